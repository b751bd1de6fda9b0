"""Draw repair.png: one trained network with running statistics of several momenta, before and after jbn.calibrate.

    python docs/pictures/repair.py

The four runs differ in the running statistics alone, since training does not read them. Each takes less than a minute.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from jbn.plot import BLUE, VERMILLION

RUNS = {
    "0.999": "momentum 0.999",
    "0.99": "momentum 0.99, the default\nof jbn, Flax and Keras",
    "0.9": "momentum 0.9",
    "warmup:0.99": "momentum warmup(0.99)",
}


def accuracies(momentum: str, folder: Path) -> tuple[float, float]:
    """Held-out accuracies in percent after 60 steps: with the running statistics, and calibrated."""
    command = [sys.executable, "-m", "jbn", "train", "--steps", "60", "--momentum", momentum, "--out", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    history = json.loads((folder / "history.json").read_text())
    return 100 * history["looks"][-1]["held_out_running"], 100 * history["held_out_calibrated"]


def draw(found: dict[str, tuple[float, float]], path: Path) -> None:
    """A row a run, with a point for each accuracy and a line between the two."""
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for row, (running, calibrated) in enumerate(found.values()):
        axes.plot([running, calibrated], [row, row], color="0.7", linewidth=2, zorder=1)
        axes.text(running - 1.5, row, f"{running:.1f}%", ha="right", va="center", color=VERMILLION)
        axes.text(calibrated + 1.5, row, f"{calibrated:.1f}%", ha="left", va="center", color=BLUE)
    rows = range(len(found))
    running, calibrated = zip(*found.values(), strict=True)
    axes.scatter(running, rows, color=VERMILLION, label="running statistics", marker="o", zorder=2, s=60)
    axes.scatter(calibrated, rows, color=BLUE, label="after jbn.calibrate", marker="D", zorder=2, s=60)
    axes.set_yticks(rows, found)
    axes.set(
        xlim=(0, 110), xticks=range(0, 101, 20), ylim=(len(found) - 0.5, -0.5), xlabel="accuracy on held-out digits (%)"
    )
    title = "One trained network, four sets of running statistics: jbn.calibrate repairs them all"
    figure.suptitle(title, x=0.01, ha="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 0), frameon=False)
    figure.savefig(path, dpi=150)


with tempfile.TemporaryDirectory() as folder:
    found = {name: accuracies(momentum, Path(folder, str(at))) for at, (momentum, name) in enumerate(RUNS.items())}
draw(found, Path(__file__).with_suffix(".png"))
