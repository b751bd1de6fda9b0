"""The compiled programs of a case, each with the arguments that it is run on in turn."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbn.bench import resnet50
from jbn.bench.cases import Case, Chain, Network
from jbn.bench.layers import Layer

ROTATED = 256 * 2**20
"""Bytes of inputs to go round, more than the caches of today's processors hold."""
MEAN = 2.0
"""Of the data, in its standard deviations."""


class Program(NamedTuple):
    """Something to run and to time."""

    prepare: Callable[[int], Any]
    """What is made anew for each run, and not timed: number of the buffer -> arguments"""
    run: Callable[[Any], Any]
    wait: Callable[[Any], Any]
    compiled: Any = None
    residual_bytes: int | None = None


class Batch(NamedTuple):
    """One input, in NumPy, and the cotangent of the output."""

    x: np.ndarray
    cotangent: np.ndarray
    mask: np.ndarray | None
    scale: np.ndarray
    bias: np.ndarray


def batches(case: Case) -> list[Batch]:
    """Different inputs of a case, more than caches hold, but between 2 and 8."""
    number = int(np.clip(-(-ROTATED // (2 * case.size)), 2, 8))
    return [batch(case, np.random.default_rng(seed)) for seed in range(number)]


def on_device(given: list[Batch], channels_first: bool) -> list[Batch]:
    """The same for JAX, with the axes in the order that a layer takes."""
    if channels_first:
        given = [batch._replace(x=_first(batch.x), cotangent=_first(batch.cotangent)) for batch in given]
    return [jax.tree.map(jnp.asarray, batch) for batch in given]


def batch(case: Case, rng: np.random.Generator, mean: float = MEAN) -> Batch:
    """Normal data around the mean, in the dtype of the case."""
    features = case.shape[-1]
    x = (rng.standard_normal(case.shape, np.float32) + np.float32(mean)).astype(case.dtype)
    cotangent = rng.standard_normal(case.shape, np.float32).astype(case.dtype)
    mask = None
    if case.masked:
        lengths = rng.integers(case.shape[1] // 2, case.shape[1] + 1, case.shape[0])
        mask = (np.arange(case.shape[1]) < lengths[:, None])[..., None]
        cotangent = np.where(mask, cotangent, 0).astype(case.dtype)
    scale, bias = rng.uniform(0.5, 1.5, features), rng.normal(size=features)
    return Batch(x, cotangent, mask, scale.astype(np.float32), bias.astype(np.float32))


def layer_program(layer: Layer, case: Case, mode: str, given: list[Batch]) -> Program:
    """A mode of a case, compiled, for inputs that `on_device` made."""
    state = layer.state(case.shape[-1])
    activation = jax.nn.relu if case.relu else None

    def forward(batch: Batch, state: Any) -> Any:
        def train(scale: Any, bias: Any, x: Any) -> Any:
            return layer.train(scale, bias, state, x, batch.mask, activation)

        return jax.vjp(train, batch.scale, batch.bias, batch.x, has_aux=True)

    def both(batch: Batch, state: Any) -> Any:
        out, pullback, new_state = forward(batch, state)
        return out, new_state, pullback(batch.cotangent)

    def infer(batch: Batch, state: Any) -> Any:
        return layer.infer(batch.scale, batch.bias, state, batch.x, activation)

    if mode != "backward":
        function = {"inference": infer, "forward": forward, "forward+backward": both}[mode]
        compiled = jax.jit(function).lower(given[0], state).compile()
        residuals = _bytes(jax.eval_shape(forward, given[0], state)[1]) if mode == "forward" else None
        return _program(compiled, [(batch, state) for batch in given], residuals)
    first = jax.jit(forward)
    pairs = [(first(batch, state)[1], batch.cotangent) for batch in given]
    return _program(jax.jit(lambda pullback, cotangent: pullback(cotangent)).lower(*pairs[0]).compile(), pairs)


def copy_program(case: Case) -> Program:
    """One read and one write of as many bytes as x has: what the memory of this machine gives."""
    arrays = [jnp.full(case.size // 4, seed, jnp.float32) for seed in range(2)]
    return _program(jax.jit(jnp.negative).lower(arrays[0]).compile(), [(array,) for array in arrays])


def chain_program(layer: Layer, chain: Chain) -> Program:
    """Gradient of a chain of layers, and the new states."""
    dtype, features = jnp.dtype(chain.dtype), chain.width
    keys = jax.random.split(jax.random.key(0), 3)
    weights = jax.random.normal(keys[0], (chain.layers, features, features), dtype) / features**0.5
    inputs = [jax.random.normal(key, (chain.rows, features), dtype) for key in keys[1:]]
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * chain.layers), layer.state(features))
    scale, bias = jnp.ones(features), jnp.zeros(features)

    def block(x: Any, of_layer: Any) -> Any:
        weight, state = of_layer
        out, new_state = layer.train(scale, bias, state, x @ weight, None, jax.nn.relu)
        # A library may hold a leaf in another shape or dtype than it gives back; scan wants them equal.
        return out, jax.tree.map(lambda new, old: jnp.reshape(new, old.shape).astype(old.dtype), new_state, state)

    def loss(weights: Any, x: Any, states: Any) -> Any:
        x, new_states = jax.lax.scan(block, x, (weights, states), unroll=1 if chain.scan else chain.layers)
        return jnp.mean(jnp.square(x.astype(jnp.float32))), new_states

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    compiled = gradient.lower(weights, inputs[0], states).compile()
    return _program(compiled, [(weights, x, states) for x in inputs])


def network_program(layer: Layer, network: Network, policy: Any = None) -> Program:
    """A training step of ResNet-50 by gradient descent; with a policy, under jax.checkpoint."""
    norm = resnet50.Norm(
        lambda features: ((jnp.ones(features), jnp.zeros(features)), layer.state(features)),
        lambda params, state, x, activation: layer.train(*params, state, x, None, activation),
    )
    params, state = jax.jit(functools.partial(resnet50.init, norm=norm))(jax.random.key(0))
    remat = (lambda f: f) if policy is None else functools.partial(jax.checkpoint, policy=policy)

    def loss(params: Any, state: Any, images: Any, labels: Any) -> Any:
        logits, new_state = resnet50.apply(norm, params, state, images.astype(network.dtype), remat=remat)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)), new_state

    def step(params: Any, state: Any, images: Any, labels: Any) -> Any:
        (value, new_state), gradient = jax.value_and_grad(loss, has_aux=True)(params, state, images, labels)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), new_state, value

    images = [jax.random.normal(jax.random.key(seed), (network.batch, 224, 224, 3)) for seed in range(2)]
    labels = jnp.arange(network.batch) % 1000
    compiled = jax.jit(step).lower(params, state, images[0], labels).compile()
    return _program(compiled, [(params, state, of_one, labels) for of_one in images])


def _program(compiled: Any, arguments: list[Any], residuals: int | None = None) -> Program:
    return Program(
        lambda number: arguments[number % len(arguments)],
        lambda given: compiled(*given),
        jax.block_until_ready,
        compiled,
        residuals,
    )


def _first(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(array, -1, 1))


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
