"""Standardize a batch by its own moments, with a derivative for every mode of JAX that stores little more than x.

    out = activation(xc * a + bias + shortcut)
    xc = x - mean,  a = scale * rstd,  rstd = 1 / sqrt(var + epsilon)

Let t be the tangent of x, and mean(v) the average of v over the batch and all places that share it. As mean(xc) = 0,

    mean_t = mean(t),  var_t = 2 * mean(xc * t),  rstd_t = -rstd**3 * mean(xc * t),  xc_t = t - mean(t)

The tangent of xc * a + bias therefore has three terms:

    line_t = a * t + xc * along + constant
    along = (scale_t - a * rstd * mean(xc * t)) * rstd,  constant = bias_t - a * mean(t)

In complex arithmetic, xc * t inside a mean stands for the real part of conj(xc) * t, and the variance is real.

The vectors `along` and `constant` hold both means, so the transpose of line_t, the backward pass, has two reductions.
Let g be the cotangent of xc * a + bias, and xhat = xc * rstd. Then

    dx = a * (g - mean(g) - xhat * mean(g * xhat)),  dscale = sum(g * xhat),  dbias = sum(g)

Higher derivatives come from differentiating these formulas, with moments from `batch_moments`, which have their own.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jbn._complex import cast, inner, is_complex
from jbn._core import for_xla
from jbn._core.moments import ShiftedMoments, batch_moments, centered, wide, zero_masked
from jbn._core.sharing import sum_over
from jbn._rule import Rule


class Inputs(NamedTuple):
    """What is normalized: x, the mask of its valid values, and the shortcut that is added before the activation."""

    x: Any
    mask: Any
    shortcut: Any


class Affine(NamedTuple):
    """Scale and bias, of the shape of x without the reduced axes."""

    scale: jax.Array
    bias: jax.Array


class Residuals(NamedTuple):
    """What the backward pass needs; it does not read the shortcut without an activation, or if there is a `result`."""

    inputs: Inputs
    result: jax.Array | None
    batch: ShiftedMoments
    rstd: jax.Array
    affine: Affine


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _standardize(rule: Rule, inputs: Inputs, affine: Affine, target: Any) -> tuple[jax.Array, ShiftedMoments, Any]:
    """Return activation((x - mean) * rstd * scale + bias + shortcut) by the batch's moments, the moments, and rstd.

    `target` is the state and the numeric bounds, which `rule.correction` of batch renormalization reads.
    """
    batch = batch_moments(rule.of_moments, inputs.x, inputs.mask)
    rstd = cast(rstd_of(batch.var, rule.epsilon), affine.scale.dtype)
    if rule.correction is not None:
        affine = rule.correction(rule.epsilon, batch, target, affine)
    return transform(rule, inputs, batch, rstd, affine), batch, rstd


standardize = jax.custom_jvp(lambda *arguments: _standardize(*arguments)[:2], nondiff_argnums=(0,))
"""The result, and the moments, which carry no tangents, since only the running statistics read them."""


def transform(rule: Rule, inputs: Inputs, batch: ShiftedMoments, rstd: jax.Array, affine: Affine) -> jax.Array:
    """activation((x - mean) * rstd * scale + bias + shortcut) by the given moments; 0 for masked values."""
    x, mask, shortcut = inputs
    a, bias = (lax.expand_dims(vector, rule.reduced) for vector in (rstd * affine.scale, affine.bias))
    out = centered(rule.reduced, x, mask, batch) * a + bias
    if shortcut is not None:
        out = out + wide(zero_masked(shortcut, mask))
    if rule.activation is not None:
        # Masked before the activation too: where its slope is infinite, the gradient would be 0 * inf.
        out = rule.activation(zero_masked(out, mask))
    out = zero_masked(out, mask).astype(rule.dtype)
    # Without the barrier, XLA on a GPU stores a float32 copy of the result for the shortcut of the next block: in a
    # step of a ResNet-50 in bfloat16 on an H200, 6.96 GiB of temporaries without the barrier, and 5.07 with it.
    return out if shortcut is None else for_xla.behind_barrier(out, "cuda")


@functools.partial(standardize.defjvp, symbolic_zeros=True)
def _standardize_jvp(rule: Rule, primals: Any, tangents: Any) -> Any:
    inputs, affine, target = primals
    # `standardize` would hide the names of the statistics from policies of `jax.checkpoint`, so it is not called here.
    out, batch, rstd = _standardize(rule, inputs, affine, target)
    # If x is not differentiated (the data, for example), its tangent is None and costs nothing. Others become arrays.
    x_t = None if isinstance(tangents[0].x, SymbolicZero) else tangents[0].x
    others: list[Any] = [inputs.shortcut, *affine]
    shortcut_t, *affine_t = (
        jnp.zeros_like(primal) if isinstance(tangent, SymbolicZero) else tangent
        for primal, tangent in zip(others, (tangents[0].shortcut, *tangents[1]), strict=True)
    )
    affine_t = Affine(*affine_t)
    if rule.correction is not None:
        # The correction is linear in scale and bias, so the same function maps their tangents.
        affine, affine_t = (rule.correction(rule.epsilon, batch, target, each) for each in (affine, affine_t))
    # With a shortcut, the slope of relu is read from the result, which is stored anyway as the input of the next layer.
    of_result = inputs.shortcut is not None and rule.activation is jax.nn.relu and not is_complex(out)
    result = out if of_result else None
    # jax.checkpoint stores only its arguments: x in its own dtype, and vectors. prevent_cse=False omits its barrier, so
    # that XLA fuses the recomputation with the backward pass.
    linear = jax.checkpoint(functools.partial(_tangent, rule), prevent_cse=False)
    out_t = linear(Residuals(inputs, result, batch, rstd, affine), Inputs(x_t, None, shortcut_t), affine_t)
    return (out, batch), (out_t, jax.tree.map(lambda value: SymbolicZero(jax.typeof(value)), batch))


def _tangent(rule: Rule, kept: Residuals, inputs_t: Inputs, affine_t: Affine) -> jax.Array:
    """The tangent of the result, a linear function of the tangents of x, shortcut, scale and bias."""
    x, mask, _ = kept.inputs
    spread = functools.partial(lax.expand_dims, dimensions=rule.reduced)
    xc, a = centered(rule.reduced, x, mask, kept.batch), kept.affine.scale * kept.rstd
    if inputs_t.x is None:
        of_x, mean_t, covariance = [], jnp.zeros_like(a), jnp.zeros_like(kept.batch.var)
    else:
        # Masked for each use, so that the transpose ends in a sum instead of a select: XLA on a CPU computes it once.
        wide_t = wide(inputs_t.x)
        t, again = (zero_masked(wide_t, mask) for _ in range(2))
        sums = [jnp.sum(array, rule.reduced) for array in (t, inner(xc, t))]
        sums = sums if rule.sharing is None else sum_over(rule.sharing, sums)
        count = kept.batch.count if jnp.ndim(kept.batch.count) == 0 else jnp.maximum(kept.batch.count, 1)
        of_x, mean_t, covariance = [spread(a) * again], *(total / cast(count, total.dtype) for total in sums)
    along = (affine_t.scale - a * (kept.rstd * cast(covariance, a.dtype))) * kept.rstd
    terms = [*of_x, xc * spread(along), spread(affine_t.bias - a * mean_t)]
    shortcut_t = None if inputs_t.shortcut is None else zero_masked(inputs_t.shortcut, mask)
    if rule.activation is None or kept.result is not None:
        out_t = _plain_tangent(rule, kept.result, terms, shortcut_t)
    else:
        out_t = _activated_tangent(rule, kept.inputs, (xc, a, kept.affine.bias), terms, shortcut_t)
    return zero_masked(out_t, mask)


def _plain_tangent(rule: Rule, result: Any, terms: list[jax.Array], shortcut_t: Any) -> jax.Array:
    """The sum of the terms without an activation, or with relu, whose slope is 1 where the result is positive."""
    *others, constant = terms
    varying = functools.reduce(jnp.add, others)
    if result is None and rule.dtype == jnp.bfloat16:
        out_t = for_xla.added(varying, jnp.zeros_like(varying) + constant, rule.dtype)
    else:
        out_t = (varying + constant).astype(rule.dtype)
    if shortcut_t is not None:
        out_t = out_t + shortcut_t.astype(rule.dtype)
    return out_t if result is None else jnp.where(result > 0, out_t, jnp.zeros_like(out_t))


def _activated_tangent(rule: Rule, inputs: Inputs, line: Any, terms: list[jax.Array], shortcut_t: Any) -> jax.Array:
    """The sum of the terms, each mapped by the derivative of the activation at xc * a + bias + shortcut."""
    xc, a, bias = line
    if shortcut_t is not None:
        terms = [functools.reduce(jnp.add, [*terms, wide(shortcut_t)])]
    tangents = []
    for number, term in enumerate(terms):
        # Without the barrier, XLA merges the slopes of the terms into one array in memory: a step of a ResNet-50 on an
        # H200 then takes 0.987 of the time of Flax's, and 0.973 with the barrier.
        a, bias = for_xla.behind_barrier((a, bias)) if number else (a, bias)
        before = xc * lax.expand_dims(a, rule.reduced) + lax.expand_dims(bias, rule.reduced)
        if inputs.shortcut is not None:
            before = before + wide(zero_masked(inputs.shortcut, inputs.mask))
        before = zero_masked(before, inputs.mask)  # as in `transform`
        # A tangent must have the type of its primal: shape, sharding, and the axes over which it varies.
        term = term if jax.typeof(term) == jax.typeof(before) else jnp.zeros_like(before) + term
        term = zero_masked(term, inputs.mask)  # An infinite slope of a masked value would give 0 * inf.
        tangents.append(jax.jvp(rule.activation, (before,), (term,))[1])
    return functools.reduce(jnp.add, tangents).astype(rule.dtype)


def rstd_of(var: jax.Array, epsilon: float) -> jax.Array:
    """1 / sqrt(var + epsilon); NaN for an infinite variance, where 0 would give a constant output without a warning."""
    return lax.select(var < jnp.inf, lax.rsqrt(var + epsilon), jnp.full_like(var, jnp.nan))
