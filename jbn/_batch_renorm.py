"""Batch renormalization: training that sees what inference will, by a clipped correction towards the running state."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.typing import ArrayLike

from jbn import renorm
from jbn._activation import Activation
from jbn._collectives import AxisName, IndexGroups
from jbn._forward import Bounds, forward
from jbn._state import Params, State
from jbn.momentum import Schedule

PUBLISHED_R_MAX = renorm.r_max()
PUBLISHED_D_MAX = renorm.d_max()


def batch_renorm(
    params: Params,
    state: State,
    x: ArrayLike,
    train: bool,
    *,
    r_max: float | Schedule = PUBLISHED_R_MAX,
    d_max: float | Schedule = PUBLISHED_D_MAX,
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
    """Normalize x by the batch in training, corrected towards the running statistics; by those alone at inference.

    out = activation((xhat * r + d) * scale + bias), xhat = (x - batch mean) / sd(batch),
    r = clip(sd(batch) / sd(state), 1/r_max, r_max), d = clip((batch mean - state.mean) / sd(state), -d_max, d_max),
    sd = sqrt(var + epsilon)

    The correction is a constant to every derivative. Within its bounds, the output in training is the one at inference
    with the state before the update, so that it depends on no other example, while the gradient is still that of batch
    norm. It is for batches of few examples. Unlike in `batch_norm`, training sees the state: a start far from the data
    is to be kept out of it, by bounds that open late, as those published, or by an `unset` state.

    Args:
        params: scale and bias of the feature shape; either may be None.
        state: running mean, variance and count of updates. Unset features are not corrected: r = 1, d = 0.
        x: float32, float64, bfloat16 or float16 array; the arithmetic is in float32 at least.
        train: a Python bool; True normalizes by the batch and updates the state.
        r_max: bound of r, at least 1, or a schedule from the count of updates to it. The default is 1 for the first
            5,000 updates, then rises to 3 at 40,000; `jbn.renorm.r_max` makes others, for shorter runs.
        d_max: bound of d, at least 0, or a schedule. The default is 0 for the first 5,000 updates, then rises to 5 at
            25,000; `jbn.renorm.d_max` makes others. r_max=1 and d_max=0 are batch norm, inf is no bound.
        momentum: share of the old value kept at an update, or a schedule from the count of updates to it.
        epsilon: added to the variance.
        feature_axis: the axis, or axes, that have statistics of their own; all others are reduced.
        mask: boolean, True counts; the shape of x without its feature axes (an axis may be 1), or of x with them 1.
        axis_name: mapped axis or axes to share statistics over: pmap, vmap, shard_map.
        axis_index_groups: places on that axis that share among themselves only, as in [[0, 1], [2, 3]].
        ghost_batch_size: normalize groups of this many examples, contiguous along the first axis, on their own, each
            corrected towards the same state.
        running_var: which variance the running average takes: "biased", "unbiased" or "total" (see `update`).
        activation: shape-preserving elementwise function, applied in float32 before the cast to `dtype`.
        dtype: dtype of the result; None is that of x.

    Returns:
        The result, of the shape of x, and the new state, not differentiated.

    Raises:
        NameError: no transformation binds `axis_name`.
        TypeError: a wrong kind or dtype of argument, or a traced `train`.
        ValueError: shapes or values that do not fit; the message says how to mend it.

    Example:
        >>> import jax.numpy as jnp
        >>> import jbn
        >>> params, _ = jbn.init(1)
        >>> state = jbn.State(jnp.array([1.0]), jnp.array([4.0]), jnp.int32(9))
        >>> x = jnp.array([[3.0], [7.0]])
        >>> free = float("inf")
        >>> out, new_state = jbn.batch_renorm(params, state, x, True, r_max=free, d_max=free)
        >>> print(bool(jnp.allclose(out, jbn.normalize(params, state, x))))
        True

    Source:
        Ioffe, Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models, 2017,
        algorithm 1 and section 4.2.
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
        bounds=Bounds(r_max, d_max),
    )
