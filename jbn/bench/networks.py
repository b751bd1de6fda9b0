"""Networks in Flax Linen for the training steps of `jbn bench`. The norm module is an argument."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

import jbn

MOMENTUM = 0.9


class Norm(NamedTuple):
    """A batch norm module with the interface of Flax, and whether it applies relu and the shortcut itself."""

    module: Any
    inside: bool = False


NORMS = {
    "linen": Norm(nn.BatchNorm),
    "jbn": Norm(jbn.linen.BatchNorm),
    "jbn-inside": Norm(jbn.linen.BatchNorm, inside=True),
}
"""jbn in place of Flax, with one name changed; and the recommended use, with relu and shortcut inside the norm."""


def normed(norm: Norm, x: jax.Array, **given: Any) -> jax.Array:
    """Apply the norm in training mode; the shortcut and relu are applied inside the norm or after it."""
    module = functools.partial(norm.module, use_running_average=False, momentum=MOMENTUM, dtype=x.dtype)
    if norm.inside:
        return module(activation=nn.relu)(x, **given)
    shortcut = given.pop("shortcut", None)
    out = module()(x, **given)
    return nn.relu(out if shortcut is None else out + shortcut)


class MLP(nn.Module):
    """A multilayer perceptron with three norms."""

    norm: Norm
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(n, inputs) -> (n, 1)"""
        for _ in range(3):
            x = normed(self.norm, nn.Dense(self.width, dtype=x.dtype)(x))
        return nn.Dense(1)(x)


class Sequences(nn.Module):
    """Three norms over sequences of unequal lengths, given by a mask."""

    norm: Norm
    width: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """(n, length, inputs), (n, length, 1) -> (n, 1)"""
        for _ in range(3):
            x = normed(self.norm, nn.Dense(self.width, dtype=x.dtype)(x), mask=mask)
        return nn.Dense(1)(jnp.mean(x, 1, where=mask))


class Block(nn.Module):
    """A bottleneck block of a residual network, with the stride in the 3 x 3 convolution."""

    norm: Norm
    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(n, height, width, channels) -> (n, height / stride, width / stride, 4 * self.width)"""
        conv = functools.partial(nn.Conv, use_bias=False, dtype=x.dtype)
        strides, features = (self.stride, self.stride), 4 * self.width
        y = normed(self.norm, conv(self.width, (1, 1))(x))
        y = normed(self.norm, conv(self.width, (3, 3), strides)(y))
        y = conv(features, (1, 1))(y)
        if x.shape != y.shape:
            x = conv(features, (1, 1), strides)(x)
            x = self.norm.module(use_running_average=False, momentum=MOMENTUM, dtype=x.dtype)(x)
        return normed(self.norm, y, shortcut=x)


class ResNet(nn.Module):
    """ResNet-50, or a smaller network with fewer blocks per stage."""

    norm: Norm
    blocks: tuple[int, ...] = (3, 4, 6, 3)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(n, height, width, 3) -> (n, 1000)"""
        x = normed(self.norm, nn.Conv(64, (7, 7), (2, 2), use_bias=False, dtype=x.dtype)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        for stage, blocks in enumerate(self.blocks):
            for block in range(blocks):
                x = Block(self.norm, 64 * 2**stage, 2 if stage and not block else 1)(x)
        return nn.Dense(1000)(jnp.mean(x, (1, 2)))
