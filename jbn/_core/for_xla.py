"""Forms of the same values for one compiler's sake, each beside its plain twin. A reader of the algorithm may skip them.

Every function here returns what its plain twin returns; the counts are of a whole training step of a ResNet-50.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import lax

_chosen: list[str] = []


@contextlib.contextmanager
def forms(platform: str) -> Iterator[None]:
    """In place of each platform's own forms, those of this one: "cuda", "tpu", "cpu", or "plain" for the plain twins."""
    jax.clear_caches()
    _chosen.append(platform)
    try:
        yield
    finally:
        _chosen.pop()
        jax.clear_caches()


def by_platform(plain: Callable[..., Any], *operands: Any, **special: Callable[..., Any]) -> Any:
    """plain(*operands), or on a platform that is named the form for it."""
    if _chosen:
        return special.get(_chosen[-1], plain)(*operands)
    return lax.platform_dependent(*operands, default=plain, **special)


def _same(values: Any) -> Any:
    return values


def hidden(values: Any) -> Any:
    """The values, behind a barrier, so that XLA does not share what is made of them with what was made of them before.

    Between the terms of an activation's tangent: a slope that the terms share becomes an array in memory (on an H200
    0.987 of the time of Flax's step, 0.973 apart).
    """
    return _same(values) if _chosen == ["plain"] else lax.optimization_barrier(values)


def hidden_on_gpu(values: Any) -> Any:
    """The values, behind a barrier on a GPU alone.

    Around the result of a join, once cast: XLA otherwise keeps a float32 copy of it for the next block's shortcut (6.96
    GiB of temporaries in place of 5.28). Around the cotangent in bfloat16 that is summed, where no activation follows
    inside: XLA then fuses the other sum with the relu behind the norm (bytes 0.994 of Flax's, 1.014 without).
    """
    return by_platform(_same, values, cuda=lax.optimization_barrier)
