"""Batch normalization as a pure function: the batch's statistics in training, the running ones at inference."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jbn import _arguments
from jbn._collectives import AxisName, IndexGroups, checked_sharing
from jbn._moments import ShiftedMoments, arithmetic_dtype, no_moments, rounded, shared, union
from jbn._standardize import Activation, Affine, Rule, closed_activation, standardize, transform
from jbn._state import Params, State, update
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
    _arguments.check_train(train)
    _arguments.check_running_var(running_var)
    _arguments.check_momentum(momentum)
    if not train:
        out = normalize(
            params,
            state,
            x,
            epsilon=epsilon,
            feature_axis=feature_axis,
            mask=mask,
            activation=activation,
            dtype=dtype,
        )
        return out, state
    x, axes, mask, rule = _checked(params, state, x, epsilon, feature_axis, mask, dtype)
    sharing = checked_sharing(axis_name, axis_index_groups)
    _arguments.check_reducible(x.shape, axes, axis_name)
    groups = None if ghost_batch_size is None else _arguments.checked_groups(ghost_batch_size, x.shape, axes)
    features = axes.features(x.shape)
    if 0 in x.shape:
        empty = no_moments(x, features)
        return jnp.zeros(x.shape, rule.dtype), update(state, empty, momentum=momentum, running_var=running_var)

    affine = _affine(params, axes, x)
    if groups is None:
        rule = rule._replace(sharing=sharing)
        out, batch = _standardized(rule, x, mask, affine, activation)
    else:
        out, batch = _standardized_in_groups(groups, rule, x, mask, affine, activation)
        batch = shared(union(jax.lax.stop_gradient(batch)), sharing)
    new_state = update(state, rounded(batch, features), momentum=momentum, running_var=running_var)
    return out, new_state


def normalize(
    params: Params,
    state: State,
    x: ArrayLike,
    *,
    epsilon: float = 1e-5,
    feature_axis: int | Sequence[int] = -1,
    mask: ArrayLike | None = None,
    activation: Activation | None = None,
    dtype: Any = None,
) -> jax.Array:
    """Normalize x by the running statistics: the inference half of `batch_norm`.

    out = activation((x - state.mean) / sqrt(state.var + epsilon) * scale + bias)

    Args:
        params: scale and bias of the feature shape; either may be None.
        state: running mean and variance of the feature shape; unset ones give NaN.
        x: float32, float64, bfloat16 or float16 array.
        epsilon: added to the variance.
        feature_axis: the axis, or axes, that have statistics of their own.
        mask: boolean, True counts; masked values come out as 0 and get gradient 0.
        activation: shape-preserving elementwise function, applied in float32 before the cast to `dtype`.
        dtype: dtype of the result; None is that of x.

    Returns:
        The result, of the shape of x.

    Raises:
        TypeError: a wrong kind or dtype of argument.
        ValueError: shapes or values that do not fit; the message says how to mend it.

    Example:
        >>> import jax.numpy as jnp
        >>> import jbn
        >>> params, state = jbn.init(2)
        >>> print(jbn.normalize(params, state, jnp.array([[1.0, -1.0]])).round(3))
        [[ 1. -1.]]

    Source:
        Ioffe and Szegedy, Batch Normalization, 2015, algorithm 2, line 11.
    """
    x, axes, mask, rule = _checked(params, state, x, epsilon, feature_axis, mask, dtype)
    affine = _affine(params, axes, x)
    mean, var = (_aligned(vector, axes, x) for vector in (state.mean, state.var))
    running = ShiftedMoments(shift=mean, offset=jnp.zeros_like(mean), var=var, count=jnp.ones((), mean.dtype))
    closed, captured = closed_activation(activation, x, mask, affine)
    rule = rule._replace(activation=closed)

    def apply(x: jax.Array, running: ShiftedMoments, affine: Affine, captured: list[jax.Array]) -> jax.Array:
        return transform(rule, x, mask, running, affine, captured)

    # For a backward pass through frozen statistics, x in its own dtype is all that needs to stay alive.
    return jax.checkpoint(apply, prevent_cse=False)(x, running, affine, captured)


def _checked(
    params: Params, state: State, x: Any, epsilon: Any, feature_axis: Any, mask: Any, dtype: Any
) -> tuple[jax.Array, _arguments.Axes, jax.Array | None, Rule]:
    """The arguments that training and inference share, checked, with the rule they make."""
    x = _arguments.checked_input(x)
    axes = _arguments.checked_axes(feature_axis, x.ndim)
    features = axes.features(x.shape)
    for name, value, kind in (("params", params, Params), ("state", state, State)):
        _arguments.check_type(name, value, kind)
        why = f"as x of shape {tuple(x.shape)} has it on `feature_axis` {axes.feature}; jbn.init({features}) makes it"
        _arguments.check_vectors(name, value, features, why)
    _arguments.check_state_dtype(state)
    mask = _arguments.checked_mask(mask, x.shape, axes)
    rule = Rule(
        reduced=axes.reduced,
        sharing=None,
        epsilon=_arguments.checked_epsilon(epsilon),
        activation=None,
        dtype=_arguments.checked_dtype(dtype, x.dtype),
    )
    return x, axes, mask, rule


def _aligned(vector: jax.Array, axes: _arguments.Axes, x: jax.Array) -> jax.Array:
    """A vector of the feature shape, with the rank of x and in the dtype of the arithmetic."""
    return jnp.expand_dims(jnp.asarray(vector).astype(arithmetic_dtype(x)), axes.reduced)


def _affine(params: Params, axes: _arguments.Axes, x: jax.Array) -> Affine:
    """Scale and bias, with the rank of x; those that are None as 1 and 0."""
    features = axes.features(x.shape)
    scale = jnp.ones(features) if params.scale is None else params.scale
    bias = jnp.zeros(features) if params.bias is None else params.bias
    return Affine(_aligned(scale, axes, x), _aligned(bias, axes, x))


def _standardized(
    rule: Rule, x: jax.Array, mask: jax.Array | None, affine: Affine, activation: Activation | None
) -> tuple[jax.Array, ShiftedMoments]:
    closed, captured = closed_activation(activation, x, mask, affine)
    return standardize(rule._replace(activation=closed), x, mask, affine, captured)


def _standardized_in_groups(
    groups: int, rule: Rule, x: jax.Array, mask: jax.Array | None, affine: Affine, activation: Activation | None
) -> tuple[jax.Array, ShiftedMoments]:
    """Each group of examples standardized on its own, and the moments of each, stacked along a new first axis."""
    _arguments.check_groups_fit_shards(groups, x)

    def cut(array: jax.Array) -> jax.Array:
        return array.reshape(groups, array.shape[0] // groups, *array.shape[1:])

    if mask is not None:
        mask = cut(jnp.broadcast_to(mask, (x.shape[0], *mask.shape[1:])))
    one_group = jax.vmap(lambda x, mask: _standardized(rule, x, mask, affine, activation))
    out, batch = one_group(cut(x), mask)
    return out.reshape(x.shape), batch
