"""The compiled programs of a case, each with several sets of arguments to rotate."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from jbn.bench.cases import Case, Chain
from jbn.bench.data import Batch
from jbn.bench.layers import Layer


class Program(NamedTuple):
    """A program to run and to time."""

    prepare: Callable[[int], Any]
    """index of the run -> arguments; called before each run and not timed"""
    run: Callable[[Any], Any]
    wait: Callable[[Any], Any]
    compiled: Any = None
    residual_bytes: int | None = None


def layer_program(layer: Layer, case: Case, mode: str, given: list[Batch]) -> Program:
    """Compile one mode of a case, for inputs from `on_device`."""
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
        function, residuals = {"inference": infer, "forward": forward, "forward+backward": both}[mode], None
        if mode == "forward":
            function = _what_is_made(forward, given[0], state)
            residuals = _bytes(jax.eval_shape(forward, given[0], state)[1])
        compiled = jax.jit(function).lower(given[0], state).compile()
        return on_buffers(compiled, [(batch, state) for batch in given], residuals)
    first = jax.jit(forward)
    pairs = [(first(batch, state)[1], batch.cotangent) for batch in given]
    return on_buffers(jax.jit(lambda pullback, cotangent: pullback(cotangent)).lower(*pairs[0]).compile(), pairs)


def _what_is_made(function: Callable[..., Any], *arguments: Any) -> Callable[..., list[jax.Array]]:
    """The function without the results that are arguments.

    When JAX differentiates a compiled function, it passes these arrays to the backward pass without a copy. As results
    of a compiled program they would be copied.
    """
    program = jax.make_jaxpr(function)(*arguments)
    made = [not any(result is given for given in program.jaxpr.invars) for result in program.jaxpr.outvars]
    run = jaxpr_as_fun(program)
    return lambda *arguments: list(itertools.compress(run(*jax.tree.leaves(arguments)), made))


def copy_program(case: Case) -> Program:
    """Read and write as many bytes as x has once, to measure the memory bandwidth of this machine."""
    arrays = [jnp.full(case.size // 4, seed, jnp.float32) for seed in range(2)]
    return on_buffers(jax.jit(jnp.negative).lower(arrays[0]).compile(), [(array,) for array in arrays])


def chain_program(layer: Layer, chain: Chain) -> Program:
    """Compile the gradient of a chain of layers, with the new states."""
    dtype, features = jnp.dtype(chain.dtype), chain.width
    keys = jax.random.split(jax.random.key(0), 3)
    weights = jax.random.normal(keys[0], (chain.layers, features, features), dtype) / features**0.5
    inputs = [jax.random.normal(key, (chain.rows, features), dtype) for key in keys[1:]]
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * chain.layers), layer.state(features))
    scale, bias = jnp.ones(features), jnp.zeros(features)

    def block(x: Any, of_layer: Any) -> Any:
        weight, state = of_layer
        out, new_state = layer.train(scale, bias, state, x @ weight, None, jax.nn.relu)
        # A library may return a leaf in another shape or dtype than it takes. scan requires equal ones.
        return out, jax.tree.map(lambda new, old: jnp.reshape(new, old.shape).astype(old.dtype), new_state, state)

    def loss(weights: Any, x: Any, states: Any) -> Any:
        x, new_states = jax.lax.scan(block, x, (weights, states), unroll=1 if chain.scan else chain.layers)
        return jnp.mean(jnp.square(x.astype(jnp.float32))), new_states

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    compiled = gradient.lower(weights, inputs[0], states).compile()
    return on_buffers(compiled, [(weights, x, states) for x in inputs])


def on_buffers(compiled: Any, arguments: list[Any], residuals: int | None = None) -> Program:
    """A compiled program that rotates through the arguments."""
    return Program(
        lambda number: arguments[number % len(arguments)],
        lambda given: compiled(*given),
        jax.block_until_ready,
        compiled,
        residuals,
    )


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
