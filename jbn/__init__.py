"""Batch normalization for JAX: a pure function whose running statistics are right."""

import importlib
from typing import TYPE_CHECKING, Any

from jbn import convert, momentum, renorm
from jbn._batch_norm import batch_norm
from jbn._batch_renorm import batch_renorm
from jbn._calibrate import calibrate
from jbn._checkpoint_policy import checkpoint_policy
from jbn._fold import fold
from jbn._merge_states import merge_states
from jbn._moments import Moments, merge, moments
from jbn._normalize import normalize
from jbn._state import Params, State, init, unset, update

if TYPE_CHECKING:
    from jbn import checkpoint, diagnostics, linen, nnx, plot

__version__ = "0.1.0"

__all__ = [
    "Moments",
    "Params",
    "State",
    "__version__",
    "batch_norm",
    "batch_renorm",
    "calibrate",
    "checkpoint",
    "checkpoint_policy",
    "convert",
    "diagnostics",
    "fold",
    "init",
    "linen",
    "merge",
    "merge_states",
    "moments",
    "momentum",
    "nnx",
    "normalize",
    "plot",
    "renorm",
    "unset",
    "update",
]

_WHEN_TOUCHED = ("checkpoint", "diagnostics", "linen", "nnx", "plot")


def __getattr__(name: str) -> Any:
    """Modules that need Flax, orbax or matplotlib, and those that few need, load when they are first touched."""
    if name in _WHEN_TOUCHED:
        return importlib.import_module(f"jbn.{name}")
    raise AttributeError(f"module 'jbn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHEN_TOUCHED])
