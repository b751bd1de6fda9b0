"""Checks of arguments: what is refused, and the message that says how to mend it."""

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

INPUT_DTYPES = ("float32", "float64", "bfloat16", "float16")
STATE_DTYPES = ("float32", "float64")
Numeric = int | float | np.generic | np.ndarray | jax.Array
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
    try:
        # An array stays as it is: to JAX, asarray is an operation, which debug_nans would check masked values in.
        x = x if isinstance(x, jax.Array) else jnp.asarray(x)
    except (TypeError, ValueError):
        raise TypeError(f"`x` is a {type(x).__name__} that makes no array: {allowed}.") from None
    if x.dtype.name not in INPUT_DTYPES:
        complex_valued = jnp.issubdtype(x.dtype, jnp.complexfloating)
        mend = "Normalize x.real and x.imag apart" if complex_valued else "Convert it first: x.astype(jnp.float32)"
        raise TypeError(f"`x` has dtype {x.dtype.name}: {allowed}. {mend}.")
    return x


def checked_axes(feature_axis: int | Sequence[int], ndim: int, name: str = "feature_axis", array: str = "x") -> Axes:
    """Feature axes counted from the front and in ascending order, and the axes left to reduce."""
    try:
        given = tuple(feature_axis) if isinstance(feature_axis, Sequence | np.ndarray) else (feature_axis,)
        axes = [_index(axis) for axis in given]
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


def check_reducible(shape: Sequence[int], axes: Axes, axis_name: Any) -> None:
    """Training needs an axis to take statistics over."""
    if not axes.reduced and axis_name is None:
        raise ValueError(
            f"`x` has shape {tuple(shape)}, and every axis is a feature axis: no axis is left to take statistics over. "
            "Add a batch axis, or name a mapped axis with `axis_name`."
        )


def _index(value: Any) -> int:
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
    """Each array of a NamedTuple of per-feature vectors is a float array of the expected shape; `count` is a scalar."""
    for field, vector in zip(vectors._fields, vectors, strict=True):
        if vector is None and name == "params":
            continue
        shape = () if field == "count" else expected
        if not is_array(vector):
            raise TypeError(f"`{name}.{field}` is {vector!r}: expected a numeric array of shape {shape}.")
        if jnp.shape(vector) != shape:
            raise ValueError(f"`{name}.{field}` has shape {jnp.shape(vector)}: expected {shape}, {why}.")
        if field != "count" and not jnp.issubdtype(jnp.result_type(vector), jnp.floating):
            raise TypeError(f"`{name}.{field}` has dtype {jnp.result_type(vector).name}: expected a float dtype.")


def is_array(value: Any) -> TypeGuard[Numeric]:
    """A number or an array of them, as NumPy's of objects, texts and dates, and JAX's of random keys, are not."""
    dtype = getattr(value, "dtype", np.dtype(float))
    return isinstance(value, Numeric) and getattr(dtype, "kind", "O") not in "MOSUm"


def checked_features(features: Any, name: str = "features") -> tuple[int, ...]:
    """The shape of the features."""
    given = tuple(features) if isinstance(features, Sequence) else (features,)
    try:
        shape = tuple(_index(size) for size in given)
    except TypeError:
        raise TypeError(f"`{name}` is {features!r}: expected an int or a sequence of ints.") from None
    if any(size < 0 for size in shape):
        raise ValueError(f"`{name}` is {features!r}: expected sizes of at least 0.")
    return shape


def checked_state_dtype(name: str, dtype: Any) -> Any:
    """Running statistics in half precision stop moving, so they are refused."""
    if _dtype_name(dtype) not in STATE_DTYPES:
        raise TypeError(
            f"`{name}` is {_dtype_name(dtype)}: expected {' or '.join(STATE_DTYPES)}, since running statistics "
            "lose small updates in half precision. For low-precision compute give x in that dtype instead."
        )
    return jnp.dtype(dtype)


def check_state_dtype(state: Any, name: str = "state") -> None:
    """The dtypes of running statistics."""
    for field in ("mean", "var"):
        checked_state_dtype(f"{name}.{field}.dtype", jnp.result_type(getattr(state, field)))


def checked_mask(mask: Any, shape: Sequence[int], axes: Axes) -> jax.Array | None:
    """The mask with size 1 on feature axes, so that it broadcasts against x; None stays None."""
    if mask is None:
        return None
    try:
        mask = jnp.asarray(mask)
    except (TypeError, ValueError):
        raise TypeError(f"`mask` is a {type(mask).__name__} that makes no array: expected a boolean one.") from None
    if mask.dtype != jnp.bool_:
        raise TypeError(
            f"`mask` has dtype {mask.dtype.name}: expected bool, where True counts. "
            "For a mask of zeros and ones use mask.astype(bool)."
        )
    short = tuple(shape[axis] for axis in axes.reduced)
    long = tuple(1 if axis in axes.feature else size for axis, size in enumerate(shape))
    if _fits(mask.shape, short):
        return jnp.expand_dims(mask, axes.feature)
    if _fits(mask.shape, long):
        return mask
    raise ValueError(
        f"`mask` has shape {mask.shape}, which does not match x of shape {tuple(shape)} without its feature axes "
        f"{axes.feature}: expected {short} or {long}, where an axis may also be 1."
    )


def _fits(shape: Sequence[int], expected: Sequence[int]) -> bool:
    return len(shape) == len(expected) and all(m in (1, n) for m, n in zip(shape, expected, strict=True))


def check_train(train: Any, name: str = "train", true: str = "batch", false: str = "running") -> None:
    """Training and inference are two programs, so the choice is made in Python."""
    if isinstance(train, Tracer):
        raise TypeError(
            f"`{name}` is traced, but it selects the program and must be a Python bool: pass it by "
            f"jax.jit(..., static_argnames='{name}'), or bind it with functools.partial before jit."
        )
    if not isinstance(train, bool | np.bool_):
        raise TypeError(f"`{name}` is {train!r}: expected True ({true} statistics) or False ({false} statistics).")


def checked_epsilon(epsilon: Any) -> float:
    """A concrete, positive number that float32 can hold."""
    _check_concrete("epsilon", epsilon, "1e-5")
    if not _is_number(epsilon):
        raise TypeError(f"`epsilon` is {epsilon!r}: expected a number such as 1e-5.")
    value, limits = float(epsilon), np.finfo(np.float32)
    if not float(limits.tiny) <= value <= float(limits.max):
        raise ValueError(f"`epsilon` is {value}: expected a positive number that float32 can hold, such as 1e-5.")
    return value


def _check_concrete(name: str, value: Any, example: str) -> None:
    """What a trace stands for is not known yet."""
    if isinstance(value, Tracer):
        raise TypeError(f"`{name}` is traced: expected a Python number such as {example}, bound before jit.")


def checked_momentum(name: str, momentum: Any) -> float:
    """A concrete share of the old value."""
    _check_concrete(name, momentum, "0.99")
    if not _is_number(momentum):
        raise TypeError(
            f"`{name}` is {momentum!r}: expected a number in [0, 1], or where a schedule is allowed a function "
            "count -> momentum, such as jbn.momentum.warmup(0.99)."
        )
    number = float(momentum)
    if not 0 <= number <= 1:
        raise ValueError(
            f"`{name}` is {number}: expected a number in [0, 1], the share of the old value to keep. "
            "PyTorch's momentum is one minus this: see jbn.momentum.from_torch."
        )
    return number


def check_momentum(momentum: Any) -> None:
    """A concrete number is checked before any work; what a schedule or a trace gives is clipped where it is used."""
    if not callable(momentum) and not isinstance(momentum, Tracer):
        checked_momentum("momentum", momentum)


LEAST_BOUNDS = {"r_max": 1.0, "d_max": 0.0}
"""Below these, a bound of batch renormalization would allow nothing."""


def checked_bound(bound: str, value: Any, name: str) -> float:
    """A concrete bound of batch renormalization, r_max or d_max, given as the argument `name`."""
    _check_concrete(name, value, "3.0")
    least = LEAST_BOUNDS[bound]
    if not _is_number(value):
        raise TypeError(
            f"`{name}` is {value!r}: expected a number of at least {least:g}, or where a schedule is allowed a "
            f"function count -> number, such as jbn.renorm.{bound}()."
        )
    if not float(value) >= least:
        raise ValueError(f"`{name}` is {float(value)}: expected a number of at least {least:g}; inf is no bound.")
    return float(value)


def check_bound(bound: str, value: Any) -> None:
    """A concrete number is checked before any work; what a schedule or a trace gives is clipped where it is used."""
    if not callable(value) and not isinstance(value, Tracer):
        checked_bound(bound, value, bound)


def scheduled(name: str, given: Any, count: jax.Array, dtype: Any) -> jax.Array:
    """What a number, or a schedule of the count of updates, comes to."""
    expected = "expected a number, or a function from the count of updates to a scalar"
    try:
        value = given(count) if callable(given) else given
    except TypeError as error:
        reason = str(error).partition("\n")[0]
        raise TypeError(
            f"`{name}` is {given!r}, which fails on the count ({reason}): {expected}. Under jit the count is traced: "
            "write jnp.where for `if`, and jnp for math."
        ) from error
    if not _is_number(value):
        raise TypeError(f"`{name}` gives {value!r}: {expected}.")
    return jnp.asarray(value, dtype)


def _is_number(value: Any) -> bool:
    return is_array(value) and np.ndim(value) == 0


def check_running_var(running_var: Any) -> None:
    """The rule by which the running variance takes a batch's."""
    if not isinstance(running_var, str) or running_var not in RUNNING_VAR:
        raise ValueError(f"`running_var` is {running_var!r}: expected one of {', '.join(map(repr, RUNNING_VAR))}.")


def checked_dtype(dtype: Any, default: Any, name: str = "dtype") -> Any:
    """The dtype of the result, or of parameters."""
    if dtype is None:
        return default
    if _dtype_name(dtype) not in INPUT_DTYPES:
        raise TypeError(f"`{name}` is {_dtype_name(dtype)}: expected one of {', '.join(INPUT_DTYPES)}.")
    return jnp.dtype(dtype)


def _dtype_name(dtype: Any) -> str:
    """The name of a dtype, or what was given instead of one."""
    try:
        return jnp.dtype(dtype).name
    except TypeError:
        return repr(dtype)


def checked_groups(ghost_batch_size: Any, shape: Sequence[int], axes: Axes) -> int:
    """The number of ghost batches in x."""
    try:
        size = _index(ghost_batch_size)
    except TypeError:
        raise TypeError(f"`ghost_batch_size` is {ghost_batch_size!r}: expected an int or None.") from None
    if 0 in axes.feature:
        raise ValueError(
            f"`ghost_batch_size` cuts the first axis of x, which is a feature axis here ({axes.feature}): "
            "move the batch to the first axis."
        )
    if not isinstance(shape[0], int):
        raise ValueError(f"`ghost_batch_size` needs a batch of known size, but x has shape {tuple(shape)}.")
    if size < 1 or shape[0] % size:
        raise ValueError(
            f"`ghost_batch_size` is {size}, which does not divide the {shape[0]} examples on the first axis of x "
            f"of shape {tuple(shape)}: expected a divisor of {shape[0]}."
        )
    return shape[0] // size


def check_groups_fit_shards(groups: int, x: jax.Array) -> None:
    """Under explicit sharding, no group of examples may reach over the border of a device."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[0] or ()
    shards = math.prod(sharding.mesh.shape[name] for name in ((names,) if isinstance(names, str) else names))
    if groups % shards:
        raise ValueError(
            f"`ghost_batch_size` is {x.shape[0] // groups}, but each of {shards} devices has {x.shape[0] // shards} of "
            f"the {x.shape[0]} examples: expected a divisor of {x.shape[0] // shards}."
        )
