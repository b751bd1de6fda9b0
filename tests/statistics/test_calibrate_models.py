"""Calibration of Flax models: Linen, NNX, frozen, repeated and foreign norms; and what the error says of each."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from support import reference
from support.tolerances import assert_close

import jbn

pytestmark = pytest.mark.standard_promotion


def batch(rng):
    return rng.normal(size=(16, 3)).astype(np.float32)


def initialized(model, x):
    return jax.jit(model.init)(jax.random.key(0), x)


def linen_model(norms, **options):
    """Norms of the given classes one after the other, with something between them."""

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            for number, norm in enumerate(norms):
                x = linen.Dense(3, name=f"dense{number}")(x)
                x = norm(use_running_average=False, name=f"norm{number}", **options)(x)
                x = linen.relu(x)
            return x

    return Model()


def linen_step(model, variables):
    def step(stats, x):
        return model.apply({**variables, "batch_stats": stats}, x, mutable=["batch_stats"])[1]["batch_stats"]

    return jax.jit(step)


def test_linen(rng):
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


def test_nnx_as_a_module_and_as_a_state(rng):
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
    np.testing.assert_array_equal(node["count"], [0, 0, 0])


class Frozen(linen.Module):
    """A frozen norm between two that train."""

    @linen.compact
    def __call__(self, x):
        x = jbn.linen.BatchNorm(use_running_average=False, name="first")(linen.Dense(3)(x))
        x = jbn.linen.BatchNorm(use_running_average=True, name="frozen")(x)
        return jbn.linen.BatchNorm(use_running_average=False, name="last")(linen.Dense(3)(x))


def test_a_frozen_norm_is_named_and_can_be_left_out(rng):
    x = batch(rng)
    model = Frozen()
    variables = initialized(model, x)
    stats = {**variables["batch_stats"], "frozen": {"mean": jnp.full(3, 0.5), "var": jnp.full(3, 2.0)}}
    step = linen_step(model, variables)
    with pytest.raises(ValueError, match="batch 0 gave no statistics for 2 of 3 norms") as error:
        jbn.calibrate(step, stats, [x])
    lines = str(error.value).splitlines()[1:]
    assert lines[0].startswith("  frozen is left as it was: it is frozen or in eval mode")
    assert "`select`" in lines[0]
    assert lines[1].startswith("  last saw no finite values: a norm named here")
    found = jbn.calibrate(step, stats, [x], select=lambda path: path != "frozen")
    np.testing.assert_array_equal(found["frozen"]["mean"], stats["frozen"]["mean"])
    assert_close(found["last"]["var"], step(jbn.unset(found) | {"frozen": stats["frozen"]}, x)["last"]["var"])


@pytest.mark.parametrize("momentum", [0.99, jbn.momentum.warmup(0.99)], ids=["without count", "with count"])
def test_a_layer_called_twice_is_named(rng, momentum):
    x = batch(rng)

    class Siamese(linen.Module):
        @linen.compact
        def __call__(self, x):
            norm = jbn.linen.BatchNorm(use_running_average=False, momentum=momentum, name="shared")
            once = jbn.linen.BatchNorm(use_running_average=False, name="once")
            return once(norm(x[:8]) - norm(x[8:]))

    model = Siamese()
    variables = initialized(model, x)
    with pytest.raises(ValueError, match=r"shared ran (2 times|more than once) in a step") as error:
        jbn.calibrate(linen_step(model, variables), variables["batch_stats"], [x])
    assert "once ran" not in str(error.value)
    assert "give each call a norm of its own" in str(error.value)


def test_a_stock_flax_norm_is_named(rng):
    """Its average with unset statistics is not finite: -inf beside a mean that moved, or NaN under momentum 0."""
    x = batch(rng)
    norms = [jbn.linen.BatchNorm, linen.BatchNorm, jbn.linen.BatchNorm]
    variables = initialized(linen_model(norms), x)
    for momentum, problem in ((0.9, "averages"), (0.0, "has statistics")):
        step = linen_step(linen_model(norms, momentum=momentum), variables)
        with pytest.raises(ValueError, match=rf"for 1 of 3 norms:\n  norm1 {problem}"):
            jbn.calibrate(step, variables["batch_stats"], [x])
    found = jbn.calibrate(step, variables["batch_stats"], [x], select=lambda path: path != "norm1")
    assert np.isfinite(found["norm2"]["var"]).all()


def test_dropout_that_draws_anew_is_no_second_call(rng):
    """Without a count, a second call is told by running the step again, which must not mistake chance for it."""
    x = batch(rng)
    model = linen_model([jbn.linen.BatchNorm])
    variables = initialized(model, x)
    keys = itertools.count()
    inner = linen_step(model, variables)

    def step(stats, x):
        return inner(stats, x * jax.random.bernoulli(jax.random.key(next(keys)), 0.5, x.shape))

    jbn.calibrate(step, variables["batch_stats"], [x])
    assert next(keys) == 3
