"""NNX norms of jbn and Flax, their calls under jit, and comparisons of their variables."""

import jax
import numpy as np
from flax import nnx

from support.tolerances import assert_close


def images(rng, batch=6):
    return (rng.normal(size=(batch, 3, 3)) * 2 + 1).astype(np.float32)


def made(module, **options):
    return module.BatchNorm(**{"num_features": 3, "rngs": nnx.Rngs(0), **options})


@nnx.jit
def applied(model, x):
    return model(x)


def arrays(model):
    return nnx.to_pure_dict(nnx.state(model))


def assert_states_close(actual, expected, **bounds):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(a, e, **bounds)
