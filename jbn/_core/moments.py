"""Mean, variance and count of a batch, exact for any ratio of mean to spread, and their exact union."""

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

from jbn import _arguments
from jbn._arguments import AxisName, IndexGroups
from jbn._core import for_xla
from jbn._core.sharing import every_part, sum_over
from jbn._rule import Rule, Sharing, checked_rule, training_rule

NAME = "jbn_statistics"
"""What `jax.checkpoint` policies know the statistics of a batch by."""


class Moments(NamedTuple):
    """Mean, biased variance and count of a batch.

    Attributes:
        mean: float array of the feature shape.
        var: float array of the feature shape: the mean squared deviation, divided by `count`.
        count: float array of the feature shape, the number of values behind each feature.

    Example:
        >>> import jax.numpy as jnp
        >>> import jbn
        >>> jbn.Moments(mean=jnp.zeros(3), var=jnp.ones(3), count=jnp.full(3, 8.0)).var.shape
        (3,)
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  optax's word, dearer than tuple.count


class ShiftedMoments(NamedTuple):
    """Moments whose mean is the unrounded pair shift + offset; in bfloat16 shift alone, and offset None.

    One float32 mean is off by up to half a unit in its last place, 0.004 standard deviations where the mean is 1e5 of
    them; `(x - shift) - offset` is not. bfloat16 values lie so far apart that one mean is off by at most
    2^-17 sqrt(N) standard deviations, and lets XLA fuse more. Arrays have the rank of x, with size 1 on the reduced
    axes; count is a scalar where it is the same for all.
    """

    shift: jax.Array
    offset: jax.Array | None
    var: jax.Array
    count: Any  # pyright: ignore[reportIncompatibleMethodOverride]  optax's word, dearer than tuple.count


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
        mask: boolean, True counts; the shape of x without its feature axes, or of the rank of x; any axis may be 1.
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
        [2.] [1.] [2.]

    Source:
        Ioffe and Szegedy, Batch Normalization, 2015, algorithm 1. The one-pass form with a shift: Chan, Golub and
        LeVeque, Algorithms for Computing the Sample Variance, 1983.
    """
    x = _arguments.checked_input(x)
    rule = checked_rule(x, feature_axis=feature_axis)
    rule = training_rule(rule, x, axis_name, axis_index_groups)
    return _moments(rule, x, _arguments.checked_mask(mask, x.shape, rule.axes))


def merge(*moments: Moments) -> Moments:
    """The moments of the union of batches, from the moments of each.

    n = na + nb,  mean = ma + d*nb/n,  var = (na*va + nb*vb + d**2 * na*nb/n) / n,  d = mb - ma, for any number of them.

    Args:
        *moments: Moments of one feature shape; a feature with count 0 changes nothing, whatever it holds.

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
    return by_feature(union(ShiftedMoments(mean, None, var, stacked.count)), ())


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _moments(rule: Rule, x: jax.Array, mask: jax.Array | None) -> Moments:
    """The moments of the feature shape; their derivative keeps only the input."""
    if 0 in x.shape:
        return Moments(*(jnp.zeros(rule.axes.features(x.shape), wide(x).dtype) for _ in Moments._fields))
    batch = jax.checkpoint(of_batch, static_argnums=0, prevent_cse=False)(rule, x, mask)
    return by_feature(batch, rule.reduced)


def of_batch(rule: Rule, x: jax.Array, mask: jax.Array | None) -> ShiftedMoments:
    """The moments of x over its reduced axes and over all who share; in one pass over x, with a mask in two."""
    if mask is None:
        size = math.prod(x.shape[axis] for axis in rule.reduced)
        dtype = wide(x).dtype
        count = np.asarray(size, dtype) if isinstance(size, int) else jnp.asarray(size, dtype)
        by_row, asked = (functools.partial(form, rule.reduced, count) for form in (_about_a_row, _asked_afterwards))
        batch = ShiftedMoments(*for_xla.by_platform(by_row, x, tpu=asked), count=count)
    else:
        batch = _of_valid(x, mask, rule.reduced)
    if rule.sharing is not None:
        batch = shared(rule.sharing, batch)
    if x.dtype == jnp.bfloat16:
        batch = batch._replace(shift=mean_of(batch), offset=None)
    return jax.tree.map(lambda value: checkpoint_name(value, NAME) if np.ndim(value) else value, batch)


def _about(shift: jax.Array, x: jax.Array, mask: jax.Array | None, count: Any, reduced: tuple[int, ...]) -> Any:
    """The shift, the mean's offset from it, and the biased variance, whose error grows with offset**2 / var.

    z = x - shift,  offset = mean(z),  var = mean(z**2) - offset**2
    """
    shift = lax.stop_gradient(shift)
    z = valid(wide(x) - shift, mask)
    offset, mean_square = (jnp.sum(v, reduced, keepdims=True) / count for v in (z, z * z))
    return shift, offset, jnp.maximum(mean_square - offset * offset, 0)


def _about_a_row(reduced: tuple[int, ...], count: Any, x: jax.Array) -> tuple[jax.Array, ...]:
    """Moments about a value of the data, in one pass."""
    row = for_xla.indexed_automatically(functools.partial(near_the_data, reduced=reduced), x, reduced)
    return _about(row, x, None, count, reduced)


def _asked_afterwards(reduced: tuple[int, ...], count: Any, x: jax.Array) -> tuple[jax.Array, ...]:
    """Moments about 0, and again about their mean where digits were lost.

    On a TPU the sums about 0 ride on the convolution that makes x: a step of a ResNet-50 moves 0.99 of the bytes of
    Flax's in bfloat16, 1.055 about a row. On a GPU the host would wait for the answer (1.083 of the time of Flax's).
    """
    zero = jnp.zeros_like(jnp.sum(wide(x), reduced, keepdims=True))
    zero, offset, var = _about(zero, x, None, count, reduced)
    lost = jnp.any(~(offset * offset <= 8 * var) | ~lax.is_finite(var))
    again = lambda x, zero, offset, var: _about(for_xla.rounded_once(offset), x, None, count, reduced)  # noqa: E731
    return lax.cond(lost, again, lambda x, *first: first, x, zero, offset, var)


def _of_valid(x: jax.Array, mask: jax.Array, reduced: tuple[int, ...]) -> ShiftedMoments:
    """Moments of the values that the mask marks, in two phases: their mean, and the squares about it."""
    dtype = wide(x).dtype
    repeats = math.prod(x.shape[axis] for axis in reduced if mask.shape[axis] == 1)
    count = jnp.sum(mask, reduced, keepdims=True, dtype=jnp.int32).astype(dtype) * repeats
    divisor = lax.max(count, jnp.ones_like(count))
    mean = for_xla.rounded_once(jnp.sum(valid(wide(x), mask), reduced, keepdims=True) / divisor)
    return ShiftedMoments(*_about(mean, x, mask, divisor, reduced), count=count)


def near_the_data(x: jax.Array, reduced: tuple[int, ...]) -> jax.Array:
    """A value near the data for each feature: the elementwise median of three rows of the first example.

    About the mean of R of N values the relative error of the variance is at most about u * (1 + N / R), so that two of
    the three rows must be far out on one side to lose digits. Of three examples, where an example has no axis of three.
    """
    if not reduced:
        return wide(x)
    inner = [axis for axis in reduced[1:] if isinstance(x.shape[axis], int) and x.shape[axis] >= 3]
    along = (inner or reduced)[0]
    size = x.shape[along]
    # Along this axis last: where it is split, cutting a row out of x at once would send a slab of x to a neighbor.
    for axis in reduced:
        x = x if axis == along else lax.slice_in_dim(x, 0, 1, axis=axis)
    if isinstance(size, int):
        rows = [lax.slice_in_dim(x, at, at + 1, axis=along) for at in (size // 4, size // 2, 3 * size // 4)]
    else:  # a symbolic size: the first rows, where places beyond the end are that of the last one
        rows = [lax.dynamic_slice_in_dim(x, at, 1, axis=along) for at in range(3)]
    a, b, c = map(wide, rows)
    return lax.max(lax.min(a, b), lax.min(lax.max(a, b), c))


def shared(sharing: Sharing, local: ShiftedMoments) -> ShiftedMoments:
    """The moments of the union of the parts of all who share, the same to each of them."""
    local = local._replace(count=jnp.reshape(local.count, local.count.shape or (1,) * local.var.ndim))
    parts = every_part(sharing, jax.tree.leaves(local))
    return union(local, functools.partial(sum_over, sharing)) if parts is None else union(ShiftedMoments(*parts))


def union(part: ShiftedMoments, add: Callable[..., Sequence[jax.Array]] | None = None) -> ShiftedMoments:
    """The moments of the union of parts, which `add` sums over; None: of those that are stacked along a first axis.

    n = sum(n_i),  center = sum(n_i * mean_i) / n,  d_i = mean_i - center,
    mean = center + sum(n_i * d_i) / n,  var = sum(n_i * (var_i + d_i**2)) / n - (sum(n_i * d_i) / n)**2
    """
    if add is None:
        part = part._replace(count=jnp.zeros_like(part.var) + part.count)
        whole = union(part, lambda arrays: [jnp.sum(array, axis=0, keepdims=True) for array in arrays])
        return jax.tree.map(lambda value: value[0], whole)
    count, total = add((part.count, part.count * mean_of(part)))
    divisor = jnp.maximum(count, 1)
    center = for_xla.rounded_once(lax.stop_gradient(total / divisor))
    distance = part.shift - center if part.offset is None else (part.shift - center) + part.offset
    distance = jnp.where(part.count > 0, distance, jnp.zeros_like(distance))
    sums = add((part.count * distance, part.count * (part.var + distance * distance)))
    offset, mean_square = (value / divisor for value in sums)
    return ShiftedMoments(center, offset, jnp.maximum(mean_square - offset * offset, 0), count)


def by_feature(batch: ShiftedMoments, reduced: tuple[int, ...]) -> Moments:
    """Moments of the feature shape, their mean in one number."""
    mean, var = (lax.squeeze(value, reduced) for value in (mean_of(batch), batch.var))
    count = jnp.broadcast_to(
        batch.count if np.ndim(batch.count) == 0 else lax.squeeze(batch.count, reduced), mean.shape
    )
    return Moments(mean, var, count)


def mean_of(batch: ShiftedMoments) -> jax.Array:
    """The mean in one number."""
    return batch.shift if batch.offset is None else batch.shift + batch.offset


def deviation(x: jax.Array, batch: ShiftedMoments) -> jax.Array:
    """(x - shift) - offset, in that order: the difference from the shift is nearly exact, the mean itself is not."""
    centered = wide(x) - batch.shift
    return centered if batch.offset is None else centered - batch.offset


def wide(x: jax.Array) -> jax.Array:
    """x in the dtype of the arithmetic: float32 at least."""
    return lax.convert_element_type(x, _arguments.arithmetic_dtype(x.dtype))


def valid(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """x with 0 in masked places."""
    return x if mask is None else jnp.where(mask, x, jnp.zeros((), x.dtype))
