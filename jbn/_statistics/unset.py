"""Statistics that are not known yet."""

from typing import Any

import jax.numpy as jnp

from jbn._statistics import nodes


def unset(tree: Any) -> Any:
    """Mark statistics as not known yet: the next good batch's own moments replace them whole.

    mean = 0, var = -inf, count = 0. Inference with them gives NaN, loudly.

    Args:
        tree: any tree of jbn statistics, of states, a Linen dict, an NNX state or module: every node with `mean` and
            `var` is marked, and its `count` where it has one; all else is left as it is.

    Returns:
        The tree, of the same structure, shapes and dtypes.

    Raises:
        ValueError: the tree holds no statistics.

    Example:
        >>> import jax.numpy as jnp
        >>> import jbn
        >>> _, state = jbn.init(1)
        >>> state = jbn.update(jbn.unset(state), jbn.moments(jnp.array([[3.0], [5.0]])))
        >>> print(state.mean, state.var, state.count)
        [4.] [1.] [1.]

    Source:
        jbn's own convention; -inf survives averaging, is no variance, and leaves NaN to mean a fault.
    """
    forest = nodes.find(tree, "`tree`")
    marks = {"mean": 0, "var": -jnp.inf, "count": 0}
    return forest.replaced(
        {
            path: {field: jnp.full_like(leaf, marks[field]) for field, leaf in forest.at(path).items()}
            for path in forest.nodes
        }
    )
