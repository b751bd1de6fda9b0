"""Single steps of `jbn train`, each from a given state, in one process of several.

python -m support.steps_of_processes COORDINATOR PROCESSES PROCESS FOLDER DTYPE
"""

import itertools
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import optax
from flax import serialization
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jbn.demo import data, model, processes
from jbn.demo.options import Options
from jbn.demo.step import AXIS, Run, make_step
from support import small_network

STEPS, BATCH, SEED = 2, 64, 0
"""Only from the second step on does the optimizer have momentum, and do statistics differ from the initial ones."""
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def cast(tree, dtype):
    """Floats in another dtype, integers as they are."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if np.issubdtype(leaf.dtype, np.floating) else leaf, tree)


def fresh_run(dtype, initialized=model.init):
    params, state = cast(initialized(jax.random.key(SEED)), dtype)
    return Run(params, state, OPTIMIZER.init(params))


def make_stepper(devices, dtype):
    """A function of the number of a step and the run before it; each process loads its part of the batch."""
    mesh = Mesh(np.array(devices), (AXIS,))
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))
    share = (jax.process_index(), jax.process_count())
    examples = cast(data.load().train, dtype)
    chex.clear_trace_counter()
    step = make_step(mesh, OPTIMIZER, momentum=0.9)

    def after_step(number, run):
        own = next(itertools.islice(data.batches(examples, BATCH, SEED, share), number, None))
        batch = jax.tree.map(lambda array: jax.make_array_from_process_local_data(split, array), own)
        run, _ = step(jax.device_put(jax.tree.map(np.asarray, run), whole), batch)
        return processes.own_copy(run)

    return after_step


def main():
    coordinator, count, process, folder, dtype = sys.argv[1:]
    jax.config.update("jax_enable_x64", dtype == "float64")
    model.STAGES = small_network.STAGES
    processes.join(Options(coordinator=coordinator, num_processes=int(count), process_id=int(process)))
    # Only the structure is needed; computing the numbers would take longer than the steps.
    after_step, like = make_stepper(jax.devices(), dtype), jax.eval_shape(lambda: fresh_run(dtype))
    for number in range(STEPS):
        run = serialization.from_bytes(like, (Path(folder) / f"before_{number}").read_bytes())
        run = after_step(number, run)
        if processes.writes():
            (Path(folder) / f"after_{number}").write_bytes(serialization.to_bytes(run))


if __name__ == "__main__":
    main()
