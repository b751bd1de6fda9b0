"""Outputs, running statistics and gradients equal those of Flax, and of the article on moving averages."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from support.steps_of_peers import (
    SIZES,
    Peer,
    assert_inference_equal,
    assert_ten_masked_steps_equal,
    assert_ten_steps_equal,
    condition,
    differentiated,
    jbn_result,
    ten_steps,
)
from support.tolerances import assert_close

import jbn

pytestmark = pytest.mark.standard_promotion


def flax_layer(options, call):
    layer = linen.BatchNorm(not options.train, options.feature_axis, options.momentum, options.epsilon)
    running = {"mean": call.state.mean, "var": call.state.var}
    variables = {"params": call.params._asdict(), "batch_stats": running}
    mask = None if call.mask is None else jnp.expand_dims(call.mask, options.feature_axis)
    out, updates = layer.apply(variables, call.x, mask=mask, mutable=["batch_stats"])
    return out, (updates["batch_stats"]["mean"], updates["batch_stats"]["var"])


FLAX = Peer(functools.partial(differentiated, flax_layer), "NC NHWC NCHW", 2)


def test_ten_training_steps_equal_those_of_flax(rng):
    assert_ten_steps_equal(rng, FLAX)


def test_inference_equals_that_of_flax(rng):
    assert_inference_equal(rng, FLAX)


def test_ten_masked_training_steps_equal_those_of_flax_on_valid_rows(rng):
    assert_ten_masked_steps_equal(rng, FLAX, ("NC", "NHWC"))


def article_forward(x, gamma, beta, moving_mean, moving_var, momentum, eps, training):
    """The NumPy code of the article on moving averages."""
    mean, var = moving_mean, moving_var
    if training:
        mean, var = np.mean(x, axis=0), np.var(x, axis=0)
        moving_mean = moving_mean * momentum + mean * (1 - momentum)
        moving_var = moving_var * momentum + var * (1 - momentum)
    xhat = (x - mean) / np.sqrt(var + eps)
    return gamma * xhat + beta, moving_mean, moving_var


def test_ten_training_steps_equal_those_of_the_article(rng):
    moving_mean, moving_var = np.zeros(SIZES["C"]), np.ones(SIZES["C"])
    for options, call, ours in ten_steps(rng, "NC", jbn_result):
        inputs = [np.asarray(array, np.float64) for array in (call.x, *call.params)]
        article = functools.partial(article_forward, *inputs, momentum=options.momentum, eps=options.epsilon)
        out, moving_mean, moving_var = article(moving_mean, moving_var, training=True)
        for actual, expected in zip(ours[:3], (out, moving_mean, moving_var), strict=True):
            assert_close(actual, expected)
        options = options._replace(train=False)
        call = call._replace(state=jbn.State(ours.mean, ours.var, call.state.count + 1))
        out, *_ = article(moving_mean, moving_var, training=False)
        assert_close(jbn_result(options, call).out, out, condition=condition(options, call, power=1))
