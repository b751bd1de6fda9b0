"""The picture of a run: loss, accuracies, and running statistics with the batch statistics that they average."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jbn import plot
from jbn.demo.loop import CHANNELS, WATCHED, Result
from jbn.demo.options import Options

FEW = 12
BLUE, VERMILLION, *_, SKY_BLUE, _ = plot.COLORS


def draw(folder: Path, options: Options, result: Result) -> Path:
    """Draw loss and accuracies by step, running mean and variance of some channels, and the error of all channels."""
    last = result.record.looks[-1]
    figure = Figure(figsize=(12, 12), layout="constrained")
    figure.suptitle(
        f"Held-out accuracy: {last.held_out_running:.1%} with running statistics, {last.held_out_batch:.1%} with batch "
        f"statistics\njbn train, momentum {options.momentum}, {options.steps} steps of {options.batch_size} examples"
    )
    grid = figure.add_gridspec(4, CHANNELS)
    _draw_loss(figure.add_subplot(grid[0, 0]), result)
    _draw_accuracies(figure.add_subplot(grid[0, 1:]), result)
    for channel in range(CHANNELS):
        for row, statistic in enumerate(("mean", "var"), start=1):
            _draw_statistic(figure.add_subplot(grid[row, channel]), result, statistic, channel)
    _draw_layers(figure.add_subplot(grid[3, :]), result)
    path = folder / "picture.png"
    figure.savefig(path, dpi=150)
    return path


def _style(result: Result) -> str:
    """The line style: with a marker at each look if there are few looks."""
    return "o-" if len(result.record.looks) <= FEW else "-"


def _draw_loss(axes: Any, result: Result) -> None:
    axes.plot(range(1, len(result.record.loss) + 1), result.record.loss, _style(result), color=BLUE)
    axes.set(title="training loss", xlabel="step", ylabel="cross-entropy (nats)", yscale="log")


def _draw_accuracies(axes: Any, result: Result) -> None:
    steps = [look.step for look in result.record.looks]
    axes.plot(
        range(1, len(result.record.train_accuracy) + 1),
        result.record.train_accuracy,
        _style(result),
        color=SKY_BLUE,
        label="training batch, batch statistics",
    )
    for field, color, label in (("batch", BLUE, "batch statistics"), ("running", VERMILLION, "running statistics")):
        accuracies = [getattr(look, f"held_out_{field}") for look in result.record.looks]
        axes.plot(steps, accuracies, _style(result), color=color, label=f"held out, {label}")
    axes.set(
        title="accuracy of training batches and of the held-out set",
        xlabel="step",
        ylabel="share of correct predictions",
        ylim=(-0.02, 1.02),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="center right")


def _draw_statistic(axes: Any, result: Result, statistic: str, channel: int) -> None:
    looks = result.record.looks
    batch, running = (
        [getattr(getattr(look, field), statistic)[channel] for look in looks] for field in ("batch", "running")
    )
    population = getattr(result.population, statistic)[channel]
    name = "mean" if statistic == "mean" else "variance"
    plot.moving_average([look.step for look in looks], batch, running, population, statistic=name, ax=axes)
    axes.set_title(f"{name} of channel {channel} of {WATCHED}")


def _draw_layers(axes: Any, result: Result) -> None:
    if result.calibrated is None:
        axes.set_title("no calibrated statistics, because the network diverged")
        return
    plot.running_against_population(result.run.state, result.calibrated, ax=axes)
    axes.set_title("error of the running statistics of each channel, against calibrated statistics")
