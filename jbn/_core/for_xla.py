"""Forms of the same values for one compiler's sake, each beside its plain twin: the algorithm reads without them."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

_chosen: list[str] = []


@contextlib.contextmanager
def forms(platform: str) -> Iterator[None]:
    """For tests: the forms of this platform everywhere ("cuda", "tpu", "cpu"), or the plain twins alone ("plain")."""
    jax.clear_caches()
    _chosen.append(platform)
    try:
        yield
    finally:
        _chosen.pop()
        jax.clear_caches()


def by_platform(plain: Callable[..., Any], *operands: Any, **special: Callable[..., Any]) -> Any:
    """plain(*operands), or where a form for the platform is given by its name, what that gives."""
    if _chosen:
        return special.get(_chosen[-1], plain)(*operands)
    return lax.platform_dependent(*operands, default=plain, **special)


def hidden(values: Any, only_on: str | None = None) -> Any:
    """The values, behind an optimization barrier on one platform or on all; the plain twin is the values.

    Between the terms of an activation's tangent, on all: else XLA merges the slopes of the terms into one array in
    memory (0.987 of the time of Flax's step of a ResNet-50 on an H200; 0.973 with the barrier).
    Around the result of a join, on a GPU: else XLA keeps a float32 copy of it for the shortcut of the next block (6.96
    GiB of temporaries; 5.28 with it).
    Around a bfloat16 cotangent that is summed, where no activation follows inside, on a GPU: XLA then fuses the other
    sum with the mask of the relu that follows the norm (bytes 1.014 of Flax's; 0.994 with it).
    """
    if only_on is None:
        return values if _chosen == ["plain"] else lax.optimization_barrier(values)
    return by_platform(lambda values: values, values, **{only_on: lax.optimization_barrier})


def rounded_once(center: jax.Array) -> jax.Array:
    """A center, which need not be exact, with one bit less; the plain twin is the center.

    Else XLA may fuse the division that makes it into a subtraction from it and leave it unrounded there, and round it
    elsewhere, so that the offset belongs to another center (the variance is off by 4e-4 at mean/sd 1e6).
    """
    form = jnp.finfo(center.dtype)
    return center if _chosen == ["plain"] else lax.reduce_precision(center, form.nexp, form.nmant - 1)


def indexed_automatically(
    function: Callable[[jax.Array], jax.Array], x: jax.Array, reduced: tuple[int, ...]
) -> jax.Array:
    """function(x), whose result has size 1 on the reduced axes; explicit sharding refuses to slice a sharded axis."""
    sharding = jax.typeof(x).sharding
    if not any(sharding.spec):
        return function(x)
    features = PartitionSpec(*(None if axis in reduced else names for axis, names in enumerate(sharding.spec)))
    with jax.sharding.use_abstract_mesh(sharding.mesh):
        automatic: Callable[..., Any] = jax.sharding.auto_axes(function, out_sharding=features)
        return automatic(x)
