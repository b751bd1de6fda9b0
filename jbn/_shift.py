"""The row that moments are taken about: cheap to read, and near the mean of each feature."""

import math
from typing import Any

import jax
import jax.numpy as jnp


def shift_row(x: jax.Array, mask: jax.Array | None, reduced: tuple[int, ...], count: jax.Array) -> jax.Array:
    """A value of the data near each feature's mean, so that a constant feature stays exact.

    The median of three rows, since one row alone may be an outlier. Two that are far out on the same side cost digits:
    the error of the variance grows with (mean - shift)**2 / var.
    """
    if not reduced:
        return x if mask is None else jnp.where(mask, x, jnp.zeros((), x.dtype))
    if mask is None:
        return _median_of_three(*_three_rows(x, reduced))
    return jnp.where(count > 0, _median_of_three(*_valid_rows(x, mask, reduced)), jnp.zeros((), x.dtype))


def _median_of_three(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.minimum(a, b), jnp.minimum(jnp.maximum(a, b), c))


def _three_rows(x: jax.Array, reduced: tuple[int, ...]) -> list[jax.Array]:
    """Rows at the quarters of the first example, or the first three examples where an example has fewer than three.

    The ends of an example are often padding. Each row is sliced from x itself and within one example, since rows that
    are scattered over a sharded batch, or slices of a slice of it, would be sent from device to device.
    """
    first, *others = reduced
    known = [axis for axis in others if isinstance(x.shape[axis], int)]
    if any(x.shape[axis] >= 3 for axis in known):
        places = [{axis: x.shape[axis] * quarter // 4 for axis in known} for quarter in (1, 2, 3)]
        return [_row(x, reduced, place) for place in places]
    return [_row(x, reduced, {first: row}) for row in range(3)]


def _row(x: jax.Array, reduced: tuple[int, ...], place: dict[int, int]) -> jax.Array:
    """The row at this place, 0 on the axes that it does not name, and at the end of those that are shorter."""
    for axis in reduced:
        size, index = x.shape[axis], place.get(axis, 0)
        if isinstance(size, int):
            x = jax.lax.slice_in_dim(x, min(index, size - 1), min(index, size - 1) + 1, axis=axis)
        else:
            x = jnp.take(x, jnp.minimum(jnp.arange(index, index + 1), size - 1), axis=axis)
    return x


def _valid_rows(x: jax.Array, mask: jax.Array, reduced: tuple[int, ...]) -> list[jax.Array]:
    """The first, the second and the last valid row; any row where there is none.

    Indexed with arrays: under automatic sharding that costs small all-reduces, where a scalar index, being a dynamic
    slice, gathers the whole input.
    """
    index = jnp.zeros(mask.shape, jnp.int32)
    strides = {axis: math.prod(mask.shape[axis + 1 :]) for axis in reduced}
    for axis, stride in strides.items():
        index += jax.lax.broadcasted_iota(jnp.int32, mask.shape, axis) * stride
    last = jnp.max(jnp.where(mask, index, 0))
    first = jnp.min(jnp.where(mask, index, last))
    second = jnp.min(jnp.where(mask & (index > first), index, last))
    picks = jnp.stack([first, second, last])
    key: list[Any] = [slice(None)] * x.ndim
    for axis, stride in strides.items():
        key[axis] = picks // stride % mask.shape[axis]
    rows = x.at[tuple(key)].get(mode="promise_in_bounds")
    contiguous = reduced == tuple(range(reduced[0], reduced[-1] + 1))
    rows = jnp.moveaxis(rows, reduced[0] if contiguous else 0, 0)
    return [jnp.expand_dims(row, reduced) for row in rows]
