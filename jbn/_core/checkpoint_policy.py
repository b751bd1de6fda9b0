"""What `jax.checkpoint` keeps of layers with norms: what is expensive to compute, and the statistics of the batch."""

from typing import Any

import jax

from jbn._core.moments import CHECKPOINT_NAME

_by_name = jax.checkpoint_policies.save_only_these_names(CHECKPOINT_NAME)


def checkpoint_policy(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
    """A policy for `jax.checkpoint`: keep the convolutions, the products of matrices and the statistics of batches.

    kept for the backward pass: y = conv(x), mean(y), var(y); computed again: relu((y - mean) * rstd * scale + bias)

    A block of convolution, norm and activation keeps its convolution's output alone, where it otherwise keeps what the
    next convolution reads as well. No convolution, no reduction and no collective of the forward pass runs twice.
    What the checkpointed function is given is kept too, so it saves more around several blocks than around each.

    Args:
        primitive: what is asked about; it is `jax.checkpoint` that calls the policy.
        *arguments: the types of its arguments.
        **parameters: its parameters.

    Returns:
        Whether to keep the result.

    Raises:
        Nothing.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jbn
        >>> params, state = jbn.init(4)
        >>> def block(weight, x):
        ...     out, new_state = jbn.batch_norm(params, state, x @ weight, True, activation=jax.nn.relu)
        ...     return out, new_state
        >>> block = jax.checkpoint(block, policy=jbn.checkpoint_policy)
        >>> gradient = jax.grad(lambda weight: jnp.sum(block(weight, jnp.ones((8, 3)))[0]))(jnp.ones((3, 4)))
        >>> print(gradient.shape)
        (3, 4)

    Source:
        Chen, Xu, Zhang and Guestrin, Training Deep Nets with Sublinear Memory Cost, 2016, section 3; jax.checkpoint.
    """
    expensive = jax.checkpoint_policies.dots_saveable(primitive, *arguments, **parameters)
    return expensive or _by_name(primitive, *arguments, **parameters)
