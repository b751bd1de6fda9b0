"""Calibration of Flax models: Linen, NNX, renorm, and layers under scan."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from support import reference
from support.calibrated import batch, initialized, linen_model, linen_step
from support.tolerances import assert_close

import jbn

pytestmark = pytest.mark.standard_promotion


def test_a_linen_model_gets_the_statistics_of_the_formula(rng):
    x = batch(rng)
    model = linen_model([jbn.linen.BatchNorm] * 2)
    variables = initialized(model, x)
    stats = jbn.calibrate(linen_step(model, variables), variables["batch_stats"], [x])
    dense = variables["params"]["dense0"]
    expected = reference.batch_norm(x @ np.asarray(dense["kernel"], np.float64) + np.asarray(dense["bias"]))
    assert_close(stats["norm0"]["mean"], expected.mean, scale=1)
    assert_close(stats["norm0"]["var"], expected.var)
    assert set(stats["norm1"]) == {"mean", "var"}


class Network(nnx.Module):
    def __init__(self, rngs, norm=jbn.nnx.BatchNorm, **options):
        self.dense = nnx.Linear(3, 4, rngs=rngs)
        self.norm = norm(4, rngs=rngs, **options)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = jbn.nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(self.norm(self.dense(x))))


def test_an_nnx_model_is_calibrated_as_a_module_and_as_a_state(rng):
    x = np.concatenate([batch(rng), batch(rng) + 1])
    network = Network(nnx.Rngs(0))
    expected = reference.batch_norm(
        x.astype(np.float64) @ np.asarray(network.dense.kernel[...]) + np.asarray(network.dense.bias[...])
    )
    graphdef, state = nnx.split(network)
    step = jax.jit(lambda state, x: nnx.call((graphdef, state))(x)[1][1])
    by_state = jbn.calibrate(step, state, np.split(x, 2))
    network.last.mean[...] = jnp.ones(4)
    by_module = jbn.calibrate(jax.jit(lambda network, x: (network(x), network)[1]), network, np.split(x, 2))
    for mean, var in (
        (by_state["norm"]["mean"][...], by_state["norm"]["var"][...]),
        (by_module.norm.mean[...], by_module.norm.var[...]),
    ):
        assert_close(mean, expected.mean, scale=1)
        assert_close(var, expected.var)
    assert isinstance(by_module, Network)
    np.testing.assert_array_equal(network.last.mean[...], np.ones(4))
    nnx.update(network, by_state)
    np.testing.assert_array_equal(network.norm.mean[...], by_state["norm"]["mean"][...])


def test_batch_renorm_is_calibrated_as_batch_norm_is(rng):
    x = batch(rng)
    graphdef, state = nnx.split(jbn.nnx.BatchRenorm(3, rngs=nnx.Rngs(0)))
    found = jbn.calibrate(jax.jit(lambda state, x: nnx.call((graphdef, state))(x)[1][1]), state, [x])
    expected = reference.batch_norm(x)
    assert_close(found["mean"][...], expected.mean, scale=1)
    assert_close(found["var"][...], expected.var)


def test_scanned_layers_have_statistics_each(rng):
    x = batch(rng)

    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            return jbn.linen.BatchNorm(use_running_average=False, momentum=jbn.momentum.warmup(0.9))(x) * 2, None

    scanned = linen.scan(Layer, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3)

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            return scanned()(x, None)[0]

    model = Model()
    variables = initialized(model, x)
    stats = jbn.calibrate(linen_step(model, variables), variables["batch_stats"], [x])
    (node,) = next(iter(stats.values())).values()
    for before, after in itertools.pairwise(node["var"]):
        assert_close(after, 4 * before / (before + 1e-5))
    np.testing.assert_array_equal(node["count"], np.ones((3, 3)))
