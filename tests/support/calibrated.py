"""Linen models of several norms, and their steps for `jbn.calibrate`."""

import jax
import numpy as np
from flax import linen


def batch(rng):
    return rng.normal(size=(16, 3)).astype(np.float32)


def initialized(model, x):
    return jax.jit(model.init)(jax.random.key(0), x)


def linen_model(norms, **options):
    """Norms of the given classes in sequence, each between a dense layer and relu."""

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            for number, norm in enumerate(norms):
                x = linen.Dense(3, name=f"dense{number}")(x)
                x = norm(use_running_average=False, name=f"norm{number}", **options)(x)
                x = linen.relu(x)
            return x

    return Model()


def linen_step(model, variables):
    def step(stats, x):
        return model.apply({**variables, "batch_stats": stats}, x, mutable=["batch_stats"])[1]["batch_stats"]

    return jax.jit(step)
