"""The training loop: run the compiled step on each batch, and look at accuracies and statistics at some steps."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jbn
from jbn.demo import checkpoints, data, model, processes
from jbn.demo.checkpoints import Progress
from jbn.demo.history import Look, Record, Watched
from jbn.demo.options import Options, momentum_from_text
from jbn.demo.step import AXIS, Metrics, Run, batch_statistics, evaluate, make_shared_statistics, make_step

LOOKS = 60
CHANNELS = 3
CHUNK = 256
WATCHED = "stem"


class Result(NamedTuple):
    """A finished run: its record, the trained network, the calibrated statistics and the accuracy with them.

    `population` has the population statistics of the watched channels. `calibrated` and `held_out_calibrated` are None
    if the network diverged, because it cannot be calibrated then.
    """

    record: Record
    population: Watched
    run: Run
    calibrated: model.Tree | None
    held_out_calibrated: float | None


def train(
    options: Options,
    digits: data.Digits,
    watch: Callable[[Look], None],
    manager: ocp.CheckpointManager | None = None,
) -> Result:
    """Train on the devices that the options select, starting from the last checkpoint if there is one.

    Process 0 looks at the network at some steps, calls `watch` with each look, and saves checkpoints with `manager`.
    The other processes only train.
    """
    mesh = Mesh(np.array(processes.chosen_devices(options.devices)), (AXIS,))
    everywhere, split = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec(AXIS)))
    optimizer = optax.adamw(optax.cosine_decay_schedule(options.learning_rate, options.steps))
    chex.clear_trace_counter()
    norm_options = {"momentum": momentum_from_text(options.momentum), "running_var": options.running_var}
    step = _one_at_a_time(make_step(mesh, optimizer, **norm_options), mesh)
    shared_statistics = _one_at_a_time(make_shared_statistics(mesh), mesh)
    params, state = _initialized(options.seed)
    done, run, record = _start(Run(params, state, optimizer.init(params)), manager)
    run = jax.device_put(run, everywhere)
    pending: list[Metrics] = []
    for number, own in _numbered_batches(done, options, digits.train):
        batch = jax.tree.map(lambda array: jax.make_array_from_process_local_data(split, array), own)
        look = number in _steps_to_look_after(options.steps)
        seen = shared_statistics(run.params, run.state, batch.images) if look else None
        run, metrics = step(run, batch)
        pending.append(metrics)
        if seen is not None and processes.writes():
            record.looks.append(_look(number, metrics, processes.own_copy(seen), processes.own_copy(run), digits))
            watch(record.looks[-1])
        if number == options.steps or number % (options.checkpoint_every or options.steps) == 0:
            _write_down(pending, record)
            if manager is not None:
                checkpoints.save(manager, Progress(number, processes.own_copy(run), record), options)
    own_run = processes.own_copy(run)
    calibrated = _calibrated(own_run, digits.train)
    if calibrated is None:
        return Result(record, _watched(jbn.unset(own_run.state)), own_run, None, None)
    accuracy = float(evaluate(own_run.params, calibrated, digits.held_out, train=False).accuracy)
    return Result(record, _watched(calibrated), own_run, calibrated, accuracy)


def _one_at_a_time(program: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """On several devices of a CPU, wait for each result: XLA's collectives of two programs can block each other there.

    They share the threads of the process. With eight devices on two cores, runs with hundreds of steps in flight hung.
    """
    if mesh.size == 1 or mesh.devices.flat[0].platform != "cpu":
        return program
    return lambda *given: jax.block_until_ready(program(*given))


def _initialized(seed: int) -> tuple[model.Tree, model.Tree]:
    """Initialize parameters and statistics in one compiled program.

    The program runs once, so XLA does not optimize it on a CPU: optimizing random number code takes eight seconds.
    """
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(lambda key: model.init(key), compiler_options=options)(jax.random.key(seed))


def _calibrated(run: Run, examples: data.Examples) -> model.Tree | None:
    """Population statistics over the training set with the final parameters; None if they are not finite."""
    images = np.split(np.asarray(examples.images), range(CHUNK, len(examples.labels), CHUNK))
    try:
        return jbn.calibrate(functools.partial(batch_statistics, run.params), run.state, images)
    except ValueError:
        return None


def _start(fresh: Run, manager: ocp.CheckpointManager | None) -> Progress:
    """The last checkpoint that process 0 finds, sent to all processes; a fresh run if there is none."""
    begun = Progress(0, jax.tree.map(np.asarray, fresh), Record([], [], []))
    if manager is not None:
        begun = checkpoints.restore(manager, begun)
    step, run = processes.from_writer((np.array(begun.step), begun.run))
    return Progress(int(step), run, begun.record)


def _numbered_batches(done: int, options: Options, examples: data.Examples) -> Iterator[tuple[int, data.Examples]]:
    """Pairs of step number and batch for the remaining steps; a batch is the part that this process loads."""
    share = (jax.process_index(), jax.process_count())
    batches = data.batches(examples, options.batch_size, options.seed, share)
    return zip(range(done + 1, options.steps + 1), itertools.islice(batches, done, None), strict=False)


def _steps_to_look_after(steps: int) -> set[int]:
    return set(np.linspace(1, steps, min(LOOKS, steps)).round().astype(int).tolist())


def _look(number: int, metrics: Metrics, seen: model.Tree, run: Run, digits: data.Digits) -> Look:
    """The metrics and running statistics after a step, and the batch statistics of that step."""
    running, batch = (
        float(evaluate(run.params, run.state, digits.held_out, train=mode).accuracy) for mode in (False, True)
    )
    return Look(
        number,
        float(metrics.loss),
        float(metrics.accuracy),
        held_out_running=float(running),
        held_out_batch=float(batch),
        batch=_watched(seen),
        running=_watched(run.state),
    )


def _write_down(pending: list[Metrics], record: Record) -> None:
    """Move the metrics of the pending steps from the devices to the record."""
    record.loss.extend(float(metrics.loss) for metrics in pending)
    record.train_accuracy.extend(float(metrics.accuracy) for metrics in pending)
    pending.clear()


def _watched(state: model.Tree) -> Watched:
    """Statistics of the watched channels; NaN where they are still unset because the batch was not finite."""
    norm = jax.device_get(state[WATCHED])
    known = np.isfinite(norm.var[:CHANNELS])
    return Watched(*(np.where(known, values[:CHANNELS], np.nan).tolist() for values in (norm.mean, norm.var)))
