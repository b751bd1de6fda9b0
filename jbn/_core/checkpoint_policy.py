"""A policy that tells `jax.checkpoint` what to store of layers with norms."""

from typing import Any

import jax

from jbn._core.moments import CHECKPOINT_NAME

_by_name = jax.checkpoint_policies.save_only_these_names(CHECKPOINT_NAME)


def checkpoint_policy(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
    """Policy for `jax.checkpoint` that stores results of convolutions and matrix products, and batch statistics.

    y = conv(x),  out = relu((y - mean(y)) / sqrt(var(y) + epsilon) * scale + bias)

    For this block, the policy stores y, mean(y) and var(y), and the backward pass computes out again from them. Without
    checkpointing, out is stored as well, because the next convolution reads it. No convolution, reduction or collective
    of the forward pass runs twice. `jax.checkpoint` also stores the arguments of the function that it wraps, so
    wrapping several blocks together saves more memory than wrapping each.

    Args:
        primitive: a JAX primitive; `jax.checkpoint` calls the policy for each one.
        *arguments: the types of the primitive's arguments.
        **parameters: the primitive's parameters.

    Returns:
        Whether to store the result.

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
