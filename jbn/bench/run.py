"""Measure the programs of `jbn bench --apart`: one record for each case and mode."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jbn.bench import data, numbers, programs, torch_programs
from jbn.bench.cases import LEAST_PASSES, Case, Chain, all_cases, quick_cases
from jbn.bench.counts import Counts, count
from jbn.bench.data import Batch
from jbn.bench.layers import LAYERS, Layer
from jbn.bench.programs import Program
from jbn.bench.timing import measure

TORCH = {"torch-last": True, "torch-first": False}
"""Whether PyTorch stores channels last in memory."""
PEERS = (*LAYERS, *TORCH)
FAR = Case("far", (8192, 64))
FAR_MEAN = 1e4


__all__ = ["PEERS", "Record", "all_cases", "far_errors", "importable", "quick_cases", "run", "work"]


class Record(NamedTuple):
    """The results of one case and mode. The keys of dictionaries are peers."""

    case: str
    mode: str
    seconds: dict[str, list[float]]
    """one time per round"""
    counts: dict[str, Counts]
    residual_bytes: dict[str, int]
    errors: dict[str, float]
    allowed: float | None = None
    size: int | None = None
    """size of x in bytes"""
    least_passes: int | None = None
    copy_seconds: list[float] | None = None
    first: dict[str, list[tuple[float, ...]]] | None = None
    """seconds to trace, to lower and to compile a training step, for each repetition"""


def importable(names: Sequence[str]) -> tuple[dict[str, Layer | None], dict[str, str]]:
    """Layers of the installed peers (None for PyTorch), and for each other peer the error of its import."""
    found: dict[str, Layer | None] = {}
    missing = {}
    for name in names:
        try:
            if name in TORCH:
                torch_programs.description()
            found[name] = LAYERS[name]() if name in LAYERS else None
        except ImportError as error:
            missing[name] = str(error)
    return found, missing


def work(cases: Sequence[Any]) -> int:
    """The number of calls of `tick` in `run`."""
    return sum(len(case.modes) if isinstance(case, Case) else 1 for case in cases)


def run(
    cases: Sequence[Any],
    layers: Mapping[str, Layer | None],
    rounds: int,
    tick: Callable[[str], Any] = lambda what: None,
) -> Iterator[Record]:
    """Yield the records one by one; call `tick` with the label of each finished measurement."""
    for case in cases:
        if isinstance(case, Case):
            found = _run_case(case, layers, rounds)
        else:
            found = iter([_record(case.label, "forward+backward", _chains(case, layers), rounds, case.size)])
        for record in found:
            tick(f"{record.case}, {record.mode}")
            yield record


def far_errors(layers: Mapping[str, Layer | None]) -> tuple[dict[str, float], float]:
    """Errors in float32 for a mean of FAR_MEAN standard deviations, and the error that rounding explains there."""
    batch = data.batch(FAR, np.random.default_rng(0), FAR_MEAN)
    return _errors(FAR, layers, batch), numbers.allowed("float32", FAR_MEAN)


def _run_case(case: Case, layers: Mapping[str, Layer | None], rounds: int) -> Iterator[Record]:
    layers = {name: layer for name, layer in layers.items() if not case.masked or (layer and layer.takes_mask)}
    given = data.batches(case)
    errors = _errors(case, layers, given[0])
    orders = {layer.channels_first for layer in layers.values() if layer}
    placed = {first: data.on_device(given, first) for first in orders}
    for mode in case.modes:
        found = {
            name: programs.layer_program(layer, case, mode, placed[layer.channels_first])
            if layer
            else torch_programs.layer_program(case, mode, given, TORCH[name])
            for name, layer in layers.items()
        }
        found["copy"] = programs.copy_program(case)
        record = _record(case.label, mode, found, rounds, case.size)
        copy_seconds = record.seconds.pop("copy")
        record.counts.pop("copy")
        yield record._replace(
            errors=errors,
            allowed=numbers.allowed(case.dtype),
            least_passes=LEAST_PASSES[mode],
            copy_seconds=copy_seconds,
        )


def _record(label: str, mode: str, found: Mapping[str, Program], rounds: int, size: int) -> Record:
    seconds = measure(found, rounds)
    compiled = {name: program.compiled for name, program in found.items() if program.compiled is not None}
    counts = {name: count(program, size) for name, program in compiled.items()}
    residuals = {name: program.residual_bytes for name, program in found.items() if program.residual_bytes is not None}
    return Record(label, mode, seconds, counts, residuals, {}, size=size)


def _chains(chain: Chain, layers: Mapping[str, Layer | None]) -> dict[str, Program]:
    found = {name: programs.chain_program(layer, chain) for name, layer in layers.items() if layer}
    if "torch-last" in layers and not chain.scan:
        found["torch-last"] = torch_programs.chain_program(chain)
    return found


def _errors(case: Case, layers: Mapping[str, Layer | None], batch: Batch) -> dict[str, float]:
    """The error of each peer in training mode, relative to the formula in float64."""
    right = numbers.expected(batch, case.relu)
    return {name: numbers.error(_result(name, layer, case, batch), right, batch.mask) for name, layer in layers.items()}


def _result(name: str, layer: Layer | None, case: Case, batch: Batch) -> list[np.ndarray]:
    """Compute output and gradients, with channels last."""
    mode = "forward+backward"
    if layer is None:
        program = torch_programs.layer_program(case, mode, [batch], TORCH[name])
        out, _, gradients = torch_programs.in_numpy(program.run(program.prepare(0)))
        return [out, *gradients]
    program = programs.layer_program(layer, case, mode, data.on_device([batch], layer.channels_first))
    out, _, gradients = program.run(program.prepare(0))
    arrays = [np.asarray(array, np.float64) for array in jax.device_get([out, *gradients])]
    return [np.moveaxis(array, 1, -1) if layer.channels_first and array.ndim > 1 else array for array in arrays]
