"""How a batch is normalized: everything that is fixed when the program is traced, from checked arguments."""

import functools
import math
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from jbn import _arguments, _dtypes, _functions
from jbn._arguments import Axes, AxisName
from jbn._complex import is_complex


class Sharing(NamedTuple):
    """How statistics are shared: over all places on a mapped axis, or within groups of places on it."""

    axis_name: AxisName
    groups: tuple[tuple[int, ...], ...] | None


class Rule(NamedTuple):
    """How x is normalized: everything that is fixed when the program is traced."""

    axes: Axes
    epsilon: Any = None
    dtype: Any = None
    activation: Any = None
    average: Any = None
    sharing: Sharing | None = None
    ghost_batches: int | None = None
    """The number of groups of examples that are normalized on their own."""
    correction: Any = None
    """The correction of batch renormalization; None for batch norm."""

    @property
    def reduced(self) -> tuple[int, ...]:
        """The axes over which statistics are computed."""
        return self.axes.reduced

    @property
    def of_moments(self) -> "Rule":
        """The fields that the moments depend on; norms that agree in them share the trace of their moments."""
        return Rule(self.axes, sharing=self.sharing)


class Numbers(NamedTuple):
    """What is given as numbers, which the program takes as arguments: the weights of old and batch, and the bounds."""

    weights: Any
    r_max: Any = None
    d_max: Any = None


def checked_rule(x: jax.Array, *, feature_axis: Any, epsilon: Any, activation: Any, dtype: Any) -> Rule:
    """The rule from the arguments that training and inference have in common."""
    axes = _arguments.checked_axes(feature_axis, x.ndim)
    activation = checked_activation(activation, x.shape, _dtypes.arithmetic_dtype(x.dtype))
    return Rule(axes, _arguments.checked_epsilon(epsilon), _dtypes.checked_dtype(dtype, x.dtype), activation)


def training_rule(
    rule: Rule, x: jax.Array, axis_name: Any, axis_index_groups: Any, ghost_batch_size: Any = None
) -> Rule:
    """Add the sharing of statistics and the number of ghost batches to the rule."""
    if not rule.reduced and axis_name is None:
        raise ValueError(
            f"`x` has shape {tuple(x.shape)}, and all its axes are feature axes: no axis is left to compute statistics "
            "over. Add a batch axis, or name a mapped axis with `axis_name`."
        )
    groups = None if ghost_batch_size is None else checked_ghost_batches(ghost_batch_size, x, rule.axes)
    return rule._replace(sharing=checked_sharing(axis_name, axis_index_groups), ghost_batches=groups)


ELEMENTWISE = "expected an elementwise JAX function that returns a float array of the same shape, such as jax.nn.relu"


def checked_activation(activation: Any, shape: Sequence[int], dtype: Any) -> Any:
    """Check that an activation is elementwise and captures no traced value; None stays None."""
    if activation is None:
        return None
    if not callable(activation):
        raise TypeError(f"`activation` is {activation!r}: {ELEMENTWISE}.")
    constant = _functions.as_constant("activation", activation)
    _check_elementwise(constant, tuple(shape), dtype)
    return constant


@functools.lru_cache(maxsize=256)
def _check_elementwise(activation: Callable[..., Any], shape: tuple[int, ...], dtype: Any) -> None:
    """Trace the activation to check it; exceptions are not cached."""
    before, shown = jax.ShapeDtypeStruct(shape, dtype), getattr(activation, "__wrapped__", activation)
    try:
        program, after = jax.make_jaxpr(lambda y: activation(y), return_shape=True)(before)
    except (TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise TypeError(f"`activation` is {shown!r}, which cannot be traced ({reason}): {ELEMENTWISE}.") from error
    captured = [value for value in program.consts if isinstance(value, Tracer)]
    if captured:
        raise ValueError(
            f"`activation` is {shown!r}, which captures a traced {captured[0].aval.str_short()}: its derivative "
            "would be lost. Pass an array to be added as `shortcut`, or apply the activation to the result."
        )
    kind = jnp.inexact if is_complex(before) else jnp.floating
    if getattr(after, "shape", None) != shape or not jnp.issubdtype(after.dtype, kind):
        raise ValueError(f"`activation` turns {before.dtype.name}{list(shape)} into {after}: {ELEMENTWISE}.")


def checked_sharing(axis_name: Any, axis_index_groups: Any) -> Sharing | None:
    """Check `axis_name` and `axis_index_groups`; None means that statistics are not shared."""
    name = tuple(axis_name) if isinstance(axis_name, list) else axis_name
    for each in name if isinstance(name, tuple) else (name,):
        if isinstance(each, int) or not isinstance(each, Hashable):
            raise TypeError(f"`axis_name` is {axis_name!r}: expected the name of a mapped axis, or a tuple of names.")
    if isinstance(name, tuple) and len(set(name)) < len(name):
        raise ValueError(f"`axis_name` is {axis_name!r}, which names an axis twice: name it once.")
    if axis_index_groups is None and name is None:
        return None
    if axis_index_groups is None:
        _check_bound(name)
        return Sharing(name, None)
    if name is None or isinstance(name, tuple):
        raise ValueError(
            f"`axis_index_groups` needs one axis name, but `axis_name` is {axis_name!r}: name the mapped axis that the "
            "groups are on."
        )
    groups = _checked_index_groups(axis_index_groups)
    _check_bound(name)
    size, places = lax.axis_size(name), sum(map(len, groups))
    if size != places:
        raise ValueError(
            f"`axis_index_groups` is {[list(group) for group in groups]}, which has {places} indices, but the axis "
            f"{name!r} has size {size}: expected each index from 0 to {size - 1} once."
        )
    return Sharing(name, groups)


def _check_bound(axis_name: Any) -> None:
    """Check that a surrounding transformation binds the axis."""
    for name in axis_name if isinstance(axis_name, tuple) else (axis_name,):
        try:
            lax.axis_size(name)
        except NameError:
            raise NameError(
                f"`axis_name` is {axis_name!r}, but no surrounding transformation binds {name!r}: call inside "
                f"jax.shard_map, jax.vmap(..., axis_name={name!r}) or jax.pmap(..., axis_name={name!r}), "
                "or leave it out. Under plain jit with a sharded batch it is not needed."
            ) from None


def _checked_index_groups(axis_index_groups: Any) -> tuple[tuple[int, ...], ...]:
    """Check that the groups contain each index from 0 on exactly once."""
    expected = "expected lists of the indices on the mapped axis, each index once, as in [[0, 1], [2, 3]]"
    try:
        groups = tuple(tuple(operator.index(place) for place in group) for group in axis_index_groups)
    except TypeError:
        raise TypeError(f"`axis_index_groups` is {axis_index_groups!r}: {expected}.") from None
    places = sorted(place for group in groups for place in group)
    if not places or places != list(range(len(places))):
        raise ValueError(f"`axis_index_groups` is {axis_index_groups!r}: {expected}.")
    return groups


def checked_ghost_batches(ghost_batch_size: Any, x: jax.Array, axes: Axes) -> int:
    """The number of ghost batches in x."""
    try:
        size = _arguments.index(ghost_batch_size)
    except TypeError:
        raise TypeError(f"`ghost_batch_size` is {ghost_batch_size!r}: expected an int or None.") from None
    if 0 in axes.feature:
        raise ValueError(
            f"`ghost_batch_size` splits the first axis of x, which is a feature axis here ({axes.feature}): "
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
    """Check that under explicit sharding no ghost batch is split over devices."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[0] or ()
    shards = math.prod(sharding.mesh.shape[name] for name in ((names,) if isinstance(names, str) else names))
    if groups % shards:
        raise ValueError(
            f"`ghost_batch_size` is {x.shape[0] // groups}, but each of {shards} devices has {x.shape[0] // shards} of "
            f"the {x.shape[0]} examples: expected a divisor of {x.shape[0] // shards}."
        )
