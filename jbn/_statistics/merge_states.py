"""Merging the running statistics of replicas that were trained apart."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jbn import _dtypes
from jbn._arguments import of_upgrade
from jbn._complex import cast, real_dtype
from jbn._core.moments import ShiftedMoments, mean_of, merge_stacked
from jbn._statistics import nodes


def merge_states(*trees: Any, weights: Sequence[ArrayLike] | None = None) -> Any:
    """Merge the running statistics of replicas by the law of total variance.

    mean = sum(w_i * mean_i),  var = sum(w_i * (var_i + |mean_i - mean|**2))
    w = weights / sum(weights)

    An average of the variances alone would leave out the variance between the means.

    Args:
        *trees: running statistics with the same nodes: states, or trees that have `mean` and `var` in some nodes, such
            as Linen variables or `nnx.state` of a model. Unset features of a tree are left out of the merge. So are
            features with the initial mean 0, variance 1 and count 0, if another tree has updated them.
        weights: a number of at least 0 for each tree, such as the number of examples that it saw; None weighs all trees
            equally. A tree of weight 0 affects only the count, whatever it holds.

    Returns:
        The first tree with the merged statistics, which carry no gradient. The `count` of each feature is its largest
        count in any tree. A feature that is unset in all trees stays unset. All other leaves are those of the first
        tree.

    Raises:
        TypeError: statistics are in half precision, or a weight is not a number.
        ValueError: there are no trees or no statistics, nodes or shapes differ, or the weights do not fit.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jbn
        >>> left, right = (jbn.State(jnp.array([m]), jnp.array([1.0]), jnp.array([9.0])) for m in (0.0, 4.0))
        >>> state = jbn.merge_states(left, right)
        >>> print(state.mean, state.var, state.count)
        [2.] [5.] [9.]

        Trees of a model, and replicas stacked along a first axis, as pmap returns them:

        >>> print(jbn.merge_states({"stem": left}, {"stem": right})["stem"].var)
        [5.]
        >>> stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), left, right)
        >>> print(jbn.merge_states(*map(jbn.State._make, zip(*stacked))).var)
        [5.]

    Source:
        Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979.
    """
    if not trees:
        raise ValueError("`merge_states` got no trees: expected at least one with statistics, such as a jbn.State.")
    if len(trees) == 1 and type(trees[0]) in (list, tuple):
        raise ValueError(
            f"`merge_states` got one tree, a {type(trees[0]).__name__} of {len(trees[0])}: expected an argument for "
            "each tree, as in merge_states(*trees)."
        )
    forests = [nodes.find(tree, f"`trees[{number}]`") for number, tree in enumerate(trees)]
    merged = {}
    for path in forests[0].nodes:
        replicas = [_checked(forests, number, path) for number in range(len(forests))]
        weight = _checked_weights(weights, len(trees), replicas[0]["var"].dtype)
        merged[path] = jax.lax.stop_gradient(_merged(replicas, weight))
    return forests[0].replaced(merged)


def _checked(forests: list[nodes.Forest], number: int, path: nodes.Path) -> dict[str, jax.Array]:
    """The statistics of a node in one of the trees, as arrays, checked against the first tree."""
    first, forest = forests[0], forests[number]
    name = f"`trees[{number}]` at {nodes.shown(path) or 'the root'}"
    if forest.nodes.keys() != first.nodes.keys():
        other = [nodes.shown(path) or "the root" for path in sorted(first.nodes.keys() ^ forest.nodes.keys(), key=str)]
        raise ValueError(
            f"`trees[{number}]` and `trees[0]` hold different norms: expected the same, but only one of them has "
            f"{', '.join(other)}."
        )
    fields, like = ({field: jnp.asarray(leaf) for field, leaf in tree.at(path).items()} for tree in (forest, first))
    if fields.keys() != like.keys():
        raise ValueError(f"{name} has {', '.join(fields)}: expected {', '.join(like)}, as in `trees[0]`.")
    for field, leaf in fields.items():
        shape = like["mean" if field == "var" else field].shape
        if leaf.shape != shape:
            raise ValueError(
                f"{name} has `{field}` of shape {leaf.shape}: expected {shape}, as in `trees[0]`{of_upgrade(field)}."
            )
        if field != "count" and not _dtypes.is_state_dtype(leaf.dtype):
            raise TypeError(
                f"{name} has `{field}` in {leaf.dtype.name}: expected float32 or float64, since sums of squares lose "
                "digits in half precision. Convert it with `.astype`."
            )
    return fields


def _merged(replicas: list[dict[str, jax.Array]], weights: jax.Array) -> dict[str, jax.Array]:
    """The merged statistics of one node."""
    stacked = {field: jnp.stack(_in_one_dtype([fields[field] for fields in replicas])) for field in replicas[0]}
    var = stacked["var"]
    weight = jnp.expand_dims(weights, range(1, var.ndim)).astype(var.dtype)
    weight = jnp.where(jnp.isneginf(var), jnp.zeros((), var.dtype), weight)
    if "count" in stacked and stacked["count"].shape == var.shape:
        updated = stacked["count"] > 0
        initial = ~updated & (stacked["mean"] == 0) & (var == 1)
        beside_updated = jnp.any(updated & (weight > 0), axis=0, keepdims=True)
        weight = jnp.where(initial & beside_updated, jnp.zeros((), var.dtype), weight)
    mean, var = (jnp.where(weight > 0, leaf, jnp.zeros((), leaf.dtype)) for leaf in (stacked["mean"], var))
    merged = merge_stacked(ShiftedMoments(shift=mean, offset=None, var=cast(var, real_dtype(mean.dtype)), count=weight))
    known = merged.count > 0
    found = {
        "mean": jnp.where(known, mean_of(merged), jnp.zeros((), mean.dtype)),
        "var": jnp.where(known, merged.var, jnp.full((), -jnp.inf, merged.var.dtype)),
    }
    return found | ({"count": jnp.max(stacked["count"], axis=0)} if "count" in stacked else {})


def _in_one_dtype(leaves: list[jax.Array]) -> list[jax.Array]:
    """The leaves in the dtype to which all of them promote."""
    with jax.numpy_dtype_promotion("standard"):
        widest = jnp.result_type(*leaves)
    return [leaf.astype(widest) for leaf in leaves]


def _checked_weights(weights: Any, trees: int, dtype: Any) -> jax.Array:
    """One weight for each tree, relative to the largest, so that counts of any size can be given."""
    if weights is None:
        return jnp.ones(trees, dtype)
    expected = f"expected {trees} numbers of at least 0, not all 0, one for each tree"
    try:
        values = list(weights)
        traced = any(isinstance(value, Tracer) for value in values)
        known = None if traced else np.array([float(value) for value in values if not isinstance(value, str)])
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"`weights` is {weights!r}: {expected}.") from None
    if isinstance(weights, Mapping) or len(values) != trees or any(np.shape(value) for value in values):
        raise ValueError(f"`weights` is {weights!r}: {expected}.")
    if known is None:
        array = jnp.stack([jnp.asarray(value).astype(dtype) for value in values])
        return array / jnp.max(array)
    if len(known) != trees or not (np.isfinite(known).all() and (known >= 0).all() and known.any()):
        raise ValueError(f"`weights` is {weights!r}: {expected}.")
    return jnp.asarray(known / known.max(), dtype)
