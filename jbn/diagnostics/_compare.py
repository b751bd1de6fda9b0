"""Comparison of running and population statistics, by the effect of their difference on inference."""

from typing import Any

import numpy as np
from jax.core import Tracer

from jbn._arguments import checked_epsilon
from jbn._complex import is_complex
from jbn._statistics import nodes
from jbn._statistics.nodes import Forest, Path, shown
from jbn.diagnostics._table import Table

COLUMNS = ("norm", "channel", "error", "shift", "ratio", "mean", "population mean", "var", "population var")


def compare(state: Any, population: Any, *, epsilon: float = 1e-5) -> Table:
    """Compare running and population statistics by their effect on the normalized output of each channel.

    output = ratio * population_output + shift
    ratio = sqrt((population_var + epsilon) / (var + epsilon))
    shift = (population_mean - mean) / sqrt(var + epsilon)
    error = sqrt(shift**2 + (ratio - 1)**2)

    The output with population statistics has mean 0 and standard deviation 1. Error, shift and ratio are in units of
    that standard deviation. The error is the root mean square error of the output.

    Args:
        state: a tree of running statistics, of any kind that `jbn.calibrate` accepts.
        population: a tree with the same nodes, as `jbn.calibrate` returns it.
        epsilon: epsilon of the norms.

    Returns:
        Table with one row for each channel, worst first: the path of the norm, the channel (its indices if there are
        several axes), error, shift, ratio, and the four statistics. The error is inf if statistics are unset or not
        finite.

    Raises:
        TypeError: epsilon is not a number, or a tree is traced.
        ValueError: a tree holds no statistics, or nodes or shapes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> import jbn
        >>> state = jbn.State(jnp.array([0.0, 1.0]), jnp.array([1.0, 4.0]), jnp.full(2, 10.0))
        >>> population = jbn.State(jnp.array([3.0, 1.0]), jnp.array([1.0, 4.0]), jnp.full(2, 10.0))
        >>> for row in jbn.diagnostics.compare(state, population).rows:
        ...     print(row[1], f"error {row[2]:.3f} shift {row[3]:.3f} ratio {row[4]:.3f}")
        0 error 3.000 shift 3.000 ratio 1.000
        1 error 0.000 shift 0.000 ratio 1.000

    Source:
        ratio and shift are r and d of Ioffe, Batch Renormalization, 2017, with the population in place of the batch.
    """
    added = checked_epsilon(epsilon)
    rows = [row for path, pair in pairs(state, population).items() for row in _rows(path, *pair, added)]
    rows.sort(key=lambda row: -row[2])
    return Table(COLUMNS, rows)


def found(tree: Any, name: str) -> Forest:
    """The nodes of a tree, which must not be traced."""
    forest = nodes.find(tree, name)
    if any(isinstance(leaf, Tracer) for leaf in forest.leaves):
        raise TypeError(f"{name} is traced, but diagnostics are computed on the host: call them outside of jit.")
    return forest


Pair = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]


def pairs(state: Any, population: Any, name: str = "state") -> dict[Path, Pair]:
    """Running and population statistics of each node, in double precision."""
    running, right = found(state, f"`{name}`"), found(population, "`population`")
    alone = {shown(path) for path in running.nodes} ^ {shown(path) for path in right.nodes}
    if alone:
        listed = ", ".join(map(repr, sorted(alone)))
        raise ValueError(
            f"`{name}` and `population` hold different norms: expected the same, but only one of them has {listed}."
        )
    by_name = {shown(path): path for path in right.nodes}
    beside: dict[Path, Pair] = {}
    for path in running.nodes:
        pair = tuple(
            {field: wide(value) for field, value in tree.at(at).items() if field != "count"}
            for tree, at in ((running, path), (right, by_name[shown(path)]))
        )
        shapes = [value.shape for fields in pair for value in fields.values()]
        if len(set(shapes)) > 1:
            raise ValueError(
                f"`{name}` and `population` have statistics of shapes {shapes} at {shown(path) or 'the root'}: "
                "expected one shape."
            )
        beside[path] = (pair[0], pair[1])
    return beside


def wide(value: Any) -> np.ndarray:
    """The value in double precision."""
    return np.asarray(value).astype(np.complex128 if is_complex(value) else np.float64)


def distances(running: dict[str, np.ndarray], right: dict[str, np.ndarray], epsilon: float) -> tuple[np.ndarray, ...]:
    """Error, shift and ratio of each channel."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        shift = (right["mean"] - running["mean"]) / np.sqrt(running["var"] + epsilon)
        shift = np.abs(shift) if is_complex(shift) else shift
        ratio = np.sqrt((right["var"] + epsilon) / (running["var"] + epsilon))
        error = np.hypot(shift, ratio - 1)
    usable = np.isfinite(running["var"]) & np.isfinite(right["var"]) & np.isfinite(error)
    return np.where(usable, error, np.inf), shift, ratio


def _rows(path: Path, running: dict[str, np.ndarray], right: dict[str, np.ndarray], epsilon: float) -> list[tuple]:
    columns = (*distances(running, right, epsilon), running["mean"], right["mean"], running["var"], right["var"])
    places = np.ndindex(running["mean"].shape)
    values = zip(*(column.ravel().tolist() for column in columns), strict=True)
    return [
        (shown(path), place[0] if len(place) == 1 else place, *row) for place, row in zip(places, values, strict=True)
    ]
