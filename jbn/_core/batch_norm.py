"""Batch normalization as a pure function: the batch's statistics in training, the running ones at inference."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jbn import _arguments, _dtypes, _scheduled
from jbn._arguments import Axes, AxisName, IndexGroups
from jbn._complex import cast, real_dtype
from jbn._core.moments import ShiftedMoments, by_feature, merge_shared, merge_stacked, wide
from jbn._core.sharing import split_as
from jbn._core.standardize import Affine, Inputs, rstd_of, standardize, transform
from jbn._core.state import Params, State, moved
from jbn._rule import Numbers, Rule, checked_rule, training_rule
from jbn.momentum import Schedule

Activation = Callable[[jax.Array], jax.Array]


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
    shortcut: ArrayLike | None = None,
    dtype: Any = None,
) -> tuple[jax.Array, State]:
    """Normalize x per feature, by the batch's statistics in training and by the running ones at inference.

    out = activation((x - mean) / sqrt(var + epsilon) * scale + bias + shortcut)

    Args:
        params: scale and bias of the feature shape; either may be None.
        state: running mean, variance and count of updates; training output does not depend on it.
        x: float32, float64, bfloat16 or float16 array; the arithmetic is in float32 at least. Or complex64 or
            complex128, with a state of `init(features, jnp.complex64)`: the variance is the mean of |x - mean|**2.
        train: a Python bool; True normalizes by the batch and updates the state.
        momentum: share of the old value kept at an update, or a schedule from a feature's count of updates, an
            int32 scalar, to it.
        epsilon: added to the variance.
        feature_axis: the axis, or axes, that have statistics of their own; all others are reduced.
        mask: boolean, True counts; the shape of x without its feature axes, or of the rank of x; any axis may be 1.
            Masked values change nothing, come out as 0, and get gradient 0, whatever they hold.
        axis_name: mapped axis or axes to share statistics over: pmap, vmap, shard_map.
        axis_index_groups: places on that axis that share among themselves only, as in [[0, 1], [2, 3]].
        ghost_batch_size: normalize groups of this many examples, contiguous along the first axis, on their own; the
            running statistics see the whole batch.
        running_var: which variance the running average takes: "biased", "unbiased" or "total" (see `update`).
        activation: shape-preserving elementwise function, applied in float32 before the cast to `dtype`. It must not
            capture a traced value. A new function object is compiled anew: define it once, outside of the loop.
        shortcut: float array of the shape of x, added before the activation, as where a residual block joins.
        dtype: dtype of the result; None is that of x.

    Returns:
        The result, of the shape of x, and the new state, not differentiated. A feature whose new statistics would not
        be finite, or that has nothing valid, keeps its old ones (see `update`); inference returns the state unchanged.

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
    _arguments.check_flag("train", train, "batch statistics", "running statistics")
    options = {"epsilon": epsilon, "feature_axis": feature_axis, "activation": activation, "dtype": dtype}
    inputs, rule = checked_call(params, state, Inputs(x, mask, shortcut), train=train, **options)
    average, number = _scheduled.checked_average(momentum, running_var, state, train)
    if not train:
        return normalize_by_state(rule, params, state, inputs), state
    rule = training_rule(rule, inputs.x, axis_name, axis_index_groups, ghost_batch_size)
    return normalize_by_batch(rule._replace(average=average), params, state, inputs, Numbers(momentum=number))


def normalize(
    params: Params,
    state: State,
    x: ArrayLike,
    *,
    epsilon: float = 1e-5,
    feature_axis: int | Sequence[int] = -1,
    mask: ArrayLike | None = None,
    activation: Activation | None = None,
    shortcut: ArrayLike | None = None,
    dtype: Any = None,
) -> jax.Array:
    """Normalize x by the running statistics: the inference half of `batch_norm`.

    out = activation((x - state.mean) / sqrt(state.var + epsilon) * scale + bias + shortcut)

    Args:
        params: scale and bias of the feature shape; either may be None.
        state: running mean and variance of the feature shape; unset ones give NaN.
        x: float32, float64, bfloat16 or float16 array.
        epsilon: added to the variance.
        feature_axis: the axis, or axes, that have statistics of their own.
        mask: boolean, True counts; the shape of x without its feature axes, or of the rank of x; any axis may be 1.
            Masked values come out as 0 and get gradient 0.
        activation: shape-preserving elementwise function, applied in float32 before the cast to `dtype`.
        shortcut: float array of the shape of x, added before the activation.
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
    options = {"epsilon": epsilon, "feature_axis": feature_axis, "activation": activation, "dtype": dtype}
    inputs, rule = checked_call(params, state, Inputs(x, mask, shortcut), train=False, **options)
    return normalize_by_state(rule, params, state, inputs)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def normalize_by_batch(
    rule: Rule, params: Params, state: State, inputs: Inputs, numbers: Numbers
) -> tuple[jax.Array, State]:
    """Normalize by the moments of the batch, and move the running ones towards them."""
    x = inputs.x
    if 0 in x.shape:
        return jnp.zeros(x.shape, rule.dtype), lax.stop_gradient(state)
    # Each ghost batch is normalized on its own; the running statistics see all of them, on all devices.
    own, group = (rule, inputs) if rule.ghost_batches is None else _in_ghost_batches(rule, inputs)
    affine = Affine(aligned(own, params.scale, group.x, missing=1), aligned(own, params.bias, group.x, missing=0))
    target = None
    if rule.correction is not None:
        target = (jax.tree.map(lambda vector: aligned(own, vector, group.x), state), numbers)
    out, batch = standardize(own, group, affine, target)
    if rule.ghost_batches is not None:
        batch = merge_stacked(batch)
        batch = batch if rule.sharing is None else merge_shared(rule.sharing, batch)
    may_be_empty = inputs.mask is not None
    return out.reshape(x.shape), moved(rule.average, state, by_feature(batch), numbers, may_be_empty)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def normalize_by_state(rule: Rule, params: Params, state: State, inputs: Inputs) -> jax.Array:
    """Normalize by the running statistics; the backward pass stores x in its own dtype, as in training."""
    x = inputs.x
    mean, var = aligned(rule, state.mean, x), cast(aligned(rule, state.var, x), real_dtype(wide(x).dtype))
    affine = Affine(aligned(rule, params.scale, x, missing=1), aligned(rule, params.bias, x, missing=0))
    running = ShiftedMoments(shift=mean, offset=None, var=var, count=None)
    apply = jax.checkpoint(functools.partial(transform, rule), prevent_cse=False)
    return apply(inputs, running, cast(rstd_of(var, rule.epsilon), affine.scale.dtype), affine)


def _in_ghost_batches(rule: Rule, inputs: Inputs) -> tuple[Rule, Inputs]:
    """The inputs in groups of examples, as (groups, examples of a group, ...), and the rule for each group alone."""
    examples = inputs.x.shape[0]
    # A mask of size 1 on the first axis counts for all examples.
    whole = [None if array is None else jnp.broadcast_to(array, (examples, *array.shape[1:])) for array in inputs]
    cut = [array if array is None else array.reshape(rule.ghost_batches, -1, *array.shape[1:]) for array in whole]
    feature, reduced = (tuple(axis + 1 for axis in axes) for axes in rule.axes)
    return rule._replace(axes=Axes(feature, reduced), sharing=None, ghost_batches=None), Inputs(*cut)


def aligned(rule: Rule, vector: Any, x: jax.Array, missing: int = 0) -> jax.Array:
    """A vector of the feature shape, or `missing` for None; wide, and with an axis of size 1 for ghost batches."""
    dtype = _dtypes.arithmetic_dtype(x.dtype)
    vector = jnp.full(rule.axes.features(x.shape), missing, dtype) if vector is None else vector
    vector = split_as(lax.convert_element_type(vector, dtype), x, rule.axes.feature)
    return lax.expand_dims(vector, range(x.ndim - len(rule.reduced) - len(rule.axes.feature)))


def checked_call(params: Any, state: Any, inputs: Inputs, *, train: bool, **options: Any) -> tuple[Inputs, Rule]:
    """The arguments that training and inference share, checked, with the rule that they make."""
    for name, value, kind in (("params", params, Params), ("state", state, State)):
        _arguments.check_type(name, value, kind)
    x = _arguments.checked_input(inputs.x)
    rule = checked_rule(x, **options)
    features = rule.axes.features(x.shape)
    why = f"as x of shape {tuple(x.shape)} has it on `feature_axis` {rule.axes.feature}; jbn.init({features}) makes it"
    fitting = [axis for axis, size in enumerate(x.shape) if (size,) == getattr(state.mean, "shape", ())]
    why += f", and feature_axis={fitting[0]} takes the state as it is" if fitting else ""
    for name, vectors in (("params", params), ("state", state)):
        _arguments.check_vectors(name, vectors, features, why)
    _dtypes.check_kinds(params, state, x)
    if train:
        _dtypes.check_state_dtype(state)
    mask = _arguments.checked_mask(inputs.mask, x.shape, rule.axes)
    return Inputs(x, mask, _arguments.checked_shortcut(inputs.shortcut, x)), rule
