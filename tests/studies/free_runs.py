"""Draw how ResNet-18s with different norms diverge from the same initial values: Flax, Flax without fast variance, jbn.

PYTHONPATH=tests python tests/studies/free_runs.py --out free-runs.png --steps 20
"""

import argparse
import functools
from typing import NamedTuple

import numpy as np
from flax import linen
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from support import networks as resnet

import jbn

WIDTH = 8
BATCH_SIZE = 16
NORMS = {
    "Flax": linen.BatchNorm,
    "Flax, use_fast_variance=False": functools.partial(linen.BatchNorm, use_fast_variance=False),
    "jbn": jbn.linen.BatchNorm,
}


class Run(NamedTuple):
    """The loss of each step, and the running variances of the last norm."""

    loss: np.ndarray
    var: np.ndarray


def run_freely(network, variables, steps, order):
    """Train from the given variables; each step starts from the results of the step before."""
    params, batch_stats = variables
    last_block = max(name for name in batch_stats if name.startswith("LinenBlock"))
    loss, var = [], []
    for images, labels in resnet.batches([BATCH_SIZE], steps, seed=order):
        step = resnet.differentiated(network, params, batch_stats, images, labels)
        params, batch_stats = resnet.descended(params, step.gradients), step.batch_stats
        loss.append(step.loss)
        var.append(batch_stats[last_block]["BatchNorm_1"]["var"])
    return Run(np.array(loss, np.float64), np.array(var, np.float64))


def differences(run, first):
    """The relative differences of loss and variance to those of the first run."""
    loss = np.abs(run.loss - first.loss) / first.loss
    var = np.linalg.norm(run.var - first.var, axis=1) / np.linalg.norm(first.var, axis=1)
    return loss, var


def draw(path, differences_by_norm):
    """Draw the differences by step, a thin line for each order of batches and a thick line for the median."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    figure.suptitle("Training amplifies rounding: jbn differs from Flax as the two variance formulas of Flax do")
    titles = ("training loss", "running variance of the last norm")
    for axes, title in zip(figure.subplots(1, 2, sharey=True), titles, strict=True):
        axes.set(title=title, xlabel="step")
        axes.set_yscale("log", nonpositive="mask")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    for (name, orders), style in zip(differences_by_norm.items(), ("C0s--", "C1o-"), strict=True):
        for axes, lines in zip(figure.axes, zip(*orders, strict=True), strict=True):
            steps = np.arange(1, len(lines[0]) + 1)
            axes.plot(steps, np.transpose(lines), color=style[:2], linewidth=0.7, alpha=0.35)
            axes.plot(steps, np.median(lines, axis=0), style, markersize=4, linewidth=2, label=name)
    figure.axes[0].set_ylabel("relative difference to Flax's default, float32")
    title = f"thin lines: {len(orders)} orders of the batches; thick line: median"
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, title=title)
    figure.savefig(path, dpi=150)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="free-runs.png", help="file of the picture")
    parser.add_argument("--steps", type=int, default=20, help="number of training steps")
    parser.add_argument("--orders", type=int, default=10, help="number of orders of the batches")
    parser.add_argument("--stages", type=int, default=resnet.STAGES, help="number of stages of the network")
    options = parser.parse_args(arguments)
    networks = {
        name: resnet.linen_network(functools.partial(norm, momentum=0.9), width=WIDTH, stages=options.stages)
        for name, norm in NORMS.items()
    }
    first, *others = networks
    variables = resnet.initialized(networks[first])
    runs = {
        name: [run_freely(network, variables, options.steps, order) for order in range(options.orders)]
        for name, network in networks.items()
    }
    draw(options.out, {name: list(map(differences, runs[name], runs[first])) for name in others})


if __name__ == "__main__":
    main()
