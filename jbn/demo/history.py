"""What is recorded of a run: every step and look, written as JSON that says how it was made."""

import importlib.metadata
import json
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

import jbn
from jbn.demo.options import Options
from jbn.demo.processes import chosen_devices

PACKAGES = ("jax", "jaxlib", "optax", "numpy", "scikit-learn")


class Watched(NamedTuple):
    """Mean and variance of the watched channels, each a list."""

    mean: list[float]
    var: list[float]


class Look(NamedTuple):
    """What a look at the network after a step finds."""

    step: int
    loss: float
    train_accuracy: float
    held_out_running: float
    held_out_batch: float
    batch: Watched
    running: Watched


class Record(NamedTuple):
    """The loss and accuracy of every step so far, and the looks."""

    loss: list[float]
    train_accuracy: list[float]
    looks: list[Look]


def from_lists(values: Sequence[Any]) -> Record:
    """A record that went through JSON, which knows lists only."""
    loss, train_accuracy, looks = values
    looks = [Look(*numbers, batch=Watched(*batch), running=Watched(*running)) for *numbers, batch, running in looks]
    return Record(loss, train_accuracy, looks)


def write(folder: Path, options: Options, record: Record, population: Watched, calibrated: float | None) -> Path:
    """Every step and look, with seed, options, versions and devices."""
    history: dict[str, Any] = {
        "options": options._asdict(),
        "versions": {
            "jbn": jbn.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "processes": jax.process_count(),
        "device": [device.device_kind for device in chosen_devices(options.devices)],
        "loss": record.loss,
        "train_accuracy": record.train_accuracy,
        "looks": [
            {**look._asdict(), "batch": look.batch._asdict(), "running": look.running._asdict()}
            for look in record.looks
        ],
        "population": population._asdict(),
        "held_out_calibrated": calibrated,
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
