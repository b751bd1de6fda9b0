"""The training loop: batches through the compiled step, with a look at accuracies and statistics now and then."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jbn.demo import data, model
from jbn.demo.options import Options, momentum_from_text
from jbn.demo.step import AXIS, Run, batch_statistics, evaluate, make_step

LOOKS = 60
CHANNELS = 3
WATCHED = "stem"


class Watched(NamedTuple):
    """Mean and variance of the watched channels, each a list of length CHANNELS."""

    mean: list[float]
    var: list[float]


class Look(NamedTuple):
    """What a look at the network after a step finds."""

    step: int
    loss: float
    train_accuracy: float
    held_out_running: float
    held_out_batch: float
    batch: Watched
    running: Watched


class Result(NamedTuple):
    """A finished run: the loss and accuracy of every step, the looks, and what was trained."""

    loss: list[float]
    train_accuracy: list[float]
    looks: list[Look]
    population: Watched
    run: Run


def train(options: Options, digits: data.Digits, watch: Callable[[Look], None]) -> Result:
    """Train on as many devices as the options ask for; `watch` is called with every look."""
    mesh = Mesh(np.array(jax.local_devices()[: options.devices]), (AXIS,))
    everywhere, split = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec(AXIS)))
    optimizer = optax.adamw(optax.cosine_decay_schedule(options.learning_rate, options.steps))
    chex.clear_trace_counter()
    step = make_step(mesh, optimizer, momentum=momentum_from_text(options.momentum), running_var=options.running_var)
    params, state = model.init(jax.random.key(options.seed))
    run = jax.device_put(Run(params, state, optimizer.init(params)), everywhere)
    look_after = set(np.linspace(1, options.steps, min(LOOKS, options.steps)).round().astype(int).tolist())
    batches = data.batches(digits.train, options.batch_size, options.seed)
    history, looks = [], []
    for number, batch in zip(range(1, options.steps + 1), batches, strict=False):
        seen = _watched(batch_statistics(run.params, run.state, batch.images)) if number in look_after else None
        run, metrics = step(run, jax.device_put(batch, split))
        history.append(metrics)
        if seen is not None:
            held_out = [evaluate(run.params, run.state, digits.held_out, train=mode).accuracy for mode in (False, True)]
            looks.append(
                Look(
                    number,
                    float(metrics.loss),
                    float(metrics.accuracy),
                    *(float(accuracy) for accuracy in held_out),
                    batch=seen,
                    running=_watched(run.state),
                )
            )
            watch(looks[-1])
    loss, accuracy = ([float(value) for value in values] for values in zip(*history, strict=True))
    population = _watched(batch_statistics(run.params, run.state, digits.train.images))
    return Result(loss, accuracy, looks, population, run)


def _watched(state: model.Tree) -> Watched:
    """The watched channels; NaN where the statistics are still unset, because the batch was not finite."""
    norm = jax.device_get(state[WATCHED])
    known = np.isfinite(norm.var[:CHANNELS])
    return Watched(*(np.where(known, values[:CHANNELS], np.nan).tolist() for values in (norm.mean, norm.var)))
