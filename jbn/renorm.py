"""Schedules for the bounds of the correction in `batch_renorm`, as functions of the count of updates."""

import dataclasses
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp

from jbn._scheduled import LEAST_BOUNDS, checked_bound_number
from jbn.momentum import Schedule


def r_max(limit: float = 3.0, *, begin: int = 5_000, end: int = 40_000) -> Schedule:
    """Schedule for the bound of r: 1, which is batch norm, until `begin`, then a linear rise to `limit` at `end`.

    r_max(t) = 1 + (limit - 1) * clip((t - begin) / (end - begin), 0, 1)

    Args:
        limit: the bound from `end` on, at least 1. The default values are those of the paper.
        begin: count of updates at which the bound begins to rise.
        end: count of updates at which the bound reaches the limit, more than `begin`.

    Returns:
        Schedule: a function from the count of updates so far (an int32 scalar) to a bound (a float scalar).

    Raises:
        TypeError: an argument is not a number.
        ValueError: limit is below 1 or not finite, or 0 <= begin < end does not hold.

    Example:
        >>> import jbn
        >>> schedule = jbn.renorm.r_max(3.0, begin=100, end=300)
        >>> print(schedule(100), schedule(200), schedule(1000))
        1.0 2.0 3.0

    Source:
        Ioffe, Batch Renormalization, 2017, section 4.2.
    """
    return _Ramp("r_max", _checked_limit("r_max", limit), *_checked_ends(begin, end))


def d_max(limit: float = 5.0, *, begin: int = 5_000, end: int = 25_000) -> Schedule:
    """Schedule for the bound of d: 0, which is batch norm, until `begin`, then a linear rise to `limit` at `end`.

    d_max(t) = limit * clip((t - begin) / (end - begin), 0, 1)

    Args:
        limit: the bound from `end` on, at least 0. The default values are those of the paper.
        begin: count of updates at which the bound begins to rise.
        end: count of updates at which the bound reaches the limit, more than `begin`.

    Returns:
        Schedule: a function from the count of updates so far (an int32 scalar) to a bound (a float scalar).

    Raises:
        TypeError: an argument is not a number.
        ValueError: limit is below 0 or not finite, or 0 <= begin < end does not hold.

    Example:
        >>> import jbn
        >>> schedule = jbn.renorm.d_max(5.0, begin=100, end=300)
        >>> print(schedule(100), schedule(200), schedule(1000))
        0.0 2.5 5.0

    Source:
        Ioffe, Batch Renormalization, 2017, section 4.2.
    """
    return _Ramp("d_max", _checked_limit("d_max", limit), *_checked_ends(begin, end))


def _checked_limit(name: str, limit: Any) -> float:
    value = checked_bound_number(name, "limit", limit)
    if math.isinf(value):
        raise ValueError(f"`limit` is {value}: expected a finite number. For no bound, pass {name}={value}.")
    return value


def _checked_ends(begin: Any, end: Any) -> tuple[int, int]:
    try:
        first, last = operator.index(begin), operator.index(end)
    except TypeError:
        raise TypeError(f"`begin` is {begin!r} and `end` {end!r}: expected counts of updates, ints.") from None
    if not 0 <= first < last:
        raise ValueError(f"`begin` is {first} and `end` {last}: expected 0 <= begin < end, counts of updates.")
    return first, last


@dataclasses.dataclass(frozen=True)
class _Ramp:
    """A bound that rises linearly from the one in LEAST_BOUNDS."""

    name: str
    limit: float
    begin: int
    end: int

    def __call__(self, count: Any) -> jax.Array:
        start = LEAST_BOUNDS[self.name]
        # As floats, because JAX takes no int beyond int32.
        passed = jnp.asarray(count).astype(jnp.result_type(float)) - float(self.begin)
        return start + (self.limit - start) * jnp.clip(passed / float(self.end - self.begin), 0, 1)

    def __repr__(self) -> str:
        return f"jbn.renorm.{self.name}({self.limit}, begin={self.begin}, end={self.end})"
