"""Checks of arguments, with error messages that say how to fix the call."""

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
"""Fields that are real even for complex x."""
Numeric = int | float | np.generic | np.ndarray | jax.Array
AxisName = str | tuple[str, ...]
IndexGroups = Sequence[Sequence[int]]
RUNNING_VAR = ("biased", "unbiased", "total")


class Axes(NamedTuple):
    """The axes of an input: feature axes, which have statistics of their own, and reduced axes."""

    feature: tuple[int, ...]
    reduced: tuple[int, ...]

    def features(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of `mean`, `var`, `scale` and `bias` for an input of this shape."""
        return tuple(shape[axis] for axis in self.feature)


def checked_input(x: Any) -> jax.Array:
    """Convert `x` to an array and check that it has one of the input dtypes."""
    allowed = f"expected one of {', '.join(INPUT_DTYPES)}"
    if hasattr(x, "_fields"):
        raise TypeError(f"`x` is a {type(x).__name__}, not an array: {allowed}.")
    try:
        # jnp.asarray of an array is an operation of JAX: under debug_nans, it would raise for NaN in masked values.
        x = x if isinstance(x, jax.Array) else jnp.asarray(x)
    except (TypeError, ValueError):
        given = f"of dtype {x.dtype}" if isinstance(x, np.ndarray) else "which cannot be converted to an array"
        raise TypeError(f"`x` is a {type(x).__name__}, {given}: {allowed}.") from None
    if x.dtype.name not in INPUT_DTYPES:
        raise TypeError(f"`x` has dtype {x.dtype.name}: {allowed}. Convert it first, with x.astype(jnp.float32).")
    return x


def checked_axes(feature_axis: int | Sequence[int], ndim: int, name: str = "feature_axis", array: str = "x") -> Axes:
    """Feature axes, as nonnegative numbers in ascending order, and the other axes, which are reduced."""
    try:
        given = tuple(feature_axis) if isinstance(feature_axis, Sequence | np.ndarray) else (feature_axis,)
        axes = [index(axis) for axis in given]
    except TypeError:
        raise TypeError(f"`{name}` is {feature_axis!r}: expected an int or a sequence of ints.") from None
    for axis in axes:
        if not -ndim <= axis < ndim:
            allowed = f"expected {-ndim} to {ndim - 1}" if ndim else "expected an array with at least one axis"
            raise ValueError(f"`{name}` {axis} is out of range for {array} of {ndim} dimensions: {allowed}.")
    feature = tuple(sorted(axis % ndim for axis in axes))
    if len(set(feature)) != len(feature):
        raise ValueError(f"`{name}` {feature_axis!r} names an axis twice: name it once.")
    return Axes(feature, tuple(axis for axis in range(ndim) if axis not in feature))


def index(value: Any) -> int:
    """Convert to an int, as operator.index does, but refuse True and False."""
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def check_type(name: str, value: Any, kind: type) -> None:
    """Check that `value` is of `kind`, one of jbn's NamedTuples."""
    if not isinstance(value, kind):
        fields = ", ".join(kind._fields)
        raise TypeError(f"`{name}` is a {type(value).__name__}: expected jbn.{kind.__name__}({fields}).")


def check_vectors(name: str, vectors: Any, expected: tuple[int, ...], why: str) -> None:
    """Check that the fields of a NamedTuple are float arrays of the expected shape."""
    for field, vector in zip(vectors._fields, vectors, strict=True):
        if vector is None and (name == "params" or (name, field) == ("state", "count")):
            continue
        if not is_array(vector):
            raise TypeError(
                f"`{name}.{field}` is {described(vector)}: expected a numeric array of NumPy or JAX, of shape "
                f"{expected}."
            )
        if np.shape(vector) != expected:
            # The mean and the variance fit already, so a count that does not comes from jbn 0.1.
            advice = f"one for each feature{of_upgrade(field)}" if field == "count" else why
            raise ValueError(f"`{name}.{field}` has shape {np.shape(vector)}: expected {expected}, {advice}.")
        dtype = jnp.result_type(vector)
        if not jnp.issubdtype(dtype, jnp.floating if field in STATISTICS else jnp.inexact):
            raise TypeError(f"`{name}.{field}` has dtype {dtype.name}: expected a float dtype{of_upgrade(field)}.")


def of_upgrade(field: str) -> str:
    """The advice for a count of jbn 0.1, to append to a message."""
    return ". jbn.upgrade(tree) gives each feature of older statistics its own count" if field == "count" else ""


def fitting_axis(shape: Sequence[int], features: tuple[int, ...]) -> int | None:
    """The first axis whose size is that of the features, for advice in a message; None if there is none."""
    return next((axis for axis, size in enumerate(shape) if (size,) == features), None)


def described(value: Any) -> str:
    """A value for a message: arrays of any library by their type and shape, NamedTuples by their type."""
    kind, shape = type(value), getattr(value, "shape", None)
    if shape is None and not hasattr(value, "_fields"):
        return repr(value)
    name = f"a {kind.__module__.partition('.')[0]}.{kind.__name__}"
    return name if shape is None else f"{name} of shape {tuple(shape)}"


def is_array(value: Any) -> TypeGuard[Numeric]:
    """Whether a value is a number or an array of numbers, not of objects, strings, dates or random keys."""
    dtype = getattr(value, "dtype", np.dtype(float))
    return isinstance(value, Numeric) and getattr(dtype, "kind", "O") not in "MOSUm"


def checked_features(features: Any, name: str = "features") -> tuple[int, ...]:
    """Convert `features`, an int or a sequence of ints, to the feature shape."""
    given = tuple(features) if isinstance(features, Sequence) else (features,)
    try:
        shape = tuple(index(size) for size in given)
    except TypeError:
        raise TypeError(f"`{name}` is {features!r}: expected an int or a sequence of ints.") from None
    if any(size < 0 for size in shape):
        raise ValueError(f"`{name}` is {features!r}: expected sizes of at least 0.")
    return shape


def checked_mask(mask: Any, shape: Sequence[int], axes: Axes) -> jax.Array | None:
    """The mask with the rank of x, so that it broadcasts against x; None stays None."""
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
            f"`mask` has dtype {mask.dtype.name}: expected bool, True for valid values. "
            "For a mask of zeros and ones, use mask.astype(bool)."
        )
    short = tuple(shape[axis] for axis in axes.reduced)
    if fits(mask.shape, short):
        return jnp.expand_dims(mask, axes.feature)
    if fits(mask.shape, shape):
        return mask
    raise ValueError(
        f"`mask` has shape {mask.shape}, which does not fit x of shape {tuple(shape)} with feature axes "
        f"{axes.feature}: expected {short} or {tuple(shape)}. Any axis may also have size 1."
    )


def checked_shortcut(shortcut: Any, x: jax.Array) -> jax.Array | None:
    """The shortcut as an array with the shape and kind of dtype of x; None stays None."""
    if shortcut is None:
        return None
    if not is_array(shortcut):
        raise TypeError(
            f"`shortcut` is {described(shortcut)}: expected an array of NumPy or JAX with the shape of x, {x.shape}."
        )
    shortcut = shortcut if isinstance(shortcut, jax.Array) else jnp.asarray(shortcut)
    if shortcut.shape != x.shape:
        raise ValueError(
            f"`shortcut` has shape {shortcut.shape}, but x has {x.shape}: expected the same shape. Project it first, "
            "for example with a 1x1 convolution."
        )
    if shortcut.dtype.name not in INPUT_DTYPES or is_complex(shortcut) != is_complex(x):
        raise TypeError(
            f"`shortcut` has dtype {shortcut.dtype.name}, but x has {x.dtype.name}: expected {of_kind(x.dtype)}."
        )
    # The arithmetic is in the arithmetic dtype of x, so a shortcut with another one is converted.
    narrow = arithmetic_dtype(shortcut.dtype) == arithmetic_dtype(x.dtype)
    return shortcut if narrow else shortcut.astype(arithmetic_dtype(x.dtype))


def fits(shape: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether a mask of this shape has the expected axes, each with the expected size or size 1."""
    return len(shape) == len(expected) and all(m in (1, n) for m, n in zip(shape, expected, strict=True))


def check_flag(name: str, flag: Any, true: str, false: str) -> None:
    """Check that a flag is a Python bool, since it selects a program; `true` and `false` describe the two programs."""
    if isinstance(flag, Tracer):
        raise TypeError(
            f"`{name}` is traced, but it selects the program and must be a Python bool. Make it static with "
            f"jax.jit(..., static_argnames='{name}'), or bind it with functools.partial before jit."
        )
    if not isinstance(flag, bool | np.bool_):
        raise TypeError(f"`{name}` is {flag!r}: expected True ({true}) or False ({false}).")


def checked_epsilon(epsilon: Any) -> float:
    """Check that epsilon is a concrete, positive number that float32 can represent."""
    check_concrete("epsilon", epsilon, "1e-5")
    if not is_number(epsilon):
        raise TypeError(f"`epsilon` is {epsilon!r}: expected a number such as 1e-5.")
    value, limits = float(epsilon), np.finfo(np.float32)
    if not float(limits.tiny) <= value <= float(limits.max):
        raise ValueError(f"`epsilon` is {value}: expected a positive number that float32 can hold, such as 1e-5.")
    return value


def check_concrete(name: str, value: Any, example: str) -> None:
    """Check that a value is not traced."""
    if isinstance(value, Tracer):
        raise TypeError(f"`{name}` is traced: expected a Python number such as {example}, bound before jit.")


def is_number(value: Any) -> bool:
    return is_array(value) and np.ndim(value) == 0
