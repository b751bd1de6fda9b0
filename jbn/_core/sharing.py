"""Sums over mapped axes: the devices of pmap and shard_map, the lanes of vmap; over all of an axis or in groups."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbn._rule import Sharing

FEW = 16
"""Up to so many parts are sent whole: one collective more costs a device more than their bytes do."""


def sum_over(sharing: Sharing, arrays: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Sums of arrays over those who share, by one collective."""
    name, groups = sharing
    if groups is None or _takes_groups(sharing):
        return _in_one_row(arrays, lambda row: lax.psum(row, name, axis_index_groups=groups))
    group_of, _ = _places(sharing)
    # A slot for each group, of which each reads its own.
    own = jnp.arange(len(groups)) == jnp.asarray(group_of)[lax.axis_index(name)]
    return _in_one_row(arrays, lambda row: jnp.sum(_where(own, lax.psum(_where(own, row[None]), name)), axis=0))


def every_part(sharing: Sharing, arrays: Sequence[jax.Array]) -> tuple[jax.Array, ...] | None:
    """The arrays of each of those who share, stacked along a new first axis, by one collective; None if they are many.

    Each writes into a slot of its own, and zeros stand for who does not share. That sends as many rows as there are
    slots, so that two sums send less where there are many.
    """
    name, groups = sharing
    group_of, seat_of = _places(sharing)
    here = lax.axis_index(name)
    if groups is None or _takes_groups(sharing):
        slots = jnp.arange(max(seat_of) + 1) == jnp.asarray(seat_of)[here]
        collective = lambda row: lax.psum(_where(slots, row[None]), name, axis_index_groups=groups)  # noqa: E731
    else:
        slots = jnp.arange(len(group_of)) == here
        own = jnp.asarray(group_of) == jnp.asarray(group_of)[here]
        collective = lambda row: _where(own, lax.psum(_where(slots, row[None]), name))  # noqa: E731
    return None if len(slots) > FEW else _in_one_row(arrays, collective)


def _takes_groups(sharing: Sharing) -> bool:
    """Whether lax.psum takes these groups here: groups of one size (TPUs take no others), under pmap or shard_map,
    unless that tracks which values vary (check_vma)."""
    if sharing.groups is None or len(set(map(len, sharing.groups))) > 1:
        return False
    manual = sharing.axis_name in jax.sharding.get_abstract_mesh().manual_axes
    return manual and jax.typeof(lax.axis_index(sharing.axis_name)) == jax.typeof(jnp.int32(0))


def _places(sharing: Sharing) -> tuple[np.ndarray, np.ndarray]:
    """The number of each place's group, and its seat in it."""
    size = lax.axis_size(sharing.axis_name)
    group_of, seat_of = np.zeros(size, np.int32), np.zeros(size, np.int32)
    for number, group in enumerate(sharing.groups or [range(size)]):
        group_of[list(group)] = number
        seat_of[list(group)] = np.arange(len(group))
    return group_of, seat_of


def _where(chosen: jax.Array, rows: jax.Array) -> jax.Array:
    """The rows that are chosen, and 0 in place of the others, whatever they hold."""
    return jnp.where(chosen[:, None], rows, jnp.zeros((), rows.dtype))


def _in_one_row(arrays: Sequence[jax.Array], collective: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, ...]:
    """What a collective makes of arrays that are sent as one row: a row, or rows, cut into arrays of their shapes."""
    rows = collective(jnp.concatenate([jnp.ravel(array) for array in arrays]))
    cut = jnp.split(rows, np.cumsum([array.size for array in arrays])[:-1], axis=-1)
    return tuple(part.reshape(*rows.shape[:-1], *array.shape) for part, array in zip(cut, arrays, strict=True))
