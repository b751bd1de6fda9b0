"""Batch normalization as a pure function: the batch's statistics in training, the running ones at inference."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.typing import ArrayLike

from jbn._activation import Activation
from jbn._collectives import AxisName, IndexGroups
from jbn._forward import forward
from jbn._state import Params, State
from jbn.momentum import Schedule


def batch_norm(
    params: Params,
    state: State,
    x: ArrayLike,
    train: bool,
    *,
    momentum: float | Schedule = 0.99,
    epsilon: float = 1e-5,
    feature_axis: int | Sequence[int] = -1,
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: IndexGroups | None = None,
    ghost_batch_size: int | None = None,
    running_var: str = "biased",
    activation: Activation | None = None,
    dtype: Any = None,
) -> tuple[jax.Array, State]:
    """Normalize x per feature, by the batch's statistics in training and by the running ones at inference.

    out = activation((x - mean) / sqrt(var + epsilon) * scale + bias)

    Args:
        params: scale and bias of the feature shape; either may be None.
        state: running mean, variance and count of updates; training output does not depend on it.
        x: float32, float64, bfloat16 or float16 array; the arithmetic is in float32 at least.
        train: a Python bool; True normalizes by the batch and updates the state.
        momentum: share of the old value kept at an update, or a schedule from the count of updates to it.
        epsilon: added to the variance.
        feature_axis: the axis, or axes, that have statistics of their own; all others are reduced.
        mask: boolean, True counts; the shape of x without its feature axes (an axis may be 1), or of x with them 1.
            Masked values change nothing, come out as 0, and get gradient 0, whatever they hold.
        axis_name: mapped axis or axes to share statistics over: pmap, vmap, shard_map.
        axis_index_groups: places on that axis that share among themselves only, as in [[0, 1], [2, 3]].
        ghost_batch_size: normalize groups of this many examples, contiguous along the first axis, on their own; the
            running statistics see the whole batch.
        running_var: which variance the running average takes: "biased", "unbiased" or "total" (see `update`).
        activation: shape-preserving elementwise function, applied in float32 before the cast to `dtype`. What it
            captures is differentiated too; with ghost batches it sees one group.
        dtype: dtype of the result; None is that of x.

    Returns:
        The result, of the shape of x, and the new state, not differentiated. A batch that is not finite, or has
        nothing valid, leaves the state as it was (see `update`), and so does inference.

    Raises:
        NameError: no transformation binds `axis_name`.
        TypeError: a wrong kind or dtype of argument, or a traced `train`.
        ValueError: shapes or values that do not fit; the message says how to mend it.

    Example:
        >>> import jax.numpy as jnp
        >>> import jbn
        >>> params, state = jbn.init(2)
        >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
        >>> out, state = jbn.batch_norm(params, state, x, True, momentum=0.5)
        >>> print(out.round(2))
        [[-1. -1.]
         [ 1.  1.]]
        >>> print(state.mean)
        [ 1. 10.]

    Source:
        Ioffe and Szegedy, Batch Normalization, 2015, algorithms 1 and 2.
    """
    return forward(
        params,
        state,
        x,
        train,
        momentum=momentum,
        epsilon=epsilon,
        feature_axis=feature_axis,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        ghost_batch_size=ghost_batch_size,
        running_var=running_var,
        activation=activation,
        dtype=dtype,
        bounds=None,
    )
