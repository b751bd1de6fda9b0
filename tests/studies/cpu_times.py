"""Time forward and backward passes of all libraries on this CPU: python tests/studies/cpu_times.py [PROCESSES]

Both passes are compiled separately. Each process measures all single-layer cases of `jbn bench`, five rounds each.
A cell is the time divided by jbn's time: the median over the processes, with the smallest and largest value. Above 1,
jbn is faster. A process takes about five minutes on two cores.
"""

import json
import os
import subprocess
import sys

import numpy as np

from jbn.diagnostics import Table

ROUNDS, BUFFERS = 5, 3


def measured():
    """Measure the seconds of each library in each case and round, forward and backward pass together."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    from jbn.bench import cases, data, programs, run, timing, torch_programs

    layers, _ = run.importable(run.PEERS)
    found = {}
    for case in filter(lambda case: isinstance(case, cases.Case), cases.all_cases(on_cpu=True)):
        names = {name: layer for name, layer in layers.items() if not case.masked or (layer and layer.takes_mask)}
        given = data.batches(case)[:BUFFERS]
        orders = {layer.channels_first for layer in names.values() if layer}
        placed = {first: data.on_device(given, first) for first in orders}
        seconds = []
        for mode in ("forward", "backward"):
            of_mode = {
                name: programs.layer_program(layer, case, mode, placed[layer.channels_first])
                if layer
                else torch_programs.layer_program(case, mode, given, run.TORCH[name])
                for name, layer in names.items()
            }
            seconds.append(timing.measure(of_mode, ROUNDS))
        found[case.label] = {name: np.add(*(of_mode[name] for of_mode in seconds)).tolist() for name in names}
    return found


def summary(processes):
    """One row for each case, and rows with the geometric means for each dtype and for all cases."""
    cases = list(processes[0])
    peers = [name for name in processes[0][cases[0]] if name != "jbn"]
    ratios = {
        (case, peer): [np.median(found[case][peer]) / np.median(found[case]["jbn"]) for found in processes]
        for case in cases
        for peer in peers
        if peer in processes[0][case]
    }
    rows = [(case, *(_cell(ratios.get((case, peer))) for peer in peers)) for case in cases]
    for dtype in ("float32", "bfloat16", ""):
        medians = [[np.median(r) for (case, of), r in ratios.items() if of == peer and dtype in case] for peer in peers]
        means = [f"{np.exp(np.mean(np.log(found))):.2f}, least {min(found):.2f}" for found in medians]
        rows.append((f"geometric mean, {dtype or 'all'}", *means))
    return Table(("case", *peers), rows)


def _cell(ratios):
    return ratios and f"{np.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


if __name__ == "__main__":
    if sys.argv[1:] == ["--one"]:
        print(json.dumps(measured()))
    else:
        number = int(sys.argv[1]) if len(sys.argv) > 1 else 3
        outputs = [
            subprocess.run([sys.executable, __file__, "--one"], stdout=subprocess.PIPE, check=True).stdout
            for _ in range(number)
        ]
        print(summary([json.loads(output.splitlines()[-1]) for output in outputs]).text(rows=100))
