"""`jbn inspect`: the health of the statistics in a checkpoint, or in a file of weights."""

import argparse
import logging
from pathlib import Path
from typing import Any

from jbn import diagnostics
from jbn.cli import weight_files
from jbn.demo.options import OptionError


def add_parser(commands: Any) -> None:
    """The options of `jbn inspect`."""
    parser = commands.add_parser(
        "inspect",
        help="the health of the statistics in a checkpoint or a file of weights, a norm a line; exit status 1 when "
        "something is wrong",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    endings = ", ".join(weight_files.READERS)
    help = f"folder that orbax wrote, file with the bytes of flax.serialization, or file of weights: {endings}"
    parser.add_argument("checkpoint", help=help)
    parser.add_argument("--population", help="checkpoint with calibrated statistics, to compare with")
    parser.add_argument("--epsilon", type=float, default=1e-5, help="that of the norms; no more variance is dead")
    parser.add_argument("--momentum", type=float, help="that of the norms, to find averages that are still the start")
    parser.add_argument(
        "--far", type=float, default=0.5, help="error, in standard deviations, that is far from the population"
    )
    picture = "draw the standard deviation of each channel, or its error against the population, into this file"
    parser.add_argument("--plot", metavar="FILE", help=picture)
    parser.set_defaults(run=run)


def run(given: dict[str, Any]) -> int:
    """Print a line a norm; 1 when something is wrong with one of them."""
    path, tree = _read("checkpoint", given["checkpoint"])
    population = None if given["population"] is None else _read("--population", given["population"])[1]
    try:
        table = diagnostics.health(
            tree, population, epsilon=given["epsilon"], far=given["far"], momentum=given["momentum"]
        )
    except ValueError as error:
        raise OptionError(f"{path}: {error}") from None
    faulty = [row for row in table.rows if diagnostics.is_faulty(row)]
    print(f"{path}\n")
    print(table.text(rows=len(table.rows)))
    listed = ", ".join(row[0] or "the norm" for row in faulty)
    print(f"\n{len(faulty)} of {len(table.rows)} norms are faulty: {listed}" if faulty else "\nnothing is wrong")
    if given["plot"] is not None:
        print("wrote", _draw(Path(given["plot"]), tree, population, given["epsilon"]))
    return 1 if faulty else 0


def _draw(path: Path, tree: Any, population: Any, epsilon: float) -> Path:
    """The picture, as wide as its norms need."""
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
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise OptionError(f"--plot is {path}, where no picture can be written: {error}.") from None
    return path


def _read(name: str, text: str) -> tuple[Path, Any]:
    """The checkpoint, or the one that it holds, or the file of weights; and its tree."""
    if (path := Path(text)).is_file() and weight_files.reads(path):
        try:
            return path, weight_files.statistics(path)
        except (ModuleNotFoundError, ValueError, OSError) as error:
            raise OptionError(f"{name} is {text}: {error}") from None
    from jbn import checkpoint

    # orbax warns of metadata that the items of a CheckpointManager do not have.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        path = checkpoint.latest(text)
        return path, checkpoint.read(path)
    except (ValueError, OSError) as error:
        raise OptionError(f"{name} is {text}: {error}") from None
