"""A check of every norm in a tree of statistics."""

import math
import re
from typing import Any

import numpy as np

from jbn._arguments import checked_epsilon, is_number
from jbn._scheduled import checked_momentum
from jbn._statistics import nodes
from jbn._statistics.nodes import shown
from jbn.diagnostics._compare import distances, found, pairs, wide
from jbn.diagnostics._laws import checked_count, checked_size
from jbn.diagnostics._table import Table

COLUMNS = ("norm", "channels", "updates", "dead", "unset", "not finite", "far", "stale", "missing")
FAULTS = ("dead", "unset", "not finite", "far", "stale", "missing")
LARGEST = 2**31 - 1
"""The number of updates of a norm without channels."""
FORGOTTEN = 0.01
"""Initial values with at most this weight do not make a norm stale."""
NO_SCHEDULE = (
    "expected a number in [0, 1]. Under warmup, debiased and cumulative the initial values have no weight, so leave it "
    "out."
)
BATCH_NORM = re.compile(r"batch_?norm|batch_?renorm|(^|_)bn", re.IGNORECASE)


def health(
    tree: Any,
    population: Any = None,
    *,
    momentum: float | None = None,
    updates: int | None = None,
    epsilon: float = 1e-5,
    far: float = 0.5,
) -> Table:
    """Report the faults of every norm in a tree, with the number of channels that have each fault.

    A channel is dead if 0 <= var <= epsilon, unset if var is -inf, not finite if mean or var has any other invalid
    value, and far if its error (see `compare`) is larger than `far`.

    Args:
        tree: any tree with statistics: states, those of a Linen or NNX model, or the contents of a checkpoint.
        population: a tree with the same nodes, as `jbn.calibrate` returns it, or None.
        momentum: momentum of the norms, if it is constant. If it is given, a norm is stale while the weight of its
            initial values is above 1%. Leave it out for schedules that give them no weight.
        updates: number of updates of the norms without a count, such as Flax's. Without it, the weight of their initial
            values is not checked.
        epsilon: epsilon of the norms; a variance of at most epsilon is dead.
        far: channels with a larger error than this, in standard deviations of the output, are far from the population.

    Returns:
        Table with one row for each norm: its path, the number of channels, the fewest updates of a channel (None
        without a count), the number of channels with each of four faults (far is None without a population), the reason
        if it is stale (it or some channels were never updated, it has fewer updates than other norms, or the initial
        values have too much weight), and the missing variables, if any.

    Raises:
        TypeError: an option is not a number, or a tree is traced.
        ValueError: a tree holds no statistics, or nodes or shapes differ.

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
    kept = None if momentum is None else _constant(momentum)
    given = None if updates is None else checked_count("updates", updates)
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
        stale = _stale(fields, counts[path], most, kept, given)
        rows.append((shown(path), fields["mean"].size, counts[path], *counted, distant, stale, absent))
    rows += [(shown(path), *[None] * 7, ", ".join(absent)) for path, absent in missing.items()]
    return Table(COLUMNS, rows)


def is_faulty(row: tuple[Any, ...]) -> bool:
    """Whether a norm has a fault.

    The faults are dead, unset, not finite, far, stale and missing.

    Args:
        row: a row of the table that `health` returns.

    Returns:
        True if one of these columns is neither 0 nor None.

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
    """The fewest updates of a channel, 0 if a count is not finite; averages of counts are rounded up."""
    if "count" not in fields:
        return None
    return math.ceil(np.min(np.nan_to_num(fields["count"], posinf=0.0, neginf=0.0), initial=LARGEST))


def _channels(fields: dict[str, np.ndarray], epsilon: float) -> tuple[int, int, int]:
    """The numbers of channels that are dead, unset and not finite."""
    mean, var = (wide(fields[field]) for field in ("mean", "var"))
    if mean.shape != var.shape:
        return 0, 0, max(mean.size, var.size)
    unset = np.isneginf(var) & (mean == 0)
    wrong = ~unset & ~(np.isfinite(mean) & np.isfinite(var) & (var >= 0))
    dead = (var >= 0) & (var <= epsilon) & ~wrong
    return int(dead.sum()), int(unset.sum()), int(wrong.sum())


def _constant(momentum: Any) -> float:
    """Check that the momentum is a concrete number in [0, 1], and no schedule."""
    if not is_number(momentum):
        raise TypeError(f"`momentum` is {momentum!r}: {NO_SCHEDULE}")
    return checked_momentum("momentum", momentum)


def _stale(
    fields: dict[str, np.ndarray], updates: int | None, most: int, momentum: float | None, given: int | None
) -> str | None:
    """The reason why the running statistics do not reflect the training, or None if they do.

    `given` is the number of updates of a norm without a count.
    """
    if fields["mean"].size and np.all(fields["mean"] == 0) and np.all(fields["var"] == 1):
        return "never updated"
    if updates is not None:
        untouched = np.sum(fields["count"] == 0)
        if 0 < untouched < np.size(fields["count"]):
            return f"{untouched} never updated"
        if updates < most:
            return f"{updates} of {most} updates"
    known = given if updates is None else updates
    if momentum is not None and known is not None and momentum**known > FORGOTTEN:
        return f"initial values weigh {momentum**known:.0%}"
    return None
