"""The inputs of a case, and their normalized values in float64."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbn.bench.cases import Case

EPSILON = 1e-5
ROTATED = 256 * 2**20
"""Total bytes of the rotated inputs, more than processor caches hold."""
MEAN = 2.0
"""Mean of the data, in standard deviations."""
KINK = 1e-4
"""Inputs of relu closer to 0 than this can change sign by rounding; the value has a safety margin."""


class Batch(NamedTuple):
    """One input in NumPy, and the cotangent of the output."""

    x: np.ndarray
    cotangent: np.ndarray
    mask: np.ndarray | None
    scale: np.ndarray
    bias: np.ndarray


class Standardized(NamedTuple):
    """A batch standardized by its own mean and variance."""

    xhat: np.ndarray
    rstd: np.ndarray
    out: np.ndarray
    """xhat * scale + bias"""


def batches(case: Case) -> list[Batch]:
    """Make 2 to 8 different inputs of a case, if possible more than the caches hold."""
    number = int(np.clip(-(-ROTATED // (2 * case.size)), 2, 8))
    return [batch(case, np.random.default_rng(seed)) for seed in range(number)]


def on_device(given: list[Batch], channels_first: bool) -> list[Batch]:
    """Convert batches to JAX arrays, with the axes in the order that a layer expects."""
    if channels_first:
        given = [batch._replace(x=_first(batch.x), cotangent=_first(batch.cotangent)) for batch in given]
    return [jax.tree.map(jnp.asarray, batch) for batch in given]


def batch(case: Case, rng: np.random.Generator, mean: float = MEAN) -> Batch:
    """Draw normal data with the given mean and standard deviation 1, in the dtype of the case."""
    features = case.shape[-1]
    x = (rng.standard_normal(case.shape, np.float32) + np.float32(mean)).astype(case.dtype)
    cotangent = rng.standard_normal(case.shape, np.float32)
    mask = None
    if case.masked:
        lengths = rng.integers(case.shape[1] // 2, case.shape[1] + 1, case.shape[0])
        mask = (np.arange(case.shape[1]) < lengths[:, None])[..., None]
        cotangent = np.where(mask, cotangent, 0)
    scale, bias = rng.uniform(0.5, 1.5, features), rng.normal(size=features)
    made = Batch(x, cotangent.astype(case.dtype), mask, scale.astype(np.float32), bias.astype(np.float32))
    if not case.relu:
        return made
    # Close to the kink of relu, rounding decides the gradient, and every library would seem wrong.
    cotangent = np.where(np.abs(standardized(made).out) > KINK, cotangent, 0)
    return made._replace(cotangent=cotangent.astype(case.dtype))


def standardized(batch: Batch) -> Standardized:
    """Evaluate the training formula for x in float64."""
    x = np.asarray(batch.x, np.float64)
    axes = tuple(range(x.ndim - 1))
    valid = np.broadcast_to(True if batch.mask is None else batch.mask, x.shape)
    mean = x.mean(axes, where=valid)
    rstd = 1 / np.sqrt(np.square(x - mean).mean(axes, where=valid) + EPSILON)
    xhat = (x - mean) * rstd
    return Standardized(xhat, rstd, xhat * batch.scale + batch.bias)


def _first(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(array, -1, 1))
