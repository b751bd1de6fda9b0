"""Batch norm from its formulas: in NumPy float64, forward and backward, and in plain jax.numpy for every derivative."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Reference(NamedTuple):
    out: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    count: np.ndarray
    dx: np.ndarray
    dscale: np.ndarray
    dbias: np.ndarray


def feature_axes(feature_axis, ndim):
    axes = (feature_axis,) if isinstance(feature_axis, int) else feature_axis
    return tuple(sorted(axis % ndim for axis in axes))


def rows(array, feature):
    """The array as (rows, features...), and a function that reverses this."""
    reduced = [axis for axis in range(array.ndim) if axis not in feature]
    order = [*reduced, *feature]
    moved = np.transpose(array, order)
    back = np.argsort(order)
    flat = moved.reshape(math.prod(moved.shape[: len(reduced)]), *moved.shape[len(reduced) :])
    return flat, lambda flat: np.transpose(flat.reshape(moved.shape), back)


def batch_norm(x, scale=None, bias=None, cotangent=None, *, feature_axis=-1, mask=None, epsilon=1e-5):
    """Training forward and backward; the mask has the shape of x without its feature axes, or the rank of x."""
    x = np.asarray(x, np.float64)
    feature = feature_axes(feature_axis, x.ndim)
    if mask is None:
        valid = np.ones(x.shape, bool)
    else:
        mask = np.asarray(mask)
        mask = np.expand_dims(mask, feature) if mask.ndim < x.ndim else mask
        valid = np.broadcast_to(mask, x.shape)
    x = np.where(valid, x, 0)
    x, back = rows(x, feature)
    w = rows(valid.astype(np.float64), feature)[0]
    n = w.sum(0)
    divisor = np.maximum(n, 1)
    scale = np.ones(x.shape[1:]) if scale is None else np.asarray(scale, np.float64)
    bias = np.zeros(x.shape[1:]) if bias is None else np.asarray(bias, np.float64)
    mean = (w * x).sum(0) / divisor
    var = (w * (x - mean) ** 2).sum(0) / divisor
    rstd = 1 / np.sqrt(var + epsilon)
    xhat = w * (x - mean) * rstd
    out = w * (xhat * scale + bias)
    g = np.zeros_like(x) if cotangent is None else rows(np.asarray(cotangent, np.float64), feature)[0] * w
    dbias, dscale = g.sum(0), (g * xhat).sum(0)
    dx = scale * rstd * (g - w / divisor * (dbias + xhat * dscale))
    return Reference(back(out), mean, var, n, back(dx), dscale, dbias)


def inference(x, mean, var, scale, bias, *, feature_axis=-1, epsilon=1e-5):
    x = np.asarray(x, np.float64)
    feature = feature_axes(feature_axis, x.ndim)
    x, back = rows(x, feature)
    mean, var, scale, bias = (np.asarray(a, np.float64) for a in (mean, var, scale, bias))
    return back((x - mean) / np.sqrt(var + epsilon) * scale + bias)


def update(mean, var, batch: Reference, momentum, running_var="biased"):
    """The running statistics after one batch."""
    taken = batch.var
    if running_var == "unbiased":
        taken = batch.var * batch.count / (batch.count - 1)
    if running_var == "total":
        taken = batch.var + momentum * (batch.mean - mean) ** 2
    return momentum * mean + (1 - momentum) * batch.mean, momentum * var + (1 - momentum) * taken


def plain(params, x, *, mask=None, epsilon=1e-5, activation=None, groups=1, shortcut=None):
    """Training output by the formula, with features last, for automatic differentiation."""
    if groups > 1:
        options = {"epsilon": epsilon, "activation": activation}
        given = {"x": x, "mask": mask, "shortcut": shortcut}
        cut = {name: jnp.split(array, groups) for name, array in given.items() if array is not None}
        each = [
            plain(params, **dict(zip(cut, parts, strict=True)), **options) for parts in zip(*cut.values(), strict=True)
        ]
        return jnp.concatenate(each)
    axes = tuple(range(x.ndim - 1))
    mask = jnp.ones_like(x, bool) if mask is None else jnp.asarray(mask)
    mask = mask[..., None] if mask.ndim < x.ndim else mask
    w = jnp.broadcast_to(mask, x.shape).astype(x.dtype)
    x = jnp.where(mask, x, 0.0)
    n = jnp.sum(w, axes, keepdims=True)
    mean = jnp.sum(w * x, axes, keepdims=True) / n
    var = jnp.sum(w * jnp.square(x - mean), axes, keepdims=True) / n
    out = (x - mean) * jax.lax.rsqrt(var + epsilon)
    shape = (1,) * (x.ndim - 1) + x.shape[-1:]
    out = out if params.scale is None else out * params.scale.reshape(shape)
    out = out if params.bias is None else out + params.bias.reshape(shape)
    out = out if shortcut is None else out + shortcut
    out = out if activation is None else activation(out)
    return out * w
