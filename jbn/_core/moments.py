"""Mean, variance and count of a batch, accurate at any ratio of mean to spread, and the exact merge of several."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from jbn import _arguments, _dtypes
from jbn._arguments import AxisName, IndexGroups
from jbn._complex import by_parts, cast, inner, real_dtype
from jbn._core import for_xla
from jbn._core.sharing import every_part, indexed_automatically, sum_over
from jbn._rule import Rule, Sharing, training_rule

CHECKPOINT_NAME = "jbn_statistics"
"""The name that batch statistics have for policies of `jax.checkpoint`."""


class Moments(NamedTuple):
    """Mean, biased variance and count of a batch.

    Attributes:
        mean: float array of the feature shape.
        var: float array of the feature shape: the sum of squared deviations, divided by `count`.
        count: float array of the feature shape: the number of valid values of each feature.

    Example:
        >>> import jax.numpy as jnp
        >>> import jbn
        >>> jbn.Moments(mean=jnp.zeros(3), var=jnp.ones(3), count=jnp.full(3, 8.0)).var.shape
        (3,)
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  hides tuple.count; optax's word for it


class ShiftedMoments(NamedTuple):
    """Moments whose mean is the pair shift + offset; x - mean is computed as (x - shift) - offset.

    A single float32 mean is off by up to half a unit in its last place. Where the mean is 1e5 standard deviations (sd),
    this is 0.004 sd. The pair avoids that error.

    For bfloat16 x, shift is the mean and offset is None, because XLA fuses more with one vector. Different bfloat16
    values differ by at least 2**-8 of their size. If even one of N values differs from the others, the sd is at least
    2**-8 / sqrt(N) of that size, so a single float32 mean is off by at most 2**-17 * sqrt(N) sd.

    The arrays have the shape of x without the reduced axes: if they kept these axes with size 1, automatic sharding
    would split them like x, and send each of them at each use. Without a mask and without sharing, count is a scalar.
    """

    shift: jax.Array
    offset: jax.Array | None
    var: jax.Array
    count: Any  # pyright: ignore[reportIncompatibleMethodOverride]  hides tuple.count; optax's word for it


def moments(
    x: ArrayLike,
    *,
    feature_axis: int | Sequence[int] = -1,
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: IndexGroups | None = None,
) -> Moments:
    """Mean, biased variance and count of a batch, per feature.

    mean = sum(x) / count,  var = sum((x - mean)**2) / count

    The sums run over the valid values of all reduced axes.

    Args:
        x: float32, float64, bfloat16 or float16 array; the statistics are computed in at least float32.
        feature_axis: axis or axes of the features; statistics are computed over all other axes.
        mask: boolean array, True for valid values. It has the shape of x without the feature axes, or the rank of x.
            Any axis may have size 1.
        axis_name: mapped axis or axes (of pmap, vmap or shard_map) to share statistics over.
        axis_index_groups: groups of indices on that axis that share statistics, such as [[0, 1], [2, 3]].

    Returns:
        Moments of the feature shape, differentiable with respect to x. A feature without valid values has mean 0,
        variance 0 and count 0.

    Raises:
        NameError: no transformation binds `axis_name`.
        TypeError: x is not a float array, or the mask is not boolean.
        ValueError: an axis or the mask does not fit x.

    Example:
        >>> import jax.numpy as jnp
        >>> import jbn
        >>> batch = jbn.moments(jnp.array([[1.0], [3.0], [100.0]]), mask=jnp.array([True, True, False]))
        >>> print(batch.mean, batch.var, batch.count)
        [2.] [1.] [2.]

    Source:
        Ioffe and Szegedy, Batch Normalization, 2015, algorithm 1. The one-pass form with a shift is from Chan, Golub
        and LeVeque, Algorithms for Computing the Sample Variance, 1983.
    """
    x = _arguments.checked_input(x)
    rule = Rule(_arguments.checked_axes(feature_axis, x.ndim))
    rule = training_rule(rule, x, axis_name, axis_index_groups)
    return _moments(rule, x, _arguments.checked_mask(mask, x.shape, rule.axes))


def merge(*moments: Moments) -> Moments:
    """Merge the moments of several batches into the moments of their union.

    n = na + nb,  d = mb - ma
    mean = ma + d * nb / n,  var = (na * va + nb * vb + d**2 * na * nb / n) / n

    These are the equations for two batches a and b; `merge` takes any number of batches.

    Args:
        *moments: Moments with the same feature shape. A feature with count 0 has no effect, even if it holds NaN.

    Returns:
        Moments of the union, of the same shape.

    Raises:
        TypeError: an argument is not a Moments.
        ValueError: there are no moments, or their shapes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> import jbn
        >>> left, right = jbn.moments(jnp.array([[0.0], [2.0]])), jbn.moments(jnp.array([[4.0], [6.0]]))
        >>> union = jbn.merge(left, right)
        >>> print(union.mean, union.var, union.count)
        [3.] [5.] [4.]

    Source:
        Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979.
    """
    if not moments:
        raise ValueError("`merge` got no moments: expected at least one jbn.Moments.")
    for part in moments:
        _arguments.check_type("moments", part, Moments)
    shapes = [np.shape(part.mean) for part in moments]
    if len(set(shapes)) > 1:
        raise ValueError(f"`moments` have means of shapes {shapes}: expected one shape for all.")
    for part in moments:
        _arguments.check_vectors("moments", part, shapes[0], "the shape of `moments.mean`")
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(Moments(*part) for part in moments))
    mean, var = (jnp.where(stacked.count > 0, leaf, jnp.zeros_like(leaf)) for leaf in (stacked.mean, stacked.var))
    return by_feature(merge_stacked(ShiftedMoments(mean, None, var, stacked.count)))


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _moments(rule: Rule, x: jax.Array, mask: jax.Array | None) -> Moments:
    """Moments of the feature shape; the backward pass stores only the input."""
    if 0 in x.shape:
        dtype, features = wide(x).dtype, rule.axes.features(x.shape)
        return Moments(jnp.zeros(features, dtype), *(jnp.zeros(features, real_dtype(dtype)) for _ in range(2)))
    batch = jax.checkpoint(batch_moments, static_argnums=0, prevent_cse=False)(rule, x, mask)
    return by_feature(batch)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def batch_moments(rule: Rule, x: jax.Array, mask: jax.Array | None) -> ShiftedMoments:
    """The moments of x over its reduced axes and over all places that share statistics."""
    count = _valid(rule.reduced, x, mask)
    batch = ShiftedMoments(*_of_place(rule.reduced, x, mask, count), count=count)
    if rule.sharing is not None:
        batch = merge_shared(rule.sharing, batch)
    if x.dtype == jnp.bfloat16:
        batch = batch._replace(shift=mean_of(batch), offset=None)
    return jax.tree.map(lambda value: checkpoint_name(value, CHECKPOINT_NAME) if np.ndim(value) else value, batch)


def _valid(reduced: tuple[int, ...], x: jax.Array, mask: jax.Array | None) -> Any:
    """The number of valid values: of each feature with a mask, and otherwise one number for all."""
    dtype = real_dtype(wide(x).dtype)
    if mask is None:
        size = math.prod(x.shape[axis] for axis in reduced)
        # A NumPy scalar becomes a constant of the program. A symbolic size is known only when the program runs.
        return (np if isinstance(size, int) else jnp).asarray(size, dtype)
    repeats = math.prod(x.shape[axis] for axis in reduced if mask.shape[axis] == 1)
    return jnp.sum(mask, reduced, dtype=jnp.int32).astype(dtype) * repeats


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _of_place(reduced: tuple[int, ...], x: jax.Array, mask: jax.Array | None, count: Any) -> list[jax.Array]:
    """[shift, offset, var] of the valid values in this place; with a mask in two passes, the first for the mean."""
    if mask is not None:
        divisor = jnp.maximum(count, 1)
        mean = for_xla.computed_once(jnp.sum(zero_masked(wide(x), mask), reduced) / cast(divisor, wide(x).dtype))
        return _about(reduced, divisor, mean, x, mask)
    a_row = functools.partial(near_the_data, reduced=reduced)
    return for_xla.by_platform(
        lambda x: _about(reduced, count, indexed_automatically(a_row, x, reduced), x),
        x,
        tpu=functools.partial(_about_zero_first, reduced, count),
    )


@_of_place.defjvp
def _of_place_jvp(reduced: tuple[int, ...], primals: Any, tangents: Any) -> tuple[list[jax.Array], list[jax.Array]]:
    """The derivative of the formulas, the same for each platform: mean_t = mean(t), var_t = 2 * mean(xc * t)."""
    x, mask, count = primals
    batch = _of_place(reduced, x, mask, count)
    xc, t = centered(reduced, x, mask, ShiftedMoments(*batch, count=count)), zero_masked(wide(tangents[0]), mask)
    divisor = jnp.maximum(count, 1)
    mean_t, covariance = (jnp.sum(v, reduced) / cast(divisor, v.dtype) for v in (t, inner(xc, t)))
    return batch, [jnp.zeros_like(batch[0]), mean_t, 2 * covariance]


def _about(reduced: tuple[int, ...], count: Any, shift: jax.Array, x: jax.Array, mask: Any = None) -> list[jax.Array]:
    """[shift, offset, var]; the relative error of the biased variance grows with |offset|**2 / var.

    z = x - shift,  offset = mean(z),  var = mean(|z|**2) - |offset|**2
    """
    z = zero_masked(wide(x) - lax.expand_dims(shift, reduced), mask)
    offset, mean_square = (jnp.sum(v, reduced) / cast(count, v.dtype) for v in (z, inner(z, z)))
    # Without this maximum, XLA computes |offset|**2 as |sum(z)|**2 / count**2, which may overflow where var does not.
    bounded = by_parts(lambda part: jnp.maximum(part, jnp.finfo(part.dtype).min), offset)
    return [shift, offset, jnp.maximum(mean_square - inner(bounded, offset), 0)]


def _about_zero_first(reduced: tuple[int, ...], count: Any, x: jax.Array) -> list[jax.Array]:
    """Moments from sums about 0 or, if these lose digits in any feature, from sums about the means that they gave.

    This form is for TPUs, where sums about 0 fuse with the convolution that computes x. A step of a ResNet-50 in
    bfloat16 moves 0.99 of the bytes of Flax's, and 1.055 with sums about a row of x. A layer with a feature far from 0
    takes a second pass over x. Under vmap, every layer does. On a GPU, the host would wait for the result of the test,
    and the step would take 1.083 of the time of Flax's.
    """
    zero = jnp.zeros_like(jnp.sum(wide(x), reduced))  # split over devices as the sums are
    first = _about(reduced, count, zero, x)
    _, mean, var = first
    # While mean**2 <= 8 * var, the variance has at most 9 times the rounding error of the sums. ~(a <= b) catches NaN.
    lost = jnp.any(~(inner(mean, mean) <= 8 * var) | ~lax.is_finite(var))
    again = functools.partial(_about, reduced, count)
    return lax.cond(lost, lambda x, first: again(for_xla.computed_once(first[1]), x), lambda x, first: first, x, first)


def near_the_data(x: jax.Array, reduced: tuple[int, ...]) -> jax.Array:
    """A value near the data for each feature: the elementwise median of three rows of x.

    A row holds one value of each feature. A single value may be sqrt(N) standard deviations from the mean of N values.
    As a shift, it gives the variance a relative error of about u * (1 + N), where u is the unit of rounding. The median
    is far from the mean only if two of the three values are, on the same side, so the error is at most
    u * (1 + N / 2). The rows are positions in the first example. If no axis of an example has size 3 or more, they are
    examples at the quarters of the batch.
    """
    if not reduced:
        return wide(x)
    positions = [axis for axis in reduced[1:] if isinstance(x.shape[axis], int) and x.shape[axis] >= 3]
    along = (positions or reduced)[0]  # the first reduced axis is that of the examples
    size = x.shape[along]
    # The other axes are sliced first, so that little has to be sent where `along` is split over devices.
    for axis in reduced:
        x = x if axis == along else lax.slice_in_dim(x, 0, 1, axis=axis)
    if isinstance(size, int):
        rows = [lax.slice_in_dim(x, at, at + 1, axis=along) for at in (size // 4, size // 2, 3 * size // 4)]
    else:  # The size is symbolic, and a dynamic slice beyond the end gives the last row.
        rows = [lax.dynamic_slice_in_dim(x, at, 1, axis=along) for at in range(3)]
    median = by_parts(lambda a, b, c: lax.max(lax.min(a, b), lax.min(lax.max(a, b), c)), *map(wide, rows))
    return lax.squeeze(median, reduced)


def merge_shared(sharing: Sharing, local: ShiftedMoments) -> ShiftedMoments:
    """Merge the moments of all places that share statistics; each place gets the same result."""
    local = local._replace(count=jnp.reshape(local.count, local.count.shape or (1,) * local.var.ndim))
    parts = every_part(sharing, jax.tree.leaves(local))
    return _merged(local, functools.partial(sum_over, sharing)) if parts is None else merge_stacked(parts)


def merge_stacked(parts: Sequence[Any]) -> ShiftedMoments:
    """Merge the moments of parts that are stacked along a new first axis."""
    parts = ShiftedMoments(*parts)
    count = jnp.zeros_like(parts.var) + parts.count
    total = jnp.sum(count, axis=0, keepdims=True)
    # Counts are divided by their total, so that no product with them overflows.
    parts = parts._replace(count=count / jnp.where(total > 0, total, jnp.ones_like(total)))
    whole = _merged(parts, lambda arrays: [jnp.sum(array, axis=0, keepdims=True) for array in arrays])
    return jax.tree.map(lambda value: value[0], whole._replace(count=total))


def _merged(part: ShiftedMoments, add: Callable[[Sequence[jax.Array]], Sequence[jax.Array]]) -> ShiftedMoments:
    """Merge the moments of parts, where `add` sums over the parts.

    n = sum(n_i),  center = sum(n_i * mean_i) / n,  d_i = mean_i - center
    offset = sum(n_i / n * d_i),  mean = center + offset,  var = sum(n_i / n * (var_i + |d_i|**2)) - |offset|**2

    In exact arithmetic the offset is 0. It makes up for the rounding of the center.
    """
    weight = cast(part.count, part.shift.dtype)
    count, total = add((part.count, weight * mean_of(part)))
    divisor = jnp.where(count > 0, count, jnp.ones_like(count))
    # Any center gives the same moments, so it needs no derivative.
    center = for_xla.computed_once(lax.stop_gradient(total / cast(divisor, total.dtype)))
    distance = part.shift - center if part.offset is None else (part.shift - center) + part.offset
    distance = jnp.where(part.count > 0, distance, jnp.zeros_like(distance))
    share = part.count / divisor  # before the sums, which would overflow for large variances
    offset, mean_square = add((cast(share, distance.dtype) * distance, share * (part.var + inner(distance, distance))))
    var = mean_square - inner(offset, offset)
    # max(var, 0), with the derivative of var where rounding decides.
    return ShiftedMoments(center, offset, var + lax.stop_gradient(jnp.maximum(-var, 0)), count)


def by_feature(batch: ShiftedMoments) -> Moments:
    """Moments with the mean as one array, and with a count for each feature."""
    return Moments(mean_of(batch), batch.var, jnp.broadcast_to(batch.count, batch.var.shape))


def mean_of(batch: ShiftedMoments) -> jax.Array:
    """The mean as one array."""
    return batch.shift if batch.offset is None else batch.shift + batch.offset


def centered(reduced: tuple[int, ...], x: jax.Array, mask: jax.Array | None, batch: ShiftedMoments) -> jax.Array:
    """(x - shift) - offset, in that order, because x - shift is nearly exact and shift + offset is not.

    Masked values of x are replaced by the shift, so that no activation overflows, whatever x holds there; the result
    there is -offset.
    """
    shift = lax.expand_dims(batch.shift, reduced)
    if mask is not None:
        # Values are masked before the conversion, because debug_nans checks the result of each conversion.
        x = jnp.where(mask, x if x.dtype == shift.dtype else wide(zero_masked(x, mask)), shift)
    x = wide(x)
    return x - shift if batch.offset is None else (x - shift) - lax.expand_dims(batch.offset, reduced)


def wide(x: jax.Array) -> jax.Array:
    """x in the dtype of the arithmetic: float32, or complex64, at least."""
    return lax.convert_element_type(x, _dtypes.arithmetic_dtype(x.dtype))


def zero_masked(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """x with masked values replaced by 0."""
    return x if mask is None else jnp.where(mask, x, jnp.zeros((), x.dtype))
