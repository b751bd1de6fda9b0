"""The report of training steps: each norm compared with that of Flax Linen."""

from collections.abc import Collection, Sequence

from jbn.bench.counts import Counts
from jbn.bench.report import geometric_mean, rival
from jbn.bench.run import Record
from jbn.bench.timing import spread
from jbn.diagnostics import Table

BASE = "linen"
"""The times of the others are divided by those of this one."""
LEGEND = """A training step is loss, gradients, statistics and optimizer in one program.
trace, compile: shortest time to trace and lower the first step, and to compile it.
time, quartiles: median and quartiles of a later step; the programs run in turn.
of linen: time divided by Flax Linen's in the same run; below 1 is faster. ±: half the distance between the quartiles.
moved: bytes that the kernels of the compiled program read and write. temporary: memory beyond inputs and outputs.
jbn: in place of Flax's norm. jbn-inside: with relu and shortcut inside the norm. torch-last: eager, channels last.
one norm: value and gradients outside jit. -: not measured."""
COLUMNS = (
    *("case", "norm", "trace s", "compile s", "of linen", "time ms", "quartiles", "of linen"),
    *("moved MiB", "kernels", "temporary MiB"),
)


def lines(records: Sequence[Record], layers: Collection[str]) -> list[str]:
    """The table, its legend and the summary."""
    found = table(records)
    return [found.text(len(found.rows)), "", LEGEND, "", *summary(records)]


def table(records: Sequence[Record]) -> Table:
    """One row for each norm in each network, and for each norm outside jit."""
    return Table(COLUMNS, [_row(record, name) for record in records for name in record.seconds])


def _row(record: Record, name: str) -> tuple[str | None, ...]:
    first, counted = firsts(record).get(name), record.counts.get(name)
    once, ratio, mine = first_ratio(record, name), rival(record, name, BASE), spread(record.seconds[name])
    return (
        *(record.case, name),
        *((None, None) if first is None else (f"{first[0] + first[1]:.2f}", f"{first[2]:.2f}")),
        None if once is None else f"{once:.2f}",
        *(f"{1e3 * mine.median:.3g}", f"{1e3 * mine.low:.3g} to {1e3 * mine.high:.3g}"),
        ratio and f"{ratio.median:.2f} ±{(ratio.high - ratio.low) / 2:.2f}",
        *((None,) * 3 if counted is None else _counted(counted)),
    )


def summary(records: Sequence[Record]) -> list[str]:
    """The geometric mean of the time ratios of each norm to Flax Linen."""
    lines = []
    for name in dict.fromkeys(name for record in records for name in record.seconds):
        first = [ratio for record in records if (ratio := first_ratio(record, name))]
        later = {
            what: [ratio.median for record in records if record.mode == mode and (ratio := rival(record, name, BASE))]
            for what, mode in (("later steps", "training step"), ("eager gradient", "eager gradient"))
        }
        means = {what: geometric_mean(found) for what, found in {"first step": first, **later}.items() if found}
        if means:
            found = ", ".join(f"{what} {mean:.2f}" for what, mean in means.items())
            lines.append(f"{name}: {found} times Flax Linen's time (geometric means)")
    return lines


def firsts(record: Record) -> dict[str, tuple[float, ...]]:
    """The times of the shortest first step of each norm."""
    return {name: min(found, key=sum) for name, found in (record.first or {}).items()}


def first_ratio(record: Record, name: str) -> float | None:
    """Time of the first step divided by Flax Linen's; None if one was not measured, and for Flax Linen itself."""
    found = firsts(record)
    if name == BASE or not {name, BASE} <= found.keys():
        return None
    return sum(found[name]) / sum(found[BASE])


def _counted(found: Counts) -> tuple[str, str, str]:
    moved, temporary = (f"{size / 2**20:.3g}" for size in (found.moved_bytes, found.temporary_bytes))
    return moved, str(found.kernels), temporary
