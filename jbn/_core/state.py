"""Parameters and running statistics: Params, State, their initial values, and the update of the running statistics."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbn import _arguments, _dtypes, _scheduled
from jbn._complex import cast, inner, is_finite, real_dtype
from jbn._core.moments import Moments
from jbn._core.sharing import split_as
from jbn._rule import Numbers
from jbn._scheduled import Average
from jbn.momentum import Schedule


class Params(NamedTuple):
    """Learned parameters: scale and bias per feature.

    out = xhat * scale + bias

    Attributes:
        scale: float array of the feature shape, gamma in the paper. None means 1, and is not learned.
        bias: float array of the feature shape, beta in the paper. None means 0, and is not learned.

    Example:
        >>> import jax.numpy as jnp
        >>> import jbn
        >>> jbn.Params(scale=None, bias=jnp.zeros(3)).scale is None
        True
    """

    scale: jax.Array | None
    bias: jax.Array | None


class State(NamedTuple):
    """Running statistics: mean, variance and count of updates per feature.

    Attributes:
        mean: float32 or float64 array of the feature shape; complex64 or complex128 for complex x.
        var: float32 or float64 array of the feature shape; -inf where unset (see `unset`).
        count: float32 array of the feature shape: the number of updates of each feature. It may be None if no
            schedule reads it.

    Example:
        >>> import jbn
        >>> _, state = jbn.init(3)
        >>> print(state.mean, state.var, state.count)
        [0. 0. 0.] [1. 1. 1.] [0. 0. 0.]
    """

    mean: jax.Array
    var: jax.Array
    count: Any  # pyright: ignore[reportIncompatibleMethodOverride]  hides tuple.count; optax's word for it


def init(features: int | Sequence[int], dtype: Any = jnp.float32) -> tuple[Params, State]:
    """Create parameters and running statistics: scale 1, bias 0, running mean 0, running variance 1, count 0.

    Args:
        features: the number of features, or their shape if several axes have statistics of their own.
        dtype: float32 or float64, the dtype of all arrays except `count`, which is float32. For complex x, give
            complex64 or complex128, which makes scale, bias and mean complex.

    Returns:
        Params and State. No two of their arrays share a buffer, so both can be donated.

    Raises:
        TypeError: features are not ints, or dtype is not one of these.
        ValueError: a size is negative.

    Example:
        >>> import jbn
        >>> params, state = jbn.init(64)
        >>> print(params.scale.shape, state.mean.dtype)
        (64,) float32

    Source:
        Ioffe and Szegedy, Batch Normalization, 2015; the initial values of Keras, Flax and PyTorch.
    """
    shape = _arguments.checked_features(features)
    dtype = _dtypes.checked_state_dtype("dtype", dtype)
    params = Params(scale=jnp.ones(shape, dtype), bias=jnp.zeros(shape, dtype))
    var = jnp.ones(shape, real_dtype(dtype))
    state = State(mean=jnp.zeros(shape, dtype), var=var, count=jnp.zeros(shape, jnp.float32))
    return params, state


def update(state: State, moments: Moments, *, momentum: float | Schedule = 0.99, running_var: str = "biased") -> State:
    """Update the running statistics with the moments of a batch.

    new = momentum * old + (1 - momentum) * batch

    Each feature is updated on its own. It keeps its mean, variance and count if the batch has no value for it (under
    "unbiased", fewer than two), or if the new statistics would not be finite. The batch's biased moments replace unset
    statistics. Other statistics that are not finite indicate a fault and are never replaced. A schedule that gives NaN
    updates nothing.

    Args:
        state: running statistics of the feature shape.
        moments: moments of the batch, of the same shape.
        momentum: share of the old value kept, in [0, 1], or a schedule: a function that computes this share from a
            feature's count of updates, an int32 scalar.
        running_var: the variance that is averaged: "biased" (Keras, Flax); "unbiased" (PyTorch), multiplied by
            n / (n - 1); or "total", which adds momentum * (1 - momentum) * (batch mean - old mean)**2 to the average.
            "total" includes the variance between batches. For batches of n values, it tends to the population variance
            times 1 - (1 - momentum) / (1 + momentum) / n.

    Returns:
        State with the dtypes of the old one. It carries no gradient.

    Raises:
        TypeError: the state is in half precision, an argument is not a State or Moments, or momentum is not a number.
        ValueError: momentum is outside [0, 1], running_var is unknown, or shapes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> import jbn
        >>> _, state = jbn.init(1)
        >>> state = jbn.update(state, jbn.moments(jnp.array([[0.0], [4.0]])), momentum=0.5)
        >>> print(state.mean, state.var, state.count)
        [1.] [2.5] [1.]

    Source:
        Ioffe and Szegedy, Batch Normalization, 2015, section 3.1; "total" is the law of total variance.
    """
    _arguments.check_type("state", state, State)
    _arguments.check_type("moments", moments, Moments)
    features = np.shape(state.mean)
    for name, vectors in (("state", state), ("moments", moments)):
        _arguments.check_vectors(name, vectors, features, "the shape of `state.mean`")
    _dtypes.check_state_dtype(state)
    average, weights = _scheduled.checked_average(momentum, running_var, state, True)
    return _moved(average, state, moments, Numbers(weights), True)


def moved(average: Average, old: State, batch: Moments, numbers: Numbers, may_be_empty: bool) -> State:
    """The state after a batch, per feature; `may_be_empty` says that a feature of the batch may have no valid value.

    new = momentum * old + (1 - momentum) * batch
    """
    dtype = real_dtype(jnp.result_type(old.mean))
    kinds = jnp.result_type(old.mean), dtype, dtype
    old_var = lax.convert_element_type(old.var, dtype)
    # The batch is split over devices like the state, so that a loop can carry the state.
    axes = range(old.mean.ndim)
    batch = Moments(*(split_as(cast(value, like), old.mean, axes) for value, like in zip(batch, kinds, strict=True)))
    weights = numbers.weights
    if average.schedule is not None:
        momentum = jnp.clip(_scheduled.scheduled("momentum", average.schedule, old.count, dtype), 0, 1)
        weights = momentum, 1 - momentum
    # An unset feature starts from the batch. This is selected before any arithmetic, in which -inf would give NaN.
    unset = old_var == -jnp.inf
    start_mean, start_var = lax.select(unset, batch.mean, old.mean), lax.select(unset, batch.var, old_var)
    batch_var, needed = batch.var, 1 if may_be_empty else 0
    if average.running_var == "unbiased":
        factor = batch.count / jnp.maximum(batch.count - 1, 1)
        batch_var, needed = lax.select(unset, batch.var, batch.var * factor), 2
    mean = _averaged(average, weights, start_mean, batch.mean)
    var = _averaged(average, weights, start_var, batch_var)
    if average.running_var == "total":
        step = batch.mean - start_mean
        var = var + weights[0] * weights[1] * inner(step, step)
    var = lax.convert_element_type(var, old.var.dtype)
    moves = is_finite(mean) & is_finite(var)
    moves = moves & (batch.count >= needed) if needed else moves
    count = None if old.count is None else old.count + moves.astype(old.count.dtype)
    return lax.stop_gradient(State(lax.select(moves, mean, old.mean), lax.select(moves, var, old.var), count))


_moved = jax.jit(moved, static_argnums=(0, 4), inline=True)


def _averaged(average: Average, weights: tuple[Any, Any], old: jax.Array, batch: jax.Array) -> jax.Array:
    """The weighted average of two values, as a step from the one with the larger weight, so that no digits are lost."""
    of_old, of_batch = (cast(weight, old.dtype) for weight in weights)
    if average.keeps_most is None:
        return jnp.where(weights[0] < 0.5, batch + of_old * (old - batch), old + of_batch * (batch - old))
    return old + of_batch * (batch - old) if average.keeps_most else batch + of_old * (old - batch)
