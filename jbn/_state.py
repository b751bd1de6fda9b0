"""What is learned and what is remembered: Params, State, their start, and the update of the running statistics."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from jbn import _arguments, _nodes
from jbn import momentum as momentum_schedules
from jbn._moments import Moments
from jbn.momentum import Schedule


class Params(NamedTuple):
    """What is learned: out = xhat * scale + bias.

    Attributes:
        scale: float array of the feature shape, gamma in the equations; None is 1, not learned.
        bias: float array of the feature shape, beta in the equations; None is 0, not learned.

    Example:
        >>> import jax.numpy as jnp
        >>> import jbn
        >>> jbn.Params(scale=None, bias=jnp.zeros(3)).scale is None
        True
    """

    scale: jax.Array | None
    bias: jax.Array | None


class State(NamedTuple):
    """What is remembered: the running statistics, which inference depends on and training never sees.

    Attributes:
        mean: float32 or float64 array of the feature shape.
        var: float32 or float64 array of the feature shape; -inf where it is not known yet (see `unset`).
        count: int32 scalar, the updates made so far.

    Example:
        >>> import jbn
        >>> _, state = jbn.init(3)
        >>> print(state.mean, state.var, state.count)
        [0. 0. 0.] [1. 1. 1.] 0
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  optax's word, dearer than tuple.count


def init(features: int | Sequence[int], dtype: Any = jnp.float32) -> tuple[Params, State]:
    """Scale 1, bias 0, running mean 0, running variance 1, no update made.

    Args:
        features: the number of features, or their shape where several axes have statistics of their own.
        dtype: float32 or float64, of all arrays but `count`.

    Returns:
        Params and State; no two of their arrays share a buffer, so that both can be donated.

    Raises:
        TypeError: features are no ints, or dtype is not float32 or float64.
        ValueError: a size is negative.

    Example:
        >>> import jbn
        >>> params, state = jbn.init(64)
        >>> print(params.scale.shape, state.mean.dtype)
        (64,) float32

    Source:
        Ioffe and Szegedy, Batch Normalization, 2015; the start of Keras, Flax and PyTorch.
    """
    shape = _arguments.checked_features(features)
    dtype = _arguments.checked_state_dtype("dtype", dtype)
    params = Params(scale=jnp.ones(shape, dtype), bias=jnp.zeros(shape, dtype))
    state = State(mean=jnp.zeros(shape, dtype), var=jnp.ones(shape, dtype), count=jnp.zeros((), jnp.int32))
    return params, state


def update(state: State, moments: Moments, *, momentum: float | Schedule = 0.99, running_var: str = "biased") -> State:
    """Move the running statistics towards a batch's.

    new = momentum * old + (1 - momentum) * batch

    A batch whose statistics are not finite in any feature, or that has no value, leaves the whole state as it was, and
    so does a batch of one value under "unbiased". Unset statistics are replaced by the batch's biased moments. A
    feature of the state that is not finite itself is a fault, and stays as it is.

    Args:
        state: the running statistics, of the feature shape.
        moments: the batch's, of the same shape.
        momentum: share of the old value kept, in [0, 1], or a schedule from `state.count` to it.
        running_var: the variance that is averaged: "biased" (Keras, Flax), "unbiased", times n / (n - 1) (PyTorch), or
            "total", plus momentum * (1 - momentum) * (batch mean - old mean)**2, which tends to the variance of the
            population with its part between batches.

    Returns:
        State of the old one's dtype, not differentiated.

    Raises:
        TypeError: half-precision state, something that is no State or Moments, or a momentum that is no number.
        ValueError: momentum outside [0, 1], unknown running_var, or shapes that differ.

    Example:
        >>> import jax.numpy as jnp
        >>> import jbn
        >>> _, state = jbn.init(1)
        >>> state = jbn.update(state, jbn.moments(jnp.array([[0.0], [4.0]])), momentum=0.5)
        >>> print(state.mean, state.var, state.count)
        [1.] [2.5] 1

    Source:
        Ioffe and Szegedy, Batch Normalization, 2015, section 3.1; "total" is the law of total variance.
    """
    _arguments.check_running_var(running_var)
    _arguments.check_type("state", state, State)
    _arguments.check_type("moments", moments, Moments)
    features = np.shape(state.mean)
    for name, vectors in (("state", state), ("moments", moments)):
        _arguments.check_vectors(name, vectors, features, "the shape of `state.mean`")
    _arguments.check_state_dtype(state)
    dtype = jnp.result_type(state.mean)
    count = whole(state.count)
    kept = momentum_schedules.at(momentum, count, dtype)
    old_mean, old_var = (jnp.asarray(leaf).astype(dtype) for leaf in (state.mean, state.var))
    batch_mean, batch_var, batch_count = (jnp.asarray(leaf).astype(dtype) for leaf in moments)
    batch = Moments(_placed_as(old_mean, batch_mean), _placed_as(old_var, batch_var), batch_count)

    unset = jnp.isneginf(old_var)
    taken_var = batch.var
    if running_var == "unbiased":
        taken_var = batch.var * (batch.count / jnp.maximum(batch.count - 1, 1))
    mean = jnp.where(unset, batch.mean, _average(kept, old_mean, batch.mean))
    var = _average(kept, jnp.where(unset, batch.var, old_var), taken_var)
    if running_var == "total":
        var += kept * (1 - kept) * jnp.square(batch.mean - old_mean)
    var = jnp.where(unset, batch.var, var)

    enough = batch.count > (1 if running_var == "unbiased" else 0)
    good_batch = enough & jnp.all(jnp.isfinite(batch.mean) & jnp.isfinite(taken_var))
    # A feature whose old statistics are a fault stays one, loudly, without holding up the others.
    fault = ~(jnp.isfinite(old_mean) & (jnp.isfinite(old_var) | unset))
    good = good_batch & jnp.all(fault | (jnp.isfinite(mean) & jnp.isfinite(var)))
    new_state = State(
        mean=jnp.where(good & ~fault, mean, old_mean),
        var=jnp.where(good & ~fault, var, old_var),
        count=count + (good & (count < jnp.iinfo(jnp.int32).max)).astype(jnp.int32),
    )
    return jax.lax.stop_gradient(new_state)


def unset(tree: Any) -> Any:
    """Mark statistics as not known yet: the next good batch's own moments replace them whole.

    mean = 0, var = -inf, count = 0. Inference with them gives NaN, loudly.

    Args:
        tree: any tree of jbn statistics, of states, a Linen dict, an NNX state or module: every node with `mean` and
            `var` is marked, and its `count` where it has one; all else is left as it is.

    Returns:
        The tree, of the same structure, shapes and dtypes.

    Raises:
        ValueError: the tree holds no statistics.

    Example:
        >>> import jax.numpy as jnp
        >>> import jbn
        >>> _, state = jbn.init(1)
        >>> state = jbn.update(jbn.unset(state), jbn.moments(jnp.array([[3.0], [5.0]])))
        >>> print(state.mean, state.var, state.count)
        [4.] [1.] 1

    Source:
        jbn's own convention; -inf survives averaging, is no variance, and leaves NaN to mean a fault.
    """
    forest = _nodes.find(tree, "`tree`")
    marks = {"mean": 0, "var": -jnp.inf, "count": 0}
    return forest.replaced(
        {
            path: {field: jnp.full_like(leaf, marks[field]) for field, leaf in forest.at(path).items()}
            for path in forest.nodes
        }
    )


def _placed_as(old: jax.Array, new: jax.Array) -> jax.Array:
    """Under explicit sharding, where the old array is, so that the state can be carried through a loop."""
    there, here = jax.typeof(old).sharding.spec, jax.typeof(new).sharding
    return new if there == here.spec else jax.sharding.reshard(new, NamedSharding(here.mesh, there))


def _average(kept: jax.Array, old: jax.Array, batch: jax.Array) -> jax.Array:
    """kept * old + (1 - kept) * batch, written about the nearer end, so that neither loses its last digits."""
    return jnp.where(kept < 0.5, batch + kept * (old - batch), old + (1 - kept) * (batch - old))


def whole(count: ArrayLike) -> jax.Array:
    """The count as int32: averaging trees turns it to float."""
    count = jnp.asarray(count)
    return (count if jnp.issubdtype(count.dtype, jnp.integer) else jnp.rint(count)).astype(jnp.int32)
