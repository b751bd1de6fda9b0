"""Random norms to fold into a layer."""

import numpy as np

import jbn


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def far_from_its_start(rng, features, scale=True, bias=True):
    """Params and state of a norm."""
    features = (features,) if isinstance(features, int | np.integer) else features
    params = jbn.Params(*(normal(rng, *features) if wanted else None for wanted in (scale, bias)))
    var = rng.uniform(0.1, 5, size=features).astype(np.float32)
    return params, jbn.State(normal(rng, *features), var, np.zeros(features, np.float32))
