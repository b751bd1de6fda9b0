"""Standardize a batch by its own moments, with a derivative that is exact in every mode and keeps only the input.

    out = activation(xc * a + bias + shortcut),  xc = x - mean,  a = scale * rstd,  rstd = 1 / sqrt(var + epsilon)

With t the tangent of x, and mean(v) the average of v over the batch,

    mean_t = mean(t),  var_t = 2 * mean(xc * t),  rstd_t = -rstd**3 * mean(xc * t),  xc_t = t - mean(t),

so that the tangent of xc * a + bias is a line in xc and t:

    a * t + xc * B + A,  A = bias_t - a * mean(t),  B = (scale_t - a * rstd * mean(xc * t)) * rstd.

Its transpose is the backward pass, with g the cotangent and xhat = xc * rstd:

    dx = a * (g - mean(g) - xhat * mean(g * xhat)),  dscale = sum(g * xhat),  dbias = sum(g).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jbn._core import for_xla
from jbn._core.moments import ShiftedMoments, deviation, of_batch, valid, wide
from jbn._core.sharing import sum_over
from jbn._rule import Rule


class Inputs(NamedTuple):
    """What is normalized: x, which of its values count, and what is added before the activation."""

    x: Any
    mask: Any
    shortcut: Any


class Affine(NamedTuple):
    """Scale and bias, with the rank of x and size 1 on the reduced axes."""

    scale: jax.Array
    bias: jax.Array


class Kept(NamedTuple):
    """What the backward pass is computed from."""

    inputs: Inputs
    result: jax.Array | None
    batch: ShiftedMoments
    rstd: jax.Array
    affine: Affine


def _standardize(rule: Rule, inputs: Inputs, affine: Affine, target: Any) -> tuple[jax.Array, ShiftedMoments, Any]:
    """activation((x - mean) * rstd * scale + bias + shortcut) by the batch's own moments, these, and rstd.

    With a target, `rule.correction` changes scale and bias by the batch and it, without a derivative of its own.
    """
    batch = of_batch(rule, *inputs[:2])
    rstd = reciprocal_deviation(batch.var, rule.epsilon)
    return transform(rule, inputs, batch, rstd, _corrected(rule, batch, target)(affine)), batch, rstd


def transform(rule: Rule, inputs: Inputs, batch: ShiftedMoments, rstd: jax.Array, affine: Affine) -> jax.Array:
    """activation((x - mean) * rstd * scale + bias + shortcut) by the given moments; masked values come out as 0."""
    x, mask, shortcut = inputs
    out = deviation(valid(x, mask), batch) * (rstd * affine.scale) + affine.bias
    if shortcut is not None:
        out = out + wide(valid(shortcut, mask))
    if rule.activation is not None:
        out = rule.activation(out)
    out = valid(out.astype(rule.dtype), mask)
    return out if shortcut is None else for_xla.hidden(out, "cuda")


standardize = jax.custom_jvp(_standardize, nondiff_argnums=(0,))


@functools.partial(standardize.defjvp, symbolic_zeros=True)
def _standardize_jvp(rule: Rule, primals: Any, tangents: Any) -> Any:
    inputs, affine, target = primals
    # By the plain function, in whose program a policy of `jax.checkpoint` finds the statistics by their name.
    out, batch, rstd = _standardize(rule, inputs, affine, target)
    correct = _corrected(rule, batch, target)
    # relu's slope is read off its result, which is alive anyway as the next layer's input, where the shortcut is not.
    result = out if inputs.shortcut is not None and rule.activation is jax.nn.relu else None
    kept = Kept(inputs if result is None else inputs._replace(shortcut=None), result, batch, rstd, correct(affine))
    # checkpoint keeps its arguments alone: x in its own dtype, and vectors. What it computes again fuses with the
    # backward pass, which the barrier that it has by default would prevent.
    linear = jax.checkpoint(functools.partial(_tangent, rule), prevent_cse=False)
    # An x that is not differentiated, as data, has the tangent None and costs nothing; other tangents become arrays.
    x_t = None if isinstance(tangents[0].x, SymbolicZero) else tangents[0].x
    others: list[Any] = [inputs.shortcut, *affine]
    shortcut_t, *affine_t = (
        jnp.zeros_like(primal) if isinstance(tangent, SymbolicZero) else tangent
        for primal, tangent in zip(others, (tangents[0].shortcut, *tangents[1]), strict=True)
    )
    return (out, batch, rstd), linear(kept, Inputs(x_t, None, shortcut_t), correct(Affine(*affine_t)))


def _tangent(rule: Rule, kept: Kept, inputs_t: Inputs, affine_t: Affine) -> Any:
    """The tangents of the result and of the moments, linear in those of x, shortcut, scale and bias."""
    x, mask, _ = kept.inputs
    xc, a = deviation(valid(x, mask), kept.batch), kept.affine.scale * kept.rstd
    if inputs_t.x is None:
        along_t, mean_t, covariance = [], jnp.zeros_like(a), jnp.zeros_like(a)
    else:
        t = wide(valid(inputs_t.x, mask))
        sums = [jnp.sum(array, rule.reduced, keepdims=True) for array in (t, xc * t)]
        sums = sums if rule.sharing is None else sum_over(rule.sharing, sums)
        count = kept.batch.count if jnp.ndim(kept.batch.count) == 0 else jnp.maximum(kept.batch.count, 1)
        along_t, mean_t, covariance = [a * t], *(total / count for total in sums)
    along_x = xc * ((affine_t.scale - a * kept.rstd * covariance) * kept.rstd)
    terms = [*along_t, along_x, jnp.zeros_like(xc) + (affine_t.bias - a * mean_t)]
    shortcut_t = None if inputs_t.shortcut is None else valid(inputs_t.shortcut, mask)
    if rule.activation is None or kept.result is not None:
        out_t = _joined(rule, x, kept.result, terms, shortcut_t)
    else:
        out_t = _activated(rule, kept.inputs, (xc, Affine(a, kept.affine.bias)), terms, shortcut_t)
    shift_t = jnp.zeros_like(kept.batch.shift)
    pair_t = (mean_t, None) if kept.batch.offset is None else (shift_t, mean_t)
    batch_t = ShiftedMoments(*pair_t, 2 * covariance, jnp.zeros_like(kept.batch.count))
    return valid(out_t, mask), batch_t, -covariance * kept.rstd**3


def _joined(rule: Rule, x: jax.Array, result: Any, terms: Any, shortcut_t: Any) -> jax.Array:
    """The tangent without an activation, or with relu, whose slope is 1 where its result is positive."""
    *line, constant = terms
    if result is None and x.dtype == jnp.bfloat16:
        out_t = functools.reduce(jnp.add, line).astype(rule.dtype) + for_xla.hidden(constant.astype(rule.dtype), "cuda")
    else:
        out_t = functools.reduce(jnp.add, terms).astype(rule.dtype)
    if shortcut_t is not None:
        out_t = out_t + shortcut_t.astype(rule.dtype)
    return out_t if result is None else jnp.where(result > 0, out_t, jnp.zeros_like(out_t))


def _activated(rule: Rule, inputs: Inputs, line: tuple[jax.Array, Affine], terms: Any, shortcut_t: Any) -> jax.Array:
    """The tangent with an activation: each term by a slope of its own, since one that they share would be an array."""
    _, mask, shortcut = inputs
    xc, affine = line
    if shortcut_t is not None:
        terms = [functools.reduce(jnp.add, [*terms, wide(shortcut_t)])]
    tangents = []
    for number, term in enumerate(terms):
        affine = for_xla.hidden(affine) if number else affine
        before = xc * affine.scale + affine.bias
        before = before if shortcut is None else before + wide(valid(shortcut, mask))
        tangents.append(jax.jvp(rule.activation, (before,), (term,))[1])
    return functools.reduce(jnp.add, tangents).astype(rule.dtype)


def _corrected(rule: Rule, batch: ShiftedMoments, target: Any) -> Callable[[Affine], Affine]:
    """What makes of scale and bias those that act on xhat as the given ones do on xhat * r + d."""
    if target is None:
        return lambda affine: affine
    r, d = rule.correction(rule.epsilon, lax.stop_gradient(batch), *target)
    return lambda affine: Affine(r * affine.scale, d * affine.scale + affine.bias)


def reciprocal_deviation(var: jax.Array, epsilon: float) -> jax.Array:
    """1 / sqrt(var + epsilon); NaN for an infinite variance, since 0 would make all of x alike without a warning."""
    return lax.select(var < jnp.inf, lax.rsqrt(var + epsilon), jnp.full_like(var, jnp.nan))
