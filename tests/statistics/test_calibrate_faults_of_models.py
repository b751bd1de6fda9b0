"""Errors of calibrate about norms in Flax models: frozen, called twice, or of another library."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from support.calibrated import batch, initialized, linen_model, linen_step
from support.tolerances import assert_close

import jbn

pytestmark = pytest.mark.standard_promotion


class Frozen(linen.Module):
    """A frozen norm between two that train."""

    @linen.compact
    def __call__(self, x):
        x = jbn.linen.BatchNorm(use_running_average=False, name="first")(linen.Dense(3)(x))
        x = jbn.linen.BatchNorm(use_running_average=True, name="frozen")(x)
        return jbn.linen.BatchNorm(use_running_average=False, name="last")(linen.Dense(3)(x))


def test_a_frozen_norm_and_one_that_saw_nothing_finite_are_named_and_can_be_left_out(rng):
    x = batch(rng)
    model = Frozen()
    variables = initialized(model, x)
    stats = {**variables["batch_stats"], "frozen": {"mean": jnp.full(3, 0.5), "var": jnp.full(3, 2.0)}}
    step = linen_step(model, variables)
    with pytest.raises(ValueError, match="on 1 batch gave no statistics for features of 2 of 3 norms") as error:
        jbn.calibrate(step, stats, [x])
    lines = str(error.value).splitlines()[1:]
    assert lines[0].startswith("  frozen was not updated: it is frozen or in eval mode")
    assert "`select`" in lines[0]
    assert lines[1].startswith("  last received no finite values: a norm before it")
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
    assert "let `step` run the model once per batch" in str(error.value)


def test_a_stock_flax_norm_is_named(rng):
    """Its average with unset statistics is not finite: -inf with a nonzero mean, or NaN with momentum 0."""
    x = batch(rng)
    norms = [jbn.linen.BatchNorm, linen.BatchNorm, jbn.linen.BatchNorm]
    variables = initialized(linen_model(norms), x)
    for momentum, problem in ((0.9, "averages"), (0.0, "has statistics")):
        step = linen_step(linen_model(norms, momentum=momentum), variables)
        with pytest.raises(ValueError, match=rf"1 of 3 norms:\n  norm1 {problem}"):
            jbn.calibrate(step, variables["batch_stats"], [x])
    found = jbn.calibrate(step, variables["batch_stats"], [x], select=lambda path: path != "norm1")
    assert np.isfinite(found["norm2"]["var"]).all()


def test_dropout_that_draws_anew_is_no_second_call(rng):
    """Without a count, running the step again detects a second call, and must not mistake random numbers for one."""
    x = batch(rng)
    model = linen_model([jbn.linen.BatchNorm])
    variables = initialized(model, x)
    keys = itertools.count()
    inner = linen_step(model, variables)

    def step(stats, x):
        return inner(stats, x * jax.random.bernoulli(jax.random.key(next(keys)), 0.5, x.shape))

    jbn.calibrate(step, variables["batch_stats"], [x])
    assert next(keys) == 3
