"""What `batch_norm` and `batch_renorm` share: by the batch, with an update, in training, by the state at inference."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jbn import _arguments, renorm
from jbn._activation import Activation
from jbn._collectives import checked_sharing
from jbn._moments import no_moments, rounded
from jbn._normalize import aligned, aligned_affine, checked_call, normalize
from jbn._shifted_moments import ShiftedMoments, shared, union
from jbn._standardize import Affine, Rule, Target, closed_activation, standardize
from jbn._state import Params, State, update, whole


class Bounds(NamedTuple):
    """How far batch renormalization corrects: numbers, or schedules of the count."""

    r_max: Any
    d_max: Any


def forward(
    params: Params,
    state: State,
    x: Any,
    train: Any,
    *,
    momentum: Any,
    epsilon: Any,
    feature_axis: Any,
    mask: Any,
    axis_name: Any,
    axis_index_groups: Any,
    ghost_batch_size: Any,
    running_var: str,
    activation: Activation | None,
    dtype: Any,
    bounds: Bounds | None,
) -> tuple[jax.Array, State]:
    """The result and the new state; with bounds, in training, corrected towards the old one."""
    _arguments.check_train(train)
    _arguments.check_running_var(running_var)
    _arguments.check_momentum(momentum)
    for bound, value in ({} if bounds is None else bounds._asdict()).items():
        _arguments.check_bound(bound, value)
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
    x, axes, mask, rule = checked_call(params, state, x, epsilon, feature_axis, mask, dtype)
    sharing = checked_sharing(axis_name, axis_index_groups)
    _arguments.check_reducible(x.shape, axes, axis_name)
    groups = None if ghost_batch_size is None else _arguments.checked_groups(ghost_batch_size, x.shape, axes)
    features = axes.features(x.shape)
    if 0 in x.shape:
        empty = no_moments(x, features)
        return jnp.zeros(x.shape, rule.dtype), update(state, empty, momentum=momentum, running_var=running_var)

    affine = aligned_affine(params, axes, x)
    # Bounds that are known to be closed are batch norm: the same program, and so the same bits.
    target = None if bounds is None or _closed(bounds) else _target(bounds, state, axes, x)
    if groups is None:
        rule = rule._replace(sharing=sharing)
        out, batch = _standardized(rule, x, mask, affine, activation, target)
    else:
        out, batch = _standardized_in_groups(groups, rule, x, mask, affine, activation, target)
        batch = shared(union(batch), sharing)
    new_state = update(state, rounded(batch, features), momentum=momentum, running_var=running_var)
    return out, new_state


def _closed(bounds: Bounds) -> bool:
    """Whether the bounds are numbers that allow no correction."""
    known = not any(callable(bound) or isinstance(bound, Tracer) for bound in bounds)
    return known and tuple(map(float, bounds)) == (1.0, 0.0)


def _target(bounds: Bounds, state: State, axes: _arguments.Axes, x: jax.Array) -> Target:
    """The running statistics, and what the bounds come to at their count."""
    mean, var = (aligned(vector, axes, x) for vector in (state.mean, state.var))
    values = []
    for bound, given in bounds._asdict().items():
        if given is renorm.r_max or given is renorm.d_max:
            raise TypeError(f"`{bound}` is jbn.renorm.{given.__name__} itself: call it, as in jbn.renorm.{bound}().")
        value = _arguments.scheduled(bound, given, whole(state.count), mean.dtype)
        values.append(jnp.maximum(value, _arguments.LEAST_BOUNDS[bound]))
    return Target(mean, var, *values)


def _standardized(
    rule: Rule,
    x: jax.Array,
    mask: jax.Array | None,
    affine: Affine,
    activation: Activation | None,
    target: Target | None,
) -> tuple[jax.Array, ShiftedMoments]:
    closed, captured = closed_activation(activation, x, mask, affine)
    return standardize(rule._replace(activation=closed), x, mask, affine, captured, target)


def _standardized_in_groups(
    groups: int,
    rule: Rule,
    x: jax.Array,
    mask: jax.Array | None,
    affine: Affine,
    activation: Activation | None,
    target: Target | None,
) -> tuple[jax.Array, ShiftedMoments]:
    """Each group of examples standardized on its own, and the moments of each, stacked along a new first axis."""
    _arguments.check_groups_fit_shards(groups, x)

    def cut(array: jax.Array) -> jax.Array:
        return array.reshape(groups, array.shape[0] // groups, *array.shape[1:])

    if mask is not None:
        mask = cut(jnp.broadcast_to(mask, (x.shape[0], *mask.shape[1:])))
    one_group = jax.vmap(lambda x, mask: _standardized(rule, x, mask, affine, activation, target))
    out, batch = one_group(cut(x), mask)
    return out.reshape(x.shape), batch
