"""Conversion from Equinox, of layers written by hand and of trained models, in both modes."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.compilation import compiled
from support.conversion import assert_same_prediction, drawn, network
from support.refusals import Refused, assert_refused
from support.tolerances import assert_close

import jbn
from jbn.convert import from_equinox, split


def layer(mode="batch", momentum=0.9, **vectors):
    """The attributes of `equinox.nn.BatchNorm`, with indices into a state that is a dict."""
    indices = {"batch_counter": 0, "batch_state_index": 1, "ema_first_time_index": 0, "ema_state_index": 1}
    return SimpleNamespace(mode=mode, momentum=momentum, **{"weight": None, "bias": None, **vectors}, **indices)


LAYER = layer()


def hidden_after(batches, momentum):
    """The state of mode "batch": averages of the means, from 0, and of the biased variances, from 1."""
    mean, var = np.zeros(batches.shape[-1]), np.ones(batches.shape[-1])
    for x in batches.astype(np.float64):
        mean, var = (momentum * old + (1 - momentum) * new for old, new in ((mean, x.mean(0)), (var, x.var(0))))
    return {0: np.int32(len(batches)), 1: (np.float32(mean), np.float32(var))}


def assert_weighted_averages(state, batches, momentum):
    weights = momentum ** np.arange(len(batches) - 1, -1, -1)
    batches = batches.astype(np.float64)
    assert (state.count == len(batches)).all()
    # The initial value is subtracted from a hidden value that was rounded with it.
    condition = 1 / (1 - momentum ** len(batches))
    assert_close(state.mean, np.average(batches.mean(1), axis=0, weights=weights), condition=condition, scale=1)
    assert_close(state.var, np.average(batches.var(1), axis=0, weights=weights), condition=condition)


def test_batch_mode_takes_the_start_out_of_the_hidden_statistics(rng):
    batches = rng.normal(size=(10, 64, 3)).astype(np.float32)
    _, state = from_equinox(layer(momentum=0.99), hidden_after(batches, 0.99))
    assert_weighted_averages(state, batches, 0.99)


def test_batch_mode_before_the_first_batch_is_mean_0_and_variance_1():
    _, state = from_equinox(LAYER, {0: 0, 1: (np.zeros(1, np.float32), np.ones(1, np.float32))})
    np.testing.assert_array_equal([state.mean, state.var], [[0], [1]])


def test_batch_mode_without_memory_gives_the_last_batch():
    _, state = from_equinox(layer(momentum=0.0), {0: np.int32(2), 1: (np.float32([3]), np.float32([4]))})
    np.testing.assert_array_equal([state.mean, state.var], [[3], [4]])


def test_batch_mode_gives_no_negative_variance():
    """Rounding may make the hidden variance of a constant channel smaller than its share of the initial variance."""
    left = np.float32([0.9**10]) * np.float32(1 - 1e-6)
    _, state = from_equinox(LAYER, {0: np.int32(10), 1: (np.zeros(1, np.float32), left)})
    np.testing.assert_array_equal(state.var, np.zeros(1))


def test_ema_mode_gives_what_is_stored_and_is_unset_before_the_first_batch():
    norm = layer("ema", weight=np.float32([2]))
    for first, expected in ((False, [[3], [4]]), (True, [[0], [-np.inf]])):
        params, state = from_equinox(norm, {0: np.array(first), 1: (np.float32([3]), np.float32([4]))})
        np.testing.assert_array_equal([state.mean, state.var], expected)
    np.testing.assert_array_equal(params.scale, [2])
    assert params.bias is None


def test_a_traced_state_converts_inside_jit():
    hidden = np.float32([3]), np.float32([4])

    def convert(counter, hidden):
        return from_equinox(LAYER, {0: counter, 1: hidden})

    for a, e in zip(jax.jit(convert)(2, hidden)[1], convert(2, hidden)[1], strict=True):
        assert_close(a, e, condition=10)


def test_norms_of_a_model_are_found_by_their_path_and_leave_none_in_their_place():
    kernel, state = np.ones((3, 3), np.float32), {0: 2, 1: (np.float32([3]), np.float32([4]))}
    norms, (model, rest) = split(({"layers": [kernel, LAYER], "last": LAYER}, state), "equinox")
    assert list(norms) == ["last", "layers/1"]
    assert model == {"layers": [kernel, None], "last": None}
    assert rest is state


REFUSED = {
    "no layer": Refused(lambda: from_equinox({}, {}), TypeError, "layer", "is a dict", "mode ema or batch"),
    "no state": Refused(lambda: from_equinox(LAYER, None), TypeError, "state", "is a NoneType", "the equinox.nn.State"),
    "another layer's state": Refused(
        lambda: from_equinox(LAYER, {}), ValueError, "state", "has no statistics of `layer`", "that was made with it"
    ),
    "another model's state": Refused(
        lambda: from_equinox(LAYER, SimpleNamespace(get={}.__getitem__)),
        ValueError,
        "state",
        "has no statistics of `layer`",
        "that was made with it",
    ),
    "a stack of layers": Refused(
        lambda: from_equinox(LAYER, {0: np.zeros(4)}), ValueError, "layer", "is a stack of (4,)", "with jax.vmap or"
    ),
}


def test_what_is_no_equinox_norm_is_refused():
    assert_refused(REFUSED)


def over_the_batch(norm_or_model):
    return jax.vmap(norm_or_model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))


@pytest.mark.slow
@pytest.mark.needs("equinox")
@pytest.mark.parametrize("mode", ["ema", "batch"])
def test_a_model_trained_in_equinox_predicts_the_same(rng, mode):
    import equinox as eqx

    class Network(eqx.Module):
        layers: list

        def __init__(self, key):
            first, second, third = jax.random.split(key, 3)
            # With this momentum the initial values, which Equinox's inference misreads, have no weight after 30 steps.
            norm = functools.partial(eqx.nn.BatchNorm, axis_name="batch", momentum=0.4, mode=mode)
            self.layers = [eqx.nn.Conv2d(3, 8, 3, key=first), norm(8)]
            self.layers += [eqx.nn.Conv2d(8, 6, 3, use_bias=False, key=second), norm(6), eqx.nn.Linear(6, 4, key=third)]

        def __call__(self, x, state):
            for convolution, norm in (self.layers[:2], self.layers[2:4]):
                x, state = norm(convolution(x), state)
                x = jax.nn.relu(x)
            return self.layers[4](x.mean((1, 2))), state

    model, state = eqx.nn.make_with_state(Network)(jax.random.key(0))
    step = compiled(lambda x, state: over_the_batch(model)(x, state)[1])
    for _ in range(30):
        state = step(drawn(rng, 8, 3, 8, 8), state)
    x = drawn(rng, 8, 3, 8, 8)
    expected, _ = compiled(over_the_batch(eqx.nn.inference_mode(model)))(x, state)
    norms, (rest, _) = split((model, state), "equinox")
    assert list(norms) == ["layers/1", "layers/3"]
    assert rest.layers[1] is rest.layers[3] is None
    convolutions = [(rest.layers[0].weight, rest.layers[0].bias[:, 0, 0]), (rest.layers[2].weight, None)]
    dense = rest.layers[4].weight.T, rest.layers[4].bias
    out, _ = network(convolutions, dense, layout=("NCHW", "OIHW"))(norms.values(), x, False)
    assert_same_prediction(out, expected)


@pytest.mark.needs("equinox")
def test_batch_mode_of_equinox_starts_from_mean_0_and_variance_1(rng):
    import equinox as eqx

    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", momentum=0.99, mode="batch")
    np.testing.assert_array_equal(from_equinox(norm, state)[1].var, np.ones(3))
    batches = rng.normal(size=(10, 64, 3)).astype(np.float32)
    step = compiled(over_the_batch(norm))
    for x in batches:
        _, state = step(x, state)
    assert_weighted_averages(from_equinox(norm, state)[1], batches, 0.99)


@pytest.mark.needs("equinox")
@pytest.mark.parametrize("mode", ["ema", "batch"])
def test_layers_of_equinox_convert_inside_jit_and_stacks_of_them_do_not(rng, mode):
    import equinox as eqx

    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", momentum=0.9, mode=mode)
    _, state = compiled(over_the_batch(norm))(drawn(rng, 8, 3), state)
    traced = eqx.filter_jit(from_equinox)(norm, state)
    for a, e in zip(jax.tree.leaves(traced), jax.tree.leaves(from_equinox(norm, state)), strict=True):
        assert_close(a, e, condition=10)
    make = eqx.filter_vmap(lambda _: eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode=mode))
    with pytest.raises(ValueError, match=r"`layer` is a stack of \(2,\) norms"):
        from_equinox(*make(jnp.arange(2)))


@pytest.mark.needs("equinox")
def test_ema_mode_of_equinox_is_unset_before_its_first_batch():
    import equinox as eqx

    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", channelwise_affine=False, mode="ema")
    params, converted = from_equinox(norm, state)
    assert params == jbn.Params(None, None)
    np.testing.assert_array_equal(converted.var, np.full(3, -np.inf))
