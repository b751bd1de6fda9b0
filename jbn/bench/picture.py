"""Pictures of the time ratios."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from jbn.bench.report import geometric_mean, rival
from jbn.bench.run import Record
from jbn.bench.step_report import first_ratio, summary
from jbn.bench.timing import Spread

MARKERS = "osD^vPX"
"""A marker for each color of `jbn.plot`."""
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
WIDTH = 90
"""Characters per line of a title."""
FINE_TICKS = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.4, 1.6, 2)


def draw(records: Sequence[Record], peers: Sequence[str], title: str) -> Any:
    """Draw one line per measurement, with a dot at the time ratio of each peer to jbn, and its quartiles."""
    figure, (ax,) = _figure(records, 1)
    found = [{peer: ratio for peer in peers if (ratio := rival(record, peer))} for record in records]
    _dots(ax, found, peers)
    explained = "time / jbn's time (ratio; bars: quartiles)\nright of 1: jbn is faster; wrong results are not drawn"
    ratios = {peer: [line[peer].median for line in found if peer in line] for peer in peers}
    means = ", ".join(f"{peer} {geometric_mean(ratio):.2f}" for peer, ratio in ratios.items() if ratio)
    ax.set(xlabel=explained)
    figure.suptitle(_title(f"Time / jbn's time, geometric means: {means}", title))
    figure.legend(loc="outside lower center", ncols=5)
    return figure


def draw_steps(records: Sequence[Record], title: str) -> Any:
    """Draw one line per network, with a dot at the time ratio of each norm to Flax Linen: later and first steps."""
    figure, (later, first) = _figure(records, 2)
    names = list(dict.fromkeys(name for record in records for name in record.seconds if name != "linen"))
    found = [{name: ratio for name in names if (ratio := rival(record, name, "linen"))} for record in records]
    _dots(later, found, names)
    once = [{name: ratio for name in names if (ratio := first_ratio(record, name))} for record in records]
    _dots(first, [{name: Spread(ratio, ratio, ratio) for name, ratio in line.items()} for line in once], names)
    later.set(
        xlabel="median time of a later step / Flax Linen's\n(ratio; bars: quartiles; left of 1: faster than Flax)"
    )
    first.set(xlabel="shortest time to trace, lower and compile /\nFlax Linen's (ratio; left of 1: faster than Flax)")
    figure.suptitle(_title(*[line for line in summary(records) if line.startswith(("jbn:", "jbn-inside:"))], title))
    figure.legend(*later.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def _title(*lines: str) -> str:
    return "\n".join(part for line in lines for part in textwrap.wrap(line, WIDTH))


def _figure(records: Sequence[Record], panels: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 + 4 * panels, 2.6 + 0.28 * len(records)), layout="constrained")
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    axes[0].set_yticks(range(len(records)), [f"{record.case}, {record.mode}" for record in records])
    axes[0].set(ylim=(len(records) - 0.5, -0.5), ylabel="case, mode")
    return figure, axes


def _dots(ax: Any, found: Sequence[Mapping[str, Spread]], names: Sequence[str]) -> None:
    """Draw the ratios of each name with its own color and marker, each name a little lower than the one before it."""
    from jbn.plot import COLORS

    for place, name in enumerate(names):
        if lines := [line for line, ratios in enumerate(found) if name in ratios]:
            spreads = [found[line][name] for line in lines]
            medians = [ratio.median for ratio in spreads]
            bars = [[r.median - r.low for r in spreads], [r.high - r.median for r in spreads]]
            color, marker = COLORS[place % len(COLORS)], MARKERS[place % len(MARKERS)]
            below = [line + 0.5 * (place + 0.5) / len(names) - 0.25 for line in lines]
            ax.errorbar(medians, below, xerr=bars, fmt=marker, color=color, label=name, markersize=5, elinewidth=1)
    ax.axvline(1, color="0.3", linewidth=1)
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ticks = [tick for tick in (TICKS if high > 4 * low else FINE_TICKS) if low <= tick <= high]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_xticks([], minor=True)
    ax.grid(axis="x", color="0.9")
