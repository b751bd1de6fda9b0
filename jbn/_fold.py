"""A norm at inference is affine, and so is the layer before it: both in one."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jbn import _arguments, _dtypes
from jbn._core.standardize import rstd_of
from jbn._core.state import Params, State


def fold(
    params: Params,
    state: State,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    epsilon: float = 1e-5,
    output_axis: int | Sequence[int] = -1,
) -> tuple[jax.Array, jax.Array]:
    """The kernel and bias of a dense or convolution layer that does the work of the norm after it too.

    kernel * a,  (bias - mean) * a + params.bias,  a = params.scale / sqrt(var + epsilon)

    Exact for inference in any padding, stride and number of groups, since the norm acts on the layer's output. An
    activation of the norm stays to be applied. Where a kernel has its output features on two axes, reshape the norm's
    vectors to them: a depthwise kernel of Keras, (height, width, channels, multiplier), takes vectors of (channels,
    multiplier) and `output_axis=(-2, -1)`; a grouped and transposed one of PyTorch takes them as (groups, out), the
    kernel as (groups, in, out, height, width), and `output_axis=(0, 2)`.

    Args:
        params: scale and bias of the norm; either may be None.
        state: its running mean and variance; unset ones give NaN.
        kernel: float array of any rank, whose output features are on `output_axis`.
        bias: float array of the feature shape; None is 0, for a layer that had no bias. The folded layer has one.
            Equinox' has axes of size 1 behind it: give `bias[:, 0, 0]`.
        epsilon: that of the norm.
        output_axis: the axis, or axes, of the kernel's output features: -1 in Flax, Keras and Haiku, 0 in PyTorch and
            Equinox. For transposed convolutions it is -2 in Keras and Haiku and in Flax with `transpose_kernel`, and 1
            in PyTorch. A wrong axis goes unseen where the sizes are equal.

    Returns:
        Kernel, of the shape and dtype given, and bias, of the feature shape and the kernel's dtype.

    Raises:
        TypeError: a wrong kind or dtype of argument.
        ValueError: shapes that do not fit, or an epsilon that is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> import jbn
        >>> params, state = jbn.init(2)
        >>> state = state._replace(mean=jnp.array([1.0, 2.0]), var=jnp.array([4.0, 16.0]))
        >>> kernel, bias = jbn.fold(params, state, jnp.ones((3, 2)))
        >>> print(kernel[0].round(3), bias.round(3))
        [0.5  0.25] [-0.5 -0.5]

    Source:
        Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
        2018, section 3.2.
    """
    kernel = _float_array("kernel", kernel)
    axes = _arguments.checked_axes(output_axis, kernel.ndim, "output_axis", "kernel")
    features = axes.features(kernel.shape)
    why = f"as kernel of shape {kernel.shape} has it on `output_axis` {axes.feature}"
    for name, value, kind in (("params", params, Params), ("state", state, State)):
        _arguments.check_type(name, value, kind)
        _arguments.check_vectors(name, value, features, why)
    _dtypes.check_kinds(params, state, kernel, "kernel")
    bias = jnp.zeros(features, kernel.dtype) if bias is None else _float_array("bias", bias)
    if bias.shape != features:
        raise ValueError(f"`bias` has shape {bias.shape}: expected {features}, {why}.")

    dtype = _dtypes.arithmetic_dtype(kernel.dtype)
    mean, var, old = (jnp.asarray(vector).astype(dtype) for vector in (state.mean, state.var, bias))
    slope = rstd_of(var, _arguments.checked_epsilon(epsilon))
    if params.scale is not None:
        slope = slope * jnp.asarray(params.scale).astype(dtype)
    shift = jnp.zeros_like(mean) if params.bias is None else jnp.asarray(params.bias).astype(dtype)
    folded = kernel.astype(dtype) * jnp.expand_dims(slope, axes.reduced)
    return folded.astype(kernel.dtype), ((old - mean) * slope + shift).astype(kernel.dtype)


def _float_array(name: str, value: Any) -> jax.Array:
    if not _arguments.is_array(value) or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        given = getattr(value, "dtype", type(value).__name__)
        raise TypeError(f"`{name}` is {given}: expected a float array.")
    return jnp.asarray(value)
