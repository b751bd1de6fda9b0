"""Output, statistics and gradients agree with the formula in float64, for any layout, mean and precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import reference
from support.inputs import LAYOUTS, LOW_PRECISION, ill_conditioned
from support.programs import batch_norm, forward_and_backward
from support.tolerances import assert_close, assert_rounded

import jbn


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_output_statistics_and_gradients_of_every_layout(x64, rng, dtype):
    """Every other layout has a mask. float64 takes every fourth layout."""
    for number, (shape, feature_axis) in enumerate(LAYOUTS if dtype == "float32" else LAYOUTS[::4]):
        x, cotangent = (rng.normal(size=shape).astype(dtype) * 2 + 3 for _ in range(2))
        feature = reference.feature_axes(feature_axis, x.ndim)
        features = tuple(shape[axis] for axis in feature)
        mask = rng.random([n for axis, n in enumerate(shape) if axis not in feature]) < 0.7 if number % 2 else None
        params = jbn.Params(*(rng.normal(size=features).astype(dtype) for _ in range(2)))
        expected = reference.batch_norm(x, *params, cotangent, feature_axis=feature_axis, mask=mask)
        _, state = jbn.init(features, dtype)
        found = forward_and_backward(params, state, x, cotangent, mask, feature_axis=feature_axis)
        assert found.out.dtype == found.dx.dtype == dtype
        assert_close(found.new_state.mean, expected.mean, dtype, scale=10)
        assert_close(found.new_state.var, expected.var, dtype)
        assert_close(found.out, expected.out, dtype, scale=10)
        assert_close(found.dx, expected.dx, dtype, scale=10)
        assert_close(found.gradients.scale, expected.dscale, dtype, scale=np.abs(cotangent).sum())
        assert_close(found.gradients.bias, expected.dbias, dtype, scale=np.abs(cotangent).sum())


@pytest.mark.parametrize("case", ["plain", "first row far", "second row far", "masked", "masked, first valid row far"])
@pytest.mark.parametrize("rows", [1024, 2**18])
def test_no_digits_are_lost_at_any_ratio_of_mean_to_spread(rng, rows, case):
    for ratio in (0, 1, 1e3, 1e4, 1e5):
        x, mask = ill_conditioned(rng, rows, ratio, case)
        cotangent = rng.normal(size=x.shape).astype(np.float32)
        expected = reference.batch_norm(x, cotangent=cotangent, mask=mask)
        found = forward_and_backward(*jbn.init(4), x, cotangent, mask)
        np.testing.assert_allclose(found.new_state.mean, expected.mean, rtol=1e-6, atol=1e-5, err_msg=str(ratio))
        np.testing.assert_allclose(found.new_state.var, expected.var, rtol=1e-5, err_msg=str(ratio))
        np.testing.assert_allclose(found.out, expected.out, rtol=1e-5, atol=1e-5, err_msg=str(ratio))
        bound = 1e-5 * np.max(np.abs(expected.dx))
        np.testing.assert_allclose(found.dx, expected.dx, rtol=0, atol=bound, err_msg=str(ratio))


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_a_constant_channel_gives_exactly_the_bias_and_a_finite_gradient(rows):
    params = jbn.Params(scale=jnp.array([2.0, -3.0]), bias=jnp.array([0.7, -0.1]))
    cotangent = np.arange(2 * rows, dtype=np.float32).reshape(rows, 2) / rows
    for value in (1e4, 1e7, 0.1, -3e-5):
        x = np.full((rows, 2), value, np.float32)
        found = forward_and_backward(params, jbn.init(2)[1], x, cotangent)
        np.testing.assert_array_equal(found.out, np.broadcast_to(params.bias, (rows, 2)))
        np.testing.assert_array_equal(found.new_state.var, [0, 0])
        np.testing.assert_array_equal(found.new_state.mean, x[0])
        # With one row, only the rounding of the mean of the cotangent is left.
        expected = reference.batch_norm(x, *params, cotangent).dx
        assert_close(found.dx, expected, scale=3 / np.sqrt(1e-5) * np.abs(cotangent).max())


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("activation", [None, jax.nn.relu])
def test_half_precision_is_off_by_one_rounding(rng, dtype, activation):
    x = jnp.asarray(rng.normal(size=(512, 3)) * 4 + 50).astype(dtype)
    cotangent = jnp.asarray(rng.normal(size=(512, 3))).astype(dtype)
    params = jbn.Params(scale=jnp.array([1.5, -0.5, 2.0]), bias=jnp.array([0.1, 0.2, -0.3]))
    exact_x, exact_cotangent = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, cotangent))
    expected = reference.batch_norm(exact_x, *params)
    if activation is not None:
        exact_cotangent = exact_cotangent * (expected.out > 0)
    expected = reference.batch_norm(exact_x, *params, exact_cotangent)
    found = forward_and_backward(params, jbn.init(3)[1], x, cotangent, activation=activation)
    assert found.out.dtype == found.dx.dtype == dtype
    assert_rounded(found.out, expected.out if activation is None else np.maximum(expected.out, 0), dtype)
    assert_rounded(found.dx, expected.dx, dtype)
    np.testing.assert_allclose(found.new_state.var, expected.var, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "dtype", "param_dtype"),
    [
        ((4, 8, 10, 10), "float32", "float32"),
        ((4, 1, 9, 9), "bfloat16", "bfloat16"),
        ((4, 9, 1, 1), "float16", "float32"),
        ((4, 8, 2, 5, 5), "bfloat16", "float32"),
        ((4, 1, 2, 9, 9), "float16", "float16"),
    ],
)
def test_features_before_places_with_params_in_any_precision(rng, shape, dtype, param_dtype):
    x, cotangent = (jnp.asarray(rng.normal(size=shape) * 2 + 1, dtype) for _ in range(2))
    params = jbn.Params(*(jnp.asarray(rng.normal(size=shape[1]) * 2 + 1, param_dtype) for _ in range(2)))
    exact = [np.asarray(array, np.float64) for array in (x, *params, cotangent)]
    expected = reference.batch_norm(*exact, feature_axis=1)
    found = forward_and_backward(params, jbn.init(shape[1])[1], x, cotangent, feature_axis=1)
    assert_rounded(found.out, expected.out, dtype)
    assert_rounded(found.dx, expected.dx, dtype)
    for gradient, value in zip(found.gradients, (expected.dscale, expected.dbias), strict=True):
        assert gradient.dtype == param_dtype
        assert_rounded(gradient, value, param_dtype, statistics=1e-6 * np.abs(exact[3]).sum())
    assert_close(found.new_state.var, expected.var)


def test_large_float16_values_stay_finite(rng):
    x = jnp.asarray(rng.choice([60000.0, 59904.0, -60000.0], size=(64, 2))).astype(jnp.float16)
    expected = reference.batch_norm(np.asarray(x, np.float64))
    found = forward_and_backward(*jbn.init(2), x, jnp.ones_like(x))
    assert_rounded(found.out, expected.out, "float16")
    assert bool(jnp.all(jnp.isfinite(found.dx)))
    np.testing.assert_allclose(found.new_state.var, expected.var, rtol=1e-5)


def test_epsilon_bounds_the_gain():
    x = jnp.array([[0.0], [1e-4]])
    out, _ = batch_norm(*jbn.init(1), x, True, epsilon=1e-2)
    np.testing.assert_allclose(out, [[-5e-5 / np.sqrt(1e-2 + 2.5e-9)], [5e-5 / np.sqrt(1e-2 + 2.5e-9)]], rtol=1e-5)


def test_the_smallest_epsilon_leaves_the_gradient_of_a_constant_feature_finite():
    """dx = scale / sqrt(epsilon) * (g - mean(g)), for xhat = 0."""
    (params, state), epsilon, cotangent = jbn.init(1), 1.2e-38, np.float32([[1], [2], [6]])
    params = params._replace(scale=jnp.array([5.0]))
    _, backward = jax.vjp(lambda x: jbn.batch_norm(params, state, x, True, epsilon=epsilon)[0], jnp.ones((3, 1)))
    assert_close(backward(cotangent)[0], 5 / np.sqrt(epsilon) * np.array([[-2.0], [-1.0], [3.0]]))


@pytest.mark.parametrize(("rows", "value"), [(9, 6e18), (2**20, 1e14)])
def test_a_sum_whose_square_is_beyond_the_range_loses_no_variance(rows, value):
    """XLA may square the sum before it divides by the count."""
    x = np.zeros((rows, 1), np.float32)
    x[: rows // 2 + 1] = value
    assert_close(jax.jit(jbn.moments)(x).var, np.var(x, 0, dtype=np.float64))


@pytest.mark.parametrize("norm", [jbn.batch_norm, jbn.batch_renorm])
def test_a_variance_beyond_the_range_is_loud(norm):
    """The reciprocal of its square root is 0, so the output would be the bias without a warning."""
    x = jnp.array([[1e20, 1.0], [-1e20, 2.0], [0.0, 6.0]])
    params, state = jbn.init(2)
    out, new_state = jax.jit(norm, static_argnames="train")(params, state, x, train=True)
    assert np.isnan(out[:, 0]).all()
    assert np.isfinite(out[:, 1]).all()
    mean, var = reference.update(0, 1, reference.batch_norm(x[:, 1:]), 0.99)
    np.testing.assert_array_equal(jnp.stack(new_state)[:, 0], [0, 1, 0])
    assert_close(jnp.stack(new_state)[:, 1], [*mean, *var, 1])
    faulty = state._replace(var=jnp.array([jnp.inf, 1.0]))
    assert np.isnan(norm(params, faulty, x, False)[0][:, 0]).all()
    kernel, bias = jbn.fold(params, faulty, jnp.ones((3, 2)))
    assert np.isnan(kernel[:, 0]).all() and np.isnan(bias[0])
    assert np.isfinite(kernel[:, 1]).all() and np.isfinite(bias[1])
