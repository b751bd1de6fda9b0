"""Outputs, running statistics and gradients equal those of other libraries, where these are right.

One step at a time from common states: every peer loads jbn's state before each step, so that errors do not add up.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from support.tolerances import assert_close

import jbn

pytestmark = pytest.mark.standard_promotion


class Options(NamedTuple):
    """What a program is compiled for, as jbn.batch_norm takes it."""

    train: bool
    momentum: float
    epsilon: float
    feature_axis: int


class Call(NamedTuple):
    """What a layer is given, and the cotangent of its output."""

    params: jbn.Params
    state: jbn.State
    x: Any
    mask: Any
    cotangent: Any


class Result(NamedTuple):
    out: Any
    mean: Any
    var: Any
    dx: Any
    dscale: Any
    dbias: Any


def installed(name):
    return pytest.importorskip(name, reason=f"{name} is not installed: pip install -e '.[peers]'")


@functools.partial(jax.jit, static_argnums=(0, 1))
def differentiated(layer, options, call):
    """The result of layer(options, call) -> out, (mean, var)."""

    def forward(params, x):
        return layer(options, call._replace(params=params, x=x))

    out, pullback, (mean, var) = jax.vjp(forward, call.params, call.x, has_aux=True)
    dparams, dx = pullback(call.cotangent)
    return Result(out, mean, var, dx, dparams.scale, dparams.bias)


def as_it_is(momentum):
    return momentum


def jbn_layer(conventions, call):
    options, momentum, running_var = conventions
    given = options._replace(momentum=momentum(options.momentum))._asdict()
    out, state = jbn.batch_norm(call.params, call.state, call.x, mask=call.mask, running_var=running_var, **given)
    return out, (state.mean, state.var)


def jbn_result(options, call, momentum=as_it_is, running_var="biased"):
    return differentiated(jbn_layer, (options, momentum, running_var), call)


def flax_layer(options, call):
    layer = linen.BatchNorm(not options.train, options.feature_axis, options.momentum, options.epsilon)
    running = {"mean": call.state.mean, "var": call.state.var}
    variables = {"params": call.params._asdict(), "batch_stats": running}
    mask = None if call.mask is None else jnp.expand_dims(call.mask, options.feature_axis)
    out, updates = layer.apply(variables, call.x, mask=mask, mutable=["batch_stats"])
    return out, (updates["batch_stats"]["mean"], updates["batch_stats"]["var"])


def keras_layer(options, call):
    keras = installed("keras")
    assert keras.backend.backend() == "jax"
    layer = keras.layers.BatchNormalization(options.feature_axis, options.momentum, options.epsilon)
    layer.build(call.x.shape)
    running = [call.state.mean, call.state.var]
    return layer.stateless_call([*call.params], running, call.x, training=options.train, mask=call.mask)


def haiku_layer(options, call):
    haiku = installed("haiku")
    channels_last = options.feature_axis == -1
    reduced = [0, *(range(1, call.x.ndim - 1) if channels_last else range(2, call.x.ndim))]
    # Haiku averages from 0 and divides by the weight gathered so far, which jbn.momentum.debiased does step by step.
    weight = -jnp.expm1(call.state.count * math.log(options.momentum))

    def average(value):
        value = jnp.expand_dims(value, reduced)
        return {"counter": call.state.count, "hidden": value * weight, "average": value}

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
    equinox = installed("equinox")
    layer = equinox.nn.BatchNorm(
        call.state.mean.size, "batch", options.epsilon, True, options.momentum, not options.train, mode="batch"
    )
    # At counter 0 inference takes the statistics as they are; later it divides by a weight that is wrong for variances.
    state = equinox.nn.State(layer).set(layer.batch_state_index, (call.state.mean, call.state.var))
    loaded = equinox.tree_at(lambda layer: (layer.weight, layer.bias), layer, tuple(call.params))
    out, state = jax.vmap(loaded, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(call.x, state)
    return out, state.get(layer.batch_state_index)


def torch_result(options, call, cumulative=False):
    torch = installed("torch")
    kinds = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}
    momentum = None if cumulative else 1 - options.momentum
    layer = kinds[call.x.ndim](call.x.shape[1], options.epsilon, momentum).train(options.train)
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    values = (torch.tensor(np.array(value)) for value in (*call.params, *call.state))
    layer.load_state_dict(dict(zip(names, values, strict=True)))
    x = torch.tensor(call.x, requires_grad=True)
    out = layer(x)
    out.backward(torch.tensor(call.cotangent))
    result = (out.detach(), layer.running_mean, layer.running_var, x.grad, layer.weight.grad, layer.bias.grad)
    return Result(*(tensor.numpy() for tensor in result))


class Peer(NamedTuple):
    """A peer, and how its conventions are said to jbn.

    `power` is that of mean/sd in the rounding error of its own arithmetic: 2 where the variance is E[x^2] - E[x]^2,
    1 where the mean is rounded before it is subtracted.
    """

    result: Callable[[Options, Call], Result]
    layouts: str
    power: int
    momentum: Callable[[float], Any] = as_it_is
    running_var: str = "biased"

    def ours(self, options, call):
        return jbn_result(options, call, self.momentum, self.running_var)


def from_torch(momentum):
    return jbn.momentum.from_torch(1 - momentum)


def from_cumulative_torch(_):
    return jbn.momentum.from_torch(None)


cumulative_torch_result = functools.partial(torch_result, cumulative=True)
PEERS = {
    "flax": Peer(functools.partial(differentiated, flax_layer), "NC NHWC NCHW", 2),
    "keras": Peer(functools.partial(differentiated, keras_layer), "NC NHWC NCHW", 1),
    "haiku": Peer(functools.partial(differentiated, haiku_layer), "NC NHWC NCHW", 2, jbn.momentum.debiased),
    "equinox": Peer(functools.partial(differentiated, equinox_layer), "NC NCHW", 1),
    "torch": Peer(torch_result, "NC NCW NCHW NCDHW", 1, from_torch, "unbiased"),
    "torch-cumulative": Peer(cumulative_torch_result, "NC NCHW", 1, from_cumulative_torch, "unbiased"),
}
peers_and_layouts = pytest.mark.parametrize(
    ("name", "layout"), [(name, layout) for name, peer in PEERS.items() for layout in peer.layouts.split()]
)
SIZES = {"C": 5, "D": 2, "H": 3, "W": 4}
# Rows, momentum and epsilon of the steps in turn; few, since each is compiled. Four rows are the least, since the
# gradient of x cancels to nothing for two.
BATCHES = [(9, 0.2, 1e-3), (17, 0.9, 1e-3), (40, 0.99, 1e-5)]


def options_and_call(rng, layout, state, step, train=True, masked=False):
    """A batch with a size, scale and mean of its own, for params, a momentum and an epsilon of its own."""
    batches = BATCHES if layout == "NC" else BATCHES[::2]
    rows, momentum, epsilon = batches[step % len(batches)]
    sizes = SIZES | {"N": rows if layout == "NC" else rows // 8}
    spread = 10 ** rng.uniform(-1, 1) * rng.uniform(0.5, 2, SIZES["C"])
    center = spread * rng.uniform(-3, 3, SIZES["C"])
    x = rng.normal(center, spread, [sizes[axis] for axis in layout.replace("C", "") + "C"])
    mask = None
    if masked:
        mask = (rng.permutation(x[..., 0].size) < 0.7 * x[..., 0].size).reshape(x.shape[:-1])
        x = np.where(mask[..., None], x, 10 * x)
    x = np.moveaxis(x, -1, layout.index("C")).astype(np.float32)
    params = jbn.Params(*rng.normal(size=(2, SIZES["C"])).astype(np.float32))
    cotangent = rng.normal(size=x.shape).astype(np.float32)
    options = Options(train, momentum, epsilon, feature_axis=-1 if layout[-1] == "C" else 1)
    return options, Call(params, state, x, mask, cotangent)


def condition(options, call, power):
    """1 + (mean / sd) ** power of the statistics that the call normalizes by."""
    mean, var = (np.asarray(value, np.float64) for value in call.state[:2])
    if options.train:
        rows = np.moveaxis(call.x, options.feature_axis, -1)
        rows = rows.reshape(-1, rows.shape[-1]) if call.mask is None else rows[call.mask]
        mean, var = np.mean(rows, 0, np.float64), np.var(rows, 0, np.float64)
    return 1 + np.max(mean**2 / var) ** (power / 2)


def ten_steps(rng, layout, ours, state=None, masked=False):
    """Each step's options and call, and jbn's result, whose state the next call starts from."""
    state = jbn.init(SIZES["C"])[1] if state is None else state
    for step in range(10):
        options, call = options_and_call(rng, layout, state, step, masked=masked)
        result = ours(options, call)
        yield options, call, result
        state = jbn.State(result.mean, result.var, jnp.int32(step + 1))


def assert_equal(ours, theirs, condition):
    for field in theirs._fields:
        try:
            assert_close(getattr(ours, field), getattr(theirs, field), condition=condition)
        except AssertionError as error:
            error.add_note(f"{field}, allowed a condition of {condition:.1f}")
            raise


@peers_and_layouts
def test_ten_steps_equal_the_peer(rng, name, layout):
    peer = PEERS[name]
    for options, call, ours in ten_steps(rng, layout, peer.ours):
        assert_equal(ours, peer.result(options, call), condition(options, call, peer.power))


@peers_and_layouts
def test_inference_equals_the_peer(rng, name, layout):
    peer = PEERS[name]
    spread = 10 ** rng.uniform(-2, 0, SIZES["C"])
    mean, var = spread * rng.uniform(-3, 3, SIZES["C"]), spread**2
    state = jbn.State(jnp.asarray(mean, jnp.float32), jnp.asarray(var, jnp.float32), jnp.int32(7))
    options, call = options_and_call(rng, layout, state, step=0, train=False)
    assert_equal(peer.ours(options, call), peer.result(options, call), condition(options, call, power=1))


@pytest.mark.parametrize("name", ["flax", "keras"])
@pytest.mark.parametrize("layout", ["NC", "NHWC"])
def test_ten_masked_steps_equal_the_peer_on_valid_rows(rng, name, layout):
    peer = PEERS[name]
    for options, call, ours in ten_steps(rng, layout, peer.ours, masked=True):
        # The peer normalizes masked rows too; without a cotangent there, its gradients are those of the valid rows.
        valid = call.mask[..., None]
        theirs = peer.result(options, call._replace(cotangent=np.where(valid, call.cotangent, np.float32(0))))
        theirs = theirs._replace(out=np.where(valid, theirs.out, 0))
        assert_equal(ours, theirs, condition(options, call, peer.power))


def article_forward(x, gamma, beta, moving_mean, moving_var, momentum, eps, training):
    """In NumPy, as the article on moving averages has it."""
    mean, var = moving_mean, moving_var
    if training:
        mean, var = np.mean(x, axis=0), np.var(x, axis=0)
        moving_mean = moving_mean * momentum + mean * (1 - momentum)
        moving_var = moving_var * momentum + var * (1 - momentum)
    xhat = (x - mean) / np.sqrt(var + eps)
    return gamma * xhat + beta, moving_mean, moving_var


def test_ten_steps_equal_the_article(rng):
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


def test_an_unset_start_is_that_of_equinox_in_ema_mode(rng):
    equinox = installed("equinox")
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
