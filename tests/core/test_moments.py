import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import reference
from support.inputs import LAYOUTS, LOW_PRECISION, ill_conditioned
from support.tolerances import assert_close

import jbn

moments = jax.jit(jbn.moments, static_argnames="feature_axis")


def assert_moments(actual, expected, x, dtype="float32"):
    largest = np.max(np.abs(np.asarray(x, np.float64)), initial=0)
    assert_close(actual.mean, expected.mean, dtype, scale=largest)
    assert_close(actual.var, expected.var, dtype)
    assert float(actual.count) == expected.count


@pytest.mark.parametrize(("shape", "feature_axis"), LAYOUTS)
@pytest.mark.parametrize("masked", [False, True])
def test_moments_of_every_layout(rng, shape, feature_axis, masked):
    x = rng.normal(size=shape).astype(np.float32) * 3 + 5
    feature = reference.feature_axes(feature_axis, x.ndim)
    mask = rng.random([n for axis, n in enumerate(shape) if axis not in feature]) < 0.6 if masked else None
    expected = reference.batch_norm(x, feature_axis=feature_axis, mask=mask)
    actual = moments(x, feature_axis=feature_axis, mask=mask)
    assert_moments(actual, expected, x)


@pytest.mark.parametrize("case", ["plain", "first row far", "second row far", "masked", "masked, first valid row far"])
@pytest.mark.parametrize("ratio", [0, 1, 1e2, 1e3, 1e4, 1e5])
@pytest.mark.parametrize("rows", [1024, 2**18])
def test_variance_keeps_its_digits_at_any_mean(rng, rows, ratio, case):
    x, mask = ill_conditioned(rng, rows, ratio, case)
    expected = reference.batch_norm(x, mask=mask)
    actual = moments(x, mask=mask)
    np.testing.assert_allclose(actual.var, expected.var, rtol=1e-5)
    np.testing.assert_allclose(actual.mean, expected.mean, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("shape", [(2**16, 1, 1, 4), (2**14, 2, 2, 4), (1, 2**16, 1, 4)])
def test_an_outlier_before_short_axes(rng, shape):
    x, _ = ill_conditioned(rng, 2**16, 1e4, "first row far")
    expected = reference.batch_norm(x)
    np.testing.assert_allclose(moments(x.reshape(shape)).var, expected.var, rtol=1e-5)


@pytest.mark.parametrize("shape", [(8, 32, 32, 2), (8, 1024, 2), (2, 1, 64, 64, 2)])
def test_an_example_that_begins_and_ends_blank(rng, shape):
    x = (rng.normal(size=shape) + 1e4).astype(np.float32)
    rows = x[0].reshape(-1, 2)
    rows[:4] = rows[-4:] = 0
    np.testing.assert_allclose(moments(x).var, reference.batch_norm(x).var, rtol=1e-5)


@pytest.mark.parametrize("feature_axis", [(0, 2), (0, 3), (1, 3), 2])
def test_masks_beside_features_in_between(rng, feature_axis):
    x = (rng.normal(size=(4, 5, 3, 6)) + 1e4).astype(np.float32)
    feature = reference.feature_axes(feature_axis, 4)
    mask = rng.random([n for axis, n in enumerate(x.shape) if axis not in feature]) < 0.5
    x[~np.broadcast_to(np.expand_dims(mask, feature), x.shape)] = np.nan
    expected = reference.batch_norm(x, feature_axis=feature_axis, mask=mask)
    np.testing.assert_allclose(moments(x, feature_axis=feature_axis, mask=mask).var, expected.var, rtol=1e-5)


@pytest.mark.parametrize("layout", ["left padding", "right padding", "scattered", "one value", "last value"])
def test_padding_of_any_layout_is_exact(rng, layout):
    x = (rng.normal(size=(6, 50, 3)) + 1e4).astype(np.float32)
    lengths = rng.integers(1, 50, size=6)
    position = np.arange(50)
    mask = {
        "left padding": position >= 50 - lengths[:, None],
        "right padding": position < lengths[:, None],
        "scattered": rng.random((6, 50)) < 0.2,
        "one value": (position == 17) & (np.arange(6)[:, None] == 3),
        "last value": (position == 49) & (np.arange(6)[:, None] == 5),
    }[layout]
    x[~mask] = np.nan
    expected = reference.batch_norm(x, mask=mask)
    actual = moments(x, mask=mask)
    np.testing.assert_allclose(actual.mean, expected.mean, rtol=1e-7)
    np.testing.assert_allclose(actual.var, expected.var, rtol=1e-5)


@pytest.mark.parametrize("mask_shape", [(6, 4, 5), (6, 1, 5), (1, 4, 1), (6, 4, 5, 1), (6, 1, 1, 1)])
def test_mask_axes_of_one_repeat(rng, mask_shape):
    x = rng.normal(size=(6, 4, 5, 3)).astype(np.float32)
    mask = rng.random(mask_shape) < 0.7
    expected = reference.batch_norm(x, mask=np.broadcast_to(mask if mask.ndim == 4 else mask[..., None], (6, 4, 5, 1)))
    actual = moments(x, mask=mask)
    assert_moments(actual, expected, x)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_half_precision_input_has_float32_moments(rng, dtype):
    x = jnp.asarray(rng.normal(size=(500, 3)) * 2 + 30).astype(dtype)
    expected = reference.batch_norm(np.asarray(x.astype(jnp.float32)))
    actual = moments(x)
    assert actual.mean.dtype == jnp.float32
    assert_moments(actual, expected, x)


@pytest.mark.parametrize("features", [1, 2, 3])
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_few_features_of_many_rows(dtype, features):
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((2**20, features), np.float32) + 0.5).astype(dtype)
    expected = reference.batch_norm(np.asarray(x.astype(jnp.float32)))
    assert_close(moments(x).var, expected.var)


@pytest.mark.parametrize("mask", [None, np.array([True, True, False, True, False, True])])
def test_moments_are_differentiable(x64, rng, mask):
    x = jnp.asarray(rng.normal(size=(6, 2)) + 3)

    def summary(x):
        batch = jbn.moments(x, mask=mask)
        return jnp.sum(jnp.sin(batch.mean) * jnp.exp(batch.var))

    def plain(x):
        w = jnp.ones((6, 1)) if mask is None else jnp.asarray(mask)[:, None].astype(jnp.float64)
        mean = jnp.sum(w * x, 0, keepdims=True) / jnp.sum(w)
        return jnp.sum(jnp.sin(mean) * jnp.exp(jnp.sum(w * jnp.square(x - mean), 0, keepdims=True) / jnp.sum(w)))

    for derivative in (jax.grad, jax.hessian):
        np.testing.assert_allclose(derivative(summary)(x), derivative(plain)(x), atol=1e-10)


def test_a_hundred_million_rows_of_one_feature():
    """More than float32 can count one by one: 2**27 rows, and more than 2**24 valid ones among 2**25."""
    rows = np.random.default_rng(0).normal(size=2**10) + 1e4
    rows = rows.astype(np.float32)
    x = jnp.tile(rows, 2**17)[:, None]
    found, expected = moments(x), reference.batch_norm(rows[:, None])
    assert float(found.count) == 2**27
    assert_close(found.mean, expected.mean)
    np.testing.assert_allclose(found.var, expected.var, rtol=1e-5)
    mask = rows > 1e4 - 0.67
    found = moments(x[: 2**25], mask=jnp.tile(mask, 2**15))
    assert float(found.count) == mask.sum() * 2**15 > 2**24
    np.testing.assert_allclose(found.var, reference.batch_norm(rows[mask][:, None]).var, rtol=1e-5)


@pytest.mark.parametrize("rows", [0, 1, 2, 3])
def test_few_rows(rows):
    x = np.arange(2 * rows, dtype=np.float32).reshape(rows, 2) ** 2
    actual = moments(x)
    expected = reference.batch_norm(x)
    assert_moments(actual, expected, x)


def test_nothing_valid_counts_nothing():
    actual = jbn.moments(jnp.full((4, 3), jnp.nan), mask=np.zeros(4, bool))
    for leaf in actual:
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def test_merge_equals_the_whole(rng):
    x = (rng.normal(size=(100, 4)) + np.array([0, 1, 1e3, 1e4])).astype(np.float32)
    parts = [jbn.moments(part) for part in np.split(x, [1, 20, 50])]
    expected = reference.batch_norm(x)
    for order in (parts, parts[::-1]):
        union = jbn.merge(*order)
        np.testing.assert_allclose(union.mean, expected.mean, rtol=1e-6)
        np.testing.assert_allclose(union.var, expected.var, rtol=1e-3)
        assert float(union.count) == 100
    nested = jbn.merge(jbn.merge(*parts[:2]), jbn.merge(*parts[2:]))
    np.testing.assert_allclose(nested.var, jbn.merge(*parts).var, rtol=1e-3)


def test_merge_is_exact_in_float64(x64, rng):
    x = rng.normal(size=(60, 2, 3)) + 10
    union = jbn.merge(*(jbn.moments(part, feature_axis=(1, 2)) for part in np.split(x, [7, 8])))
    expected = reference.batch_norm(x, feature_axis=(1, 2))
    assert_moments(union, expected, x, "float64")


def test_merge_ignores_what_is_empty(rng):
    x = rng.normal(size=(10, 3)).astype(np.float32)
    batch, nothing = jbn.moments(x), jbn.moments(x[:0])
    union = jbn.merge(nothing, batch, nothing)
    assert_moments(union, batch, x)
    unknown = jbn.Moments(jnp.full(3, jnp.nan), jnp.full(3, -jnp.inf), jnp.float32(0))
    assert_moments(jbn.merge(unknown, batch), batch, x)


def test_merge_ignores_what_is_empty_far_from_zero(rng):
    x = (1e20 * (1 + 1e-6 * rng.normal(size=(7, 3)))).astype(np.float32)
    nothing = jbn.Moments(jnp.zeros(3), jnp.zeros(3), jnp.float32(0))
    for merged in (jbn.merge(nothing, jbn.moments(x)), jbn.merge(jbn.moments(x), nothing)):
        assert_close(merged.var, reference.batch_norm(x).var)


def test_merge_refuses():
    with pytest.raises(ValueError, match="at least one"):
        jbn.merge()
    with pytest.raises(TypeError, match=r"`moments` is a list.*expected jbn.Moments"):
        jbn.merge([jbn.moments(jnp.ones((4, 3)))])
    with pytest.raises(ValueError, match=r"shapes \[\(3,\), \(2,\)\]"):
        jbn.merge(jbn.moments(jnp.ones((4, 3))), jbn.moments(jnp.ones((4, 2))))
