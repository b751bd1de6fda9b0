"""Small Flax models with jbn's or Flax's norm, and comparisons of their results."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import jbn
from support.tolerances import assert_close


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape) * 2 + 1, jnp.float32)


def both(module):
    """jbn's class and Flax's class of the same name, to use in the same model."""
    return {"linen": (jbn.linen.BatchNorm, nn.BatchNorm), "nnx": (jbn.nnx.BatchNorm, nnx.BatchNorm)}[module]


def assert_trees_close(actual, expected, **bounds):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, e: assert_close(a, e, **bounds), actual, expected)


class Block(nnx.Module):
    """Linear, norm and relu."""

    def __init__(self, rngs, norm=jbn.nnx.BatchNorm, features=3):
        self.linear = nnx.Linear(features, features, use_bias=False, rngs=rngs)
        self.norm = norm(features, momentum=0.5, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.linear(x)))
