"""Batch renormalization from its formula, in NumPy float64, and a state that it corrects towards."""

import numpy as np

import jbn
from support import reference

# A running mean between the mean of the batch and the initial one, as in the state of a trained network.
RUNNING = 0.3
FREE = {"r_max": np.inf, "d_max": np.inf}
CLOSED = {"r_max": 1.0, "d_max": 0.0}


def case(rng, shape, feature_axis=-1, mean=3.0):
    """Params, a state and a batch."""
    x = (rng.normal(size=shape) * 2 + mean).astype(np.float32)
    features = tuple(shape[axis] for axis in reference.feature_axes(feature_axis, len(shape)))
    params = jbn.Params(*((rng.normal(size=features) + one).astype(np.float32) for one in (1, 0)))
    start = (rng.normal(size=features) * RUNNING + mean).astype(np.float32)
    state = jbn.State(start, rng.uniform(1, 9, features).astype(np.float32), np.full(features, 7, np.float32))
    return params, state, x


def corrected(params, state, x, cotangent=None, *, r_max, d_max, feature_axis=-1, mask=None, epsilon=1e-5):
    """Batch norm with scale r * scale and bias d * scale + bias."""
    options = {"feature_axis": feature_axis, "mask": mask, "epsilon": epsilon}
    batch = reference.batch_norm(x, **options)
    mean, var, scale, bias = (np.asarray(a, np.float64) for a in (state.mean, state.var, *params))
    sd = np.sqrt(var + epsilon)
    r = np.clip(np.sqrt(batch.var + epsilon) / sd, 1 / r_max, r_max)
    d = np.clip((batch.mean - mean) / sd, -d_max, d_max)
    found = reference.batch_norm(x, r * scale, d * scale + bias, cotangent, **options)
    return found._replace(dscale=r * found.dscale + d * found.dbias)
