"""Unchanged statistics: frozen norms, and training without updates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from support.refusals import Refused, assert_refused
from support.tolerances import assert_close

import jbn

KEY = jax.random.key(0)
WARM = jbn.momentum.warmup(0.9)
# The default bounds of batch renorm are schedules, which read a count in training.
LINEN = {"norm": jbn.linen.BatchNorm, "renorm": jbn.linen.BatchRenorm}
NNX = {"norm": jbn.nnx.BatchNorm, "renorm": jbn.nnx.BatchRenorm}


def images(rng):
    return (rng.normal(size=(8, 4, 3)) * 2 + 1).astype(np.float32)


def statistics():
    return {"mean": jnp.array([1.0, 2.0, 3.0]), "var": jnp.array([4.0, 1.0, 0.5])}


def given_statistics(module, **options):
    norm = module(3, rngs=nnx.Rngs(0), **options)
    for name, value in statistics().items():
        getattr(norm, name)[...] = value
    return norm


def gradients(apply, scale, bias, x):
    return jax.grad(lambda *given: jnp.sum(jnp.sin(apply(*given))), argnums=(0, 1, 2))(scale, bias, x)


def inference(scale, bias, x):
    state = jbn.State(**statistics(), count=None)
    return jbn.normalize(jbn.Params(scale, bias), state, x)


@pytest.mark.parametrize("module", LINEN.values(), ids=LINEN)
def test_a_frozen_linen_norm_infers_in_training_without_a_mutable_collection(rng, module):
    norm, x = module(frozen=True, momentum=WARM), images(rng)

    def apply(scale, bias, x):
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": statistics()}
        return norm.apply(variables, x, use_running_average=False)

    scale, bias = jnp.array([1.0, 2.0, 3.0]), jnp.array([0.5, 0.0, -1.0])
    assert_close(apply(scale, bias, x), inference(scale, bias, x))
    for actual, expected in zip(gradients(apply, scale, bias, x), gradients(inference, scale, bias, x), strict=True):
        assert_close(actual, expected)
    assert set(norm.init(KEY, x)["batch_stats"]) == {"mean", "var", "count"}


@pytest.mark.parametrize("module", NNX.values(), ids=NNX)
def test_a_frozen_nnx_norm_stays_so_through_train(rng, module):
    x, model = images(rng), nnx.Sequential(given_statistics(module, frozen=True, momentum=WARM))
    norm = model.layers[0]
    expected = inference(jnp.ones(3), jnp.zeros(3), x)
    for switch in (lambda: None, model.train, model.eval):
        switch()
        assert_close(model(x), expected)
    assert_close(norm(x, use_running_average=False), expected)
    np.testing.assert_array_equal(norm.mean[...], statistics()["mean"])
    model.set_attributes(jbn.nnx.BatchNorm, frozen=False)
    norm.count[...] = 10.0
    model.train()
    model(x)
    assert np.all(norm.mean[...] != statistics()["mean"])


def test_the_gradient_of_a_frozen_nnx_norm_is_that_of_inference(rng):
    x, norm = images(rng), given_statistics(jbn.nnx.BatchNorm, frozen=True)
    graph, params, rest = nnx.split(norm, nnx.Param, ...)

    def loss(params, x):
        return jnp.sum(jnp.sin(nnx.merge(graph, params, rest)(x)))

    of_params, of_x = jax.grad(loss, argnums=(0, 1))(params, x)
    expected = gradients(inference, jnp.ones(3), jnp.zeros(3), x)
    for actual, right in zip((of_params["scale"][...], of_params["bias"][...], of_x), expected, strict=True):
        assert_close(actual, right)


@pytest.mark.parametrize("at_call", [True, False], ids=["at the call", "at construction"])
@pytest.mark.parametrize("module", LINEN.values(), ids=LINEN)
def test_a_linen_norm_normalizes_by_the_batch_and_updates_nothing(rng, module, at_call):
    x, flag = images(rng), {"update_statistics": False}
    norm = module(use_running_average=False, momentum=WARM, **({} if at_call else flag))
    # The schedules of the bounds affect the output, so a count is stored for them, but none for momentum.
    count = {} if module is jbn.linen.BatchNorm else {"count": jnp.zeros(3)}
    variables = {"params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)}, "batch_stats": statistics() | count}
    out = norm.apply(variables, x, **(flag if at_call else {}))
    assert_close(out, jbn.batch_norm(*jbn.init(3), x, True)[0])


@pytest.mark.parametrize("at_call", [True, False], ids=["at the call", "at construction"])
@pytest.mark.parametrize("module", NNX.values(), ids=NNX)
def test_an_nnx_norm_normalizes_by_the_batch_and_updates_nothing(rng, module, at_call):
    x, flag = images(rng), {"update_statistics": False}
    norm = module(3, rngs=nnx.Rngs(0), momentum=WARM, **({} if at_call else flag))
    out = norm(x, **(flag if at_call else {}))
    assert_close(out, jbn.batch_norm(*jbn.init(3), x, True)[0])
    for name, value in jbn.init(3)[1]._asdict().items():
        np.testing.assert_array_equal(getattr(norm, name)[...], value)
    norm(x, update_statistics=True)
    assert np.all(norm.count[...] == 1)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("module", LINEN.values(), ids=LINEN)
def test_half_precision_statistics_that_are_not_updated_are_read(rng, module):
    x, norm = images(rng), module(use_running_average=False, update_statistics=False)
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), norm.init(KEY, x))
    assert_close(norm.apply(variables, x), jbn.batch_norm(*jbn.init(3), x, True)[0])


def test_a_module_from_before_it_could_be_frozen_is_as_it_was(rng):
    x, norm = images(rng), given_statistics(jbn.nnx.BatchNorm)
    del norm.frozen, norm.update_statistics
    norm(x)
    assert np.all(norm.mean[...] != statistics()["mean"])


class Model(nn.Module):
    frozen: bool = False

    @nn.compact
    def __call__(self, x, train):
        return jbn.linen.BatchNorm(frozen=self.frozen)(nn.Dense(3)(x), use_running_average=not train)


def test_a_linen_model_is_frozen_by_an_attribute_and_its_variables_stay(rng):
    x = images(rng)
    variables = Model().init(KEY, x, train=True)
    out = Model(frozen=True).apply(variables, x, train=True)
    np.testing.assert_array_equal(out, Model().apply(variables, x, train=False))


def test_training_refuses_statistics_that_a_schedule_would_overwrite_and_inference_serves_them(rng):
    """In NNX the count of loaded statistics is 0, as in a new module; training refuses them if it can see values."""
    x = images(rng)
    norm = given_statistics(jbn.nnx.BatchNorm, momentum=WARM)
    norm(x, use_running_average=True)
    norm(x, update_statistics=False)
    assert_refused(
        {
            "momentum": Refused(lambda: norm(x), ValueError, "count", "is 0, but `mean`", "norm.count[...] ="),
            "bounds": Refused(
                lambda: given_statistics(jbn.nnx.BatchRenorm)(x), ValueError, "count", "is 0", "use numbers instead"
            ),
        }
    )
    np.testing.assert_array_equal(norm.mean[...], statistics()["mean"])
    norm.count[...] = 9.0
    norm(x)
    assert_close(norm.mean[...], 0.9 * statistics()["mean"] + 0.1 * x.mean((0, 1), dtype=np.float64))
    nnx.update(norm, jbn.unset(nnx.state(norm, nnx.BatchStat)))
    norm(x)
    assert_close(norm.mean[...], x.mean((0, 1), dtype=np.float64))


REFUSED = {
    "linen": Refused(
        lambda: jbn.linen.BatchNorm(frozen=1).init(KEY, np.ones((2, 3), np.float32)),
        TypeError,
        "frozen",
        "is 1",
        "expected True (always normalize by the running",
    ),
    "nnx": Refused(
        lambda: jbn.nnx.BatchNorm(3, update_statistics="no", rngs=nnx.Rngs(0))(np.ones((2, 3), np.float32)),
        TypeError,
        "update_statistics",
        "is 'no'",
        "or False (leave them unchanged)",
    ),
}


def test_flags_are_bools():
    assert_refused(REFUSED)
