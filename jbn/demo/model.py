"""A residual network in plain JAX: nested dicts of parameters and running statistics, and a function of both."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jbn
from jbn.demo.data import Array

Tree = dict[str, Any]
CLASSES = 10
STAGES = {"stage1": (32, 1), "stage2": (64, 2)}
"""Channels and stride of each residual block; the stem has the channels of the first block."""


def init(key: jax.Array) -> tuple[Tree, Tree]:
    """Initialize the parameters and running statistics of the network."""
    width = next(iter(STAGES.values()))[0]
    stem_key, dense_key, *block_keys = jax.random.split(key, 2 + len(STAGES))
    params: Tree = {}
    state: Tree = {}
    params["stem"], state["stem"] = _init_conv_norm(stem_key, (3, 3, 1, width))
    channels = width
    for (name, (features, _)), block_key in zip(STAGES.items(), block_keys, strict=True):
        params[name], state[name] = _init_block(block_key, channels, features)
        channels = features
    params["dense"] = {
        "kernel": jax.nn.initializers.he_normal()(dense_key, (channels, CLASSES), jnp.float32),
        "bias": jnp.zeros(CLASSES),
    }
    return params, state


def apply(params: Tree, state: Tree, images: Array, train: bool, norm: Callable[..., Any]) -> tuple[Any, Tree]:
    """Compute logits of shape (n, 10) and the new running statistics.

    `norm` is jbn.batch_norm with its options bound. Activations and shortcuts are arguments of the norm, so that the
    backward pass stores only the inputs of the norms.
    """
    new_state: Tree = {}
    x, new_state["stem"] = _conv_norm(params["stem"], state["stem"], images, train, norm, activation=jax.nn.relu)
    for name, (_, stride) in STAGES.items():
        x, new_state[name] = _block(params[name], state[name], x, train, norm, stride)
    x = jnp.mean(x, axis=(1, 2))
    return x @ params["dense"]["kernel"] + params["dense"]["bias"], new_state


def _init_conv_norm(key: jax.Array, shape: tuple[int, ...]) -> tuple[Tree, jbn.State]:
    norm_params, norm_state = jbn.init(shape[-1])
    return {"kernel": jax.nn.initializers.he_normal()(key, shape, jnp.float32), "norm": norm_params}, norm_state


def _init_block(key: jax.Array, channels: int, features: int) -> tuple[Tree, Tree]:
    keys = jax.random.split(key, 3)
    first = _init_conv_norm(keys[0], (3, 3, channels, features))
    second = _init_conv_norm(keys[1], (3, 3, features, features))
    shortcut = _init_conv_norm(keys[2], (1, 1, channels, features))
    layers = {"first": first, "second": second, "shortcut": shortcut}
    return {name: layer[0] for name, layer in layers.items()}, {name: layer[1] for name, layer in layers.items()}


def _conv_norm(
    params: Tree, state: jbn.State, x: Array, train: bool, norm: Callable[..., Any], stride: int = 1, **options: Any
) -> tuple[jax.Array, jbn.State]:
    x = jax.lax.conv_general_dilated(
        jnp.asarray(x), params["kernel"], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return norm(params["norm"], state, x, train, **options)


def _block(
    params: Tree, state: Tree, x: jax.Array, train: bool, norm: Callable[..., Any], stride: int
) -> tuple[jax.Array, Tree]:
    new_state: Tree = {}
    y, new_state["first"] = _conv_norm(params["first"], state["first"], x, train, norm, stride, activation=jax.nn.relu)
    x, new_state["shortcut"] = _conv_norm(params["shortcut"], state["shortcut"], x, train, norm, stride)
    joined = {"activation": jax.nn.relu, "shortcut": x}
    y, new_state["second"] = _conv_norm(params["second"], state["second"], y, train, norm, **joined)
    return y, new_state
