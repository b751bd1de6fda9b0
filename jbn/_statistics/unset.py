"""Marking statistics as unset."""

from typing import Any

import jax.numpy as jnp

from jbn._statistics import nodes


def unset(tree: Any) -> Any:
    """Mark statistics as unset, so that the moments of the next valid batch replace them.

    mean = 0,  var = -inf,  count = 0

    Inference with unset statistics gives NaN.

    Args:
        tree: any tree with jbn statistics, such as states, Linen variables, or an NNX state or module. Every node with
            `mean` and `var` is marked, and its `count` if it has one; everything else is returned unchanged.

    Returns:
        The tree, with the same structure, shapes and dtypes.

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
        jbn's own convention. -inf stays -inf when averaged and cannot be a variance; NaN remains the sign of a fault.
    """
    forest = nodes.find(tree, "`tree`")
    marks = {"mean": 0, "var": -jnp.inf, "count": 0}
    return forest.replaced(
        {
            path: {field: jnp.full_like(leaf, marks[field]) for field, leaf in forest.at(path).items()}
            for path in forest.nodes
        }
    )
