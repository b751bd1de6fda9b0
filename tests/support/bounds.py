"""Bounds, per entry, of the rounding error of a norm on a drawn batch."""

import numpy as np

from support.tolerances import FLUSHED, SUM, UNIT


def condition(batch, expected, epsilon=1e-5):
    """The largest distance of a shift that is a value of the data, in standard deviations, with the rank of x."""
    return batch.over_x(batch.spread() / np.sqrt(expected.var + epsilon))


def assert_within(actual, expected, bound):
    """assert_allclose with an array of bounds, which NumPy's does not take."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    bound = np.broadcast_to(bound, expected.shape)
    wrong = ~(np.abs(actual - expected) <= bound)
    assert actual.shape == expected.shape
    assert not wrong.any(), (actual[wrong][:3], expected[wrong][:3], bound[wrong][:3])


def out_bound(batch, params, expected, dtype="float32", epsilon=1e-5):
    """Sums about a shift that is t standard deviations away lose t units of the mean and t**2 of the variance."""
    t = condition(batch, expected, epsilon)
    rstd = 1 / np.sqrt(batch.over_x(expected.var) + epsilon)
    with np.errstate(invalid="ignore"):
        centered = np.abs(np.where(batch.valid, np.float64(batch.x) - batch.over_x(expected.mean), 0))
    scale, bias = (batch.over_x(np.abs(np.float64(vector))) for vector in params)
    result = batch.x.dtype.name
    low = UNIT[result] * np.abs(expected.out) + 2.0**-24 if result != dtype else 0
    if dtype == "float64":
        # The reference rounds the mean too.
        t = t + batch.over_x(np.abs(expected.mean)) * rstd
    flushed = FLUSHED * (1 + scale * rstd + centered)
    return SUM * UNIT[dtype] * (scale * (t + centered * rstd * t**2) + bias) + flushed + low


def mean_bound(batch, expected, *others, dtype="float32"):
    largest = np.max([np.abs(expected.mean), *map(np.abs, others)], axis=0)
    return SUM * UNIT[dtype] * (largest + batch.spread()) + FLUSHED


def var_bound(batch, *others, dtype="float32"):
    largest = np.max([batch.spread() ** 2, *others], axis=0)
    # The reference is computed in float64, and also rounds the mean.
    rounding = SUM * UNIT["float64"] * np.max(np.abs(np.float64(batch.x)), where=batch.valid, initial=0)
    return SUM * UNIT[dtype] * largest + rounding**2 + FLUSHED
