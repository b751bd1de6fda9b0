"""`jbn inspect`: the health of the statistics in a checkpoint."""

import argparse
import logging
from pathlib import Path
from typing import Any

from jbn import diagnostics
from jbn.demo.options import OptionError


def add_parser(commands: Any) -> None:
    """The options of `jbn inspect`."""
    parser = commands.add_parser(
        "inspect",
        help="the health of the statistics in a checkpoint of orbax or flax, a norm a line; exit status 1 when "
        "something is wrong",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("checkpoint", help="folder that orbax wrote, or file with the bytes of flax.serialization")
    parser.add_argument("--population", help="checkpoint with calibrated statistics, to compare with")
    parser.add_argument("--epsilon", type=float, default=1e-5, help="that of the norms; no more variance is dead")
    parser.add_argument("--momentum", type=float, help="that of the norms, to find averages that are still the start")
    parser.add_argument(
        "--far", type=float, default=0.5, help="error, in standard deviations, that is far from the population"
    )
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
    return 1 if faulty else 0


def _read(name: str, text: str) -> tuple[Path, Any]:
    """The checkpoint, or the one that it holds, and its tree."""
    from jbn import checkpoint

    # orbax warns of metadata that the items of a CheckpointManager do not have.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        path = checkpoint.latest(text)
        return path, checkpoint.read(path)
    except (ValueError, OSError) as error:
        raise OptionError(f"{name} is {text}: {error}") from None
