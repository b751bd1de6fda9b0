"""Batch renormalization: training that sees what inference will, by a clipped correction towards the running state."""

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
from jbn._core.standardize import Affine, Inputs
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
    """Normalize x by the batch in training, corrected towards the running statistics; by those alone at inference.

    out = activation((xhat * r + d) * scale + bias + shortcut), xhat = (x - batch mean) / sd(batch),
    r = clip(sd(batch) / sd(state), 1/r_max, r_max), d = clip((batch mean - state.mean) / sd(state), -d_max, d_max),
    sd = sqrt(var + epsilon)

    The correction is a constant to every derivative. Within its bounds, the output in training is the one at inference
    with the state before the update, so that it depends on no other example, while the gradient is still that of batch
    norm. It is for batches of few examples. Unlike in `batch_norm`, the training output depends on the state: keep
    a start far from the data out of it by bounds that open late, as the published ones do, or by an `unset` state.

    Args:
        params: scale and bias of the feature shape; either may be None.
        state: running mean, variance and count of updates. Unset features are not corrected: r = 1, d = 0.
        x: float32, float64, bfloat16 or float16 array; the arithmetic is in float32 at least.
        train: a Python bool; True normalizes by the batch and updates the state.
        r_max: bound of r, at least 1, or a schedule from a feature's count of updates to it. The default is 1 for the
            first 5,000 updates, then rises to 3 at 40,000; `jbn.renorm.r_max` makes others, for shorter runs.
        d_max: bound of d, at least 0, or a schedule. The default is 0 for the first 5,000 updates, then rises to 5 at
            25,000; `jbn.renorm.d_max` makes others. r_max=1 and d_max=0 are batch norm, inf is no bound.
        momentum: share of the old value kept at an update, or a schedule from a feature's count of updates to it.
        epsilon: added to the variance.
        feature_axis: the axis, or axes, that have statistics of their own; all others are reduced.
        mask: boolean, True counts; the shape of x without its feature axes, or of the rank of x; any axis may be 1.
        axis_name: mapped axis or axes to share statistics over: pmap, vmap, shard_map.
        axis_index_groups: places on that axis that share among themselves only, as in [[0, 1], [2, 3]].
        ghost_batch_size: normalize groups of this many examples, contiguous along the first axis, on their own, each
            corrected towards the same state.
        running_var: which variance the running average takes: "biased", "unbiased" or "total" (see `update`).
        activation: shape-preserving elementwise function, applied in float32 before the cast to `dtype`.
        shortcut: float array of the shape of x, added before the activation, as where a residual block joins.
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
    average, number = _scheduled.checked_average(momentum, running_var, state, train)
    r_schedule, r_number = checked_bound("r_max", r_max, state, train)
    d_schedule, d_number = checked_bound("d_max", d_max, state, train)
    if not train:
        return normalize_by_state(rule, params, state, inputs), state
    rule = training_rule(rule, inputs.x, axis_name, axis_index_groups, ghost_batch_size)._replace(average=average)
    # Bounds that are known to allow no correction are batch norm: the same program, and so the same bits.
    traced = isinstance(r_number, Tracer) or isinstance(d_number, Tracer)
    if traced or (r_number, d_number) != (1, 0):
        rule = rule._replace(correction=Correction(r_schedule, d_schedule))
    return normalize_by_batch(rule, params, state, inputs, Numbers(number, r_number, d_number))


@dataclasses.dataclass(frozen=True)
class Correction:
    """Scale and bias that correct a batch towards the state, with the schedules of the bounds; None for a number.

    (xhat * r + d) * scale + bias = xhat * (r * scale) + (d * scale + bias),
    r = clip(sd(batch) / sd(state), 1/r_max, r_max),  d = clip((mean(batch) - mean(state)) / sd(state), -d_max, d_max)
    """

    r_max: Schedule | None
    d_max: Schedule | None

    def __call__(self, epsilon: float, batch: ShiftedMoments, target: tuple[State, Numbers], affine: Affine) -> Affine:
        """The scale and bias, or their tangents, that act on xhat as the given ones do on xhat * r + d."""
        batch, (state, numbers) = lax.stop_gradient((batch, target))
        unset = state.var == -jnp.inf  # not corrected: r = 1, d = 0
        running = jnp.where(unset, jnp.ones_like(state.var), state.var) + epsilon
        r = jnp.sqrt((batch.var + epsilon) / running)
        distance = batch.shift - state.mean
        distance = distance if batch.offset is None else distance + batch.offset
        d = distance * lax.rsqrt(running)
        r_max = bound_at("r_max", self.r_max, numbers.r_max, state.count, r.dtype)
        d_max = bound_at("d_max", self.d_max, numbers.d_max, state.count, d.dtype)
        r = jnp.where(unset, jnp.ones_like(r), jnp.clip(r, 1 / r_max, r_max))
        d = jnp.where(unset, jnp.zeros_like(d), jnp.clip(d, -d_max, d_max))
        return Affine(r * affine.scale, d * affine.scale + affine.bias)
