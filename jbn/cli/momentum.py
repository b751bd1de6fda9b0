"""`jbn momentum`: print how accurate running statistics are for a number of steps and a batch size."""

import math
from pathlib import Path
from typing import Any

import jbn
from jbn import diagnostics
from jbn.demo.options import OptionError
from jbn.diagnostics._laws import written

MOST_STEPS = 10**7
USUAL = (0.9, 0.99, 0.999)
COLUMNS = (
    "momentum",
    "initial weight",
    "half-life",
    "batches averaged",
    "error of mean",
    "bias of var",
    "spread of var",
)

LEGEND = """initial weight: weight of the initial values (mean 0 and variance 1) in the running statistics
half-life: number of steps after which an old value keeps half of its weight
batches averaged: the plain average of this many batches has the same noise, apart from the initial values
error of mean: expected root mean square error of the running mean, in standard deviations of the data
bias, spread of var: mean and standard deviation of the error of the running variance; the data has variance 1"""


def add_parser(commands: Any) -> None:
    """Add the options of `jbn momentum`."""
    purpose = "show how accurate the running statistics are after a number of steps, and which momentum is best"
    parser = commands.add_parser("momentum", help=purpose, description=purpose)
    parser.add_argument("--steps", type=int, default=1000, help="number of updates (default: %(default)s)")
    size = "number of independent values per batch and feature (default: %(default)s)"
    parser.add_argument("--batch-size", type=int, default=32, help=size)
    distance = "distance between the initial mean and the mean of the data, in standard deviations of the data"
    parser.add_argument("--distance", type=float, default=1.0, help=f"{distance} (default: %(default)s)")
    parser.add_argument(
        "--plot", metavar="FILE", help="write a picture of the results to this file, such as momentum.png"
    )
    parser.set_defaults(run=run)


def run(given: dict[str, Any]) -> int:
    """Print the table and the advice, and draw the picture if --plot is given."""
    steps, size, distance = given["steps"], given["batch_size"], given["distance"]
    for flag, value, least in (("--steps", steps, 1), ("--batch-size", size, 1), ("--distance", distance, 0)):
        if not least <= value < math.inf:
            raise OptionError(f"{flag} is {value}: expected a finite number of at least {least}.")
    if steps > MOST_STEPS:
        raise OptionError(
            f"--steps is {steps}: expected at most {MOST_STEPS}, because the command sums over all steps."
        )
    best = diagnostics.best_momentum(steps, size, distance)
    named: dict[str, Any] = {f"{momentum:g}": momentum for momentum in USUAL}
    rounded = written(best)
    named |= {f"{rounded}, the best": best, f"warmup:{rounded}": jbn.momentum.warmup(best)}
    rows = [_row(name, momentum, steps, size, distance) for name, momentum in named.items()]
    print(f"{steps} steps of {size} values; error of the initial mean: {distance:g} standard deviations of the data\n")
    print(diagnostics.Table(COLUMNS, rows))
    print(f"\n{LEGEND}\n\n{_advice(rounded, best)}")
    if given["plot"] is not None:
        print("wrote", _draw(Path(given["plot"]), steps, size, distance, named, rounded))
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
        return "The initial mean is correct, so averaging gains nothing. Set its error with --distance."
    return (
        f"Use momentum={rounded}, or better jbn.momentum.warmup({rounded}), which gives the initial values no weight.\n"
        "These figures assume that the distribution of the data does not change. While a network learns, it does "
        "change:\nthe faster the network learns, the smaller the momentum should be. After training, "
        "jbn.calibrate replaces\nthe running statistics with population statistics."
    )


def _draw(path: Path, steps: int, size: int, distance: float, named: dict[str, Any], best: str) -> Path:
    """Draw the weight of the initial values, and the error of the running mean against the momentum."""
    from matplotlib.figure import Figure

    from jbn import plot

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    figure.suptitle(f"{steps} steps of {size} values, initial mean off by {distance:g} sd: momentum {best} is best")
    left, right = figure.subplots(1, 2)
    plot.initial_weight(steps, named, ax=left)
    around = sorted({distance / 10, distance, distance * 10} - {0.0}) or [1.0]
    plot.error_against_momentum(steps, size, distances=around, ax=right)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise OptionError(f"--plot is {path}, but no picture can be written there: {error}.") from None
    return path
