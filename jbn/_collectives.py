"""Sums over mapped axes: the devices of pmap and shard_map, the lanes of vmap; over all of an axis or in groups."""

import operator
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

AxisName = str | tuple[str, ...]
IndexGroups = Sequence[Sequence[int]]


class Sharing(NamedTuple):
    """Who shares statistics: everything along a mapped axis, or groups of places on it."""

    axis_name: AxisName
    groups: tuple[tuple[int, ...], ...] | None


def checked_sharing(axis_name: Any, axis_index_groups: Any) -> Sharing | None:
    """The arguments `axis_name` and `axis_index_groups`; None shares nothing."""
    name = tuple(axis_name) if isinstance(axis_name, list) else axis_name
    for each in name if isinstance(name, tuple) else (name,):
        if isinstance(each, int) or not isinstance(each, Hashable):
            raise TypeError(f"`axis_name` is {axis_name!r}: expected the name of a mapped axis, or a tuple of names.")
    if axis_index_groups is None:
        return None if name is None else Sharing(name, None)
    if name is None or isinstance(name, tuple):
        raise ValueError(
            f"`axis_index_groups` needs one axis name, but `axis_name` is {axis_name!r}: name the mapped axis that the "
            "groups are on."
        )
    return Sharing(name, _checked_groups(axis_index_groups))


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


def sum_over(sharing: Sharing | None, arrays: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Sums of arrays of one shape over those who share, by one collective; without sharing the arrays themselves."""
    if sharing is None:
        return tuple(arrays)
    name = sharing.axis_name
    try:
        if sharing.groups is None:
            return tuple(jax.lax.psum(jnp.stack(arrays), name))
        return tuple(_sum_in_groups(jnp.stack(arrays), sharing.axis_name, sharing.groups))
    except NameError:
        raise NameError(
            f"`axis_name` is {name!r}, which no surrounding transformation binds: call inside "
            f"jax.shard_map, jax.vmap(..., axis_name={name!r}) or jax.pmap(..., axis_name={name!r}), "
            "or leave `axis_name` out. Under plain jit with a sharded batch it is not needed."
        ) from None


def _sum_in_groups(array: jax.Array, axis_name: AxisName, groups: tuple[tuple[int, ...], ...]) -> jax.Array:
    """The sum over one's own group: each group adds up in a slot of its own.

    The groups of lax.psum itself are refused under vmap and under shard_map with check_vma.
    """
    size, places = jax.lax.axis_size(axis_name), sum(map(len, groups))
    if size != places:
        raise ValueError(
            f"`axis_index_groups` is {[list(group) for group in groups]}, which has {places} places, but the axis "
            f"{axis_name!r} has {size}: expected each place from 0 to {size - 1} once."
        )
    group_of = np.zeros(size, np.int32)
    for number, group in enumerate(groups):
        group_of[list(group)] = number
    slot = jnp.arange(len(groups)) == jnp.asarray(group_of)[jax.lax.axis_index(axis_name)]
    slot = slot.reshape(-1, *[1] * array.ndim)
    zero = jnp.zeros((), array.dtype)
    slots = jax.lax.psum(jnp.where(slot, array[None], zero), axis_name)
    return jnp.sum(jnp.where(slot, slots, zero), axis=0)
