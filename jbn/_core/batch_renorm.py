"""Batch renormalization: batch norm in training, with a bounded correction toward the running statistics."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike

from jbn import _arguments, _scheduled, renorm
from jbn._arguments import AxisName, IndexGroups
from jbn._complex import is_complex
from jbn._core.batch_norm import Activation, checked_call, normalize_by_batch, normalize_by_state
from jbn._core.moments import ShiftedMoments
from jbn._core.standardize import Affine, Inputs, rstd_of
from jbn._core.state import Params, State
from jbn._rule import Numbers, training_rule
from jbn._scheduled import bound_at, checked_bound
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
    shortcut: ArrayLike | None = None,
    dtype: Any = None,
) -> tuple[jax.Array, State]:
    """Normalize x as `batch_norm` does, with a bounded correction toward the running statistics in training.

    out = activation((xhat * r + d) * scale + bias + shortcut),  xhat = (x - mean) / sd(var)
    r = clip(sd(var) / sd(state.var), 1 / r_max, r_max),  d = clip((mean - state.mean) / sd(state.var), -d_max, d_max)
    sd(var) = sqrt(var + epsilon)

    Here mean and var are the batch statistics. r and d are treated as constants in differentiation, so gradients flow
    through the batch statistics as in batch norm. Where neither is clipped, the training output equals the output of
    inference with the old state, so it does not depend on the other examples. Use batch renormalization for small
    batches.

    The training output depends on the state, unlike in `batch_norm`. If the initial values are far from the data, use
    bounds that allow no correction at first, as the defaults do, or start from an `unset` state.

    Args:
        params: scale and bias of the feature shape; either may be None.
        state: running mean, variance and count of updates. Unset features are not corrected: r = 1, d = 0.
        x: float32, float64, bfloat16 or float16 array; the arithmetic uses at least float32.
        train: Python bool. True normalizes by batch statistics and updates the state.
        r_max: bound of r, at least 1, or a schedule. The default stays at 1 for the first 5,000 updates, then rises to
            3 at 40,000. For shorter runs, create a schedule with `jbn.renorm.r_max`.
        d_max: bound of d, at least 0, or a schedule. The default stays at 0 for the first 5,000 updates, then rises to
            5 at 25,000; see `jbn.renorm.d_max`. r_max=1 with d_max=0 is batch norm; inf means no bound.
        momentum: share of the old value kept at an update, or a schedule: a function that computes this share from a
            feature's count of updates, an int32 scalar.
        epsilon: added to the variance.
        feature_axis: axis or axes of the features; statistics are computed over all other axes.
        mask: boolean array, True for valid values. It has the shape of x without the feature axes, or the rank of x.
            Any axis may have size 1.
        axis_name: mapped axis or axes (of pmap, vmap or shard_map) to share statistics over.
        axis_index_groups: groups of indices on that axis that share statistics, such as [[0, 1], [2, 3]].
        ghost_batch_size: number of examples in a ghost batch. Each ghost batch, contiguous along the first axis, is
            normalized on its own. All ghost batches are corrected toward the same state.
        running_var: which variance the running average uses: "biased", "unbiased" or "total" (see `update`).
        activation: elementwise function that keeps the shape, applied in float32 before the cast to `dtype`.
        shortcut: float array with the shape of x, added before the activation, as in a residual block.
        dtype: dtype of the result; None means the dtype of x.

    Returns:
        The result, with the shape of x, and the new state, which carries no gradient.

    Raises:
        NameError: no transformation binds `axis_name`.
        TypeError: an argument has the wrong type or dtype, or `train` is traced.
        ValueError: a shape or value does not fit; the message says how to fix it.

    Example:
        >>> import jax.numpy as jnp
        >>> import jbn
        >>> params, _ = jbn.init(1)
        >>> state = jbn.State(mean=jnp.array([1.0]), var=jnp.array([4.0]), count=jnp.array([9.0]))
        >>> x = jnp.array([[3.0], [7.0]])
        >>> free = float("inf")
        >>> out, new_state = jbn.batch_renorm(params, state, x, True, r_max=free, d_max=free)
        >>> print(bool(jnp.allclose(out, jbn.normalize(params, state, x))))
        True

    Source:
        Ioffe, Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models, 2017,
        algorithm 1 and section 4.2.
    """
    _arguments.check_flag("train", train, "batch statistics", "running statistics")
    options = {"epsilon": epsilon, "feature_axis": feature_axis, "activation": activation, "dtype": dtype}
    inputs, rule = checked_call(params, state, Inputs(x, mask, shortcut), train=train, **options)
    if is_complex(inputs.x):
        raise TypeError(f"`x` has dtype {inputs.x.dtype.name}: expected a float dtype; jbn.batch_norm takes complex x.")
    average, weights = _scheduled.checked_average(momentum, running_var, state, train)
    r_schedule, r_number = checked_bound("r_max", r_max, state, train)
    d_schedule, d_number = checked_bound("d_max", d_max, state, train)
    if not train:
        return normalize_by_state(rule, params, state, inputs), state
    rule = training_rule(rule, inputs.x, axis_name, axis_index_groups, ghost_batch_size)._replace(average=average)
    # Bounds that are known to allow no correction give batch norm: the same program, so the results are bit-equal.
    traced = isinstance(r_number, Tracer) or isinstance(d_number, Tracer)
    if traced or (r_number, d_number) != (1, 0):
        rule = rule._replace(correction=Correction(r_schedule, d_schedule))
    return normalize_by_batch(rule, params, state, inputs, Numbers(weights, r_number, d_number))


@dataclasses.dataclass(frozen=True)
class Correction:
    """The correction of a batch toward the state, applied to scale and bias.

    (xhat * r + d) * scale + bias = xhat * (r * scale) + (d * scale + bias)

    The fields are the schedules of the bounds; None where a bound is a number.
    """

    r_max: Schedule | None
    d_max: Schedule | None

    def __call__(self, epsilon: float, batch: ShiftedMoments, target: tuple[State, Numbers], affine: Affine) -> Affine:
        """(r * scale, d * scale + bias), for scale and bias or for their tangents; r and d as in `batch_renorm`."""
        batch, (state, numbers) = lax.stop_gradient((batch, target))
        unset = state.var == -jnp.inf  # Unset features are not corrected: r = 1, d = 0.
        rstd = rstd_of(jnp.where(unset, jnp.ones_like(state.var), state.var), epsilon)
        r = jnp.sqrt(batch.var + epsilon) * rstd
        distance = batch.shift - state.mean
        distance = distance if batch.offset is None else distance + batch.offset
        d = distance * rstd
        r_max = bound_at("r_max", self.r_max, numbers.r_max, state.count, r.dtype)
        d_max = bound_at("d_max", self.d_max, numbers.d_max, state.count, d.dtype)
        r = jnp.where(unset, jnp.ones_like(r), jnp.clip(r, 1 / r_max, r_max))
        d = jnp.where(unset, jnp.zeros_like(d), jnp.clip(d, -d_max, d_max))
        return Affine(r * affine.scale, d * affine.scale + affine.bias)
