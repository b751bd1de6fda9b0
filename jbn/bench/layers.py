"""Batch norm of jbn and of other JAX libraries, with one common signature."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jbn
from jbn.bench.data import EPSILON

Activation = Callable[[jax.Array], jax.Array]
MOMENTUM = 0.9


class Layer(NamedTuple):
    """A batch norm as pure functions. The output has the dtype of x."""

    state: Callable[[int], Any]
    """features -> the running statistics"""
    train: Callable[..., tuple[jax.Array, Any]]
    """(scale, bias, state, x, mask, activation) -> (out, new state)"""
    infer: Callable[..., jax.Array]
    """(scale, bias, state, x, activation) -> out"""
    takes_mask: bool = False
    channels_first: bool = False


def jbn_layer() -> Layer:
    """Batch norm of jbn."""

    def train(scale: Any, bias: Any, state: Any, x: Any, mask: Any, activation: Activation | None) -> Any:
        params = jbn.Params(scale, bias)
        return jbn.batch_norm(params, state, x, True, mask=mask, momentum=MOMENTUM, activation=activation)

    def infer(scale: Any, bias: Any, state: Any, x: Any, activation: Activation | None) -> jax.Array:
        return jbn.batch_norm(jbn.Params(scale, bias), state, x, False, activation=activation)[0]

    return Layer(lambda features: jbn.init(features)[1], train, infer, takes_mask=True)


def linen_layer(use_fast_variance: bool = True) -> Layer:
    """Batch norm of Flax Linen."""
    from flax import linen

    def norm(x: Any, running: bool) -> Any:
        return linen.BatchNorm(
            running, momentum=MOMENTUM, epsilon=EPSILON, dtype=x.dtype, use_fast_variance=use_fast_variance
        )

    def train(scale: Any, bias: Any, state: Any, x: Any, mask: Any, activation: Activation | None) -> Any:
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": state}
        mask = None if mask is None else jnp.broadcast_to(mask, x.shape)
        out, new = norm(x, False).apply(variables, x, mask=mask, mutable=["batch_stats"])
        return _activated(out, activation), new["batch_stats"]

    def infer(scale: Any, bias: Any, state: Any, x: Any, activation: Activation | None) -> Any:
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": state}
        return _activated(norm(x, True).apply(variables, x), activation)

    return Layer(_mean_and_var, train, infer, takes_mask=True)


def nnx_layer() -> Layer:
    """Batch norm of Flax NNX."""
    from flax import nnx

    def norm(scale: Any, bias: Any, state: Any, x: Any) -> Any:
        # NNX requires that the module is created in the trace that changes its statistics.
        module = nnx.BatchNorm(scale.size, momentum=MOMENTUM, epsilon=EPSILON, dtype=x.dtype, rngs=nnx.Rngs(0))
        module.scale, module.bias = nnx.Param(scale), nnx.Param(bias)
        module.mean, module.var = nnx.BatchStat(state["mean"]), nnx.BatchStat(state["var"])
        return module

    def train(scale: Any, bias: Any, state: Any, x: Any, mask: Any, activation: Activation | None) -> Any:
        module = norm(scale, bias, state, x)
        mask = None if mask is None else jnp.broadcast_to(mask, x.shape)
        out = module(x, use_running_average=False, mask=mask)
        return _activated(out, activation), {"mean": module.mean[...], "var": module.var[...]}

    def infer(scale: Any, bias: Any, state: Any, x: Any, activation: Activation | None) -> Any:
        return _activated(norm(scale, bias, state, x)(x, use_running_average=True), activation)

    return Layer(_mean_and_var, train, infer, takes_mask=True)


def haiku_layer() -> Layer:
    """Batch norm of Haiku."""
    haiku = importlib.import_module("haiku")

    def applied(scale: Any, bias: Any, state: Any, x: Any, training: bool, activation: Activation | None) -> Any:
        def norm(x: Any) -> Any:
            return haiku.BatchNorm(True, True, MOMENTUM, EPSILON, name="norm")(x, is_training=training)

        wide = (1,) * (x.ndim - 1) + (-1,)
        params = {"norm": {"scale": scale.reshape(wide), "offset": bias.reshape(wide)}}
        state = jax.tree.map(lambda leaf: leaf.reshape(wide) if jnp.ndim(leaf) else leaf, state)
        out, new = haiku.transform_with_state(norm).apply(params, state, None, x)
        return _activated(out.astype(x.dtype), activation), jax.tree.map(jnp.ravel, new)

    def state(features: int) -> Any:
        # Haiku starts its averages from 0 with counter 0. The other libraries start from mean 0 and variance 1.
        def average(value: Any) -> dict[str, Any]:
            return {"counter": jnp.int32(1), "hidden": value, "average": value}

        return {
            "norm/~/mean_ema": average(jnp.zeros(features)),
            "norm/~/var_ema": average(jnp.ones(features)),
        }

    return Layer(
        state,
        lambda scale, bias, state, x, mask, activation: applied(scale, bias, state, x, True, activation),
        lambda scale, bias, state, x, activation: applied(scale, bias, state, x, False, activation)[0],
    )


def equinox_layer() -> Layer:
    """Batch norm of Equinox in mode "batch"."""
    equinox = importlib.import_module("equinox")

    def applied(scale: Any, bias: Any, state: Any, x: Any, inference: bool, activation: Activation | None) -> Any:
        layer = equinox.nn.BatchNorm(scale.size, "batch", EPSILON, True, MOMENTUM, inference=inference, mode="batch")
        held = equinox.nn.State(layer).set(layer.batch_state_index, state)
        layer = equinox.tree_at(lambda layer: (layer.weight, layer.bias), layer, (scale, bias))
        out, new = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, held)
        return _activated(out.astype(x.dtype), activation), new.get(layer.batch_state_index)

    return Layer(
        lambda features: (jnp.zeros(features), jnp.ones(features)),
        lambda scale, bias, state, x, mask, activation: applied(scale, bias, state, x, False, activation),
        lambda scale, bias, state, x, activation: applied(scale, bias, state, x, True, activation)[0],
        channels_first=True,
    )


def keras_layer() -> Layer:
    """Batch norm of Keras with the JAX backend."""
    keras = importlib.import_module("keras")
    if keras.backend.backend() != "jax":
        raise ImportError("Keras uses another backend: set KERAS_BACKEND=jax.")

    def applied(scale: Any, bias: Any, state: Any, x: Any, training: bool, mask: Any, activation: Any) -> Any:
        policy = "float32" if x.dtype == jnp.float32 else f"mixed_{x.dtype.name}"
        layer = keras.layers.BatchNormalization(momentum=MOMENTUM, epsilon=EPSILON, dtype=policy)
        layer.build(x.shape)
        mask = None if mask is None else mask[..., 0]
        out, new = layer.stateless_call([scale, bias], state, x, training=training, mask=mask)
        return _activated(out.astype(x.dtype), activation), new

    return Layer(
        lambda features: [jnp.zeros(features), jnp.ones(features)],
        lambda scale, bias, state, x, mask, activation: applied(scale, bias, state, x, True, mask, activation),
        lambda scale, bias, state, x, activation: applied(scale, bias, state, x, False, None, activation)[0],
        takes_mask=True,
    )


LAYERS: dict[str, Callable[[], Layer]] = {
    "jbn": jbn_layer,
    "linen": linen_layer,
    "linen-2pass": lambda: linen_layer(use_fast_variance=False),
    "nnx": nnx_layer,
    "haiku": haiku_layer,
    "equinox": equinox_layer,
    "keras": keras_layer,
}
"""Each function imports its library, and raises ImportError if the library is not installed."""


def _mean_and_var(features: int) -> dict[str, jax.Array]:
    return {"mean": jnp.zeros(features), "var": jnp.ones(features)}


def _activated(out: jax.Array, activation: Activation | None) -> jax.Array:
    return out if activation is None else activation(out)
