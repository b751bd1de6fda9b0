"""Mean, variance and count of a batch, exact for any ratio of mean to spread, and their exact union."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jbn import _arguments
from jbn._collectives import AxisName, IndexGroups, Sharing, checked_sharing, every_part, sum_over
from jbn._shift import shift_row


class Moments(NamedTuple):
    """Mean, biased variance and count of a batch.

    Attributes:
        mean: float array of the feature shape.
        var: float array of the feature shape: the mean squared deviation, divided by `count`.
        count: float scalar, the number of values behind each entry.

    Example:
        >>> import jax.numpy as jnp
        >>> import jbn
        >>> jbn.Moments(mean=jnp.zeros(3), var=jnp.ones(3), count=jnp.float32(8)).var.shape
        (3,)
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  optax's word, dearer than tuple.count


class ShiftedMoments(NamedTuple):
    """Moments whose mean is the unrounded pair shift + offset.

    A single float32 mean is off by up to half a unit in its last place, which is 0.004 standard deviations where the
    mean is 1e5 of them; `(x - shift) - offset` is not. Arrays have the rank of x, with size 1 on the reduced axes.
    """

    shift: jax.Array
    offset: jax.Array
    var: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  optax's word, dearer than tuple.count


def moments(
    x: ArrayLike,
    *,
    feature_axis: int | Sequence[int] = -1,
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: IndexGroups | None = None,
) -> Moments:
    """Mean, biased variance and count of a batch, per feature.

    mean = sum(x) / count,  var = sum((x - mean)**2) / count, over the valid values of all reduced axes.

    Args:
        x: float32, float64, bfloat16 or float16 array; statistics are computed in float32 at least.
        feature_axis: the axis, or axes, that have statistics of their own; all others are reduced.
        mask: boolean, True counts; the shape of x without its feature axes (an axis may be 1), or of x with them 1.
        axis_name: mapped axis or axes to share statistics over.
        axis_index_groups: places on the axis that share among themselves only, as in [[0, 1], [2, 3]].

    Returns:
        Moments of the feature shape, differentiable in x. Nothing valid gives mean 0, variance 0, count 0.

    Raises:
        NameError: no transformation binds `axis_name`.
        TypeError: x is no float array, or the mask is not boolean.
        ValueError: an axis or the mask does not fit x.

    Example:
        >>> import jax.numpy as jnp
        >>> import jbn
        >>> batch = jbn.moments(jnp.array([[1.0], [3.0], [100.0]]), mask=jnp.array([True, True, False]))
        >>> print(batch.mean, batch.var, batch.count)
        [2.] [1.] 2.0

    Source:
        Ioffe and Szegedy, Batch Normalization, 2015, algorithm 1. The one-pass form with a shift: Chan, Golub and
        LeVeque, Algorithms for Computing the Sample Variance, 1983.
    """
    x = _arguments.checked_input(x)
    axes = _arguments.checked_axes(feature_axis, x.ndim)
    sharing = checked_sharing(axis_name, axis_index_groups)
    _arguments.check_reducible(x.shape, axes, axis_name)
    mask = _arguments.checked_mask(mask, x.shape, axes)
    if 0 in x.shape:
        return no_moments(x, axes.features(x.shape))
    return rounded(shifted_moments(x, mask, axes.reduced, sharing), axes.features(x.shape))


def merge(*moments: Moments) -> Moments:
    """The moments of the union of batches, from the moments of each.

    n = na + nb,  mean = ma + d*nb/n,  var = (na*va + nb*vb + d**2 * na*nb/n) / n,  d = mb - ma, for any number of them.

    Args:
        *moments: Moments of one feature shape; one with count 0 changes nothing, whatever it holds.

    Returns:
        Moments of the union, of the same shape.

    Raises:
        TypeError: something that is no Moments.
        ValueError: no moments, or moments of different shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> import jbn
        >>> left, right = jbn.moments(jnp.array([[0.0], [2.0]])), jbn.moments(jnp.array([[4.0], [6.0]]))
        >>> union = jbn.merge(left, right)
        >>> print(union.mean, union.var, union.count)
        [3.] [5.] 4.0

    Source:
        Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979.
    """
    if not moments:
        raise ValueError("`merge` got no moments: expected at least one jbn.Moments.")
    for part in moments:
        _arguments.check_type("moments", part, Moments)
    shapes = [jnp.shape(part.mean) for part in moments]
    if len(set(shapes)) > 1:
        raise ValueError(f"`moments` have means of shapes {shapes}: expected one shape for all.")
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(Moments(*part) for part in moments))
    count = jnp.expand_dims(stacked.count, range(1, stacked.mean.ndim))
    mean, var = (jnp.where(count > 0, leaf, jnp.zeros((), leaf.dtype)) for leaf in (stacked.mean, stacked.var))
    parts = ShiftedMoments(shift=mean, offset=jnp.zeros_like(mean), var=var, count=count)
    return rounded(union(parts), shapes[0])


def arithmetic_dtype(x: jax.Array) -> Any:
    """The dtype to compute in: float32 at least."""
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


@functools.partial(jax.jit, static_argnames=("reduced", "sharing"), inline=True)
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
    centered = x.astype(dtype) - shift
    divisor = jnp.maximum(count, 1)
    offset = jnp.sum(centered, axis=reduced, keepdims=True) / divisor
    mean_square = jnp.sum(centered * centered, axis=reduced, keepdims=True) / divisor
    local = ShiftedMoments(shift, offset, jnp.maximum(mean_square - offset * offset, 0), count)
    return shared(local, sharing)


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
    distance = (parts.shift - center[None]) + parts.offset
    offset = jnp.sum(weight * distance, axis=0)
    var = jnp.sum(weight * (parts.var + jnp.square(distance - offset[None])), axis=0)
    return ShiftedMoments(center, offset, var, everything)


def _union_by_sums(local: ShiftedMoments, sharing: Sharing) -> ShiftedMoments:
    """The same for many parts: a first sum gives all one center near the mean, a second the offset and the spread."""
    everything, first_moment = sum_over(sharing, (local.count, local.count * (local.shift + local.offset)))
    divisor = jnp.maximum(everything, 1)
    center = _rounded_once(jax.lax.stop_gradient(first_moment / divisor))
    distance = (local.shift - center) + local.offset
    sums = sum_over(sharing, (local.count * distance, local.count * (local.var + jnp.square(distance))))
    offset, mean_square = (total / divisor for total in sums)
    return ShiftedMoments(center, offset, jnp.maximum(mean_square - jnp.square(offset), 0), everything)


def _rounded_once(center: jax.Array) -> jax.Array:
    """The center with one bit less: without that, the compiler may fuse its last multiplication into a subtraction
    from it and leave it unrounded there, while elsewhere it is rounded."""
    form = jnp.finfo(center.dtype)
    return jax.lax.reduce_precision(center, exponent_bits=form.nexp, mantissa_bits=form.nmant - 1)


def rounded(shifted: ShiftedMoments, features: tuple[int, ...]) -> Moments:
    """Moments of the feature shape, their mean in one number."""
    mean = (shifted.shift + shifted.offset).reshape(features)
    return Moments(mean, shifted.var.reshape(features), jnp.max(shifted.count))


def no_moments(x: jax.Array, features: tuple[int, ...]) -> Moments:
    """The moments of no values."""
    dtype = arithmetic_dtype(x)
    return Moments(jnp.zeros(features, dtype), jnp.zeros(features, dtype), jnp.zeros((), dtype))
