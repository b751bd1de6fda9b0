"""The ratios as a picture."""

from collections.abc import Sequence
from typing import Any

from jbn.bench.report import rival
from jbn.bench.run import Record


def draw(records: Sequence[Record], peers: Sequence[str], title: str) -> Any:
    """A figure: a line for each measurement, a dot for each peer at its time over jbn's, with the quartiles."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.28 * len(records)), layout="constrained")
    ax = figure.subplots()
    for place, peer in enumerate(peers):
        found = [(line, ratio) for line, record in enumerate(records) if (ratio := rival(record, peer))]
        if found:
            lines, spreads = zip(*found, strict=True)
            medians = [ratio.median for ratio in spreads]
            bars = [[r.median - r.low for r in spreads], [r.high - r.median for r in spreads]]
            ax.errorbar(medians, lines, xerr=bars, fmt="o", color=f"C{place}", label=peer, markersize=5, elinewidth=1)
    ax.axvline(1, color="0.3", linewidth=1)
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low <= tick <= high]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_xticks([], minor=True)
    ax.set_yticks(range(len(records)), [f"{record.case}, {record.mode}" for record in records])
    ax.set_ylim(len(records) - 0.5, -0.5)
    ax.grid(axis="x", color="0.9")
    explained = "time over jbn's, with quartiles: to the right of 1, jbn is faster\nwrong numbers are left out"
    ax.set(xlabel=explained, title=title)
    figure.legend(loc="outside lower center", ncols=5)
    return figure
