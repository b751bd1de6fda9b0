"""The dtypes of input, statistics and results: which are taken, and in which the arithmetic is."""

from typing import Any

import jax
import jax.numpy as jnp

from jbn._complex import is_complex

INPUT_DTYPES = ("float32", "float64", "bfloat16", "float16", "complex64", "complex128")
STATE_DTYPES = ("float32", "float64")


def arithmetic_dtype(dtype: Any) -> Any:
    """The dtype to compute in: float32, or complex64, at least."""
    if is_complex(dtype):
        return dtype
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def checked_dtype(dtype: Any, default: Any, name: str = "dtype") -> Any:
    """The dtype of the result, complex where x is, whose dtype is the default; or any dtype of parameters."""
    if dtype is None:
        return default
    if _dtype_name(dtype) not in INPUT_DTYPES:
        raise TypeError(f"`{name}` is {_dtype_name(dtype)}: expected one of {', '.join(INPUT_DTYPES)}.")
    if default is not None and is_complex(default) != is_complex(jnp.dtype(dtype)):
        raise TypeError(f"`{name}` is {_dtype_name(dtype)}, but x has {default.name}: expected {of_kind(default)}.")
    return jnp.dtype(dtype)


def of_kind(dtype: Any) -> str:
    """The dtypes of input that are complex, or float, as this one is."""
    return "one of " + ", ".join(name for name in INPUT_DTYPES if is_complex(jnp.dtype(name)) == is_complex(dtype))


def check_kinds(params: Any, state: Any, x: jax.Array, name: str = "x") -> None:
    """The mean is complex where the input of this name is, and so may scale and bias be there."""
    mean = jnp.result_type(state.mean)
    if is_complex(mean) != is_complex(x):
        wanted = "complex64 or complex128" if is_complex(x) else "a float dtype"
        raise TypeError(
            f"`state.mean` has dtype {mean.name}, but {name} has dtype {x.dtype.name}: expected {wanted}, as "
            f"jbn.init(features, jnp.{arithmetic_dtype(x.dtype).name}) makes it."
        )
    for field, vector in params._asdict().items():
        if vector is not None and is_complex(jnp.result_type(vector)) and not is_complex(x):
            raise TypeError(
                f"`params.{field}` has dtype {jnp.result_type(vector).name}, but {name} has dtype {x.dtype.name}: "
                "expected a float dtype."
            )


def checked_state_dtype(name: str, dtype: Any) -> Any:
    """Running statistics in half precision stop moving, so they are refused."""
    if not is_state_dtype(dtype):
        raise TypeError(
            f"`{name}` is {_dtype_name(dtype)}: expected {' or '.join(STATE_DTYPES)}, since running statistics "
            "lose small updates in half precision. Convert it by `.astype`; x may have a low precision."
        )
    return jnp.dtype(dtype)


def is_state_dtype(dtype: Any) -> bool:
    """Whether running statistics, or their real parts, are precise enough to be updated."""
    name = _dtype_name(dtype)
    return name in STATE_DTYPES or name.startswith("complex")


def check_state_dtype(state: Any, name: str = "state") -> None:
    """The dtypes of running statistics."""
    for field, array in state._asdict().items():
        if array is None:
            continue
        checked_state_dtype(f"{name}.{field}.dtype", jnp.result_type(array))


def _dtype_name(dtype: Any) -> str:
    """The name of a dtype, or what was given instead of one."""
    try:
        return jnp.dtype(dtype).name
    except TypeError:
        return repr(dtype)
