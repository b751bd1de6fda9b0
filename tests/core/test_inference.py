"""Inference normalizes by the running statistics and returns the state unchanged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import reference
from support.inputs import LAYOUTS
from support.programs import batch_norm
from support.tolerances import assert_close, assert_same

import jbn

normalize = jax.jit(jbn.normalize, static_argnames="feature_axis")


def test_every_layout_is_normalized_by_the_running_statistics(rng):
    for shape, feature_axis in LAYOUTS:
        x = rng.normal(size=shape).astype(np.float32) * 2 + 1
        features = tuple(shape[axis] for axis in reference.feature_axes(feature_axis, x.ndim))
        params = jbn.Params(*(rng.normal(size=features).astype(np.float32) for _ in range(2)))
        mean, var = rng.normal(size=features).astype(np.float32), rng.uniform(0.5, 2, features).astype(np.float32)
        out = normalize(params, jbn.State(mean, var, None), x, feature_axis=feature_axis)
        assert_close(out, reference.inference(x, mean, var, *params, feature_axis=feature_axis))


def test_inference_is_normalize_and_returns_the_state_as_it_is(rng):
    x = rng.normal(size=(4, 3, 5)).astype(np.float32)
    params, state = jbn.init(3)
    out, same = jbn.batch_norm(params, state, x, False, feature_axis=1, activation=jax.nn.relu, dtype="bfloat16")
    assert same is state
    assert_same(out, jbn.normalize(params, state, x, feature_axis=1, activation=jax.nn.relu, dtype="bfloat16"))


@pytest.mark.parametrize(("shape", "feature_axis"), [((2, 3, 4), -1), ((5, 3, 3, 2), 1)])
def test_inference_repeats_training_after_an_update_with_momentum_zero(rng, shape, feature_axis):
    x = (rng.normal(size=shape) * 2 + 1).astype(np.float32)
    params, state = jbn.init(shape[feature_axis])
    out, new_state = batch_norm(params, state, x, True, momentum=0.0, feature_axis=feature_axis)
    assert not np.allclose(normalize(params, state, x, feature_axis=feature_axis), out)
    assert_close(normalize(params, new_state, x, feature_axis=feature_axis), out, scale=5)


def test_no_examples_and_no_batch_axis():
    for shape in ((0, 3), (0, 2, 2, 3), (3,)):
        assert normalize(*jbn.init(3), jnp.zeros(shape)).shape == shape
    assert normalize(*jbn.init(0), jnp.zeros(0)).shape == (0,)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_statistics_in_half_precision_are_served(rng, dtype):
    """Inference takes trees that were cast for serving, which training refuses."""
    x = rng.normal(size=(8, 3)).astype(np.float32)
    params, state = jax.tree.map(lambda leaf: leaf.astype(dtype), jbn.init(3))
    state = state._replace(mean=jnp.asarray(rng.normal(size=3), dtype), var=jnp.asarray([0.5, 1, 9], dtype))
    exact = (np.float64(vector) for vector in (*state[:2], *params))
    expected = reference.inference(x, *exact)
    assert_close(batch_norm(params, state, x, False)[0], expected)
    assert_close(normalize(params, state, x), expected)
    kernel, bias = jbn.fold(params, state, jnp.eye(3))
    assert_close(x @ np.float64(kernel) + np.float64(bias), expected, scale=20)
