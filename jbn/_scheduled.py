"""Momentum and bounds: each a number, which is checked, or a schedule, a function from the count of updates to one."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jbn._arguments import RUNNING_VAR, check_concrete, is_number
from jbn._complex import real_dtype
from jbn._functions import as_constant


class Average(NamedTuple):
    """How the running statistics move: what of it is fixed when the program is traced."""

    schedule: Callable[[Any], Any] | None
    keeps_most: bool | None
    """Whether a number as momentum is at least 1/2; None if it is not known."""
    running_var: str


LEAST_BOUNDS = {"r_max": 1.0, "d_max": 0.0}
"""Below these, a bound of batch renormalization would allow nothing."""


def checked_momentum(name: str, momentum: Any) -> float:
    """A concrete share of the old value."""
    check_concrete(name, momentum, "0.99")
    if not is_number(momentum):
        raise TypeError(
            f"`{name}` is {momentum!r}: expected a number in [0, 1], or where a schedule is allowed a function "
            "count -> momentum, such as jbn.momentum.warmup(0.99)."
        )
    number = float(momentum)
    if not 0 <= number <= 1:
        raise ValueError(
            f"`{name}` is {number}: expected a number in [0, 1], the share of the old value to keep. "
            "PyTorch's momentum is one minus this: see jbn.momentum.from_torch."
        )
    return number


def checked_bound_number(bound: str, name: str, value: Any) -> float:
    """A concrete bound of batch renormalization, r_max or d_max, given as the argument `name`."""
    check_concrete(name, value, "3.0")
    least = LEAST_BOUNDS[bound]
    if not is_number(value):
        raise TypeError(
            f"`{name}` is {value!r}: expected a number of at least {least:g}, or where a schedule is allowed a "
            f"function count -> number, such as jbn.renorm.{bound}()."
        )
    if not float(value) >= least:
        raise ValueError(f"`{name}` is {float(value)}: expected a number of at least {least:g}; inf is no bound.")
    return float(value)


def scheduled(name: str, schedule: Any, count: Any, dtype: Any) -> jax.Array:
    """What a schedule gives at each count, which it sees as one int32 scalar; averaged counts are rounded up."""
    expected = "expected a function from the count of updates, an int32 scalar, to a number"

    def at(count: jax.Array) -> jax.Array:
        value = schedule(count)
        if not is_number(value):
            raise TypeError(f"`{name}` gives {value!r}: {expected}.")
        return jnp.asarray(value, dtype)

    for _ in range(np.ndim(count)):
        at = jax.vmap(at)
    try:
        return at(jnp.ceil(count).astype(jnp.int32))
    except TypeError as error:
        if str(error).startswith(f"`{name}`"):
            raise
        reason = str(error).partition("\n")[0]
        raise TypeError(
            f"`{name}` is {schedule!r}, which fails on a traced count ({reason}): {expected}. Write jnp.where or "
            "jax.lax.cond for `if`, and jnp for math."
        ) from error


def checked_average(momentum: Any, running_var: Any, state: Any, train: bool) -> tuple[Average, Any]:
    """What of the moving average is fixed when it is traced, and the momentum, if it is a number."""
    if not isinstance(running_var, str) or running_var not in RUNNING_VAR:
        raise ValueError(f"`running_var` is {running_var!r}: expected one of {', '.join(map(repr, RUNNING_VAR))}.")
    schedule, number = checked_schedule("momentum", momentum, real_dtype(jnp.result_type(state.mean)), checked_momentum)
    if train:
        check_counted(state, "momentum", schedule)
    keeps_most = None if schedule is not None or isinstance(number, Tracer) else bool(number >= 0.5)
    if isinstance(number, Tracer):
        number = jnp.clip(number, 0, 1)
    return Average(schedule, keeps_most, running_var), number


def checked_schedule(name: str, given: Any, dtype: Any, check: Callable[[str, Any], float]) -> tuple[Any, Any]:
    """A schedule and None, or None and a number, concrete and checked or traced."""
    if callable(given):
        if getattr(given, "__module__", "") in ("jbn.momentum", "jbn.renorm") and hasattr(given, "__code__"):
            maker = f"{given.__module__}.{given.__name__}"
            raise TypeError(f"`{name}` is {maker} itself: call it, as in {maker}(...), for a schedule or a number.")
        return as_constant(name, given), None
    if isinstance(given, Tracer):
        if given.ndim or jnp.issubdtype(given.dtype, jnp.complexfloating):
            raise TypeError(f"`{name}` is a traced {given.aval.str_short()}: expected a number, of shape ().")
        return None, jnp.asarray(given, dtype)
    return None, np.asarray(check(name, given), dtype)


def checked_bound(name: str, given: Any, state: Any, train: bool) -> tuple[Any, Any]:
    """The schedule of a bound and None, or None and the number."""
    schedule, number = checked_schedule(name, given, jnp.float32, functools.partial(checked_bound_number, name))
    if train:
        check_counted(state, name, schedule)
    return schedule, number


def bound_at(bound: str, schedule: Any, number: Any, count: Any, dtype: Any) -> jax.Array:
    """A bound of batch renormalization: the number, or what the schedule gives at the count; not below the least."""
    value = number if schedule is None else scheduled(bound, schedule, count, dtype)
    return jnp.maximum(value, LEAST_BOUNDS[bound]).astype(dtype)


def check_counted(state: Any, name: str, schedule: Any) -> None:
    """What a schedule reads is there."""
    if schedule is not None and state.count is None:
        raise ValueError(
            f"`state.count` is None, but `{name}` is a schedule of it: expected an array like `state.mean`."
        )
