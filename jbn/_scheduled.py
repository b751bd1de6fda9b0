"""Momentum and bounds of batch renormalization: numbers, or schedules, which are functions of the count of updates."""

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
    """How the running statistics are updated: everything that is fixed when the program is traced."""

    schedule: Callable[[Any], Any] | None
    keeps_most: bool | None
    """Whether the momentum is at least 1/2; None if it is traced or a schedule."""
    running_var: str


LEAST_BOUNDS = {"r_max": 1.0, "d_max": 0.0}
"""At these bounds, batch renormalization is batch norm; smaller ones are invalid."""


def checked_momentum(name: str, momentum: Any) -> float:
    """Check that a momentum is a concrete number in [0, 1]."""
    check_concrete(name, momentum, "0.99")
    if not is_number(momentum):
        raise TypeError(
            f"`{name}` is {momentum!r}: expected a number in [0, 1] or, where a schedule is allowed, a function "
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
    """Check the argument `name`, a concrete number for `bound`, which is r_max or d_max."""
    check_concrete(name, value, "3.0")
    least = LEAST_BOUNDS[bound]
    if not is_number(value):
        raise TypeError(
            f"`{name}` is {value!r}: expected a number of at least {least:g} or, where a schedule is allowed, a "
            f"function count -> number, such as jbn.renorm.{bound}()."
        )
    if not float(value) >= least:
        raise ValueError(f"`{name}` is {float(value)}: expected a number of at least {least:g}; inf means no bound.")
    return float(value)


def scheduled(name: str, schedule: Any, count: Any, dtype: Any) -> jax.Array:
    """The values of a schedule at each count, which it gets as an int32 scalar; fractional counts are rounded up."""
    expected = "expected a function from the count of updates, an int32 scalar, to a number"

    def at(count: jax.Array) -> jax.Array:
        value = schedule(count)
        if not is_number(value):
            raise TypeError(f"`{name}` returns {value!r}: {expected}.")
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
            f"`{name}` is {schedule!r}, which fails on a traced count ({reason}): {expected}. Use jnp.where or "
            "jax.lax.cond instead of `if`, and jnp instead of math."
        ) from error


def checked_average(momentum: Any, running_var: Any, state: Any, train: bool) -> tuple[Average, Any]:
    """Check momentum and running_var; return the Average, and for a number the weights (momentum, 1 - momentum)."""
    if not isinstance(running_var, str) or running_var not in RUNNING_VAR:
        raise ValueError(f"`running_var` is {running_var!r}: expected one of {', '.join(map(repr, RUNNING_VAR))}.")
    schedule, number = checked_schedule("momentum", momentum, real_dtype(jnp.result_type(state.mean)), checked_momentum)
    if train:
        check_counted(state, "momentum", schedule)
    if schedule is not None:
        return Average(schedule, None, running_var), None
    if isinstance(number, Tracer):
        number = jnp.clip(number, 0, 1)
        return Average(None, None, running_var), (number, 1 - number)
    # Subtracted in double precision: in float32, 1 - 0.9999 is off by 2e-4 of itself.
    weights = number, np.asarray(1 - float(momentum), number.dtype)
    return Average(None, bool(number >= 0.5), running_var), weights


def checked_schedule(name: str, given: Any, dtype: Any, check: Callable[[str, Any], float]) -> tuple[Any, Any]:
    """Return (schedule, None) or (None, number); concrete numbers are checked by `check`."""
    if callable(given):
        if getattr(given, "__module__", "") in ("jbn.momentum", "jbn.renorm") and hasattr(given, "__code__"):
            maker = f"{given.__module__}.{given.__name__}"
            raise TypeError(f"`{name}` is the function {maker} itself: call it, as in {maker}(...).")
        return as_constant(name, given), None
    if isinstance(given, Tracer):
        if given.ndim or jnp.issubdtype(given.dtype, jnp.complexfloating):
            raise TypeError(f"`{name}` is a traced {given.aval.str_short()}: expected a number, of shape ().")
        return None, jnp.asarray(given, dtype)
    return None, np.asarray(check(name, given), dtype)


def checked_bound(name: str, given: Any, state: Any, train: bool) -> tuple[Any, Any]:
    """Check a bound; return (schedule, None) or (None, number)."""
    dtype = real_dtype(jnp.result_type(state.mean))
    schedule, number = checked_schedule(name, given, dtype, functools.partial(checked_bound_number, name))
    if train:
        check_counted(state, name, schedule)
    return schedule, number


def bound_at(bound: str, schedule: Any, number: Any, count: Any, dtype: Any) -> jax.Array:
    """A bound of batch renormalization: the number, or the schedule's value at the count, at least LEAST_BOUNDS."""
    value = number if schedule is None else scheduled(bound, schedule, count, dtype)
    return jnp.maximum(value, LEAST_BOUNDS[bound]).astype(dtype)


def check_counted(state: Any, name: str, schedule: Any) -> None:
    """Check that the state has a count if a schedule reads it."""
    if schedule is not None and state.count is None:
        raise ValueError(
            f"`state.count` is None, but `{name}` is a schedule, which reads it: expected an array like `state.mean`."
        )
