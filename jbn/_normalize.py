"""Normalize by the running statistics: the inference half of `batch_norm`, and the checks that training shares."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jbn import _arguments
from jbn._activation import Activation
from jbn._precision import arithmetic_dtype
from jbn._shifted_moments import ShiftedMoments
from jbn._standardize import Affine, Rule, closed_activation, transform
from jbn._state import Params, State


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
        mask: boolean, True counts; the shape of x without its feature axes (an axis may be 1), or of x with them 1.
            Masked values come out as 0 and get gradient 0.
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
    x, axes, mask, rule = checked_call(params, state, x, epsilon, feature_axis, mask, dtype)
    affine = aligned_affine(params, axes, x)
    mean, var = (aligned(vector, axes, x) for vector in (state.mean, state.var))
    running = ShiftedMoments(shift=mean, offset=jnp.zeros_like(mean), var=var, count=jnp.ones((), mean.dtype))
    closed, captured = closed_activation(activation, x, mask, affine)
    rule = rule._replace(activation=closed)

    def apply(x: jax.Array, running: ShiftedMoments, affine: Affine, captured: list[jax.Array]) -> jax.Array:
        return transform(rule, x, mask, running, affine, captured)

    # For a backward pass through frozen statistics, x in its own dtype is all that needs to stay alive.
    return jax.checkpoint(apply, prevent_cse=False)(x, running, affine, captured)


def checked_call(
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


def aligned(vector: jax.Array, axes: _arguments.Axes, x: jax.Array) -> jax.Array:
    """A vector of the feature shape, with the rank of x and in the dtype of the arithmetic."""
    return jnp.expand_dims(jnp.asarray(vector).astype(arithmetic_dtype(x)), axes.reduced)


def aligned_affine(params: Params, axes: _arguments.Axes, x: jax.Array) -> Affine:
    """Scale and bias, with the rank of x; those that are None as 1 and 0."""
    features = axes.features(x.shape)
    scale = jnp.ones(features) if params.scale is None else params.scale
    bias = jnp.zeros(features) if params.bias is None else params.bias
    return Affine(aligned(scale, axes, x), aligned(bias, axes, x))
