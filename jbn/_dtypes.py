"""The dtypes of input, arithmetic, statistics and results."""

from typing import Any

import jax
import jax.numpy as jnp

from jbn._complex import is_complex

INPUT_DTYPES = ("float32", "float64", "bfloat16", "float16", "complex64", "complex128")
STATE_DTYPES = ("float32", "float64")


def arithmetic_dtype(dtype: Any) -> Any:
    """The dtype to compute in: at least float32, or complex64 for complex input."""
    if is_complex(dtype):
        return dtype
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def checked_dtype(dtype: Any, default: Any, name: str = "dtype") -> Any:
    """Check a dtype: complex exactly if `default`, the dtype of x, is; any input dtype if `default` is None."""
    if dtype is None:
        return default
    if _dtype_name(dtype) not in INPUT_DTYPES:
        raise TypeError(f"`{name}` is {_dtype_name(dtype)}: expected one of {', '.join(INPUT_DTYPES)}.")
    if default is not None and is_complex(default) != is_complex(jnp.dtype(dtype)):
        raise TypeError(f"`{name}` is {_dtype_name(dtype)}, but x has {default.name}: expected {of_kind(default)}.")
    return jnp.dtype(dtype)


def of_kind(dtype: Any) -> str:
    """A list for messages: the complex input dtypes for a complex dtype, otherwise the float ones."""
    return "one of " + ", ".join(name for name in INPUT_DTYPES if is_complex(jnp.dtype(name)) == is_complex(dtype))


def check_kinds(params: Any, state: Any, x: jax.Array, name: str = "x") -> None:
    """Check that the mean is complex exactly if x is, and that scale and bias are complex only if x is."""
    mean = jnp.result_type(state.mean)
    if is_complex(mean) != is_complex(x):
        wanted = "complex64 or complex128" if is_complex(x) else "a float dtype"
        raise TypeError(
            f"`state.mean` has dtype {mean.name}, but {name} has dtype {x.dtype.name}: expected {wanted}. "
            f"Create it with jbn.init(features, jnp.{arithmetic_dtype(x.dtype).name})."
        )
    for field, vector in params._asdict().items():
        if vector is not None and is_complex(jnp.result_type(vector)) and not is_complex(x):
            raise TypeError(
                f"`params.{field}` has dtype {jnp.result_type(vector).name}, but {name} has dtype {x.dtype.name}: "
                "expected a float dtype."
            )


def checked_state_dtype(name: str, dtype: Any, remedy: str = "Leave it out") -> Any:
    """Check the dtype of running statistics; half precision is refused, because it loses small updates."""
    if not is_state_dtype(dtype):
        raise TypeError(
            f"`{name}` is {_dtype_name(dtype)}: expected {' or '.join(STATE_DTYPES)}, since running statistics "
            f"lose small updates in half precision. {remedy}. x itself may be in half precision."
        )
    return jnp.dtype(dtype)


def is_state_dtype(dtype: Any) -> bool:
    """Whether a dtype (the dtype of its real part, if complex) is precise enough for running statistics."""
    name = _dtype_name(dtype)
    return name in STATE_DTYPES or name.startswith("complex")


def check_state_dtype(state: Any, name: str = "state") -> None:
    """Check the dtype of each array of running statistics."""
    for field, array in state._asdict().items():
        if array is None:
            continue
        checked_state_dtype(f"{name}.{field}.dtype", jnp.result_type(array), "Convert it with `.astype`")


def _dtype_name(dtype: Any) -> str:
    """The name of a dtype, or the repr of a value that is not a dtype."""
    try:
        return jnp.dtype(dtype).name
    except TypeError:
        return repr(dtype)
