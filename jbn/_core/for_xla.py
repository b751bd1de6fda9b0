"""Workarounds for XLA, each beside its plain twin, which gives the same values: the algorithm reads without them."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jbn._complex import by_parts

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


def by_platform(plain: Callable[..., Any], *operands: Any, **by_name: Callable[..., Any]) -> Any:
    """plain(*operands), or on a platform for which a form is given by its name, what that form gives.

    To JAX, this is one function with a derivative of its own. JAX would else look for known values in each form
    whenever a norm is differentiated, a tenth of the time to trace a step of a ResNet-50.
    """
    choose = functools.partial(_chosen_form, plain, by_name)
    opaque = jax.custom_jvp(lambda *operands: choose(*operands))
    opaque.defjvp(lambda primals, tangents: jax.jvp(choose, primals, tangents))
    return opaque(*operands)


def _chosen_form(plain: Callable[..., Any], by_name: dict[str, Callable[..., Any]], *operands: Any) -> Any:
    if _chosen:
        return by_name.get(_chosen[-1], plain)(*operands)
    return lax.platform_dependent(*operands, default=plain, **by_name)


def behind_barrier(values: Any, only_on: str | None = None) -> Any:
    """The values, which XLA cannot merge with other uses of them, on one platform or on all; plain: the values."""
    if only_on is None:
        return values if _chosen[-1:] == ["plain"] else lax.optimization_barrier(values)
    return by_platform(lambda values: values, values, **{only_on: lax.optimization_barrier})


def added(line: jax.Array, constant: jax.Array, dtype: Any) -> jax.Array:
    """line + constant, cast to a half-precision dtype.

    In the transpose, the sum of the cotangent over the constant reads it behind a barrier of its own on a GPU, in its
    own dtype. XLA then fuses the other sum with the activation that follows the norm. Compiled for an H200, a step of a
    ResNet-50 moves 0.994 of the bytes of Flax's, 1.014 without; with silu, a small network takes 0.991 of the time of
    Flax's on an H100, 1.004 without. Forward mode pays for it there: both terms are rounded.
    """
    on_gpu = {"cuda": lambda line, constant: line.astype(dtype) + lax.optimization_barrier(constant.astype(dtype))}
    return _chosen_form(lambda line, constant: (line + constant).astype(dtype), on_gpu, line, constant)


def computed_once(center: jax.Array) -> jax.Array:
    """A center with one bit less, which serves as well, and which all uses have the same; plain: the center.

    XLA may compute a center again in each of its uses: on a CPU the quotient, rounded in one and not in another, where
    it fuses it with a subtraction; on a GPU a sum of few values too, in another order. An offset from one center then
    belongs to another: the variance is off by 4e-4 at mean/sd 1e6 on a CPU, by 8e-4 at 1e5 on an H100. No bit that
    reduce_precision leaves is rounded again; on a GPU, the barrier keeps the sum in one kernel.
    """
    form = jnp.finfo(center.dtype)
    narrowed = functools.partial(lax.reduce_precision, exponent_bits=form.nexp, mantissa_bits=form.nmant - 1)
    return center if _chosen[-1:] == ["plain"] else lax.optimization_barrier(by_parts(narrowed, center))
