"""Schedules for `batch_renorm`: how far it may correct, as a function of the updates made so far."""

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp

from jbn._arguments import checked_bound
from jbn.momentum import Schedule


def r_max(limit: float = 3.0, *, begin: int = 5_000, end: int = 40_000) -> Schedule:
    """The bound of the ratio r: 1, which is batch norm, until `begin`, then linearly up to `limit` at `end`.

    r_max(t) = 1 + (limit - 1) * clip((t - begin) / (end - begin), 0, 1).

    Args:
        limit: the bound from `end` on, at least 1. The defaults are those that were published.
        begin: updates until the bound begins to rise.
        end: updates until it has reached the limit, more than `begin`.

    Returns:
        Schedule from the count of updates so far, an int32 scalar, to a bound, a float scalar.

    Raises:
        TypeError: something that is no number.
        ValueError: limit is below 1 or not finite, or not 0 <= begin < end.

    Example:
        >>> import jbn
        >>> schedule = jbn.renorm.r_max(3.0, begin=100, end=300)
        >>> print(schedule(100), schedule(200), schedule(1000))
        1.0 2.0 3.0

    Source:
        Ioffe, Batch Renormalization, 2017, section 4.2.
    """
    return _ramp(1.0, _checked_limit("r_max", limit), begin, end)


def d_max(limit: float = 5.0, *, begin: int = 5_000, end: int = 25_000) -> Schedule:
    """The bound of the shift d: 0, which is batch norm, until `begin`, then linearly up to `limit` at `end`.

    d_max(t) = limit * clip((t - begin) / (end - begin), 0, 1).

    Args:
        limit: the bound from `end` on, at least 0. The defaults are those that were published.
        begin: updates until the bound begins to rise.
        end: updates until it has reached the limit, more than `begin`.

    Returns:
        Schedule from the count of updates so far, an int32 scalar, to a bound, a float scalar.

    Raises:
        TypeError: something that is no number.
        ValueError: limit is below 0 or not finite, or not 0 <= begin < end.

    Example:
        >>> import jbn
        >>> schedule = jbn.renorm.d_max(5.0, begin=100, end=300)
        >>> print(schedule(100), schedule(200), schedule(1000))
        0.0 2.5 5.0

    Source:
        Ioffe, Batch Renormalization, 2017, section 4.2.
    """
    return _ramp(0.0, _checked_limit("d_max", limit), begin, end)


def _checked_limit(name: str, limit: Any) -> float:
    value = checked_bound(name, limit, "limit")
    if math.isinf(value):
        raise ValueError(f"`limit` is {value}: expected a finite number. For no bound give {name}={value}.")
    return value


def _ramp(start: float, limit: float, begin: Any, end: Any) -> Schedule:
    try:
        first, last = operator.index(begin), operator.index(end)
    except TypeError:
        raise TypeError(f"`begin` is {begin!r} and `end` {end!r}: expected counts of updates, ints.") from None
    if not 0 <= first < last:
        raise ValueError(f"`begin` is {first} and `end` {last}: expected 0 <= begin < end, counts of updates.")

    def schedule(count: Any) -> jax.Array:
        passed = jnp.asarray(count).astype(jnp.result_type(float)) - first
        return start + (limit - start) * jnp.clip(passed / (last - first), 0, 1)

    return schedule
