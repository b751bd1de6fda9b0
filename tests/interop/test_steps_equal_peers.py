"""Outputs, running statistics and gradients equal those of PyTorch, Keras, Haiku and Equinox, where these are right."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.steps_of_peers import (
    SIZES,
    Peer,
    Result,
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


def keras_layer(options, call):
    import keras

    assert keras.backend.backend() == "jax"
    layer = keras.layers.BatchNormalization(options.feature_axis, options.momentum, options.epsilon)
    layer.build(call.x.shape)
    running = [call.state.mean, call.state.var]
    return layer.stateless_call([*call.params], running, call.x, training=options.train, mask=call.mask)


def haiku_layer(options, call):
    import haiku

    channels_last = options.feature_axis == -1
    reduced = [0, *(range(1, call.x.ndim - 1) if channels_last else range(2, call.x.ndim))]
    # Haiku divides an average from 0 by its total weight; jbn.momentum.debiased gives the same in each step.
    counter = call.state.count[0].astype(jnp.int32)
    weight = -jnp.expm1(counter * math.log(options.momentum))

    def average(value):
        value = jnp.expand_dims(value, reduced)
        return {"counter": counter, "hidden": value * weight, "average": value}

    def layer(x):
        data_format = "N...C" if channels_last else "NC..."
        norm = haiku.BatchNorm(True, True, options.momentum, options.epsilon, data_format=data_format, name="norm")
        return norm(x, is_training=options.train)

    scale, offset = (jnp.expand_dims(vector, reduced) for vector in call.params)
    running = {"norm/~/mean_ema": average(call.state.mean), "norm/~/var_ema": average(call.state.var)}
    apply = haiku.transform_with_state(layer).apply
    out, running = apply({"norm": {"scale": scale, "offset": offset}}, running, None, call.x)
    return out, tuple(jnp.squeeze(running[f"norm/~/{name}_ema"]["average"], reduced) for name in ("mean", "var"))


def equinox_layer(options, call):
    import equinox

    layer = equinox.nn.BatchNorm(
        call.state.mean.size, "batch", options.epsilon, True, options.momentum, not options.train, mode="batch"
    )
    # At counter 0 inference uses the statistics unchanged; later it divides by a weight that is wrong for variances.
    state = equinox.nn.State(layer).set(layer.batch_state_index, (call.state.mean, call.state.var))
    loaded = equinox.tree_at(lambda layer: (layer.weight, layer.bias), layer, tuple(call.params))
    out, state = jax.vmap(loaded, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(call.x, state)
    return out, state.get(layer.batch_state_index)


def torch_result(options, call, cumulative=False):
    import torch

    kinds = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}
    momentum = None if cumulative else 1 - options.momentum
    layer = kinds[call.x.ndim](call.x.shape[1], options.epsilon, momentum).train(options.train)
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    # PyTorch has one count for all features.
    values = (torch.tensor(np.array(value)) for value in (*call.params, *call.state[:2], call.state.count[0]))
    layer.load_state_dict(dict(zip(names, values, strict=True)))
    x = torch.tensor(call.x, requires_grad=True)
    out = layer(x)
    out.backward(torch.tensor(call.cotangent))
    result = (out.detach(), layer.running_mean, layer.running_var, x.grad, layer.weight.grad, layer.bias.grad)
    return Result(*(tensor.numpy() for tensor in result))


def from_torch(momentum):
    return jbn.momentum.from_torch(1 - momentum)


def from_cumulative_torch(_):
    return jbn.momentum.from_torch(None)


cumulative_torch_result = functools.partial(torch_result, cumulative=True)
KERAS = Peer(functools.partial(differentiated, keras_layer), "NC NHWC NCHW", 1)
PEERS = {
    "keras": KERAS,
    "haiku": Peer(functools.partial(differentiated, haiku_layer), "NC NHWC NCHW", 2, jbn.momentum.debiased),
    "equinox": Peer(functools.partial(differentiated, equinox_layer), "NC NCHW", 1),
    "torch": Peer(torch_result, "NC NCW NCHW NCDHW", 1, from_torch, "unbiased"),
    "torch, cumulative": Peer(cumulative_torch_result, "NC NCHW", 1, from_cumulative_torch, "unbiased"),
}
each_peer = pytest.mark.parametrize(
    "peer",
    [pytest.param(peer, id=name, marks=pytest.mark.needs(name.partition(",")[0])) for name, peer in PEERS.items()],
)


@each_peer
def test_ten_training_steps_equal_those_of_the_peer(rng, peer):
    assert_ten_steps_equal(rng, peer)


@each_peer
def test_inference_equals_that_of_the_peer(rng, peer):
    assert_inference_equal(rng, peer)


@pytest.mark.needs("keras")
def test_ten_masked_training_steps_equal_those_of_keras_on_valid_rows(rng):
    assert_ten_masked_steps_equal(rng, KERAS, ("NC", "NHWC"))


@pytest.mark.needs("equinox")
def test_an_unset_start_is_that_of_equinox_in_ema_mode(rng):
    import equinox

    layer = equinox.nn.BatchNorm(SIZES["C"], "batch", momentum=0.9, mode="ema")
    step = jax.jit(jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None)))
    theirs = equinox.nn.State(layer)
    unset = jbn.unset(jbn.init(SIZES["C"])[1])
    jbn_step = functools.partial(jbn_result, momentum=lambda _: 0.9)
    for options, call, ours in ten_steps(rng, "NC", jbn_step, unset):
        # In this mode Equinox normalizes by the running statistics even in training, so only these are compared.
        _, theirs = step(call.x, theirs)
        for actual, expected in zip((ours.mean, ours.var), theirs.get(layer.ema_state_index), strict=True):
            assert_close(actual, expected, condition=condition(options, call, power=1))
