"""What the right numbers are, and how far those of a program are from them."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jbn.bench.data import MEAN, Batch, standardized

SUM = 64
"""Units of rounding that a result made of a few long sums may be off by, for a mean near 0."""


def expected(batch: Batch, relu: bool) -> tuple[np.ndarray, ...]:
    """Output, and gradients of scale, bias and x, from the formula in float64; 0 in masked places."""
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
    """The largest relative error of the arrays, each by its Euclidean norm; inf where one is not finite."""
    errors = []
    for found, wanted in zip(actual, right, strict=True):
        array = np.asarray(found, np.float64)
        if mask is not None and array.ndim > 1:
            array = np.where(mask, array, 0)
        errors.append(np.linalg.norm(array - wanted) / np.linalg.norm(wanted))
    largest = float(np.max(errors))
    return largest if np.isfinite(largest) else np.inf


def allowed(dtype: str, mean: float = MEAN) -> float:
    """What rounding explains: of the result, and of sums in float32 about a mean that is so many deviations from 0."""
    single = float(jnp.finfo(jnp.float32).eps) / 2
    return float(jnp.finfo(dtype).eps) / 2 + SUM * single * (1 + mean)
