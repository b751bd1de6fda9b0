"""The row that moments are taken about: cheap to read, and near the mean of each feature."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jbn._precision import widened


def shift_row(x: jax.Array, mask: jax.Array | None, reduced: tuple[int, ...], count: jax.Array) -> jax.Array:
    """A value of the data near each feature's mean, so that a constant feature stays exact.

    The median of three rows, since one row alone may be an outlier. Two that are far out on the same side cost digits:
    the error of the variance grows with (mean - shift)**2 / var.
    """
    if not reduced:
        return x if mask is None else jnp.where(mask, x, jnp.zeros((), x.dtype))
    median = functools.partial(_median_of_rows, reduced=reduced)
    sharding = jax.typeof(x).sharding
    row = _indexed_automatically(median, sharding, reduced, x, mask) if any(sharding.spec) else median(x, mask)
    return row if mask is None else jnp.where(count > 0, row, jnp.zeros((), x.dtype))


def _indexed_automatically(
    median: Callable[..., jax.Array], sharding: Any, reduced: tuple[int, ...], x: jax.Array, mask: jax.Array | None
) -> jax.Array:
    """Explicit sharding refuses to index a sharded axis; the compiler knows how."""
    features = PartitionSpec(*(None if axis in reduced else names for axis, names in enumerate(sharding.spec)))
    with jax.sharding.use_abstract_mesh(sharding.mesh):
        automatic: Callable[..., Any] = jax.sharding.auto_axes(median, out_sharding=features)
        return automatic(x, mask)


def _median_of_rows(x: jax.Array, mask: jax.Array | None, *, reduced: tuple[int, ...]) -> jax.Array:
    """The elementwise median of three rows."""

    def rows(x: jax.Array) -> list[jax.Array]:
        return _rows_of_the_first_example(x, reduced) if mask is None else _valid_rows(x, mask, reduced)

    def rows_by_bits(x: jax.Array) -> list[jax.Array]:
        bits = rows(jax.lax.bitcast_convert_type(x, jnp.uint16))
        return [jax.lax.bitcast_convert_type(row, x.dtype) for row in bits]

    # XLA for CPU slices bfloat16 by turning the whole of it to float32, but takes its bits as they are.
    by_bits = functools.partial(jax.lax.platform_dependent, cpu=rows_by_bits, default=rows)
    a, b, c = map(widened, (by_bits if x.dtype == jnp.bfloat16 else rows)(x))
    return jnp.maximum(jnp.minimum(a, b), jnp.minimum(jnp.maximum(a, b), c)).astype(x.dtype)


def _rows_of_the_first_example(x: jax.Array, reduced: tuple[int, ...]) -> list[jax.Array]:
    """Rows at its quarters, or of the first three examples where an example has fewer than three.

    The ends of an example are often padding. To slice before indexing spares TPUs a copy of the whole input in another
    layout; to slice only would send the rows of a sharded example from device to device.
    """
    first, *others = reduced
    known = [axis for axis in others if isinstance(x.shape[axis], int)]
    places: dict[int, Any] = {axis: np.zeros(3, np.int32) for axis in reduced}
    if any(x.shape[axis] >= 3 for axis in known):
        places |= {axis: x.shape[axis] * np.arange(1, 4) // 4 for axis in known}
        x = jax.lax.slice_in_dim(x, 0, 1, axis=first)
    else:
        places[first] = jnp.minimum(jnp.arange(3), x.shape[first] - 1)
    return _rows(x, places, reduced)


def _valid_rows(x: jax.Array, mask: jax.Array, reduced: tuple[int, ...]) -> list[jax.Array]:
    """The next valid row from the start, a third and two thirds on, around the end; any row where there is none."""
    total = math.prod(mask.shape)
    strides = {axis: math.prod(mask.shape[axis + 1 :]) for axis in reduced}
    index = jnp.zeros(mask.shape, jnp.int32)
    for axis, stride in strides.items():
        index += jax.lax.broadcasted_iota(jnp.int32, mask.shape, axis) * stride
    starts, steps = (0, total // 3, total * 2 // 3), []
    for start in starts:
        ahead = jnp.where(index >= start, index - start, index - start + total)
        steps.append(jnp.min(jnp.where(mask, ahead, total - 1)))
    # By jnp, as sizes may be symbolic.
    picks = jax.lax.rem(jnp.stack(steps) + jnp.array(starts, jnp.int32), jnp.array(total, jnp.int32))
    return _rows(x, {axis: picks // stride % mask.shape[axis] for axis, stride in strides.items()}, reduced)


def _rows(x: jax.Array, places: dict[int, Any], reduced: tuple[int, ...]) -> list[jax.Array]:
    """The three rows at these places, each with size 1 on the reduced axes.

    Indexed with arrays: under automatic sharding that costs one small all-reduce, where a scalar index, being a dynamic
    slice, gathers the whole input.
    """
    key: list[Any] = [slice(None)] * x.ndim
    for axis, place in places.items():
        key[axis] = place
    rows = x.at[tuple(key)].get(mode="promise_in_bounds")
    contiguous = reduced == tuple(range(reduced[0], reduced[-1] + 1))
    rows = jnp.moveaxis(rows, reduced[0] if contiguous else 0, 0)
    return [jnp.expand_dims(row, reduced) for row in rows]
