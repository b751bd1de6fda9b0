"""Moments of a batch about a row of the data, their derivative, and the union of those of all who share."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jbn._collectives import Sharing, every_part, sum_over
from jbn._fusion import apart_on_cpu
from jbn._precision import arithmetic_dtype, widened
from jbn._shift import shift_row

NAME = "jbn_statistics"
"""What `jax.checkpoint` policies know the statistics of a batch by."""


class ShiftedMoments(NamedTuple):
    """Moments whose mean is the unrounded pair shift + offset.

    A single float32 mean is off by up to half a unit in its last place, which is 0.004 standard deviations where the
    mean is 1e5 of them; `(x - shift) - offset` is not. Arrays have the rank of x, with size 1 on the reduced axes.
    """

    shift: jax.Array
    offset: jax.Array
    var: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  optax's word, dearer than tuple.count


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
@functools.partial(jax.jit, static_argnums=(2, 3), inline=True)
def shifted_moments(
    x: jax.Array, mask: jax.Array | None, reduced: tuple[int, ...], sharing: Sharing | None
) -> ShiftedMoments:
    """Moments in one pass about a row of the data: the error grows with (mean - shift)**2 / var, not mean**2 / var."""
    dtype = arithmetic_dtype(x)
    sizes = [x.shape[axis] for axis in reduced]
    if mask is None:
        count = jnp.full((1,) * x.ndim, math.prod(sizes), dtype)
    else:
        repeats = math.prod(x.shape[axis] for axis in reduced if mask.shape[axis] == 1)
        count = jnp.sum(mask, axis=reduced, keepdims=True, dtype=jnp.int32).astype(dtype) * repeats
    shift = jax.lax.stop_gradient(shift_row(x, mask, reduced, count))
    x = x if mask is None else jnp.where(mask, x, shift)
    shift = shift.astype(dtype)
    divisor = jnp.maximum(count, 1)
    offset, mean_square = (total / divisor for total in _sums(x, shift, reduced))
    local = ShiftedMoments(shift, offset, jnp.maximum(mean_square - offset * offset, 0), count)
    return shared(local, sharing)


def _sums(x: jax.Array, shift: jax.Array, reduced: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The sums of x - shift and of its square."""

    def two_reductions(x: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
        centered, again = (x.astype(shift.dtype) - apart_on_cpu(shift, fault) for fault in (jnp.inf, -jnp.inf))
        return jnp.sum(centered, reduced, keepdims=True), jnp.sum(again * again, reduced, keepdims=True)

    def one_reduction(x: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Of z*1 and z*z, along a new first axis.
        square, plain = (jnp.array(pair, shift.dtype).reshape(2, *(1,) * x.ndim) for pair in ([0, 1], [1, 0]))
        centered = jnp.broadcast_to(x[None], (2, *x.shape)).astype(shift.dtype) - shift[None]
        sums = jnp.sum(centered * (centered * square + plain), [axis + 1 for axis in reduced], keepdims=True)
        return sums[0], sums[1]

    # Of a single feature, the one reduction adds in longer chains and loses a digit.
    if x.dtype != jnp.bfloat16 or shift.size == 1:
        return two_reductions(x, shift)
    return jax.lax.platform_dependent(x, shift, cpu=one_reduction, default=two_reductions)


@shifted_moments.defjvp
def _shifted_moments_jvp(
    reduced: tuple[int, ...], sharing: Sharing | None, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[ShiftedMoments, ShiftedMoments]:
    x, mask = primals
    batch = remembered(x, mask, reduced, sharing)

    def linear(x: jax.Array, mask: jax.Array | None, batch: ShiftedMoments, x_t: jax.Array) -> ShiftedMoments:
        tangent = valid(x_t, mask).astype(batch.shift.dtype)
        return moments_tangent(batch, *mean_tangents(tangent, deviation(x, mask, batch), batch, reduced, sharing))

    return batch, jax.checkpoint(linear, prevent_cse=False)(x, mask, batch, tangents[0])


def remembered(
    x: jax.Array, mask: jax.Array | None, reduced: tuple[int, ...], sharing: Sharing | None
) -> ShiftedMoments:
    """The moments, by a name under which `jax.checkpoint` may keep them for the backward pass."""
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, NAME), shifted_moments(x, mask, reduced, sharing))


def mean_tangents(
    tangent: jax.Array, centered: jax.Array, batch: ShiftedMoments, reduced: tuple[int, ...], sharing: Sharing | None
) -> list[jax.Array]:
    """Means, over all who share, of a tangent of x and of its product with x - mean."""
    sums = [jnp.sum(v, axis=reduced, keepdims=True) for v in (tangent, centered * tangent)]
    sums = sums if sharing is None else sum_over(sharing, sums)
    return [v / jnp.maximum(batch.count, 1) for v in sums]


def moments_tangent(batch: ShiftedMoments, mean_t: jax.Array, covariance: jax.Array) -> ShiftedMoments:
    """The tangent of the moments: of mean and variance those of offset and twice the covariance."""
    return ShiftedMoments(jnp.zeros_like(batch.shift), mean_t, 2 * covariance, jnp.zeros_like(batch.count))


def deviation(x: jax.Array, mask: jax.Array | None, batch: ShiftedMoments) -> jax.Array:
    """(x - shift) - offset, in that order: the difference from the shift is nearly exact, the mean itself is not."""
    return (widened(valid(x, mask)) - batch.shift) - batch.offset


def deviation_to_sum(x: jax.Array, mask: jax.Array | None, batch: ShiftedMoments) -> jax.Array:
    """The same, for a reduction."""
    shift, offset = (apart_on_cpu(vector, jnp.nan) for vector in (batch.shift, batch.offset))
    return (valid(x, mask).astype(shift.dtype) - shift) - offset


def valid(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """x with 0 in masked places."""
    return x if mask is None else jnp.where(mask, x, jnp.zeros((), x.dtype))


def shared(local: ShiftedMoments, sharing: Sharing | None) -> ShiftedMoments:
    """The moments of the union of the parts of all who share, the same to each of them."""
    if sharing is None:
        return local
    parts = every_part(sharing, local)
    return _union_by_sums(local, sharing) if parts is None else union(ShiftedMoments(*parts))


def union(parts: ShiftedMoments) -> ShiftedMoments:
    """The moments of the union of parts that are stacked along a new first axis, about the shift of the largest one."""
    everything = jnp.sum(parts.count, axis=0)
    weight = parts.count / jnp.where(everything > 0, everything, jnp.ones_like(everything))[None]
    # The first of the largest, by two reductions: argmax would gather counts that are spread over devices.
    number = jax.lax.broadcasted_iota(jnp.int32, parts.count.shape, 0)
    is_largest = parts.count == jnp.max(parts.count, axis=0)[None]
    chosen = number == jnp.min(jnp.where(is_largest, number, len(number)), axis=0)[None]
    # A value that is picked out is the same wherever the compiler forms it anew; one that is computed may round apart.
    center = jax.lax.stop_gradient(jnp.sum(jnp.where(chosen, parts.shift, jnp.zeros((), parts.shift.dtype)), axis=0))
    distance = _distance(parts, center[None])
    offset = jnp.sum(weight * distance, axis=0)
    var = jnp.sum(weight * (parts.var + jnp.square(distance - offset[None])), axis=0)
    return ShiftedMoments(center, offset, var, everything)


def _union_by_sums(local: ShiftedMoments, sharing: Sharing) -> ShiftedMoments:
    """The same for many parts: a first sum gives all one center near the mean, a second the offset and the spread."""
    everything, first_moment = sum_over(sharing, (local.count, local.count * (local.shift + local.offset)))
    divisor = jnp.maximum(everything, 1)
    center = _rounded_once(jax.lax.stop_gradient(first_moment / divisor))
    distance = _distance(local, center)
    sums = sum_over(sharing, (local.count * distance, local.count * (local.var + jnp.square(distance))))
    offset, mean_square = (total / divisor for total in sums)
    return ShiftedMoments(center, offset, jnp.maximum(mean_square - jnp.square(offset), 0), everything)


def _distance(part: ShiftedMoments, center: jax.Array) -> jax.Array:
    """Of a part's mean from a center; 0 for a part without values, whose mean says nothing and may be far."""
    return jnp.where(part.count > 0, (part.shift - center) + part.offset, jnp.zeros((), center.dtype))


def _rounded_once(center: jax.Array) -> jax.Array:
    """The center with one bit less: without that, the compiler may fuse its last multiplication into a subtraction
    from it and leave it unrounded there, while elsewhere it is rounded."""
    form = jnp.finfo(center.dtype)
    return jax.lax.reduce_precision(center, exponent_bits=form.nexp, mantissa_bits=form.nmant - 1)
