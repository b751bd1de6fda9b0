"""Standardize a batch by its own moments, with the exact derivative in every mode, which keeps only the input alive."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from jbn._activation import Activation, ClosedActivation, closed
from jbn._collectives import Sharing
from jbn._fusion import apart_on_gpu
from jbn._shifted_moments import (
    ShiftedMoments,
    deviation,
    deviation_to_sum,
    mean_tangents,
    moments_tangent,
    remembered,
    shifted_moments,
    valid,
)


class Affine(NamedTuple):
    """Scale and bias, with the rank of x and size 1 on the reduced axes."""

    scale: jax.Array
    bias: jax.Array


class Target(NamedTuple):
    """What batch renormalization corrects towards: running statistics with the rank of x, and the bounds of r and d."""

    mean: jax.Array
    var: jax.Array
    r_max: jax.Array
    d_max: jax.Array


class Rule(NamedTuple):
    """What is fixed while tracing."""

    reduced: tuple[int, ...]
    sharing: Sharing | None
    epsilon: float
    activation: ClosedActivation | None
    dtype: Any


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def standardize(
    rule: Rule,
    x: jax.Array,
    mask: jax.Array | None,
    affine: Affine,
    captured: list[jax.Array],
    target: Target | None = None,
) -> tuple[jax.Array, ShiftedMoments]:
    """activation((x - mean) * rstd * scale + bias) by the batch's own mean and variance, and its moments.

    `captured` are the values that the activation closes over, since a custom derivative sees arguments only. With a
    target, (x - mean) * rstd becomes (x - mean) * rstd * r + d, where r and d are constants to every derivative.
    """
    batch = shifted_moments(x, mask, rule.reduced, rule.sharing)
    if target is not None:
        affine = _corrected(_correction(rule, batch, target), affine)
    return transform(rule, x, mask, batch, affine, captured), batch


def transform(
    rule: Rule, x: jax.Array, mask: jax.Array | None, batch: ShiftedMoments, affine: Affine, captured: list[jax.Array]
) -> jax.Array:
    """activation((x - mean) * rstd * scale + bias) by the given moments; masked values come out as 0."""
    out = deviation(x, mask, batch) * (reciprocal_deviation(batch.var, rule.epsilon) * affine.scale) + affine.bias
    if rule.activation is not None:
        out = rule.activation(out, *captured)
    return valid(out.astype(rule.dtype), mask)


@functools.partial(standardize.defjvp, symbolic_zeros=True)
def _standardize_jvp(rule: Rule, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    x, mask, affine, captured, target = primals
    x_t, _, affine_t, captured_t, _ = tangents
    # Rather than by standardize itself: what is kept of the moments, by their name, is then what the result is made of.
    batch = remembered(x, mask, rule.reduced, rule.sharing)
    x_t = None if isinstance(x_t, SymbolicZero) else x_t
    affine_t, captured_t = jax.tree.map(
        _instantiated, (affine_t, captured_t), (affine, captured), is_leaf=lambda leaf: isinstance(leaf, SymbolicZero)
    )
    if target is not None:
        correction = _correction(rule, batch, target)
        affine, affine_t = _corrected(correction, affine), _corrected(correction, affine_t)
    out = transform(rule, x, mask, batch, affine, captured)
    # checkpoint keeps its arguments and recomputes the rest, so that the backward pass has x in its own dtype, the
    # moments, scale and bias, and nothing else. What it recomputes is elementwise and fuses into the backward pass:
    # a barrier against merging it with the forward pass, the default, would only stop that fusion.
    linear = jax.checkpoint(functools.partial(_tangent, rule), prevent_cse=False)
    return (out, batch), linear(x, mask, batch, affine, captured, x_t, affine_t, captured_t)


def _tangent(
    rule: Rule,
    x: jax.Array,
    mask: jax.Array | None,
    batch: ShiftedMoments,
    affine: Affine,
    captured: list[jax.Array],
    x_t: jax.Array | None,
    affine_t: Affine,
    captured_t: list[jax.Array | None],
) -> tuple[jax.Array, ShiftedMoments]:
    """Tangents of output and moments, linear in those of x, scale, bias and the captured values.

    With a = scale*rstd and t the tangent of x,
    out_t = a*t + xc*B + A,  A = bias_t - a*mean(t),  B = (scale_t - a*rstd*mean(xc*t))*rstd.
    The means are factored out of the elementwise line, so that its transpose holds two reductions, not four.
    """
    centered = deviation(x, mask, batch)
    rstd = reciprocal_deviation(batch.var, rule.epsilon)
    slope = rstd * affine.scale
    if x_t is None:
        tangent, mean_t, covariance = None, jnp.zeros_like(batch.offset), jnp.zeros_like(batch.var)
    else:
        tangent = valid(x_t, mask).astype(centered.dtype)
        mean_t, covariance = mean_tangents(tangent, centered, batch, rule.reduced, rule.sharing)
    constant = affine_t.bias - slope * mean_t
    along = (affine_t.scale - slope * rstd * covariance) * rstd
    # In the transpose these two are reductions.
    terms = [deviation_to_sum(x, mask, batch) * along, constant]
    if tangent is not None:
        terms.append(slope * tangent)
    if rule.activation is None:
        out_t = sum(terms[1:], terms[0])
    else:
        out_t = _after_activation(rule.activation, centered, Affine(slope, affine.bias), terms, captured, captured_t)
    return valid(out_t.astype(rule.dtype), mask), moments_tangent(batch, mean_t, covariance)


def _after_activation(
    activation: ClosedActivation,
    centered: jax.Array,
    affine: Affine,
    terms: list[jax.Array],
    captured: list[jax.Array],
    captured_t: list[jax.Array | None],
) -> jax.Array:
    """The activation's tangent where that of its argument, centered * scale + bias, is the sum of the terms.

    A GPU reads x anyway in each of the loops that the transposes of the terms become. Where the derivative is cheap,
    each has its own, since XLA otherwise writes it to memory for them to share, as a mask for relu.
    """
    if not activation.is_cheap:
        terms = [sum(terms[1:], terms[0])]
    values_t = [
        np.zeros(value.shape, jax.dtypes.float0) if value_t is None else value_t
        for value, value_t in zip(captured, captured_t, strict=True)
    ]
    _, out_t = jax.jvp(activation, (centered * affine.scale + affine.bias, *captured), (terms[0], *values_t))
    for term in terms[1:]:
        affine = Affine(*apart_on_gpu(*affine))
        before = centered * affine.scale + affine.bias
        # Zeros of its argument broadcast the term to its shape and to its sharding.
        before_t = jnp.zeros_like(before) + term
        out_t += jax.jvp(lambda y: activation(y, *captured), (before,), (before_t,))[1]
    return out_t


def _correction(rule: Rule, batch: ShiftedMoments, target: Target) -> tuple[jax.Array, jax.Array]:
    """r and d of batch renormalization, 1 and 0 where the running statistics are unset; never differentiated."""
    batch = jax.lax.stop_gradient(batch)
    unset = jnp.isneginf(target.var)
    running = jnp.where(unset, jnp.ones_like(target.var), target.var) + rule.epsilon
    r = jnp.sqrt((batch.var + rule.epsilon) / running)
    d = ((batch.shift - target.mean) + batch.offset) * jax.lax.rsqrt(running)
    r = jnp.where(unset, jnp.ones_like(r), jnp.clip(r, 1 / target.r_max, target.r_max))
    return r, jnp.where(unset, jnp.zeros_like(d), jnp.clip(d, -target.d_max, target.d_max))


def _corrected(correction: tuple[jax.Array, jax.Array], affine: Affine) -> Affine:
    """Scale and bias, or their tangents, that act on xhat as the given ones do on xhat * r + d."""
    r, d = correction
    return Affine(r * affine.scale, d * affine.scale + affine.bias)


def closed_activation(
    activation: Activation | None, x: jax.Array, mask: jax.Array | None, affine: Affine
) -> tuple[ClosedActivation | None, list[jax.Array]]:
    """The activation with the values that it captures as arguments, and those values."""
    if activation is None:
        return None, []
    # By shape evaluation, since the type that the activation meets has a sharding and mapped axes too.
    before = jax.eval_shape(lambda: valid(x, mask).astype(affine.scale.dtype) * affine.scale + affine.bias)
    return closed(activation, before)


def reciprocal_deviation(var: jax.Array, epsilon: float) -> jax.Array:
    """1 / sqrt(var + epsilon); NaN for an infinite variance, since 0 would make all of x alike, in silence."""
    return jnp.where(var < jnp.inf, jax.lax.rsqrt(var + epsilon), jnp.nan)


def _instantiated(tangent: Any, primal: jax.Array) -> Any:
    """Zeros for a value that is not differentiated, which vary over the mapped axes as it does; None for no float."""
    if not isinstance(tangent, SymbolicZero):
        return tangent
    return jnp.zeros_like(primal) if jnp.issubdtype(primal.dtype, jnp.floating) else None
