"""The picture of a run: loss, accuracies, and the moving average beside what it should follow."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from jbn.demo.loop import CHANNELS, WATCHED, Result
from jbn.demo.options import Options

FEW = 12


def draw(folder: Path, options: Options, result: Result) -> Path:
    """Loss and accuracies by step above, running mean and variance of some channels below."""
    figure = Figure(figsize=(12, 9), layout="constrained")
    figure.suptitle(f"jbn train: momentum {options.momentum}, {options.steps} steps of {options.batch_size} examples")
    grid = figure.add_gridspec(3, CHANNELS)
    _draw_loss(figure.add_subplot(grid[0, 0]), result)
    _draw_accuracies(figure.add_subplot(grid[0, 1:]), result)
    for channel in range(CHANNELS):
        for row, statistic in enumerate(("mean", "var"), start=1):
            axes = figure.add_subplot(grid[row, channel])
            _draw_statistic(axes, result, statistic, channel)
            axes.set_title(f"{'mean' if statistic == 'mean' else 'variance'} of {WATCHED}, channel {channel}")
    path = folder / "picture.png"
    figure.savefig(path, dpi=110)
    return path


def _style(result: Result) -> str:
    """Lines, with a mark at each look while they are few enough to be told apart."""
    return "o-" if len(result.record.looks) <= FEW else "-"


def _draw_loss(axes: Any, result: Result) -> None:
    axes.plot(range(1, len(result.record.loss) + 1), result.record.loss, _style(result), color="C0")
    axes.set(title="training loss", xlabel="step", ylabel="cross-entropy (nats)", yscale="log")


def _draw_accuracies(axes: Any, result: Result) -> None:
    steps = [look.step for look in result.record.looks]
    axes.plot(
        range(1, len(result.record.train_accuracy) + 1),
        result.record.train_accuracy,
        _style(result),
        color="C0",
        alpha=0.35,
        label="training batch, its own statistics",
    )
    for field, color, label in (("batch", "C2", "its own statistics"), ("running", "C3", "running statistics")):
        accuracies = [getattr(look, f"held_out_{field}") for look in result.record.looks]
        axes.plot(steps, accuracies, _style(result), color=color, label=f"held out, {label}")
    axes.set(title="accuracy", xlabel="step", ylabel="share correct", ylim=(-0.02, 1.02))
    axes.legend(loc="center right")


def _draw_statistic(axes: Any, result: Result, statistic: str, channel: int) -> None:
    steps = [look.step for look in result.record.looks]
    batch = [getattr(look.batch, statistic)[channel] for look in result.record.looks]
    running = [getattr(look.running, statistic)[channel] for look in result.record.looks]
    axes.plot(steps, batch, ".", color="0.6", label="batches")
    axes.plot(steps, running, _style(result), color="C3", label="running")
    axes.axhline(
        getattr(result.population, statistic)[channel], color="C2", linestyle="--", label="training set, final weights"
    )
    axes.set(xlabel="step")
    if channel == 0 and statistic == "mean":
        axes.legend()
