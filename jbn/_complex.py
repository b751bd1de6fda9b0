"""Arithmetic for real and complex arrays alike. For real arrays, each function does what its name says."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def is_complex(array: Any) -> bool:
    """Whether an array or a dtype is complex."""
    dtype = getattr(array, "dtype", array)
    return isinstance(dtype, np.dtype) and dtype.kind == "c"


def real_dtype(dtype: Any) -> Any:
    """The dtype of the real part."""
    return jnp.finfo(dtype).dtype


def inner(a: jax.Array, b: jax.Array) -> jax.Array:
    """The real part of conj(a) * b: a * b for real arrays, and |a|**2 if b is a."""
    return lax.real(lax.conj(a) * b) if is_complex(a) else a * b


def is_finite(array: jax.Array) -> jax.Array:
    """Whether each entry is finite."""
    if is_complex(array):
        return lax.is_finite(lax.real(array)) & lax.is_finite(lax.imag(array))
    return lax.is_finite(array)


def by_parts(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """function(*arrays), applied to the real and the imaginary parts separately."""
    if is_complex(arrays[0]):
        return lax.complex(*(function(*map(part, arrays)) for part in (lax.real, lax.imag)))
    return function(*arrays)


def cast(array: Any, dtype: Any) -> jax.Array:
    """The array in a dtype; its real part, if the array is complex and the dtype is real."""
    if is_complex(array) and not is_complex(dtype):
        array = lax.real(array)
    return lax.convert_element_type(array, dtype)
