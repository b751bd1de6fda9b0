"""The picture of a run: loss, accuracies, and the moving average beside what it should follow."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from jbn import plot
from jbn.demo.loop import CHANNELS, WATCHED, Result
from jbn.demo.options import Options

FEW = 12


def draw(folder: Path, options: Options, result: Result) -> Path:
    """Loss and accuracies by step above, running mean and variance of some channels, and all layers below."""
    figure = Figure(figsize=(12, 12), layout="constrained")
    figure.suptitle(f"jbn train: momentum {options.momentum}, {options.steps} steps of {options.batch_size} examples")
    grid = figure.add_gridspec(4, CHANNELS)
    _draw_loss(figure.add_subplot(grid[0, 0]), result)
    _draw_accuracies(figure.add_subplot(grid[0, 1:]), result)
    for channel in range(CHANNELS):
        for row, statistic in enumerate(("mean", "var"), start=1):
            _draw_statistic(figure.add_subplot(grid[row, channel]), result, statistic, channel)
    _draw_layers(figure.add_subplot(grid[3, :]), result)
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
    looks = result.record.looks
    batch, running = (
        [getattr(getattr(look, field), statistic)[channel] for look in looks] for field in ("batch", "running")
    )
    population = getattr(result.population, statistic)[channel]
    name = "mean" if statistic == "mean" else "variance"
    plot.moving_average([look.step for look in looks], batch, running, population, statistic=name, ax=axes)
    axes.set_title(f"{name} of {WATCHED}, channel {channel}")


def _draw_layers(axes: Any, result: Result) -> None:
    if result.calibrated is None:
        axes.set_title("no calibrated statistics: the network diverged")
        return
    plot.running_against_population(result.run.state, result.calibrated, ax=axes)
    axes.set_title("running against calibrated statistics, a dot a channel")
