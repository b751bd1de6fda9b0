"""What the records of whole steps say: each norm beside Flax Linen's."""

from collections.abc import Collection, Sequence

from jbn.bench.counts import Counts
from jbn.bench.report import geometric_mean, rival
from jbn.bench.run import Record
from jbn.bench.timing import spread
from jbn.diagnostics import Table

BASE = "linen"
"""Over whose times the others stand."""
LEGEND = """trace, compile: least time to trace and lower, and to compile, a whole training step: loss, gradients,
statistics and optimizer in one program. time: median of a step, in turn with the others, and its quartiles. of linen:
over Flax Linen's in the same run, below 1 is faster; ± is half the distance of the quartiles. moved, kernels,
temporary: what the compiled program reads and writes at the boundaries of its kernels, how many these are, and the
memory that it needs beside inputs and outputs. jbn: in Flax's place. jbn-inside: with relu and the shortcut given to
it. one norm: value and gradients outside of jit. torch-last: PyTorch, eager, with channels last."""
COLUMNS = (
    *("case", "norm", "trace s", "compile s", "of linen", "time ms", "quartiles", "of linen"),
    *("moved MiB", "kernels", "temporary MiB"),
)


def lines(records: Sequence[Record], layers: Collection[str]) -> list[str]:
    """The table, its words and the summary."""
    found = table(records)
    return [found.text(len(found.rows)), "", LEGEND, "", *summary(records)]


def table(records: Sequence[Record]) -> Table:
    """A line for each norm in each network, and outside of jit."""
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
    """What each norm costs over Flax's, on average."""
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
            lines.append(f"{name}: {found} of Flax Linen's, geometric means")
    return lines


def firsts(record: Record) -> dict[str, tuple[float, ...]]:
    """Of each norm, the first step that took least."""
    return {name: min(found, key=sum) for name, found in (record.first or {}).items()}


def first_ratio(record: Record, name: str) -> float | None:
    """Its first step over Flax Linen's; None where either was not taken, and for itself."""
    found = firsts(record)
    if name == BASE or not {name, BASE} <= found.keys():
        return None
    return sum(found[name]) / sum(found[BASE])


def _counted(found: Counts) -> tuple[str, str, str]:
    moved, temporary = (f"{size / 2**20:.3g}" for size in (found.moved_bytes, found.temporary_bytes))
    return moved, str(found.kernels), temporary
