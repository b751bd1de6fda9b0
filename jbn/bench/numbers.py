"""The correct results in float64, and the error of a program."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jbn.bench.data import MEAN, Batch, standardized

SUM = 64
"""Allowed error of a result from a few long sums, in units of rounding, for a mean near 0."""


def expected(batch: Batch, relu: bool) -> tuple[np.ndarray, ...]:
    """Compute output and gradients of scale, bias and x in float64; masked values are 0."""
    xhat, rstd, out = standardized(batch)
    valid = np.ones((*out.shape[:-1], 1)) if batch.mask is None else batch.mask.astype(np.float64)
    cotangent = np.asarray(batch.cotangent, np.float64) * valid
    if relu:
        cotangent = cotangent * (out > 0)
        out = np.maximum(out, 0)
    axes = tuple(range(out.ndim - 1))
    count = np.broadcast_to(valid[..., 0], out.shape[:-1]).sum()
    d_bias, d_scale = cotangent.sum(axes), (cotangent * xhat).sum(axes)
    d_x = (cotangent - (d_bias + xhat * d_scale) / count) * batch.scale.astype(np.float64) * rstd
    return out * valid, d_scale, d_bias, d_x * valid


def error(actual: Any, right: tuple[np.ndarray, ...], mask: np.ndarray | None = None) -> float:
    """The largest relative error of the arrays in Euclidean norm; inf if an array is not finite."""
    errors = []
    for found, wanted in zip(actual, right, strict=True):
        array = np.asarray(found, np.float64)
        if mask is not None and array.ndim > 1:
            array = np.where(mask, array, 0)
        errors.append(np.linalg.norm(array - wanted) / np.linalg.norm(wanted))
    largest = float(np.max(errors))
    return largest if np.isfinite(largest) else np.inf


def allowed(dtype: str, mean: float = MEAN) -> float:
    """Relative error that rounding explains: of the result, and of float32 sums of data with mean `mean` and sd 1."""
    single = float(jnp.finfo(jnp.float32).eps) / 2
    return float(jnp.finfo(dtype).eps) / 2 + SUM * single * (1 + mean)
