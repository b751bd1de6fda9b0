"""Training steps of jbn and of another library from the same states, each with a condition number for its rounding.

Steps are compared one at a time: the other library loads jbn's state before each step, so that errors do not add up.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jbn
from support.compilation import compiled
from support.tolerances import assert_close


class Options(NamedTuple):
    """The static arguments of a program, in the convention of jbn.batch_norm."""

    train: bool
    momentum: float
    epsilon: float
    feature_axis: int


class Call(NamedTuple):
    """The arrays that a layer is called with, and the cotangent of its output."""

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


@functools.partial(compiled, static_argnums=(0, 1))
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


class Peer(NamedTuple):
    """A peer, and its conventions as arguments for jbn.

    The rounding error of its arithmetic grows with (mean / sd)**power: power is 2 if it computes the variance as
    E[x**2] - E[x]**2, and 1 if it rounds the mean before it subtracts it.
    """

    result: Callable[[Options, Call], Result]
    layouts: str
    power: int
    momentum: Callable[[float], Any] = as_it_is
    running_var: str = "biased"

    def ours(self, options, call):
        return jbn_result(options, call, self.momentum, self.running_var)


SIZES = {"C": 5, "D": 2, "H": 3, "W": 4}
# Rows, momentum and epsilon, which the steps cycle through. There are few, since each is compiled. Each has at least
# four rows, since the gradient of x cancels for two.
BATCHES = [(9, 0.2, 1e-3), (17, 0.9, 1e-3), (40, 0.99, 1e-5)]
BATCHES_OF = {"NC": BATCHES[::2], "NHWC": BATCHES[1:2], "NCHW": BATCHES[2:], "NCW": BATCHES[:1], "NCDHW": BATCHES[:1]}


def options_and_call(rng, layout, state, step, train=True, masked=False):
    """A random batch, with its own size, scale, mean, params, momentum and epsilon."""
    batches = BATCHES_OF[layout][-1:] if masked else BATCHES_OF[layout]
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
    """Options, call and jbn's result of each step; the next step starts from the state of the result."""
    state = jbn.init(SIZES["C"])[1] if state is None else state
    for step in range(10):
        options, call = options_and_call(rng, layout, state, step, masked=masked)
        result = ours(options, call)
        yield options, call, result
        state = jbn.State(result.mean, result.var, jnp.full(result.mean.shape, step + 1.0))


def assert_equal(ours, theirs, condition, layout):
    for field in theirs._fields:
        try:
            assert_close(getattr(ours, field), getattr(theirs, field), condition=condition)
        except AssertionError as error:
            error.add_note(f"{field} of {layout}, allowed a condition of {condition:.1f}")
            raise


def assert_ten_steps_equal(rng, peer):
    for layout in peer.layouts.split():
        for options, call, ours in ten_steps(rng, layout, peer.ours):
            assert_equal(ours, peer.result(options, call), condition(options, call, peer.power), layout)


def assert_inference_equal(rng, peer):
    for layout in peer.layouts.split():
        spread = 10 ** rng.uniform(-2, 0, SIZES["C"])
        mean, var = spread * rng.uniform(-3, 3, SIZES["C"]), spread**2
        state = jbn.State(jnp.asarray(mean, jnp.float32), jnp.asarray(var, jnp.float32), jnp.full(mean.shape, 7.0))
        options, call = options_and_call(rng, layout, state, step=0, train=False)
        assert_equal(peer.ours(options, call), peer.result(options, call), condition(options, call, power=1), layout)


def assert_ten_masked_steps_equal(rng, peer, layouts):
    for layout in layouts:
        for options, call, ours in ten_steps(rng, layout, peer.ours, masked=True):
            # The peer normalizes masked rows too. With cotangent 0 there, its gradients come from the valid rows only.
            valid = call.mask[..., None]
            theirs = peer.result(options, call._replace(cotangent=np.where(valid, call.cotangent, np.float32(0))))
            theirs = theirs._replace(out=np.where(valid, theirs.out, 0))
            assert_equal(ours, theirs, condition(options, call, peer.power), layout)
