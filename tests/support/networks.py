"""ResNet-18 for small images in Flax Linen and in Flax NNX, with the norm and the number of stages as arguments."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx

from jbn.demo import data
from support import compilation

CLASSES = 10
STAGES = 4
"""The stages of a ResNet-18. The first two have all kinds of layers, and compile in a third of the time."""
LEARNING_RATE = 0.05
compiled = functools.partial(compilation.compiled, static_argnums=0)


def strides_and_features(width, stages):
    """Stride and features of each block: two per stage; from the second stage on, the first block halves the image."""
    return [(2 if stage > 0 and block == 0 else 1, width * 2**stage) for stage in range(stages) for block in range(2)]


class LinenBlock(linen.Module):
    features: int
    stride: int
    conv: Callable[..., Any]
    norm: Callable[..., Any]
    activation: Callable[..., Any]

    @linen.compact
    def __call__(self, x):
        y = self.norm()(self.conv(self.features, (3, 3), self.stride)(x))
        y = self.norm()(self.conv(self.features, (3, 3))(self.activation(y)))
        if x.shape != y.shape:
            x = self.norm()(self.conv(self.features, (1, 1), self.stride)(x))
        return self.activation(x + y)


class LinenResNet(linen.Module):
    norm: Callable[..., Any] = linen.BatchNorm
    width: int = 64
    stages: int = STAGES
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    activation: Callable[..., Any] = jax.nn.relu

    @linen.compact
    def __call__(self, images, train):
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = functools.partial(linen.Conv, use_bias=False, **dtypes)
        norm = functools.partial(self.norm, use_running_average=not train, **dtypes)
        x = self.activation(norm()(conv(self.width, (3, 3))(images)))
        for stride, features in strides_and_features(self.width, self.stages):
            x = LinenBlock(features, stride, conv, norm, self.activation)(x)
        return linen.Dense(CLASSES, **dtypes)(jnp.mean(x, axis=(1, 2)))


class NnxConvNorm(nnx.Module):
    def __init__(self, inputs, features, kernel, stride, norm, dtypes, rngs):
        self.conv = nnx.Conv(inputs, features, kernel, stride, use_bias=False, **dtypes, rngs=rngs)
        self.norm = norm(features, **dtypes, rngs=rngs)

    def __call__(self, x, train):
        return self.norm(self.conv(x), use_running_average=not train)


class NnxBlock(nnx.Module):
    def __init__(self, inputs, features, stride, activation, **options):
        self.first = NnxConvNorm(inputs, features, (3, 3), stride, **options)
        self.second = NnxConvNorm(features, features, (3, 3), 1, **options)
        projects = (inputs, 1) != (features, stride)
        self.shortcut = nnx.data(NnxConvNorm(inputs, features, (1, 1), stride, **options) if projects else None)
        self.activation = activation

    def __call__(self, x, train):
        y = self.second(self.activation(self.first(x, train)), train)
        return self.activation(y + (x if self.shortcut is None else self.shortcut(x, train)))


class NnxResNet(nnx.Module):
    def __init__(
        self,
        norm=nnx.BatchNorm,
        *,
        width=64,
        stages=STAGES,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        activation=jax.nn.relu,
        channels=1,
        rngs,
    ):
        options = {"norm": norm, "dtypes": {"dtype": dtype, "param_dtype": param_dtype}, "rngs": rngs}
        self.stem = NnxConvNorm(channels, width, (3, 3), 1, **options)
        self.blocks = nnx.List()
        inputs = width
        for stride, features in strides_and_features(width, stages):
            self.blocks.append(NnxBlock(inputs, features, stride, activation, **options))
            inputs = features
        self.dense = nnx.Linear(inputs, CLASSES, **options["dtypes"], rngs=rngs)
        self.activation = activation

    def __call__(self, images, train):
        x = self.activation(self.stem(images, train))
        for block in self.blocks:
            x = block(x, train)
        return self.dense(jnp.mean(x, axis=(1, 2)))


class Network(NamedTuple):
    """A ResNet as pure functions of its variables.

    init(key) -> params, batch_stats;  apply(params, batch_stats, images, train) -> logits, batch_stats
    """

    init: Callable[..., Any]
    apply: Callable[..., Any]


def linen_network(norm, *, channels=1, **options):
    model = LinenResNet(norm, **options)

    def init(key):
        variables = model.init(key, jnp.zeros((1, 8, 8, channels)), train=True)
        return variables["params"], variables["batch_stats"]

    def apply(params, batch_stats, images, train):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updated = model.apply(variables, images, train, mutable=["batch_stats"])
        return logits, updated["batch_stats"]

    return Network(init, apply)


def nnx_network(norm, **options):
    def init(key):
        return nnx.state(NnxResNet(norm, **options, rngs=nnx.Rngs(key)), nnx.Param, nnx.BatchStat)

    graph = nnx.graphdef(nnx.eval_shape(lambda: NnxResNet(norm, **options, rngs=nnx.Rngs(0))))

    def apply(params, batch_stats, images, train):
        model = nnx.merge(graph, params, batch_stats, copy=True)
        return model(images, train), nnx.state(model, nnx.BatchStat)

    return Network(init, apply)


@compiled
def initialized(network):
    """Parameters and running statistics, the same for every norm."""
    # XLA's own random generator compiles in a fraction of the time.
    return network.init(jax.random.key(0, impl="unsafe_rbg"))


@compiled
def inferred(network, params, batch_stats, images):
    return network.apply(params, batch_stats, images, False)[0]


class Step(NamedTuple):
    """Results of a training step: the loss, the new running statistics, and the gradients of the parameters."""

    loss: Any
    batch_stats: Any
    gradients: Any


@compiled
def differentiated(network, params, batch_stats, images, labels):
    def loss(params):
        logits, updated = network.apply(params, batch_stats, images, True)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels)), updated

    (value, updated), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return Step(value, updated, gradients)


def descended(params, gradients):
    """One step of gradient descent, in NumPy, so that nothing is compiled for each leaf."""
    return jax.tree.map(lambda *pair: np.asarray(pair[0]) - LEARNING_RATE * np.asarray(pair[1]), params, gradients)


def batches(sizes, steps, seed=0):
    """Batches of handwritten digits of 8 x 8 pixels, whose sizes cycle through `sizes`."""
    digits = data.load().train
    rng = np.random.default_rng(seed)
    for step in range(steps):
        chosen = rng.choice(len(digits.labels), sizes[step % len(sizes)], replace=False)
        yield digits.images[chosen], digits.labels[chosen]
