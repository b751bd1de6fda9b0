"""Fold a norm into the layer before it; at inference both are affine, so one layer computes both."""

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
    """Fold a norm into the kernel and bias of the dense or convolution layer before it.

    folded_kernel = kernel * a,  folded_bias = (bias - mean) * a + params.bias
    a = params.scale / sqrt(var + epsilon)

    The result is exact for inference with any padding, stride and number of groups, since the norm acts on the output
    of the layer. Apply the activation of the norm after the folded layer. If a kernel has its output features on two
    axes, reshape the vectors of the norm to the shape of these axes. A depthwise kernel of Keras, (height, width,
    channels, multiplier), takes vectors of shape (channels, multiplier) and `output_axis=(-2, -1)`. For a grouped
    transposed convolution of PyTorch, reshape the vectors to (groups, out) and the kernel to (groups, in, out, height,
    width), with `output_axis=(0, 2)`.

    Args:
        params: scale and bias of the norm; either may be None.
        state: running mean and variance of the norm; unset statistics give NaN.
        kernel: float array of any rank, with its output features on `output_axis`.
        bias: float array of the feature shape; None means 0, for a layer without a bias. The folded layer always has a
            bias. The bias of an Equinox convolution has trailing axes of size 1: pass `bias[:, 0, 0]`.
        epsilon: epsilon of the norm.
        output_axis: axis, or axes, of the kernel's output features: -1 in Flax, Keras and Haiku, 0 in PyTorch and
            Equinox. For transposed convolutions it is -2 in Keras and Haiku and in Flax with `transpose_kernel`, and 1
            in PyTorch. A wrong axis of the right size raises no error.

    Returns:
        The kernel, with its shape and dtype unchanged, and the bias, of the feature shape and the kernel's dtype.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape does not fit, or epsilon is not positive.

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
    why = f"the features of kernel of shape {kernel.shape} on `output_axis` {axes.feature}"
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
    """The value as an array of JAX; tensors of PyTorch are converted too."""
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError):
        raise TypeError(f"`{name}` is {_arguments.described(value)}: expected a float array.") from None
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"`{name}` has dtype {array.dtype.name}: expected a float array.")
    return array
