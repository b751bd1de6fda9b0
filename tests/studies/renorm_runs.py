"""Compare the held-out accuracy of batch norm and batch renorm on digits at small batch sizes.

python tests/studies/renorm_runs.py

Each run trains for two epochs on one device, with the network and optimizer of `jbn train`. The table has mean and
standard deviation of the accuracy over the seeds, with running statistics and with calibrated statistics.
"""

import argparse
import functools
import itertools
import statistics

import chex
import jax
import numpy as np
import optax
from tqdm import tqdm

import jbn
from jbn.demo import data, loop, model
from jbn.demo.step import Run, _metrics, batch_statistics, evaluate


def trained(norm, digits, batch_size, seed, steps):
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-3, steps))

    def loss(params, state, batch):
        logits, new_state = model.apply(params, state, batch.images, True, norm)
        return _metrics(logits, batch.labels).loss, new_state

    @functools.partial(jax.jit, donate_argnums=0)
    @chex.assert_max_traces(n=1)
    def step(run, batch):
        gradients, state = jax.grad(loss, has_aux=True)(run.params, run.state, batch)
        updates, memory = optimizer.update(gradients, run.optimizer, run.params)
        return Run(optax.apply_updates(run.params, updates), state, memory)

    params, state = model.init(jax.random.key(seed))
    run = Run(params, state, optimizer.init(params))
    for batch in itertools.islice(data.batches(digits.train, batch_size, seed), steps):
        run = step(run, batch)
    return run


def accuracies(run, digits):
    images = np.split(digits.train.images, range(loop.CHUNK, len(digits.train.labels), loop.CHUNK))
    calibrated = jbn.calibrate(functools.partial(batch_statistics, run.params), run.state, images)
    return [
        float(evaluate(run.params, state, digits.held_out, train=False).accuracy) for state in (run.state, calibrated)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2, 4, 8])
    options = parser.parse_args()
    digits = data.load()
    rows = []
    for batch_size in options.batch_sizes:
        steps = options.epochs * (len(digits.train.labels) // batch_size)
        # The published bounds open over 40,000 of more than 100,000 steps. Here they open over a share of the steps.
        begin, end = steps // 10, steps // 2
        bounds = {"r_max": jbn.renorm.r_max(begin=begin, end=end), "d_max": jbn.renorm.d_max(begin=begin, end=end)}
        norms = {"batch_norm": jbn.batch_norm, "batch_renorm": functools.partial(jbn.batch_renorm, **bounds)}
        for name, norm in norms.items():
            found = []
            for seed in tqdm(range(options.seeds), desc=f"{name}, batches of {batch_size}", leave=False):
                chex.clear_trace_counter()
                found.append(accuracies(trained(norm, digits, batch_size, seed, steps), digits))
            for which, values in zip(("running", "calibrated"), zip(*found, strict=True), strict=True):
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                rows.append((batch_size, name, which, f"{statistics.mean(values):.2%}", f"{spread:.2%}"))
    print(jbn.diagnostics.Table(("batch size", "norm", "statistics", "mean", "spread"), rows))


if __name__ == "__main__":
    main()
