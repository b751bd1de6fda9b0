"""The health of every norm in a tree of statistics."""

import math
import re
from typing import Any

import numpy as np

from jbn._arguments import checked_epsilon
from jbn._scheduled import checked_momentum
from jbn._statistics import nodes
from jbn._statistics.nodes import shown
from jbn.diagnostics._compare import distances, found, pairs, wide
from jbn.diagnostics._laws import checked_size
from jbn.diagnostics._table import Table

COLUMNS = ("norm", "channels", "updates", "dead", "unset", "not finite", "far", "stale", "missing")
FAULTS = ("dead", "unset", "not finite", "far", "stale", "missing")
LARGEST = 2**31 - 1
"""The updates of a norm without channels."""
FORGOTTEN = 0.01
"""A start of less weight than this no longer matters."""
BATCH_NORM = re.compile(r"batch_?norm|batch_?renorm|(^|_)bn", re.IGNORECASE)


def health(
    tree: Any,
    population: Any = None,
    *,
    momentum: float | None = None,
    epsilon: float = 1e-5,
    far: float = 0.5,
) -> Table:
    """Every norm in a tree, with how many of its channels something is wrong with.

    dead: 0 <= var <= epsilon, unset: var = -inf, not finite: anything else that is no mean and variance,
    far: error > far (see `compare`)

    Args:
        tree: any tree with statistics: states, a Linen or NNX model's, or what a checkpoint holds.
        population: a tree with the same nodes, as `jbn.calibrate` gives, or None.
        momentum: that of the norms, a number without warmup, where a norm with a count shall be stale as long as more
            than 1% of it is still the start.
        epsilon: that of the norms; a variance of no more than that is dead.
        far: the error, in standard deviations of the output, from which a channel is far from the population.

    Returns:
        Table with a row a norm: its path, channels, the fewest updates of a channel (None without a count), the four
        numbers of channels (far is None without a population), why it is stale, if so (never updated, updated less
        often than others, or still the start), and the variables that are missing, if any.

    Raises:
        TypeError: an option is no number, or a tree is traced.
        ValueError: tree or population holds no statistics, or they have other nodes or shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> import jbn
        >>> state = jbn.State(jnp.zeros(3), jnp.array([1.0, 0.0, jnp.nan]), jnp.full(3, 10.0))
        >>> print(jbn.diagnostics.health({"stem": state}))
        norm  channels  updates  dead  unset  not finite  far  stale  missing
        stem         3       10     1      0           1    -      -        -

    Source:
        jbn's own convention.
    """
    added, limit = checked_epsilon(epsilon), checked_size("far", far)
    kept = None if momentum is None else checked_momentum("momentum", momentum)
    missing = nodes.incomplete(tree, BATCH_NORM)
    forest = found(tree, "`tree`")
    counts = {path: _updates(forest.at(path)) for path in forest.nodes}
    most = max((count for count in counts.values() if count is not None), default=0)
    beside = {} if population is None else pairs(tree, population, "tree")
    rows: list[tuple[Any, ...]] = []
    for path in forest.nodes:
        fields = {field: np.asarray(value) for field, value in forest.at(path).items()}
        absent = ", ".join(missing.pop(path, [])) or None
        distant = None
        if beside:
            distant = int(np.sum(distances(*beside[path], added)[0] > limit))
        counted = _channels(fields, added)
        stale = _stale(fields, counts[path], most, kept)
        rows.append((shown(path), fields["mean"].size, counts[path], *counted, distant, stale, absent))
    rows += [(shown(path), *[None] * 7, ", ".join(absent)) for path, absent in missing.items()]
    return Table(COLUMNS, rows)


def is_faulty(row: tuple[Any, ...]) -> bool:
    """Whether something is wrong with a norm.

    any of dead, unset, not finite, far, stale, missing

    Args:
        row: a row of what `health` gives.

    Returns:
        True where one of these columns is not 0 or None.

    Raises:
        Nothing.

    Example:
        >>> import jbn
        >>> (row,) = jbn.diagnostics.health(jbn.unset(jbn.init(2)[1])).rows
        >>> jbn.diagnostics.is_faulty(row)
        True

    Source:
        jbn's own convention.
    """
    return any(row[COLUMNS.index(fault)] for fault in FAULTS)


def _updates(fields: dict[str, Any]) -> int | None:
    """The fewest updates of a channel, none if its count is not finite; averages of counts are rounded up."""
    if "count" not in fields:
        return None
    return math.ceil(np.min(np.nan_to_num(fields["count"], posinf=0.0, neginf=0.0), initial=LARGEST))


def _channels(fields: dict[str, np.ndarray], epsilon: float) -> tuple[int, int, int]:
    """How many channels are dead, unset, and not finite."""
    mean, var = (wide(fields[field]) for field in ("mean", "var"))
    if mean.shape != var.shape:
        return 0, 0, max(mean.size, var.size)
    unset = np.isneginf(var) & (mean == 0)
    wrong = ~unset & ~(np.isfinite(mean) & np.isfinite(var) & (var >= 0))
    dead = (var >= 0) & (var <= epsilon) & ~wrong
    return int(dead.sum()), int(unset.sum()), int(wrong.sum())


def _stale(fields: dict[str, np.ndarray], updates: int | None, most: int, momentum: float | None) -> str | None:
    """Why the averages are not those of the training, if they are not."""
    if fields["mean"].size and np.all(fields["mean"] == 0) and np.all(fields["var"] == 1):
        return "never updated"
    if updates is None:
        return None
    if updates < most:
        return f"{updates} of {most} updates"
    if momentum is not None and momentum**updates > FORGOTTEN:
        return f"{momentum**updates:.0%} is still the start"
    return None
