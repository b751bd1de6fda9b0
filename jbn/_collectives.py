"""Sums over mapped axes: the devices of pmap and shard_map, the lanes of vmap."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

AxisName = str | tuple[str, ...]


def sum_over(axis_name: AxisName | None, arrays: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Sums of arrays of one shape over the mapped axes, by one collective; without a name the arrays themselves."""
    if axis_name is None:
        return tuple(arrays)
    try:
        return tuple(jax.lax.psum(jnp.stack(arrays), axis_name))
    except NameError:
        raise NameError(
            f"`axis_name` is {axis_name!r}, which no surrounding transformation binds: call inside "
            f"jax.shard_map, jax.vmap(..., axis_name={axis_name!r}) or jax.pmap(..., axis_name={axis_name!r}), "
            "or leave `axis_name` out. Under plain jit with a sharded batch it is not needed."
        ) from None
