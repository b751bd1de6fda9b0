"""Outputs, running statistics and gradients equal those of other libraries, where these are right.

One step at a time from common states: every peer loads jbn's state before each step, so that errors do not add up.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from tolerances import assert_close

import jbn

pytestmark = pytest.mark.peers

STEPS = 10


class Call(NamedTuple):
    """One call of a layer: what it is given, and the cotangent of its output."""

    params: jbn.Params
    state: jbn.State
    x: np.ndarray
    cotangent: np.ndarray
    train: bool
    momentum: float
    epsilon: float
    feature_axis: int
    mask: np.ndarray | None = None


class Result(NamedTuple):
    out: Any
    mean: Any
    var: Any
    dx: Any
    dscale: Any
    dbias: Any


def installed(name):
    return pytest.importorskip(name, reason=f"{name} is not installed: pip install -e '.[peers]'")


def differentiated(forward, call):
    """The result of forward(params, x) -> out, (mean, var)."""
    out, pullback, (mean, var) = jax.vjp(forward, call.params, jnp.asarray(call.x), has_aux=True)
    dparams, dx = pullback(jnp.asarray(call.cotangent))
    return Result(out, mean, var, dx, dparams.scale, dparams.bias)


def jbn_call(call, momentum, running_var="biased"):
    options = dict(momentum=momentum, epsilon=call.epsilon, feature_axis=call.feature_axis, running_var=running_var)

    def forward(params, x):
        out, state = jbn.batch_norm(params, call.state, x, call.train, mask=call.mask, **options)
        return out, (state.mean, state.var)

    return differentiated(forward, call)


def flax_call(call):
    layer = linen.BatchNorm(
        use_running_average=not call.train, axis=call.feature_axis, momentum=call.momentum, epsilon=call.epsilon
    )
    mask = None if call.mask is None else np.expand_dims(call.mask, call.feature_axis)

    def forward(params, x):
        running = {"mean": call.state.mean, "var": call.state.var}
        variables = {"params": params._asdict(), "batch_stats": running}
        out, updates = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
        return out, (updates["batch_stats"]["mean"], updates["batch_stats"]["var"])

    return differentiated(forward, call)


def keras_call(call):
    keras = installed("keras")
    assert keras.backend.backend() == "jax"
    layer = keras.layers.BatchNormalization(axis=call.feature_axis, momentum=call.momentum, epsilon=call.epsilon)
    layer.build(call.x.shape)

    def forward(params, x):
        running = [call.state.mean, call.state.var]
        mask = None if call.mask is None else jnp.asarray(call.mask)
        return layer.stateless_call([*params], running, x, training=call.train, mask=mask)

    return differentiated(forward, call)


def torch_call(call, cumulative=False):
    torch = installed("torch")
    kinds = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}
    momentum = None if cumulative else 1 - call.momentum
    layer = kinds[call.x.ndim](call.x.shape[1], eps=call.epsilon, momentum=momentum).train(call.train)
    values = {
        "weight": call.params.scale,
        "bias": call.params.bias,
        "running_mean": call.state.mean,
        "running_var": call.state.var,
        "num_batches_tracked": call.state.count,
    }
    layer.load_state_dict({name: torch.tensor(np.array(value)) for name, value in values.items()})
    x = torch.tensor(call.x, requires_grad=True)
    out = layer(x)
    out.backward(torch.tensor(call.cotangent))
    result = (out.detach(), layer.running_mean, layer.running_var, x.grad, layer.weight.grad, layer.bias.grad)
    return Result(*(tensor.numpy() for tensor in result))


def haiku_call(call):
    haiku = installed("haiku")
    channels_last = call.feature_axis == -1
    reduced = [0, *(range(1, call.x.ndim - 1) if channels_last else range(2, call.x.ndim))]
    # Haiku remembers the average from 0 and divides it by the weight it has gathered, as jbn.momentum.debiased does.
    weight = 1 - call.momentum ** int(call.state.count)

    def average(value):
        value = jnp.expand_dims(value, reduced)
        return {"counter": call.state.count, "hidden": value * weight, "average": value}

    def layer(x):
        data_format = "N...C" if channels_last else "NC..."
        norm = haiku.BatchNorm(True, True, call.momentum, call.epsilon, data_format=data_format, name="norm")
        return norm(x, is_training=call.train)

    def forward(params, x):
        scale, offset = (jnp.expand_dims(vector, reduced) for vector in params)
        running = {"norm/~/mean_ema": average(call.state.mean), "norm/~/var_ema": average(call.state.var)}
        apply = haiku.transform_with_state(layer).apply
        out, running = apply({"norm": {"scale": scale, "offset": offset}}, running, None, x)
        return out, tuple(jnp.squeeze(running[f"norm/~/{name}_ema"]["average"], reduced) for name in ("mean", "var"))

    return differentiated(forward, call)


def equinox_call(call):
    equinox = installed("equinox")
    features = call.x.shape[call.feature_axis]
    options = dict(axis_name="batch", eps=call.epsilon, momentum=call.momentum, inference=not call.train)
    layer = equinox.nn.BatchNorm(features, mode="batch", **options)
    # At counter 0 inference takes the statistics as they are; later ones it divides by a weight that is wrong for var.
    state = equinox.nn.State(layer).set(layer.batch_state_index, (call.state.mean, call.state.var))

    def forward(params, x):
        loaded = equinox.tree_at(lambda layer: (layer.weight, layer.bias), layer, tuple(params))
        out, new = jax.vmap(loaded, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
        return out, new.get(layer.batch_state_index)

    return differentiated(forward, call)


class Peer(NamedTuple):
    """A peer, and how its conventions are said to jbn.

    `power` is that of mean/sd in the rounding error of its own arithmetic: 2 where the variance is E[x^2] - E[x]^2,
    1 where the mean is rounded before it is subtracted.
    """

    call: Callable[[Call], Result]
    power: int
    momentum: Callable[[float], Any] = lambda momentum: momentum
    running_var: str = "biased"


PEERS = {
    "flax": Peer(flax_call, power=2),
    "keras": Peer(keras_call, power=1),
    "torch": Peer(torch_call, 1, lambda momentum: jbn.momentum.from_torch(1 - momentum), "unbiased"),
    "torch-cumulative": Peer(
        functools.partial(torch_call, cumulative=True), 1, lambda _: jbn.momentum.from_torch(None), "unbiased"
    ),
    "haiku": Peer(haiku_call, power=2, momentum=jbn.momentum.debiased),
    "equinox": Peer(equinox_call, power=1),
}
LAYOUTS = [
    ("flax", "NC"),
    ("flax", "NHWC"),
    ("flax", "NCHW"),
    ("keras", "NC"),
    ("keras", "NHWC"),
    ("keras", "NCHW"),
    ("torch", "NC"),
    ("torch", "NCW"),
    ("torch", "NCHW"),
    ("torch", "NCDHW"),
    ("torch-cumulative", "NC"),
    ("haiku", "NC"),
    ("haiku", "NHWC"),
    ("haiku", "NCHW"),
    ("equinox", "NC"),
    ("equinox", "NCHW"),
]
SIZES = {"C": 5, "D": 2, "H": 3, "W": 4}
# Few sizes, since every operation is compiled for each; no fewer than six valid values, since the gradient of x cancels
# to nothing as their number comes near two.
BATCH_SIZES = {2: [9, 17, 40]}
SPATIAL_BATCH_SIZES = [2, 5]


def per_feature(vector, layout):
    """A vector with the rank of the layout."""
    return np.expand_dims(vector, [axis for axis, name in enumerate(layout) if name != "C"])


def random_call(rng, layout, state, train, masked=False):
    """A call on a batch of its own size, scale and mean, with a momentum, an epsilon and params of its own."""
    batch_sizes = BATCH_SIZES.get(len(layout), SPATIAL_BATCH_SIZES)
    shape = [int(rng.choice(batch_sizes)), *(SIZES[name] for name in layout[1:])]
    spread = 10 ** rng.uniform(-1, 1) * rng.uniform(0.5, 2, SIZES["C"])
    center = spread * rng.uniform(-3, 3, SIZES["C"])
    x = per_feature(center, layout) + per_feature(spread, layout) * rng.normal(size=shape)
    mask = None
    if masked:
        rows = int(np.prod(shape[:-1]))
        mask = (rng.permutation(rows) < 0.7 * rows).reshape(shape[:-1])
        x = np.where(mask[..., None], x, 10 * x)
    scale, bias = rng.normal(size=(2, SIZES["C"])).astype(np.float32)
    return Call(
        params=jbn.Params(jnp.asarray(scale), jnp.asarray(bias)),
        state=state,
        x=x.astype(np.float32),
        cotangent=rng.normal(size=shape).astype(np.float32),
        train=train,
        momentum=float(rng.choice([0.99, 0.9, 0.7, 0.2])),
        epsilon=float(rng.choice([1e-5, 1e-3])),
        feature_axis=layout.index("C") - (len(layout) if layout[-1] == "C" else 0),
        mask=mask,
    )


def condition(call, power):
    """1 + (mean / sd) ** power of the statistics that the call normalizes by."""
    mean, var = (np.asarray(value, np.float64) for value in call.state[:2])
    if call.train:
        rows = np.moveaxis(call.x, call.feature_axis, -1)
        rows = rows.reshape(-1, rows.shape[-1]) if call.mask is None else rows[call.mask]
        mean, var = np.mean(rows, 0, np.float64), np.var(rows, 0, np.float64)
    return 1 + np.max(mean**2 / var) ** (power / 2)


def assert_equal(ours, theirs, condition):
    for field in Result._fields:
        try:
            assert_close(getattr(ours, field), getattr(theirs, field), condition=condition)
        except AssertionError as error:
            error.add_note(f"of {field}, allowed a condition of {condition:.1f}")
            raise


@pytest.mark.parametrize(("name", "layout"), LAYOUTS, ids=lambda part: part)
def test_ten_steps_equal_the_peer(rng, name, layout):
    peer = PEERS[name]
    _, state = jbn.init(SIZES["C"])
    for step in range(STEPS):
        call = random_call(rng, layout, state, train=True)
        ours = jbn_call(call, peer.momentum(call.momentum), peer.running_var)
        assert_equal(ours, peer.call(call), condition(call, peer.power))
        state = jbn.State(ours.mean, ours.var, jnp.int32(step + 1))


@pytest.mark.parametrize(("name", "layout"), LAYOUTS, ids=lambda part: part)
def test_inference_equals_the_peer(rng, name, layout):
    mean, var = rng.uniform(-3, 3, SIZES["C"]), rng.uniform(0.5, 4, SIZES["C"])
    state = jbn.State(jnp.asarray(mean, jnp.float32), jnp.asarray(var, jnp.float32), jnp.int32(7))
    call = random_call(rng, layout, state, train=False)
    peer = PEERS[name]
    ours = jbn_call(call, peer.momentum(call.momentum), peer.running_var)
    assert_equal(ours, peer.call(call), condition(call, power=1))
    np.testing.assert_array_equal(ours.mean, state.mean)
    np.testing.assert_array_equal(ours.var, state.var)


@pytest.mark.parametrize("name", ["flax", "keras"])
@pytest.mark.parametrize("layout", ["NC", "NHWC"])
def test_ten_masked_steps_equal_the_peer_on_valid_rows(rng, name, layout):
    peer = PEERS[name]
    _, state = jbn.init(SIZES["C"])
    for step in range(STEPS):
        call = random_call(rng, layout, state, train=True, masked=True)
        valid = call.mask[..., None]
        ours = jbn_call(call, call.momentum)
        # The peer normalizes masked rows too; without a cotangent there, its gradients are those of the valid rows.
        theirs = peer.call(call._replace(cotangent=np.where(valid, call.cotangent, 0)))
        theirs = theirs._replace(out=np.where(valid, theirs.out, 0))
        assert_equal(ours, theirs, condition(call, peer.power))
        state = jbn.State(ours.mean, ours.var, jnp.int32(step + 1))


def article_forward(x, gamma, beta, moving_mean, moving_var, momentum, eps, training):
    """NumPy, as the article on moving averages has it."""
    mean, var = moving_mean, moving_var
    if training:
        mean, var = np.mean(x, axis=0), np.var(x, axis=0)
        moving_mean = moving_mean * momentum + mean * (1 - momentum)
        moving_var = moving_var * momentum + var * (1 - momentum)
    xhat = (x - mean) / np.sqrt(var + eps)
    return gamma * xhat + beta, moving_mean, moving_var


def test_ten_steps_equal_the_article(rng):
    moving_mean, moving_var = np.zeros(SIZES["C"]), np.ones(SIZES["C"])
    _, state = jbn.init(SIZES["C"])
    for _ in range(STEPS):
        call = random_call(rng, "NC", state, train=True)
        given = call.x.astype(np.float64), *(np.asarray(vector, np.float64) for vector in call.params)
        options = dict(momentum=call.momentum, epsilon=call.epsilon)
        out, state = jbn.batch_norm(call.params, state, call.x, True, **options)
        at_inference, _ = jbn.batch_norm(call.params, state, call.x, False, **options)
        expected, moving_mean, moving_var = article_forward(
            *given, moving_mean, moving_var, call.momentum, call.epsilon, training=True
        )
        assert_close(out, expected)
        assert_close(state.mean, moving_mean)
        assert_close(state.var, moving_var)
        expected, *_ = article_forward(*given, moving_mean, moving_var, call.momentum, call.epsilon, training=False)
        assert_close(at_inference, expected, condition=condition(call._replace(state=state, train=False), power=1))


def test_an_unset_start_is_that_of_equinox_in_ema_mode(rng):
    equinox = installed("equinox")
    layer = equinox.nn.BatchNorm(SIZES["C"], "batch", mode="ema", momentum=0.9)
    theirs = equinox.nn.State(layer)
    params, state = jbn.init(SIZES["C"])
    state = jbn.unset(state)
    for _ in range(STEPS):
        call = random_call(rng, "NC", state, train=True)
        _, state = jbn.batch_norm(params, state, call.x, True, momentum=0.9)
        _, theirs = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(call.x, theirs)
        for ours, expected in zip(state[:2], theirs.get(layer.ema_state_index), strict=True):
            assert_close(ours, expected, condition=condition(call, power=1))
