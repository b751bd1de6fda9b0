"""Mean, variance and count of a batch, exact for any ratio of mean to spread, and their exact union."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jbn import _arguments
from jbn._collectives import AxisName, IndexGroups, checked_sharing
from jbn._precision import arithmetic_dtype
from jbn._shifted_moments import ShiftedMoments, shifted_moments, union


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
    shapes = [np.shape(part.mean) for part in moments]
    if len(set(shapes)) > 1:
        raise ValueError(f"`moments` have means of shapes {shapes}: expected one shape for all.")
    for part in moments:
        _arguments.check_vectors("moments", part, shapes[0], "the shape of `moments.mean`")
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(Moments(*part) for part in moments))
    count = jnp.expand_dims(stacked.count, range(1, stacked.mean.ndim))
    mean, var = (jnp.where(count > 0, leaf, jnp.zeros((), leaf.dtype)) for leaf in (stacked.mean, stacked.var))
    parts = ShiftedMoments(shift=mean, offset=jnp.zeros_like(mean), var=var, count=count)
    return rounded(union(parts), shapes[0])


def rounded(shifted: ShiftedMoments, features: tuple[int, ...]) -> Moments:
    """Moments of the feature shape, their mean in one number."""
    mean = (shifted.shift + shifted.offset).reshape(features)
    return Moments(mean, shifted.var.reshape(features), jnp.max(shifted.count))


def no_moments(x: jax.Array, features: tuple[int, ...]) -> Moments:
    """The moments of no values."""
    dtype = arithmetic_dtype(x)
    return Moments(jnp.zeros(features, dtype), jnp.zeros(features, dtype), jnp.zeros((), dtype))
