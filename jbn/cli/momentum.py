"""`jbn momentum`: what the laws of the moving average say about a number of steps and a batch size."""

import argparse
import math
from pathlib import Path
from typing import Any

import jbn
from jbn import diagnostics
from jbn.demo.options import OptionError
from jbn.diagnostics._laws import written

MOST_STEPS = 10**7
USUAL = (0.9, 0.99, 0.999)
COLUMNS = ("momentum", "start left", "half-life", "batches averaged", "error of mean", "bias of var", "spread of var")

LEGEND = """start left: weight of the initial mean 0 and variance 1
batches averaged: so many, of one weight, would be as precise
error of mean: root mean square, in standard deviations of the data
bias, spread of var: in variances of the data, which is taken to be 1"""


def add_parser(commands: Any) -> None:
    """The options of `jbn momentum`."""
    parser = commands.add_parser(
        "momentum",
        help="what the moving average holds after so many steps, for several momenta, and which is best",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=1000, help="updates made")
    parser.add_argument("--batch-size", type=int, default=32, help="independent values behind each batch's statistics")
    parser.add_argument(
        "--distance", type=float, default=1.0, help="of the initial mean from the data's, in standard deviations"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the picture into this file, as momentum.png")
    parser.set_defaults(run=run)


def run(given: dict[str, Any]) -> int:
    """Print the table and the advice, and draw the picture where it was asked for."""
    steps, size, distance = given["steps"], given["batch_size"], given["distance"]
    for flag, value, least in (("--steps", steps, 1), ("--batch-size", size, 1), ("--distance", distance, 0)):
        if not least <= value < math.inf:
            raise OptionError(f"{flag} is {value}: expected a finite number of at least {least}.")
    if steps > MOST_STEPS:
        raise OptionError(f"--steps is {steps}: expected at most {MOST_STEPS}, as schedules are summed step by step.")
    best = diagnostics.best_momentum(steps, size, distance)
    named: dict[str, Any] = {f"{momentum:g}": momentum for momentum in USUAL}
    rounded = written(best)
    named |= {f"{rounded}, the best": best, f"warmup:{rounded}": jbn.momentum.warmup(best)}
    rows = [_row(name, momentum, steps, size, distance) for name, momentum in named.items()]
    print(f"{steps} steps of {size} values, from a start that is {distance:g} standard deviations away\n")
    print(diagnostics.Table(COLUMNS, rows))
    print(f"\n{LEGEND}\n\n{_advice(rounded, best)}")
    if given["plot"] is not None:
        print("wrote", _draw(Path(given["plot"]), steps, size, distance, named))
    return 0


def _row(name: str, momentum: Any, steps: int, size: int, distance: float) -> tuple[Any, ...]:
    variance = diagnostics.expected_variance(momentum, steps, size, distance=distance)
    return (
        name,
        f"{diagnostics.initial_weight(momentum, steps):.2%}",
        None if callable(momentum) else f"{diagnostics.half_life(momentum):.1f} steps",
        f"{diagnostics.effective_batches(momentum, steps):.1f}",
        diagnostics.expected_error(momentum, steps, size, distance) ** 0.5,
        variance.bias,
        variance.spread,
    )


def _advice(rounded: str, best: float) -> str:
    if best == 1:
        return "The start is right already: nothing is gained by averaging. Give its distance by --distance."
    return (
        f"Take momentum={rounded}, or better jbn.momentum.warmup({rounded}), which leaves nothing of the start.\n"
        "The laws hold for data that stays the same. While a network learns, its older batches are out of date: the "
        "faster it\nlearns, the smaller the momentum should be, and jbn.calibrate takes the statistics anew at the end."
    )


def _draw(path: Path, steps: int, size: int, distance: float, named: dict[str, Any]) -> Path:
    """What is left of the start, and the error against the momentum."""
    from matplotlib.figure import Figure

    from jbn import plot

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot.initial_weight(steps, named, ax=left)
    around = sorted({distance / 10, distance, distance * 10} - {0.0}) or [1.0]
    plot.error_against_momentum(steps, size, distances=around, ax=right)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise OptionError(f"--plot is {path}, where no picture can be written: {error}.") from None
    return path
