"""The closing lines of a run: how good it is, what its running statistics hold, and what to do about it."""

import math
import textwrap
from typing import NamedTuple

import numpy as np

import jbn
from jbn.demo.loop import WATCHED, Result
from jbn.demo.options import Options, momentum_from_text

# One standard error of an accuracy of 98% on 360 held-out digits.
NOTICEABLE = 0.0075
FORGOTTEN = 0.01
TRAINED = 0.9
WIDTH = 110
WORST = 5


class Memory(NamedTuple):
    """What a moving average is made of after a run: the start's weight, and the mean age of its batches in steps."""

    start: float
    age: float


def memory(momentum: str, updates: int) -> Memory:
    """The weights of a moving average: the start keeps the product of all momenta, a batch those after its own."""
    if not updates:
        return Memory(start=1.0, age=0.0)
    weights = jbn.diagnostics.average_weights(momentum_from_text(momentum), updates)
    gathered = weights.batches.sum()
    age = float(np.arange(updates)[::-1] @ weights.batches / gathered) if gathered else 0.0
    return Memory(weights.start, age)


def comparison(result: Result) -> str:
    """The channels whose running statistics do most to inference, beside the calibrated ones."""
    if result.calibrated is None:
        return "no comparison with calibrated statistics: they are not finite"
    table = jbn.diagnostics.compare(result.run.state, result.calibrated)
    heading = "running against calibrated statistics, the worst channels, output = ratio * right output + shift"
    return f"{heading}\n{table.text(WORST)}"


def closing_lines(options: Options, result: Result) -> list[str]:
    """Lines that a person can act on."""
    last = result.record.looks[-1]
    updates = int(np.min(result.run.state[WATCHED].count))
    held = memory(options.momentum, updates)
    made = f"{updates} update{'s' if updates != 1 else ''}"
    if updates < options.steps:
        made += f" in {options.steps} steps: values that are not finite leave the statistics alone"
    entries = {
        "held-out accuracy": f"{last.held_out_running:6.1%} with the running statistics (inference)",
        "": f"{last.held_out_batch:6.1%} with the held-out set's own statistics, as one batch",
        " ": "   -   the network diverged and cannot be calibrated"
        if result.held_out_calibrated is None
        else f"{result.held_out_calibrated:6.1%} calibrated: with the training set's statistics, by jbn.calibrate",
        "start's weight": f"{held.start:6.1%} of the running statistics is still the initial mean 0 and variance 1 "
        f"(momentum {options.momentum}, {made})",
        "batches' age": f"{held.age:6.1f} steps on average: older batches were made by other weights",
        "what to do": _advice(options, result, held),
    }
    return [_wrapped(name, text) for name, text in entries.items()]


def _wrapped(name: str, text: str) -> str:
    """A named line of at most WIDTH characters, its continuation under its text."""
    return textwrap.fill(f"{name:<20}{text}", WIDTH, subsequent_indent=" " * 20, break_on_hyphens=False)


def _advice(options: Options, result: Result, held: Memory) -> str:
    last = result.record.looks[-1]
    if not math.isfinite(last.loss):
        return "The loss is not finite: lower --learning-rate."
    if last.held_out_batch < TRAINED:
        return "The network itself is not trained yet, whichever statistics it uses: train for more --steps."
    if last.held_out_batch - last.held_out_running <= NOTICEABLE:
        return "Nothing: inference keeps what training reached."
    mended = result.held_out_calibrated is not None and last.held_out_batch - result.held_out_calibrated <= NOTICEABLE
    mend = " jbn.calibrate mends this network as it is." if mended else ""
    faster = (
        f"forget them faster with --momentum {1 - min(1.0, 10 / options.steps):.3g}, or train for more --steps.{mend}"
    )
    if held.start <= FORGOTTEN:
        return f"Nothing is left of the start; what remains is early batches, which other weights made: {faster}"
    number = options.momentum.rpartition(":")[2]
    return (
        "The network is trained, its running statistics are not: training never sees them, inference depends on "
        f"nothing else. Remove the start's weight with --momentum warmup:{number}. Early batches remain: {faster}"
    )
