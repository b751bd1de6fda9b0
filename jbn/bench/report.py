"""The report of `jbn bench --apart`, as text and as plain data."""

import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jbn.bench.layers import Layer
from jbn.bench.run import FAR_MEAN, Record, far_errors
from jbn.bench.timing import Spread, ratios, spread
from jbn.diagnostics import Table

BASE = "jbn"
"""The times of the others are divided by those of this one."""
PACKAGES = ("jbn", "jax", "jaxlib", "flax", "dm-haiku", "equinox", "keras", "torch")

LEGEND = """ms: median time of jbn in milliseconds.
memory: jbn's share of this machine's copy bandwidth, counting the least bytes to move; with caches it can exceed 100%.
Other columns: time divided by jbn's time in the same round; above 1, jbn is faster.
±: half the distance between the quartiles of this run; different runs differ by more.
!: the results are wrong by more than rounding explains, so the time does not count. -: not available.
conv-relu: with relu. unrolled, scanned: eight layers of matmul, norm and relu.
linen-2pass: Flax with use_fast_variance=False. torch-last, torch-first: PyTorch, channels last or first in memory."""
COUNTED = """passes: reads and writes of arrays as large as x; after the slash, the least number that any program needs.
kernels: number of kernels of the program; most of them process only a few vectors.
temporary: memory in addition to inputs and outputs, in arrays as large as x.
kept: memory that the forward pass keeps for the backward pass, in arrays as large as x."""


def machine(threads_of_torch: str | None) -> dict[str, Any]:
    """Versions, device, cores and threads of this machine."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "versions": versions,
        "device": _device(),
        "cores": cores,
        "python": platform.python_version(),
        "torch": threads_of_torch,
    }


def _device() -> str:
    """The name of the first device; for a CPU its model, because JAX reports only "cpu"."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{device.device_kind} ({device.platform})"
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def lines(records: Sequence[Record], layers: Mapping[str, Layer | None]) -> list[str]:
    """The tables, their legends and the summary."""
    peers = [name for name in layers if name != "jbn"]
    found, beside = times(records, peers), counts(records, [name for name in ("jbn", "linen") if name in layers])
    tables = [found.text(len(found.rows)), LEGEND, beside.text(len(beside.rows)), COUNTED]
    return [*(line for table in tables for line in (table, "")), *summary(records, peers, *far_errors(layers))]


def times(records: Sequence[Record], peers: Sequence[str]) -> Table:
    """One row for each case and mode."""
    rows = []
    for record in records:
        ours = spread(record.seconds["jbn"])
        cells = [_cell(record, peer) for peer in peers]
        rows.append((record.case, record.mode, f"{1e3 * ours.median:.3g}", _share(record), *cells))
    return Table(("case", "what", "ms", "memory", *peers), rows)


def counts(records: Sequence[Record], peers: Sequence[str]) -> Table:
    """One row for each case, mode and peer: the counts of the compiled program."""
    rows = []
    for record in records:
        for peer in peers:
            if record.size and (counted := record.counts.get(peer)):
                # Chains have no least number: the body of a loop counts once, and weights count as large arrays.
                least = f"{counted.passes:.1f} / {record.least_passes}" if record.least_passes else None
                kept = record.residual_bytes.get(peer)
                temporary = f"{counted.temporary_bytes / record.size:.2f}"
                rows.append(
                    (record.case, record.mode, peer, least, str(counted.kernels), temporary, _in_arrays(kept, record))
                )
    return Table(("case", "what", "of", "passes", "kernels", "temporary", "kept"), rows)


def summary(records: Sequence[Record], peers: Sequence[str], far: Mapping[str, float], far_allowed: float) -> list[str]:
    """The mean ratio of each peer, the cases in which a peer is faster, and the peers with wrong results."""
    lines = []
    for peer in peers:
        of_peer = [ratio for record in records if (ratio := rival(record, peer))]
        if of_peer:
            mean = geometric_mean([ratio.median for ratio in of_peer])
            lines.append(
                f"{peer}: {mean:.2f} times jbn's time (geometric mean of the {len(of_peer)} measurements without !)"
            )
    for record in records:
        faster = [f"{peer} ({r.median:.2f})" for peer in peers if (r := rival(record, peer)) and r.high < 1]
        if faster:
            lines.append(f"faster than jbn at {record.case}, {record.mode}: {', '.join(faster)}")
    wrong = [f"{peer} (error {error:.1g})" for peer, error in far.items() if error > far_allowed]
    lines.append(
        f"float32 data with mean {FAR_MEAN:g} and standard deviation 1 (rounding explains a relative error of "
        f"{far_allowed:.1g}): " + (f"wrong results from {', '.join(wrong)}" if wrong else "all results are correct")
    )
    return lines


def rival(record: Record, peer: str, base: str = "jbn") -> Spread | None:
    """Time of the peer divided by that of the base. None if one of them did not run, or if the results are wrong."""
    if not {peer, base} <= record.seconds.keys() or peer == base or _is_wrong(record, peer):
        return None
    return ratios(record.seconds[peer], record.seconds[base])


def geometric_mean(found: Sequence[float]) -> float:
    """The geometric mean of ratios."""
    return float(np.exp(np.mean(np.log(found))))


def data(records: Sequence[Record], base: str = "jbn") -> list[dict[str, Any]]:
    """The records as plain values, with every sample."""
    return [
        {
            **record._asdict(),
            "counts": {peer: counted._asdict() for peer, counted in record.counts.items()},
            # JSON has no infinity.
            "errors": {peer: error if math.isfinite(error) else None for peer, error in record.errors.items()},
            "ratios": {
                peer: ratios(seconds, record.seconds[base])._asdict()
                for peer, seconds in record.seconds.items()
                if base in record.seconds
            },
        }
        for record in records
    ]


def _cell(record: Record, peer: str) -> str | None:
    if peer not in record.seconds:
        return None
    ratio = ratios(record.seconds[peer], record.seconds["jbn"])
    mark = "!" if _is_wrong(record, peer) else ""
    return f"{ratio.median:.2f} ±{(ratio.high - ratio.low) / 2:.2f}{mark}"


def _is_wrong(record: Record, peer: str) -> bool:
    return record.allowed is not None and record.errors.get(peer, 0.0) > record.allowed


def _share(record: Record) -> str | None:
    """The least bytes to move, divided by the bytes that a copy moves in the same time."""
    if record.copy_seconds is None or record.least_passes is None:
        return None
    faster = [copy / ours for copy, ours in zip(record.copy_seconds, record.seconds["jbn"], strict=True)]
    return f"{spread(faster).median * record.least_passes / 2:.0%}"


def _in_arrays(found: int | None, record: Record) -> str | None:
    return None if found is None or record.size is None else f"{found / record.size:.2f}"
