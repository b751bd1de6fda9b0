"""Momentum schedules: the share of the old running statistics to keep, as a function of the count of updates."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jbn._arguments import is_number
from jbn._scheduled import checked_momentum, checked_schedule, scheduled

Schedule = Callable[[Any], Any]


def cumulative() -> Schedule:
    """Schedule for the plain average of all batches: equal weights, and no weight for the initial values.

    momentum(t) = t / (t + 1)

    Returns:
        Schedule: a function from the count of updates so far (an int32 scalar) to a momentum (a float scalar).

    Raises:
        Nothing.

    Example:
        >>> import jbn
        >>> schedule = jbn.momentum.cumulative()
        >>> print(schedule(0), schedule(3))
        0.0 0.75

    Source:
        PyTorch, BatchNorm with momentum=None.
    """

    return _Cumulative()


def warmup(momentum: float) -> Schedule:
    """Schedule for the plain average of the first 1 / (1 - momentum) batches, and the moving average afterwards.

    momentum(t) = min(momentum, t / (t + 1))

    Args:
        momentum: share of the old value kept after the warmup, in [0, 1].

    Returns:
        Schedule: a function from the count of updates so far (an int32 scalar) to a momentum (a float scalar).

    Raises:
        TypeError: momentum is not a number.
        ValueError: momentum is not in [0, 1].

    Example:
        >>> import jbn
        >>> schedule = jbn.momentum.warmup(0.75)
        >>> print(schedule(0), schedule(1), schedule(100))
        0.0 0.5 0.75

    Source:
        Abadi et al., TensorFlow: tf.train.ExponentialMovingAverage with num_updates, which uses (1 + t) / (10 + t).
    """
    return _Warmup(checked_momentum("momentum", momentum))


def debiased(momentum: float) -> Schedule:
    """Schedule for the moving average without the weight of the initial values, as in Adam's bias correction.

    momentum(t) = m * (1 - m**t) / (1 - m**(t + 1))

    The running statistics are then the moving average divided by the total weight of its batches. The schedule is
    precise for m near 1.

    Args:
        momentum: m, in [0, 1].

    Returns:
        Schedule: a function from the count of updates so far (an int32 scalar) to a momentum (a float scalar).

    Raises:
        TypeError: momentum is not a number.
        ValueError: momentum is not in [0, 1].

    Example:
        >>> import jbn
        >>> schedule = jbn.momentum.debiased(0.5)
        >>> print(f"{schedule(0):.4f} {schedule(1):.4f} {schedule(100):.4f}")
        0.0000 0.3333 0.5000

    Source:
        Kingma and Ba, Adam, 2015, section 3.
    """
    return _Debiased(checked_momentum("momentum", momentum))


def per_microbatch(momentum: float, microbatches: int) -> float:
    """Momentum for one update per microbatch that keeps as much of the old value as one update per batch.

    result = momentum**(1 / microbatches)

    Args:
        momentum: share of the old value kept at the update for a full batch, in [0, 1].
        microbatches: number of microbatches in a batch, an int of at least 1.

    Returns:
        The share of the old value to keep at the update for a microbatch.

    Raises:
        TypeError: momentum is not a number.
        ValueError: momentum is not in [0, 1], or microbatches is not an int of at least 1.

    Example:
        >>> import jbn
        >>> jbn.momentum.per_microbatch(0.81, 2)
        0.9

    Source:
        (momentum ** (1/k)) ** k = momentum.
    """
    kept = checked_momentum("momentum", momentum)
    if not isinstance(microbatches, int) or microbatches < 1:
        raise ValueError(f"`microbatches` is {microbatches!r}: expected an int of at least 1.")
    return kept ** (1 / microbatches)


def from_torch(momentum: float | None) -> float | Schedule:
    """Convert PyTorch's momentum, which is the share of the new value, to jbn's, which is the share of the old value.

    result = 1 - momentum

    None, which means a cumulative average in PyTorch, gives `cumulative()`.

    Args:
        momentum: PyTorch's `momentum`, in [0, 1], or None.

    Returns:
        A momentum for `batch_norm`.

    Raises:
        TypeError: momentum is not a number.
        ValueError: momentum is not in [0, 1].

    Example:
        >>> import jbn
        >>> jbn.momentum.from_torch(0.1)
        0.9

    Source:
        PyTorch, BatchNorm: running = (1 - momentum) * running + momentum * batch.
    """
    if momentum is None:
        return cumulative()
    if is_number(momentum) and not 0 <= float(momentum) <= 1:
        raise ValueError(
            f"`momentum` is {momentum}: expected PyTorch's momentum in [0, 1], the share of the new value."
        )
    return 1 - checked_momentum("momentum", momentum)


def at(momentum: Any, count: jax.Array, dtype: Any) -> jax.Array:
    """Evaluate a momentum, which is a number or a schedule, at a count of updates.

    result = clip(momentum(count), 0, 1)

    A concrete number outside [0, 1] raises an error instead.

    Args:
        momentum: a number, or a schedule: a function from the count of updates so far to a number.
        count: the number of updates so far, an int32 scalar.
        dtype: dtype of the result, float32 or float64.

    Returns:
        Scalar array in [0, 1].

    Raises:
        TypeError: momentum is neither a number nor a function that returns a scalar.
        ValueError: momentum is a number outside [0, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> import jbn
        >>> print(jbn.momentum.at(jbn.momentum.warmup(0.9), jnp.int32(1), jnp.float32))
        0.5

    Source:
        jbn's own convention.
    """
    schedule, number = checked_schedule("momentum", momentum, dtype, checked_momentum)
    if schedule is not None:
        number = scheduled("momentum", schedule, count, dtype)
    return jnp.clip(number, 0, 1)


@dataclasses.dataclass(frozen=True)
class _Cumulative:
    def __call__(self, count: Any) -> jax.Array:
        t = _as_float(count)
        return t / (t + 1)

    def __repr__(self) -> str:
        return "jbn.momentum.cumulative()"


@dataclasses.dataclass(frozen=True)
class _Warmup:
    momentum: float

    def __call__(self, count: Any) -> jax.Array:
        return jnp.minimum(self.momentum, _Cumulative()(count))

    def __repr__(self) -> str:
        return f"jbn.momentum.warmup({self.momentum})"


@dataclasses.dataclass(frozen=True)
class _Debiased:
    momentum: float

    def __call__(self, count: Any) -> jax.Array:
        t = _as_float(count)
        if self.momentum == 0:
            return jnp.zeros_like(t)
        if self.momentum == 1:
            return t / (t + 1)
        log = math.log(self.momentum)
        return self.momentum * jnp.expm1(t * log) / jnp.expm1((t + 1) * log)

    def __repr__(self) -> str:
        return f"jbn.momentum.debiased({self.momentum})"


def _as_float(count: Any) -> jax.Array:
    return jnp.asarray(count).astype(jnp.result_type(float))
