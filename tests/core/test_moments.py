"""moments: mean, variance and count of a batch. batch_norm is also tested with layouts, masks and far means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import reference
from support.inputs import LOW_PRECISION, ill_conditioned
from support.tolerances import assert_close, assert_moments

import jbn

moments = jax.jit(jbn.moments, static_argnames="feature_axis")


@pytest.mark.parametrize(
    ("shape", "feature_axis"), [((7, 3), -1), ((4, 3, 5), 1), ((3, 2, 4, 5), (1, 3)), ((2, 1, 2, 2, 2, 2, 3), -1)]
)
def test_moments_are_those_of_the_formula(rng, shape, feature_axis):
    x = rng.normal(size=shape).astype(np.float32) * 3 + 5
    feature = reference.feature_axes(feature_axis, x.ndim)
    for mask in (None, rng.random([n for axis, n in enumerate(shape) if axis not in feature]) < 0.6):
        found = moments(x, feature_axis=feature_axis, mask=mask)
        assert_moments(found, reference.batch_norm(x, feature_axis=feature_axis, mask=mask), x)


@pytest.mark.parametrize("shape", [(2**16, 1, 1, 4), (2**14, 2, 2, 4), (1, 2**16, 1, 4)])
def test_an_outlier_before_short_axes_costs_no_digits(rng, shape):
    x, _ = ill_conditioned(rng, 2**16, 1e4, "first row far")
    np.testing.assert_allclose(moments(x.reshape(shape)).var, reference.batch_norm(x).var, rtol=1e-5)


@pytest.mark.parametrize("shape", [(8, 32, 32, 2), (8, 1024, 2), (2, 1, 64, 64, 2)])
def test_an_example_that_begins_and_ends_blank_costs_no_digits(rng, shape):
    # The spread is large, so that no order of summation drops the squares of values next to those of blank ones.
    x = (rng.normal(size=shape) * 100 + 1e4).astype(np.float32)
    rows = x[0].reshape(-1, 2)
    rows[:4] = rows[-4:] = 0
    np.testing.assert_allclose(moments(x).var, reference.batch_norm(x).var, rtol=1e-5)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_half_precision_input_has_float32_moments(dtype):
    """Including a million rows of one to three features; half-precision sums would stop growing at a few thousand."""
    rng = np.random.default_rng(2)
    for rows, features in ((500, 3), (2**20, 1), (2**20, 2), (2**20, 3)):
        x = jnp.asarray(rng.standard_normal((rows, features), np.float32) + 0.5).astype(dtype)
        found = moments(x)
        assert found.mean.dtype == found.var.dtype == jnp.float32
        assert_moments(found, reference.batch_norm(np.asarray(x.astype(jnp.float32))), x)


@pytest.mark.slow
def test_a_hundred_million_rows_of_one_feature():
    """More rows than float32 can count in steps of one: 2**27 rows, and over 2**24 valid rows of 2**25."""
    rows = (np.random.default_rng(0).normal(size=2**10) + 1e4).astype(np.float32)
    x = jnp.tile(rows, 2**17)[:, None]
    found, expected = moments(x), reference.batch_norm(rows[:, None])
    assert float(found.count[0]) == 2**27
    assert_close(found.mean, expected.mean)
    np.testing.assert_allclose(found.var, expected.var, rtol=1e-5)
    mask = rows > 1e4 - 0.67
    found = moments(x[: 2**25], mask=jnp.tile(mask, 2**15))
    assert float(found.count[0]) == mask.sum() * 2**15 > 2**24
    np.testing.assert_allclose(found.var, reference.batch_norm(rows[mask][:, None]).var, rtol=1e-5)


@pytest.mark.parametrize("rows", [0, 1, 2, 3])
def test_few_rows_and_none(rows):
    x = np.arange(2 * rows, dtype=np.float32).reshape(rows, 2) ** 2
    assert_moments(moments(x), reference.batch_norm(x), x)


def test_nothing_valid_counts_nothing():
    for leaf in moments(jnp.full((4, 3), jnp.nan), mask=np.zeros(4, bool)):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))
