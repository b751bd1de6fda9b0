"""Statistics of jbn 0.1, which counted the updates of a norm, as those of 0.2, which counts those of each feature."""

from typing import Any

import jax
import jax.numpy as jnp

from jbn._statistics import nodes


def upgrade(tree: Any) -> Any:
    """Give each feature of statistics from jbn 0.1 its count: before 0.2 a norm had one for all, an int32 scalar.

    count = broadcast(count, mean.shape), over the trailing axes: (L,) of a scanned stack becomes (L, features).

    Args:
        tree: any tree of jbn statistics: a State, a dict of them, variables of Linen, `nnx.state` of a model. Nodes
            without a count, and those that have one for each feature, are returned unchanged.

    Returns:
        The tree, of the same structure; each count is float32 and of the shape of its mean.

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
    """A count of fewer axes than the mean, for each feature."""
    if count.shape != mean.shape[: count.ndim]:
        raise ValueError(f"`count` has shape {count.shape}, but `mean` {mean.shape}: expected its first axes, or ().")
    count = jnp.expand_dims(count, range(count.ndim, mean.ndim))
    return jnp.broadcast_to(count, mean.shape).astype(jnp.float64 if count.dtype == jnp.float64 else jnp.float32)
