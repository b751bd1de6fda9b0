"""Checks of arguments: what is refused, and the message that says how to mend it."""

import functools
import math
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

INPUT_DTYPES = ("float32", "float64", "bfloat16", "float16")
STATE_DTYPES = ("float32", "float64")
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


class Sharing(NamedTuple):
    """Who shares statistics: everything along a mapped axis, or groups of places on it."""

    axis_name: AxisName
    groups: tuple[tuple[int, ...], ...] | None


class Rule(NamedTuple):
    """How x is normalized: all that is fixed when the program is traced."""

    axes: Axes
    epsilon: float
    dtype: Any
    activation: Any = None
    average: Any = None
    sharing: Sharing | None = None
    ghosts: int | None = None
    """The number of groups of examples that are normalized on their own."""
    correction: Any = None
    """That of batch renormalization; None is batch norm."""

    @property
    def reduced(self) -> tuple[int, ...]:
        """The axes over which statistics are taken."""
        return self.axes.reduced


class Numbers(NamedTuple):
    """Momentum and bounds that are numbers, which a program takes as arguments; None for what a schedule gives."""

    momentum: Any
    r_max: Any = None
    d_max: Any = None


class Average(NamedTuple):
    """How the running statistics move: what of it is fixed when the program is traced."""

    schedule: Callable[[Any], Any] | None
    heavy: bool | None
    """Whether a number as momentum is at least 1/2; None if it is not known."""
    running_var: str


def arithmetic_dtype(dtype: Any) -> Any:
    """The dtype to compute in: float32 at least."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def checked_input(x: Any) -> jax.Array:
    """`x` as an array of one of the input dtypes."""
    allowed = f"expected one of {', '.join(INPUT_DTYPES)}"
    try:
        # An array stays as it is: to JAX, asarray is an operation, which debug_nans would check masked values in.
        x = x if isinstance(x, jax.Array) else jnp.asarray(x)
    except (TypeError, ValueError):
        raise TypeError(f"`x` is a {type(x).__name__}, which cannot be converted to an array: {allowed}.") from None
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


def checked_rule(
    x: jax.Array,
    *,
    feature_axis: Any = -1,
    epsilon: Any = 1e-5,
    activation: Any = None,
    dtype: Any = None,
) -> Rule:
    """How x is normalized, by the arguments that training and inference have."""
    axes = checked_axes(feature_axis, x.ndim)
    check_activation(activation, x.shape, arithmetic_dtype(x.dtype))
    return Rule(axes, checked_epsilon(epsilon), checked_dtype(dtype, x.dtype), activation)


def training_rule(
    rule: Rule, x: jax.Array, axis_name: Any, axis_index_groups: Any, ghost_batch_size: Any = None
) -> Rule:
    """The rule with who shares statistics, and with the number of ghost batches."""
    if not rule.reduced and axis_name is None:
        raise ValueError(
            f"`x` has shape {tuple(x.shape)}, and every axis is a feature axis: no axis is left to take statistics "
            "over. Add a batch axis, or name a mapped axis with `axis_name`."
        )
    groups = None if ghost_batch_size is None else checked_groups(ghost_batch_size, x, rule.axes)
    return rule._replace(sharing=checked_sharing(axis_name, axis_index_groups), ghosts=groups)


def check_activation(activation: Any, shape: Sequence[int], dtype: Any) -> None:
    """An elementwise function that captures nothing traced."""
    if activation is None:
        return
    if not callable(activation):
        raise TypeError(f"`activation` is {activation!r}: {ELEMENTWISE}.")
    check_hashable("activation", activation)
    _check_elementwise(activation, tuple(shape), dtype)


ELEMENTWISE = "expected an elementwise function of jax, whose result is a float array of the same shape: jax.nn.relu"


@functools.lru_cache(maxsize=256)
def _check_elementwise(activation: Callable[..., Any], shape: tuple[int, ...], dtype: Any) -> None:
    """What a trace of the activation shows; errors are not remembered."""
    before = jax.ShapeDtypeStruct(shape, dtype)
    try:
        program, after = jax.make_jaxpr(lambda y: activation(y), return_shape=True)(before)
    except (TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise TypeError(f"`activation` is {activation!r}, which fails on a trace ({reason}): {ELEMENTWISE}.") from error
    captured = [value for value in program.consts if isinstance(value, Tracer)]
    if captured:
        raise ValueError(
            f"`activation` is {activation!r}, which captures a traced {captured[0].aval.str_short()}: its derivative "
            "would be lost. Give what is added as `shortcut`, or apply the activation to the result."
        )
    if getattr(after, "shape", None) != shape or not jnp.issubdtype(after.dtype, jnp.floating):
        raise ValueError(f"`activation` turns {before.dtype.name}{list(shape)} into {after}: {ELEMENTWISE}.")


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
    """Each array of a NamedTuple of per-feature vectors is a float array of the expected shape."""
    for field, vector in zip(vectors._fields, vectors, strict=True):
        if vector is None and (name == "params" or (name, field) == ("state", "count")):
            continue
        if not is_array(vector):
            raise TypeError(f"`{name}.{field}` is {vector!r}: expected a numeric array of shape {expected}.")
        if np.shape(vector) != expected:
            mend = "; jbn.upgrade(tree) gives each feature of older statistics its count" if field == "count" else ""
            raise ValueError(f"`{name}.{field}` has shape {np.shape(vector)}: expected {expected}, {why}{mend}.")
        if not jnp.issubdtype(jnp.result_type(vector), jnp.floating):
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
    for field, array in state._asdict().items():
        if array is None:
            continue
        checked_state_dtype(f"{name}.{field}.dtype", jnp.result_type(array))


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
    if _fits(mask.shape, short):
        return jnp.expand_dims(mask, axes.feature)
    if _fits(mask.shape, shape):
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
    if shortcut.dtype.name not in INPUT_DTYPES:
        raise TypeError(f"`shortcut` has dtype {shortcut.dtype.name}: expected one of {', '.join(INPUT_DTYPES)}.")
    return shortcut


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


LEAST_BOUNDS = {"r_max": 1.0, "d_max": 0.0}
"""Below these, a bound of batch renormalization would allow nothing."""


def checked_bound(bound: str, name: str, value: Any) -> float:
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


def scheduled(name: str, schedule: Any, count: Any, dtype: Any) -> jax.Array:
    """What a schedule gives at each count, which it sees as one int32 scalar; averaged counts are rounded up."""
    expected = "expected a function from the count of updates, an int32 scalar, to a number"

    def at(count: jax.Array) -> jax.Array:
        value = schedule(count)
        if not _is_number(value):
            raise TypeError(f"`{name}` gives {value!r}: {expected}.")
        return jnp.asarray(value, dtype)

    for _ in range(np.ndim(count)):
        at = jax.vmap(at)
    try:
        return at(jnp.ceil(count).astype(jnp.int32))
    except jax.errors.JAXTypeError as error:
        reason = str(error).partition("\n")[0]
        raise TypeError(
            f"`{name}` is {schedule!r}, which fails on a traced count ({reason}): {expected}. Write jnp.where or "
            "jax.lax.cond for `if`, and jnp for math."
        ) from error


def checked_average(momentum: Any, running_var: Any, state: Any, train: bool) -> tuple[Average, Any]:
    """What of the moving average is fixed when it is traced, and the momentum, if it is a number."""
    if not isinstance(running_var, str) or running_var not in RUNNING_VAR:
        raise ValueError(f"`running_var` is {running_var!r}: expected one of {', '.join(map(repr, RUNNING_VAR))}.")
    schedule, number = checked_schedule("momentum", momentum, jnp.result_type(state.mean), checked_momentum)
    if train:
        check_counted(state, "momentum", schedule)
    heavy = None if schedule is not None or isinstance(number, Tracer) else bool(number >= 0.5)
    if isinstance(number, Tracer):
        number = jnp.clip(number, 0, 1)
    return Average(schedule, heavy, running_var), number


def check_counted(state: Any, name: str, schedule: Any) -> None:
    """What a schedule reads is there."""
    if schedule is not None and state.count is None:
        raise ValueError(
            f"`state.count` is None, but `{name}` is a schedule of it: expected an array like `state.mean`."
        )


def checked_schedule(name: str, given: Any, dtype: Any, check: Callable[[str, Any], float]) -> tuple[Any, Any]:
    """A schedule and None, or None and a number, concrete and checked or traced."""
    if callable(given):
        if getattr(given, "__module__", "") in ("jbn.momentum", "jbn.renorm") and hasattr(given, "__code__"):
            raise TypeError(f"`{name}` is {given.__module__}.{given.__name__} itself: call it, as in the docs.")
        check_hashable(name, given)
        return given, None
    if isinstance(given, Tracer):
        return None, jnp.asarray(given, dtype)
    return None, np.asarray(check(name, given), dtype)


def check_hashable(name: str, function: Any) -> None:
    """What a program is compiled for is found again by its hash."""
    try:
        hash(function)
    except TypeError:
        raise TypeError(
            f"`{name}` is {function!r}, which has no hash: expected a function, or an object with __hash__ and __eq__, "
            "such as a frozen dataclass."
        ) from None


def _is_number(value: Any) -> bool:
    return is_array(value) and np.ndim(value) == 0


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


def checked_groups(ghost_batch_size: Any, x: jax.Array, axes: Axes) -> int:
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
    if not isinstance(x.shape[0], int):
        raise ValueError(f"`ghost_batch_size` needs a batch of known size, but x has shape {tuple(x.shape)}.")
    if size < 1 or x.shape[0] % size:
        raise ValueError(
            f"`ghost_batch_size` is {size}, which does not divide the {x.shape[0]} examples on the first axis of x "
            f"of shape {tuple(x.shape)}: expected a divisor of {x.shape[0]}."
        )
    _check_groups_fit_shards(x.shape[0] // size, x)
    return x.shape[0] // size


def _check_groups_fit_shards(groups: int, x: jax.Array) -> None:
    """Under explicit sharding, no group of examples may reach over the border of a device."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[0] or ()
    shards = math.prod(sharding.mesh.shape[name] for name in ((names,) if isinstance(names, str) else names))
    if groups % shards:
        raise ValueError(
            f"`ghost_batch_size` is {x.shape[0] // groups}, but each of {shards} devices has {x.shape[0] // shards} of "
            f"the {x.shape[0]} examples: expected a divisor of {x.shape[0] // shards}."
        )


def checked_sharing(axis_name: Any, axis_index_groups: Any) -> Sharing | None:
    """The arguments `axis_name` and `axis_index_groups`; None shares nothing."""
    name = tuple(axis_name) if isinstance(axis_name, list) else axis_name
    for each in name if isinstance(name, tuple) else (name,):
        if isinstance(each, int) or not isinstance(each, Hashable):
            raise TypeError(f"`axis_name` is {axis_name!r}: expected the name of a mapped axis, or a tuple of names.")
    if isinstance(name, tuple) and len(set(name)) < len(name):
        raise ValueError(f"`axis_name` is {axis_name!r}, which names an axis twice: name it once.")
    if axis_index_groups is None:
        return None if name is None else Sharing(name, _check_bound(name))
    if name is None or isinstance(name, tuple):
        raise ValueError(
            f"`axis_index_groups` needs one axis name, but `axis_name` is {axis_name!r}: name the mapped axis that the "
            "groups are on."
        )
    groups = _checked_groups(axis_index_groups)
    _check_bound(name)
    size, places = lax.axis_size(name), sum(map(len, groups))
    if size != places:
        raise ValueError(
            f"`axis_index_groups` is {[list(group) for group in groups]}, which has {places} places, but the axis "
            f"{name!r} has {size}: expected each place from 0 to {size - 1} once."
        )
    return Sharing(name, groups)


def _check_bound(axis_name: Any) -> None:
    """An axis that nothing binds is an error that says what to wrap."""
    try:
        lax.axis_size(axis_name)
    except NameError:
        raise NameError(
            f"`axis_name` is {axis_name!r}, which no surrounding transformation binds: call inside "
            f"jax.shard_map, jax.vmap(..., axis_name={axis_name!r}) or jax.pmap(..., axis_name={axis_name!r}), "
            "or leave `axis_name` out. Under plain jit with a sharded batch it is not needed."
        ) from None


def _checked_groups(axis_index_groups: Any) -> tuple[tuple[int, ...], ...]:
    """Groups that hold each place from 0 on once."""
    expected = "expected lists of the places on the mapped axis, each place once, as in [[0, 1], [2, 3]]"
    try:
        groups = tuple(tuple(operator.index(place) for place in group) for group in axis_index_groups)
    except TypeError:
        raise TypeError(f"`axis_index_groups` is {axis_index_groups!r}: {expected}.") from None
    places = sorted(place for group in groups for place in group)
    if not places or places != list(range(len(places))):
        raise ValueError(f"`axis_index_groups` is {axis_index_groups!r}: {expected}.")
    return groups
