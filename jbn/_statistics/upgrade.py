"""Conversion of statistics from jbn 0.1, which has one count for each norm, to 0.2, which has one for each feature."""

from typing import Any

import jax
import jax.numpy as jnp

from jbn._statistics import nodes


def upgrade(tree: Any) -> Any:
    """Convert the counts of jbn 0.1, an int32 scalar for each norm, to one count for each feature.

    count = broadcast(count, mean.shape)

    The count is repeated over trailing axes. In a scanned stack, the shape (L,) becomes (L, features). In a stack with
    the layers on the last axis it becomes (features, L), if these sizes differ.

    Args:
        tree: any tree with jbn statistics: a State, a dict of states, Linen variables, or `nnx.state` of a model.
            Nodes without a count, or with one for each feature, are returned unchanged.

    Returns:
        The tree, with the same structure; each count is float32 and has the shape of its mean.

    Raises:
        ValueError: the tree holds no statistics, or a count does not fit its mean.

    Example:
        >>> import jax.numpy as jnp
        >>> import jbn
        >>> old = jbn.State(mean=jnp.zeros(3), var=jnp.ones(3), count=jnp.int32(7))
        >>> print(jbn.upgrade(old).count)
        [7. 7. 7.]

    Source:
        jbn's own convention.
    """
    forest = nodes.find(tree, "`tree`")
    raised = {}
    for path in forest.nodes:
        fields = forest.at(path)
        if "count" in fields:
            try:
                raised[path] = {"count": for_each_feature(jnp.asarray(fields["count"]), fields["mean"])}
            except ValueError as error:
                raise ValueError(f"`tree` at {nodes.shown(path)}: {error}") from None
    return forest.replaced(raised)


def for_each_feature(count: jax.Array, mean: Any) -> jax.Array:
    """A count with the leading or the trailing axes of the mean, repeated for each feature."""
    if not fits(count.shape, mean.shape):
        raise ValueError(
            f"`count` has shape {count.shape}, but `mean` has {mean.shape}: expected (), or the leading or trailing "
            "axes of `mean`."
        )
    if count.shape == mean.shape[: count.ndim]:
        count = jnp.expand_dims(count, range(count.ndim, mean.ndim))
    return jnp.broadcast_to(count, mean.shape).astype(jnp.float64 if count.dtype == jnp.float64 else jnp.float32)


def fits(count: tuple[int, ...], mean: tuple[int, ...]) -> bool:
    """Whether a count of this shape has the leading or the trailing axes of a mean of this shape."""
    return count in (mean[: len(count)], mean[len(mean) - len(count) :])
