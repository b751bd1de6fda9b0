"""Batch normalization for JAX: a pure function whose running statistics are right."""

from jbn import momentum
from jbn._batch_norm import batch_norm, normalize
from jbn._moments import Moments, merge, moments
from jbn._state import Params, State, init, unset, update

__version__ = "0.1.0.dev0"

__all__ = [
    "Moments",
    "Params",
    "State",
    "__version__",
    "batch_norm",
    "init",
    "merge",
    "moments",
    "momentum",
    "normalize",
    "unset",
    "update",
]
