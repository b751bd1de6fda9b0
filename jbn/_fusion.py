"""Forms of the same values that let XLA fuse each reduction with what it reduces.

On a CPU, XLA hands sums to a library that takes in the arithmetic before them, but only operands that nobody else uses.
What sums and loops share, it writes to memory for them, as float32, and the page faults of fresh memory can cost as
much as the arithmetic. So each user is given a form of its own, which the compiler does not know to be the same.
"""

import jax
import jax.numpy as jnp


def apart_on_cpu(vector: jax.Array, fault: float) -> jax.Array:
    """The vector, for which a CPU's compiler forms anew what is made of it; NaN becomes `fault`, not finite either."""
    return jax.lax.platform_dependent(
        vector,
        cpu=lambda same: jnp.where(same == same, same, jnp.asarray(fault, same.dtype)),
        default=lambda same: same,
    )


def apart_on_gpu(*vectors: jax.Array) -> tuple[jax.Array, ...]:
    """The vectors, of which a GPU's compiler no longer knows that they are the same."""
    return jax.lax.platform_dependent(
        *vectors, cuda=lambda *same: tuple(jax.lax.optimization_barrier(same)), default=lambda *same: same
    )
