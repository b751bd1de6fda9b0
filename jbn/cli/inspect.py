"""`jbn inspect`: check the running statistics in a checkpoint or a file of weights."""

import logging
from pathlib import Path
from typing import Any

from jbn import diagnostics
from jbn.cli import weight_files
from jbn.demo.options import OptionError
from jbn.diagnostics._health import NO_SCHEDULE

NO_COUNT = (
    "not checked: the weight of the initial values, because these norms have no count of updates (Flax stores none). "
    "Pass --updates N."
)


def add_parser(commands: Any) -> None:
    """Add the options of `jbn inspect`."""
    purpose = (
        "check the running statistics in a checkpoint or a file of weights, and print one line per norm; "
        "the exit status is 1 if a norm is faulty"
    )
    parser = commands.add_parser("inspect", help=purpose, description=purpose)
    endings = ", ".join(weight_files.READERS)
    checkpoint = f"orbax folder, file written with flax.serialization.to_bytes, or file of weights ({endings})"
    parser.add_argument("checkpoint", help=checkpoint)
    parser.add_argument("--population", help="checkpoint with calibrated statistics to compare with")
    epsilon = "epsilon of the norms; channels with a variance of at most epsilon are dead (default: %(default)s)"
    parser.add_argument("--epsilon", type=float, default=1e-5, help=epsilon)
    momentum = "momentum of the norms; norms whose initial values still have a weight above 1%% are stale"
    parser.add_argument("--momentum", help=momentum)
    updates = "number of updates of the norms without a count, such as Flax's, to judge them with --momentum"
    parser.add_argument("--updates", type=int, metavar="N", help=updates)
    far = "channels with a larger error than this, in standard deviations, are far from the population"
    parser.add_argument("--far", type=float, default=0.5, help=f"{far} (default: %(default)s)")
    picture = "write a picture to this file: the standard deviation of each channel, or its error with --population"
    parser.add_argument("--plot", metavar="FILE", help=picture)
    parser.set_defaults(run=run)


def run(given: dict[str, Any]) -> int:
    """Print one line per norm; return 1 if a norm is faulty."""
    path, tree = _read("checkpoint", given["checkpoint"])
    population = None if given["population"] is None else _read("--population", given["population"])[1]
    momentum = None if given["momentum"] is None else _number(given["momentum"])
    options = {name: given[name] for name in ("updates", "epsilon", "far")}
    try:
        table = diagnostics.health(tree, population, momentum=momentum, **options)
    except ValueError as error:
        raise OptionError(f"{path}: {error}") from None
    faulty = [row for row in table.rows if diagnostics.is_faulty(row)]
    print(f"{path}\n")
    print(table.text(rows=len(table.rows)))
    # A row without channels is of a norm without statistics.
    uncounted = any(channels is not None and updates is None for _, channels, updates, *_ in table.rows)
    left = []
    if momentum is None:
        left.append("initial values (--momentum)")
    elif uncounted and given["updates"] is None:
        left.append("initial values (--updates)")
        print(f"\n{NO_COUNT}")
    if population is None:
        left.append("distance from the population (--population)")
    print(f"\n{_summary(table, faulty, left)}")
    if given["plot"] is not None:
        print("wrote", _draw(Path(given["plot"]), tree, population, given["epsilon"]))
    return 1 if faulty else 0


def _summary(table: diagnostics.Table, faulty: list[tuple[Any, ...]], left: list[str]) -> str:
    """The faulty norms, or the checks that are left because an option was not given."""
    if faulty:
        listed = ", ".join(row[0] or "the norm" for row in faulty)
        return f"{len(faulty)} of {len(table.rows)} norms are faulty: {listed}"
    return f"no fault found; not checked: {', '.join(left)}" if left else "no fault found"


def _number(momentum: str) -> float:
    try:
        return float(momentum)
    except ValueError:
        raise OptionError(f"--momentum is {momentum}: {NO_SCHEDULE}") from None


def _draw(path: Path, tree: Any, population: Any, epsilon: float) -> Path:
    """Draw the picture; its width grows with the number of norms."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    from jbn import plot

    figure, ax = pyplot.subplots(figsize=(max(6, 0.4 * len(diagnostics.health(tree).rows)), 4.5), layout="constrained")
    if population is None:
        plot.standard_deviations(tree, ax=ax)
    else:
        plot.running_against_population(tree, population, epsilon=epsilon, ax=ax)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise OptionError(f"--plot is {path}, but no picture can be written there: {error}.") from None
    return path


def _read(name: str, text: str) -> tuple[Path, Any]:
    """The path and the tree of a checkpoint, of the latest checkpoint in a folder, or of a file of weights."""
    if (path := Path(text)).is_file() and weight_files.reads(path):
        try:
            return path, weight_files.statistics(path)
        except (ModuleNotFoundError, ValueError, OSError) as error:
            raise OptionError(f"{name} is {text}: {error}") from None
    from jbn import checkpoint

    # orbax logs a warning about missing metadata for the items of a CheckpointManager.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        path = checkpoint.latest(text)
        return path, checkpoint.read(path)
    except (ValueError, OSError) as error:
        raise OptionError(f"{name} is {text}: {error}") from None
