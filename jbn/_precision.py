"""The precision of the arithmetic: float32 at least, whatever the dtype of x."""

from typing import Any

import jax
import jax.numpy as jnp


def arithmetic_dtype(x: jax.Array) -> Any:
    """The dtype to compute in."""
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def widened(x: jax.Array) -> jax.Array:
    """x in the dtype of the arithmetic, for loops and single rows; what is to be summed is converted by `astype`.

    A CPU reads bfloat16 by its bits here. XLA would write a conversion that sums and loops share to memory for them,
    and convert the whole of x to slice it.
    """
    return _from_bfloat16(x) if x.dtype == jnp.bfloat16 else x.astype(arithmetic_dtype(x))


@jax.custom_jvp
def _from_bfloat16(x: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(x, cpu=_by_bits, default=lambda x: x.astype(jnp.float32))


@_from_bfloat16.defjvp
def _from_bfloat16_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return _from_bfloat16(*primals), tangents[0].astype(jnp.float32)


def _by_bits(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(bits << jnp.uint32(16), jnp.float32)
