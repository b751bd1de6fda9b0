"""The closing lines of a run: its accuracy, what its running statistics consist of, and advice."""

import math
import textwrap
from typing import NamedTuple

import numpy as np

import jbn
from jbn.demo.loop import WATCHED, Result
from jbn.demo.options import Options, momentum_from_text

# The standard error of an accuracy of 98% on 360 held-out digits.
NOTICEABLE = 0.0075
FORGOTTEN = 0.01
TRAINED = 0.9
WIDTH = 110
WORST = 5


class Memory(NamedTuple):
    """The content of a moving average: the weight of the initial values, and the mean age of its batches in steps."""

    start: float
    age: float


def memory(momentum: str, updates: int) -> Memory:
    """Compute the weight of the initial values and the weighted mean age of the batches after `updates` updates."""
    if not updates:
        return Memory(start=1.0, age=0.0)
    weights = jbn.diagnostics.average_weights(momentum_from_text(momentum), updates)
    gathered = weights.batches.sum()
    age = float(np.arange(updates)[::-1] @ weights.batches / gathered) if gathered else 0.0
    return Memory(weights.start, age)


def comparison(result: Result) -> str:
    """A table of the channels whose running statistics change inference most, against the calibrated statistics."""
    if result.calibrated is None:
        return "no comparison with calibrated statistics, because they are not finite"
    table = jbn.diagnostics.compare(result.run.state, result.calibrated)
    heading = (
        "running against calibrated statistics, worst channels first: output = ratio * calibrated output + shift\n"
        "(error and shift are in standard deviations of the calibrated output)"
    )
    return f"{heading}\n{table.text(WORST)}"


def closing_lines(options: Options, result: Result) -> list[str]:
    """Accuracies, the content of the running statistics, and what to do next, as lines to print."""
    last = result.record.looks[-1]
    updates = int(np.min(result.run.state[WATCHED].count))
    held = memory(options.momentum, updates)
    made = f"{updates} update{'s' if updates != 1 else ''}"
    if updates < options.steps:
        made += f" in {options.steps} steps, because batches that are not finite update nothing"
    entries = {
        "held-out accuracy": f"{last.held_out_running:6.1%} with the running statistics (inference)",
        "": f"{last.held_out_batch:6.1%} with the batch statistics of the held-out set, as one batch",
        " ": "   -   not calibrated, because the network diverged"
        if result.held_out_calibrated is None
        else f"{result.held_out_calibrated:6.1%} with calibrated statistics (jbn.calibrate on the training set)",
        "initial values": f"{held.start:6.1%} of the weight in the running statistics belongs to mean 0 and variance 1 "
        f"(momentum {options.momentum}, {made})",
        "age of batches": f"{held.age:6.1f} steps on average; older batches come from older network weights",
        "what to do": _advice(options, result, held),
    }
    return [_wrapped(name, text) for name, text in entries.items()]


def _wrapped(name: str, text: str) -> str:
    """Lines of at most WIDTH characters; the text starts in column 20."""
    return textwrap.fill(f"{name:<20}{text}", WIDTH, subsequent_indent=" " * 20, break_on_hyphens=False)


def _advice(options: Options, result: Result, held: Memory) -> str:
    last = result.record.looks[-1]
    if not math.isfinite(last.loss):
        return "The loss is not finite. Use a lower --learning-rate."
    if last.held_out_batch < TRAINED:
        return "The network is not trained yet: even with batch statistics its accuracy is low. Train for more --steps."
    if last.held_out_batch - last.held_out_running <= NOTICEABLE:
        return "Nothing. Inference is about as accurate as with batch statistics."
    mended = result.held_out_calibrated is not None and last.held_out_batch - result.held_out_calibrated <= NOTICEABLE
    mend = " Or repair this network with jbn.calibrate." if mended else ""
    faster = f"use --momentum {1 - min(1.0, 10 / options.steps):.3g}, or train for more --steps.{mend}"
    if held.start <= FORGOTTEN:
        return f"Early batches, which come from older network weights, have too much weight. To forget them, {faster}"
    number = options.momentum.rpartition(":")[2]
    return (
        "The network is trained, but its running statistics are not accurate yet. Training does not use them, but "
        f"inference does. To remove the initial values, use --momentum warmup:{number}. To forget early batches, "
        f"{faster}"
    )
