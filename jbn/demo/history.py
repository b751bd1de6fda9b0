"""The record of a run: metrics of every step and the looks, written as JSON with options and versions."""

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
    """Mean and variance of the watched channels, one list each."""

    mean: list[float]
    var: list[float]


class Look(NamedTuple):
    """Metrics and statistics of the network after one step, with the batch of that step."""

    step: int
    loss: float
    train_accuracy: float
    held_out_running: float
    held_out_batch: float
    batch: Watched
    running: Watched


class Record(NamedTuple):
    """Loss and accuracy of every step so far, and the looks at selected steps."""

    loss: list[float]
    train_accuracy: list[float]
    looks: list[Look]


def from_lists(values: Sequence[Any]) -> Record:
    """Restore a record from JSON, which turns tuples into lists."""
    loss, train_accuracy, looks = values
    looks = [Look(*numbers, batch=Watched(*batch), running=Watched(*running)) for *numbers, batch, running in looks]
    return Record(loss, train_accuracy, looks)


def write(folder: Path, options: Options, record: Record, population: Watched, calibrated: float | None) -> Path:
    """Write history.json: every step and look, with seed, options, versions and devices."""
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
    """Replace NaN and infinity by None, because JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
