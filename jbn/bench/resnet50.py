"""ResNet-50 as a pure function, whose norm is an argument."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
"""Width of the inner convolutions and number of blocks."""
HALVES = (("stem", "stage0", "stage1"), ("stage2", "stage3"))
WIDENING = 4
LAYOUT = ("NHWC", "HWIO", "NHWC")

Activation = Callable[[jax.Array], jax.Array]
Remat = Callable[[Callable[..., Any]], Callable[..., Any]]


class Norm(NamedTuple):
    """A batch norm in training, as pure functions."""

    init: Callable[[int], tuple[Any, Any]]
    """features -> (params, state)"""
    apply: Callable[[Any, Any, jax.Array, Activation | None], tuple[jax.Array, Any]]
    """(params, state, x, activation) -> (out, new state)"""


def init(key: jax.Array, norm: Norm, classes: int = 1000) -> tuple[Any, Any]:
    """Parameters and state; the blocks of a stage after its first are stacked."""
    keys = iter(jax.random.split(key, 2 + 2 * len(STAGES)))
    stem, head = next(keys), next(keys)
    params, state = {}, {}
    params["stem"], state["stem"] = _init_conv(stem, norm, 7, 3, 64)
    inputs = 64
    for stage, (width, blocks) in enumerate(STAGES):
        first = _init_block(next(keys), norm, inputs, width)
        inputs = width * WIDENING
        rest = [_init_block(key, norm, inputs, width) for key in jax.random.split(next(keys), blocks - 1)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rest)
        for tree, of_first, of_rest in zip((params, state), first, stacked, strict=True):
            tree[f"stage{stage}"] = {"first": of_first, "rest": of_rest}
    params["head"] = jax.random.normal(head, (inputs, classes)) / inputs**0.5
    return params, state


def apply(
    norm: Norm, params: Any, state: Any, images: jax.Array, *, remat: Remat = lambda f: f, scan: bool = False
) -> tuple[jax.Array, Any]:
    """Logits and the new state, in the dtype of the images; `scan` loops over the equal blocks of a stage.

    `remat` wraps each half of the network, each stage in it and each block in that: what a policy does not keep is
    then alive for one block at a time, beside the inputs of the stage's blocks and of the half's stages.
    """
    new_state = {}
    x = images
    for names in HALVES:
        half = remat(functools.partial(_half, norm, names, remat, scan))
        x, new = half({name: params[name] for name in names}, {name: state[name] for name in names}, x)
        new_state |= new
    return jnp.mean(x, axis=(1, 2)).astype(jnp.float32) @ params["head"], new_state


def _half(
    norm: Norm, names: Sequence[str], remat: Remat, scan: bool, params: Any, state: Any, x: jax.Array
) -> tuple[jax.Array, Any]:
    new = {}
    for name in names:
        stage = functools.partial(_stem, norm)
        if name != "stem":
            stage = functools.partial(_stage, norm, 1 if name == "stage0" else 2, remat, scan)
        x, new[name] = remat(stage)(params[name], state[name], x)
    return x, new


def _stem(norm: Norm, params: Any, state: Any, images: jax.Array) -> tuple[jax.Array, Any]:
    x, new_state = _conv_norm(norm, params, state, images, 2, jax.nn.relu)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME"), new_state


def _stage(
    norm: Norm, stride: int, remat: Remat, scan: bool, params: Any, state: Any, x: jax.Array
) -> tuple[jax.Array, Any]:
    first, later = (remat(functools.partial(_block, norm, stride)) for stride in (stride, 1))
    x, of_first = first(params["first"], state["first"], x)
    rest = (params["rest"], state["rest"])
    if scan:
        x, of_rest = jax.lax.scan(lambda x, block: later(*block, x), x, rest)
        return x, {"first": of_first, "rest": of_rest}
    new = []
    for number in range(len(jax.tree.leaves(rest)[0])):
        x, of_one = later(*(jax.tree.map(operator.itemgetter(number), tree) for tree in rest), x)
        new.append(of_one)
    return x, {"first": of_first, "rest": jax.tree.map(lambda *leaves: jnp.stack(leaves), *new)}


def _init_conv(key: jax.Array, norm: Norm, size: int, inputs: int, features: int) -> tuple[Any, Any]:
    kernel = jax.random.normal(key, (size, size, inputs, features)) * (2 / (size * size * inputs)) ** 0.5
    params, state = norm.init(features)
    return {"kernel": kernel, "norm": params}, state


def _init_block(key: jax.Array, norm: Norm, inputs: int, width: int) -> tuple[Any, Any]:
    shapes = {"reduce": (1, inputs, width), "inner": (3, width, width), "widen": (1, width, width * WIDENING)}
    if inputs != width * WIDENING:
        shapes["shortcut"] = (1, inputs, width * WIDENING)
    keys = jax.random.split(key, len(shapes))
    made = {name: _init_conv(key, norm, *shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}
    return {name: pair[0] for name, pair in made.items()}, {name: pair[1] for name, pair in made.items()}


def _conv_norm(
    norm: Norm, params: Any, state: Any, x: jax.Array, stride: int, activation: Activation | None
) -> tuple[jax.Array, Any]:
    kernel = params["kernel"].astype(x.dtype)
    y = jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=LAYOUT)
    return norm.apply(params["norm"], state, y, activation)


def _block(norm: Norm, stride: int, params: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    """The bottleneck block, with its stride in the inner convolution."""
    new = {}

    def layer(name: str, x: jax.Array, stride: int, activation: Activation | None) -> jax.Array:
        out, new[name] = _conv_norm(norm, params[name], state[name], x, stride, activation)
        return out

    y = layer("reduce", x, 1, jax.nn.relu)
    y = layer("inner", y, stride, jax.nn.relu)
    y = layer("widen", y, 1, None)
    shortcut = layer("shortcut", x, stride, None) if "shortcut" in params else x
    return jax.nn.relu(y + shortcut), new
