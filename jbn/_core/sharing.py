"""Sums over mapped axes (of pmap, shard_map or vmap), and the splitting of vectors under explicit sharding.

A place is an index on the mapped axis: a device under pmap and shard_map, an element under vmap.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jbn._complex import cast
from jbn._rule import Sharing

FEW = 16
"""Up to this many parts are sent by one collective; a second collective costs a device more than their bytes."""


def sum_over(sharing: Sharing, arrays: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Sum arrays over the places that share statistics, by one collective."""
    name, groups = sharing
    group_of, _, by_groups = _places(sharing)
    if groups is None or by_groups:
        return _in_one_row(arrays, lambda row: lax.psum(row, name, axis_index_groups=groups))
    # Each group has a slot, which its places write to and read from.
    own = jnp.arange(len(groups)) == jnp.asarray(group_of)[lax.axis_index(name)]
    return _in_one_row(arrays, lambda row: jnp.sum(_where(own, lax.psum(_where(own, row[None]), name)), axis=0))


def every_part(sharing: Sharing, arrays: Sequence[jax.Array]) -> tuple[jax.Array, ...] | None:
    """Stack the arrays of all places that share along a new first axis, by one collective; None if there are many.

    Each place writes to its own slot, and the parts of places outside the group are 0. n places therefore send n rows.
    Beyond FEW, two sums (see `moments.merge_shared`) send less.
    """
    name, groups = sharing
    group_of, seat_of, by_groups = _places(sharing)
    place = lax.axis_index(name)
    if groups is None or by_groups:
        slots = jnp.arange(max(seat_of) + 1) == jnp.asarray(seat_of)[place]
    else:
        slots = jnp.arange(len(group_of)) == place
    if len(slots) > FEW:
        return None
    if groups is None or by_groups:
        return _in_one_row(arrays, lambda row: lax.psum(_where(slots, row[None]), name, axis_index_groups=groups))
    own = jnp.asarray(group_of) == jnp.asarray(group_of)[place]
    return _in_one_row(arrays, lambda row: _where(own, lax.psum(_where(slots, row[None]), name)))


def _places(sharing: Sharing) -> tuple[np.ndarray, np.ndarray, bool]:
    """The group of each place, the position of each place in its group, and whether lax.psum takes these groups here.

    lax.psum takes groups under pmap and shard_map, if they have equal sizes (TPUs take no others). It takes none where
    shard_map tracks which values vary (check_vma). The type of lax.axis_index shows whether it does.
    """
    name, groups = sharing
    size = lax.axis_size(name)
    group_of, seat_of = np.empty((2, size), np.int32)  # each place is in one group
    for number, group in enumerate(groups or [range(size)]):
        group_of[list(group)] = number
        seat_of[list(group)] = np.arange(len(group))
    if groups is None or len(set(map(len, groups))) > 1:
        return group_of, seat_of, False
    tracked = jax.typeof(lax.axis_index(name)) != jax.typeof(jnp.int32(0))
    return group_of, seat_of, name in jax.sharding.get_abstract_mesh().manual_axes and not tracked


def _where(chosen: jax.Array, rows: jax.Array) -> jax.Array:
    """The chosen rows, with 0 in place of the others, whatever those hold."""
    return jnp.where(chosen[:, None], rows, jnp.zeros((), rows.dtype))


def _in_one_row(arrays: Sequence[jax.Array], collective: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, ...]:
    """Send arrays through a collective as one row; cut the row or rows that it returns into arrays of their shapes."""
    dtype = max((array.dtype for array in arrays), key=lambda dtype: dtype.itemsize)
    rows = collective(jnp.concatenate([jnp.ravel(cast(array, dtype)) for array in arrays]))
    cut = jnp.split(rows, np.cumsum([array.size for array in arrays])[:-1], axis=-1)
    return tuple(
        cast(part, array.dtype).reshape(*rows.shape[:-1], *array.shape) for part, array in zip(cut, arrays, strict=True)
    )


def indexed_automatically(function: Callable[[jax.Array], Any], x: jax.Array, reduced: tuple[int, ...]) -> jax.Array:
    """function(x) under automatic sharding, because explicit sharding cannot slice a split axis.

    The result has the shape of x without the reduced axes.
    """
    sharding = jax.typeof(x).sharding
    if not any(sharding.spec):
        return function(x)
    out_spec = PartitionSpec(*(names for axis, names in enumerate(sharding.spec) if axis not in reduced))
    with jax.sharding.use_abstract_mesh(sharding.mesh):
        automatic: Callable[..., Any] = jax.sharding.auto_axes(function, out_sharding=out_spec)
        return automatic(x)


def split_as(vector: jax.Array, like: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The vector, split over devices like these axes of another array; unchanged without explicit sharding.

    The gradient is split like the given vector.
    """
    there, here = jax.typeof(like).sharding, jax.typeof(vector).sharding
    spec = PartitionSpec(*(there.spec[axis] for axis in axes))
    if spec == here.spec:
        return vector
    return jax.sharding.reshard(vector, NamedSharding(there.mesh if any(spec) else here.mesh, spec))
