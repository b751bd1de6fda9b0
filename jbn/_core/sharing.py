"""Sums over mapped axes: the devices of pmap and shard_map, the lanes of vmap; over all of an axis or in groups."""

import contextlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jbn._arguments import AxisName, Sharing

FEW = 16
"""Up to so many parts are sent whole: one collective more costs a device more than their bytes do."""


def sum_over(sharing: Sharing, arrays: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Sums of arrays over those who share, by one collective."""
    with _binding(sharing.axis_name):
        row = _as_row(arrays)
        if sharing.groups is None or _takes_groups(sharing):
            return _as_arrays(_psum(row, sharing), arrays)
        group_of, _ = _tables(sharing)
        own = jnp.arange(len(sharing.groups)) == _own(group_of, sharing)
        slots = jax.lax.psum(_rows_where(own, row[None]), sharing.axis_name)
        return _as_arrays(jnp.sum(_rows_where(own, slots), axis=0), arrays)


def every_part(sharing: Sharing, arrays: Sequence[jax.Array]) -> tuple[jax.Array, ...] | None:
    """The arrays of each of those who share, stacked along a new first axis, by one collective; None if they are many.

    Each writes into a slot of its own, and zeros stand for who does not share. That sends as many rows as there are
    slots, so that two sums send less where there are many.
    """
    with _binding(sharing.axis_name):
        group_of, seat_of = _tables(sharing)
        apart = sharing.groups is None or _takes_groups(sharing)
        slots = int(max(seat_of)) + 1 if apart else len(group_of)
        if slots > FEW:
            return None
        slot = _own(seat_of, sharing) if apart else jax.lax.axis_index(sharing.axis_name)
        written = _rows_where(jnp.arange(slots) == slot, _as_row(arrays)[None])
        if apart:
            return _as_arrays(_psum(written, sharing), arrays)
        parts = jax.lax.psum(written, sharing.axis_name)
        return _as_arrays(_rows_where(jnp.asarray(group_of) == _own(group_of, sharing), parts), arrays)


def _psum(array: jax.Array, sharing: Sharing) -> jax.Array:
    groups = sharing.groups and [list(group) for group in sharing.groups]
    return jax.lax.psum(array, sharing.axis_name, axis_index_groups=groups)


def _takes_groups(sharing: Sharing) -> bool:
    """Whether lax.psum takes these groups here: groups of one size (TPUs take no others), under pmap or shard_map,
    unless that tracks which values vary (check_vma)."""
    if sharing.groups is None or len(set(map(len, sharing.groups))) > 1:
        return False
    manual = sharing.axis_name in jax.sharding.get_abstract_mesh().manual_axes
    return manual and jax.typeof(jax.lax.axis_index(sharing.axis_name)) == jax.typeof(jnp.int32(0))


def _tables(sharing: Sharing) -> tuple[np.ndarray, np.ndarray]:
    """The number of each place's group, and its seat in it."""
    size = jax.lax.axis_size(sharing.axis_name)
    groups = (tuple(range(size)),) if sharing.groups is None else sharing.groups
    places = sum(map(len, groups))
    if size != places:
        raise ValueError(
            f"`axis_index_groups` is {[list(group) for group in groups]}, which has {places} places, but the axis "
            f"{sharing.axis_name!r} has {size}: expected each place from 0 to {size - 1} once."
        )
    group_of, seat_of = np.zeros(size, np.int32), np.zeros(size, np.int32)
    for number, group in enumerate(groups):
        group_of[list(group)] = number
        seat_of[list(group)] = np.arange(len(group))
    return group_of, seat_of


def _own(table: np.ndarray, sharing: Sharing) -> jax.Array:
    """One's own entry."""
    return jnp.asarray(table)[jax.lax.axis_index(sharing.axis_name)]


def _rows_where(chosen: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.where(chosen[:, None], rows, jnp.zeros((), rows.dtype))


def _as_row(arrays: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate([jnp.ravel(array) for array in arrays])


def _as_arrays(row: jax.Array, like: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """The last axis of a row, or of rows, cut into arrays of these shapes."""
    ends = np.cumsum([array.size for array in like])[:-1]
    cut = jnp.split(row, ends, axis=-1)
    return tuple(part.reshape(*row.shape[:-1], *array.shape) for part, array in zip(cut, like, strict=True))


@contextlib.contextmanager
def _binding(axis_name: AxisName) -> Iterator[None]:
    """An axis that nothing binds is an error that says what to wrap."""
    try:
        yield
    except NameError:
        raise NameError(
            f"`axis_name` is {axis_name!r}, which no surrounding transformation binds: call inside "
            f"jax.shard_map, jax.vmap(..., axis_name={axis_name!r}) or jax.pmap(..., axis_name={axis_name!r}), "
            "or leave `axis_name` out. Under plain jit with a sharded batch it is not needed."
        ) from None
