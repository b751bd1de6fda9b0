"""Gradients of one norm outside jit, as in a notebook or a debugger."""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx

import jbn
from jbn.bench import torch_steps
from jbn.bench.programs import Program


class Eager(NamedTuple):
    """Value and gradients of one norm; argument 0 is the parameters, argument 1 is x."""

    name: str
    argnums: tuple[int, ...]
    shape: tuple[int, int] = (64, 32)

    @property
    def label(self) -> str:
        """Its name in the report."""
        return f"{self.name} {'x'.join(map(str, self.shape))} float32"


CASES = [Eager("one norm, in params", (0,)), Eager("one norm, in params and x", (0, 1))]


def programs(case: Eager, peers: Collection[str]) -> dict[str, Program]:
    """The programs of a case, by name of module or function, for jbn and the given peers."""
    inputs = [jax.random.normal(jax.random.key(seed), case.shape) for seed in range(2)]
    features = case.shape[-1]
    gradients = {
        "linen": lambda: _of_linen(linen.BatchNorm, case.argnums, inputs[0]),
        "jbn": lambda: _of_linen(jbn.linen.BatchNorm, case.argnums, inputs[0]),
        "jbn.batch_norm": lambda: _of_function(case.argnums, features),
        "nnx": lambda: _of_nnx(nnx.BatchNorm, case.argnums, features),
        "jbn.nnx": lambda: _of_nnx(jbn.nnx.BatchNorm, case.argnums, features),
    }
    found = {
        name: Program(lambda number: inputs[number % 2], make(), jax.block_until_ready)
        for name, make in gradients.items()
        if name.startswith("jbn") or name in peers
    }
    if "torch-last" in peers:
        found["torch-last"] = torch_steps.eager_program(case.argnums, inputs)
    return found


def _loss(out: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(out))


def _of_linen(module: Any, argnums: tuple[int, ...], x: jax.Array) -> Callable[[jax.Array], Any]:
    norm = module(use_running_average=False)
    variables = norm.init(jax.random.key(0), x)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return _loss(norm.apply({**variables, "params": params}, x, mutable=["batch_stats"])[0])

    return lambda x: jax.value_and_grad(loss, argnums)(variables["params"], x)


def _of_function(argnums: tuple[int, ...], features: int) -> Callable[[jax.Array], Any]:
    params, state = jbn.init(features)

    def loss(params: jbn.Params, x: jax.Array) -> jax.Array:
        return _loss(jbn.batch_norm(params, state, x, True)[0])

    return lambda x: jax.value_and_grad(loss, argnums)(params, x)


def _of_nnx(module: Any, argnums: tuple[int, ...], features: int) -> Callable[[jax.Array], Any]:
    norm = module(features, use_running_average=False, rngs=nnx.Rngs(0))

    def loss(norm: Any, x: jax.Array) -> jax.Array:
        return _loss(norm(x))

    return lambda x: nnx.value_and_grad(loss, argnums=argnums)(norm, x)
