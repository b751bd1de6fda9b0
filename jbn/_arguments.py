"""Checks of arguments: what is refused, and the message that says how to mend it."""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jbn._complex import is_complex
from jbn._dtypes import INPUT_DTYPES, arithmetic_dtype, of_kind

STATISTICS = ("var", "count")
"""Fields that are real for complex x too."""
Numeric = int | float | np.generic | np.ndarray | jax.Array
AxisName = str | tuple[str, ...]
IndexGroups = Sequence[Sequence[int]]
RUNNING_VAR = ("biased", "unbiased", "total")


class Axes(NamedTuple):
    """The axes of an input: those with statistics of their own, and those that are reduced."""

    feature: tuple[int, ...]
    reduced: tuple[int, ...]

    def features(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of `mean`, `var`, `scale` and `bias` for an input of this shape."""
        return tuple(shape[axis] for axis in self.feature)


def checked_input(x: Any) -> jax.Array:
    """`x` as an array of one of the input dtypes."""
    allowed = f"expected one of {', '.join(INPUT_DTYPES)}"
    if hasattr(x, "_fields"):
        raise TypeError(f"`x` is a {type(x).__name__}, not an array: {allowed}.")
    try:
        # An array stays as it is: to JAX, asarray is an operation, which debug_nans would check masked values in.
        x = x if isinstance(x, jax.Array) else jnp.asarray(x)
    except (TypeError, ValueError):
        given = f"of dtype {x.dtype}" if isinstance(x, np.ndarray) else "which cannot be converted to an array"
        raise TypeError(f"`x` is a {type(x).__name__}, {given}: {allowed}.") from None
    if x.dtype.name not in INPUT_DTYPES:
        raise TypeError(f"`x` has dtype {x.dtype.name}: {allowed}. Convert it first: x.astype(jnp.float32).")
    return x


def checked_axes(feature_axis: int | Sequence[int], ndim: int, name: str = "feature_axis", array: str = "x") -> Axes:
    """Feature axes counted from the front and in ascending order, and the axes left to reduce."""
    try:
        given = tuple(feature_axis) if isinstance(feature_axis, Sequence | np.ndarray) else (feature_axis,)
        axes = [index(axis) for axis in given]
    except TypeError:
        raise TypeError(f"`{name}` is {feature_axis!r}: expected an int or a sequence of ints.") from None
    for axis in axes:
        if not -ndim <= axis < ndim:
            allowed = f"expected {-ndim} to {ndim - 1}" if ndim else "a scalar has no features, give it axes"
            raise ValueError(f"`{name}` {axis} is out of range for {array} of {ndim} dimensions: {allowed}.")
    feature = tuple(sorted(axis % ndim for axis in axes))
    if len(set(feature)) != len(feature):
        raise ValueError(f"`{name}` {feature_axis!r} names an axis twice: name it once.")
    return Axes(feature, tuple(axis for axis in range(ndim) if axis not in feature))


def index(value: Any) -> int:
    """An int, which True and False are not meant as."""
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def check_type(name: str, value: Any, kind: type) -> None:
    """`value` is one of jbn's NamedTuples."""
    if not isinstance(value, kind):
        fields = ", ".join(kind._fields)
        raise TypeError(f"`{name}` is a {type(value).__name__}: expected jbn.{kind.__name__}({fields}).")


def check_vectors(name: str, vectors: Any, expected: tuple[int, ...], why: str) -> None:
    """Each array of a NamedTuple of per-feature vectors is a float array of the expected shape."""
    for field, vector in zip(vectors._fields, vectors, strict=True):
        if vector is None and (name == "params" or (name, field) == ("state", "count")):
            continue
        if not is_array(vector):
            raise TypeError(f"`{name}.{field}` is {vector!r}: expected a numeric array of shape {expected}.")
        if np.shape(vector) != expected:
            raise ValueError(
                f"`{name}.{field}` has shape {np.shape(vector)}: expected {expected}, {why}{of_upgrade(field)}."
            )
        dtype = jnp.result_type(vector)
        if not jnp.issubdtype(dtype, jnp.floating if field in STATISTICS else jnp.inexact):
            raise TypeError(f"`{name}.{field}` has dtype {dtype.name}: expected a float dtype{of_upgrade(field)}.")


def of_upgrade(field: str) -> str:
    """The remedy for a count of jbn 0.1, to end a message with."""
    return "; jbn.upgrade(tree) gives each feature of older statistics its count" if field == "count" else ""


def is_array(value: Any) -> TypeGuard[Numeric]:
    """A number or an array of them, as NumPy's of objects, texts and dates, and JAX's of random keys, are not."""
    dtype = getattr(value, "dtype", np.dtype(float))
    return isinstance(value, Numeric) and getattr(dtype, "kind", "O") not in "MOSUm"


def checked_features(features: Any, name: str = "features") -> tuple[int, ...]:
    """The shape of the features."""
    given = tuple(features) if isinstance(features, Sequence) else (features,)
    try:
        shape = tuple(index(size) for size in given)
    except TypeError:
        raise TypeError(f"`{name}` is {features!r}: expected an int or a sequence of ints.") from None
    if any(size < 0 for size in shape):
        raise ValueError(f"`{name}` is {features!r}: expected sizes of at least 0.")
    return shape


def checked_mask(mask: Any, shape: Sequence[int], axes: Axes) -> jax.Array | None:
    """The mask with the rank of x, so that it broadcasts against it; None stays None."""
    if mask is None:
        return None
    try:
        mask = jnp.asarray(mask)
    except (TypeError, ValueError):
        raise TypeError(
            f"`mask` is a {type(mask).__name__}, which cannot be converted to an array: expected a boolean one."
        ) from None
    if mask.dtype != jnp.bool_:
        raise TypeError(
            f"`mask` has dtype {mask.dtype.name}: expected bool, where True counts. "
            "For a mask of zeros and ones use mask.astype(bool)."
        )
    short = tuple(shape[axis] for axis in axes.reduced)
    if fits(mask.shape, short):
        return jnp.expand_dims(mask, axes.feature)
    if fits(mask.shape, shape):
        return mask
    raise ValueError(
        f"`mask` has shape {mask.shape}, which does not match x of shape {tuple(shape)} without its feature axes "
        f"{axes.feature}: expected {short}, or {tuple(shape)}, where an axis may also be 1."
    )


def checked_shortcut(shortcut: Any, x: jax.Array) -> jax.Array | None:
    """An array like x; None stays None."""
    if shortcut is None:
        return None
    if not is_array(shortcut):
        raise TypeError(f"`shortcut` is {shortcut!r}: expected an array of the shape of x, {x.shape}.")
    shortcut = shortcut if isinstance(shortcut, jax.Array) else jnp.asarray(shortcut)
    if shortcut.shape != x.shape:
        raise ValueError(
            f"`shortcut` has shape {shortcut.shape}, but x has {x.shape}: expected the same shape. Project it first, "
            "as residual networks do with a convolution of size 1."
        )
    if shortcut.dtype.name not in INPUT_DTYPES or is_complex(shortcut) != is_complex(x):
        raise TypeError(
            f"`shortcut` has dtype {shortcut.dtype.name}: expected {of_kind(x.dtype)}, as x has {x.dtype.name}."
        )
    # The arithmetic is in the dtype that x has it in.
    narrow = arithmetic_dtype(shortcut.dtype) == arithmetic_dtype(x.dtype)
    return shortcut if narrow else shortcut.astype(arithmetic_dtype(x.dtype))


def fits(shape: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether a mask of this shape has the axes that are expected, of their size or of size 1."""
    return len(shape) == len(expected) and all(m in (1, n) for m, n in zip(shape, expected, strict=True))


def check_flag(name: str, flag: Any, true: str, false: str) -> None:
    """A flag selects one of two programs, so it is a bool of Python; `true` and `false` say what it does."""
    if isinstance(flag, Tracer):
        raise TypeError(
            f"`{name}` is traced, but it selects the program and must be a Python bool: pass it by "
            f"jax.jit(..., static_argnames='{name}'), or bind it with functools.partial before jit."
        )
    if not isinstance(flag, bool | np.bool_):
        raise TypeError(f"`{name}` is {flag!r}: expected True ({true}) or False ({false}).")


def checked_epsilon(epsilon: Any) -> float:
    """A concrete, positive number that float32 can hold."""
    check_concrete("epsilon", epsilon, "1e-5")
    if not is_number(epsilon):
        raise TypeError(f"`epsilon` is {epsilon!r}: expected a number such as 1e-5.")
    value, limits = float(epsilon), np.finfo(np.float32)
    if not float(limits.tiny) <= value <= float(limits.max):
        raise ValueError(f"`epsilon` is {value}: expected a positive number that float32 can hold, such as 1e-5.")
    return value


def check_concrete(name: str, value: Any, example: str) -> None:
    """What a trace stands for is not known yet."""
    if isinstance(value, Tracer):
        raise TypeError(f"`{name}` is traced: expected a Python number such as {example}, bound before jit.")


def is_number(value: Any) -> bool:
    return is_array(value) and np.ndim(value) == 0
