"""What a run leaves behind: a history that says how it was made, and a checkpoint."""

import importlib.metadata
import json
import math
import platform
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint

import jbn
from jbn.demo.loop import Result
from jbn.demo.options import Options

PACKAGES = ("jax", "jaxlib", "optax", "numpy", "scikit-learn")


def write_history(folder: Path, options: Options, result: Result) -> Path:
    """Every step and look as JSON, with seed, options, versions and device."""
    history: dict[str, Any] = {
        "options": options._asdict(),
        "versions": {
            "jbn": jbn.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "device": [device.device_kind for device in jax.local_devices()[: options.devices]],
        "loss": result.loss,
        "train_accuracy": result.train_accuracy,
        "looks": [
            {**look._asdict(), "batch": look.batch._asdict(), "running": look.running._asdict()}
            for look in result.looks
        ],
        "population": result.population._asdict(),
    }
    path = folder / "history.json"
    path.write_text(json.dumps(_finite_or_null(history), indent=1, allow_nan=False) + "\n")
    return path


def _finite_or_null(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_checkpoint(folder: Path, result: Result) -> Path:
    """Parameters, running statistics and the optimizer's memory, by orbax; one from an earlier run is replaced."""
    path = folder.resolve() / "checkpoint"
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, result.run._asdict(), force=True)
    return path
