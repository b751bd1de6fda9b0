"""Batch normalization for JAX: a pure function with correct running statistics."""

import importlib
from typing import TYPE_CHECKING, Any

from jbn import convert, momentum, renorm
from jbn._core.batch_norm import batch_norm, normalize
from jbn._core.batch_renorm import batch_renorm
from jbn._core.checkpoint_policy import checkpoint_policy
from jbn._core.moments import Moments, merge, moments
from jbn._core.state import Params, State, init, update
from jbn._fold import fold
from jbn._statistics.calibrate import calibrate
from jbn._statistics.merge_states import merge_states
from jbn._statistics.unset import unset
from jbn._statistics.upgrade import upgrade

if TYPE_CHECKING:
    from jbn import checkpoint, diagnostics, linen, nnx, plot

__version__ = "0.2.0"

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
    "upgrade",
]

_WHEN_TOUCHED = ("checkpoint", "diagnostics", "linen", "nnx", "plot")


def __getattr__(name: str) -> Any:
    """Import modules that need Flax, orbax or matplotlib, or that few users need, at their first use."""
    if name in _WHEN_TOUCHED:
        return importlib.import_module(f"jbn.{name}")
    raise AttributeError(f"module 'jbn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHEN_TOUCHED])
