"""`jbn train`: train a small network on handwritten digits, and see what its running statistics do."""

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import jax

from jbn.demo.options import OptionError, Options, check, check_processes

if TYPE_CHECKING:
    from orbax.checkpoint import CheckpointManager

    from jbn.demo.history import Look

LINES = 10


def add_parser(commands: Any) -> None:
    """The options of `jbn train`."""
    train = commands.add_parser(
        "train",
        help="train a small network on handwritten digits, and see what its running statistics do",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    explained = {
        "momentum": "share of the old running statistics kept at a step: a number, warmup:NUMBER, debiased:NUMBER "
        "or cumulative",
        "running_var": "the variance that is averaged: biased, unbiased or total",
        "batch_size": "examples in a step, over all devices",
        "steps": "optimizer steps",
        "learning_rate": "AdamW's learning rate at the start; it falls to 0 along a cosine",
        "seed": "fixes weights and batches, every bit on one machine",
        "devices": "devices of each process to share the batch and its statistics, all by default; on a CPU as many "
        "are made",
        "out": "folder for the picture, the history and the checkpoints",
        "checkpoint_every": "steps from one checkpoint to the next; by default there is one, after the last step",
        "resume": "go on from the last whole checkpoint in --out, with the same options; from the start where there is "
        "none",
        "coordinator": "HOST:PORT of process 0, where several processes find each other; auto on a cluster that JAX "
        "knows, as Slurm and TPU pods",
        "num_processes": "how many processes take part",
        "process_id": "which one this is, from 0 on; process 0 prints and writes",
    }
    kinds = get_type_hints(Options)
    for name, default in Options()._asdict().items():
        flag = f"--{name.replace('_', '-')}"
        if kinds[name] is bool:
            train.add_argument(flag, action="store_true", help=explained[name])
        else:
            kind = next(kind for kind in (str, int, float) if kind in (kinds[name], *get_args(kinds[name])))
            train.add_argument(flag, type=kind, default=default, help=explained[name])
    train.set_defaults(run=lambda given: run(Options(**given)))


def run(options: Options) -> int:
    """Check, train, write and tell; of several processes, one writes and tells."""
    check_processes(options)
    _make_cpu_devices(options.devices)
    from jbn.demo import data, history, loop, picture, processes, report

    processes.join(options)
    digits = data.load()
    check(options, len(digits.train.labels), jax.local_device_count(), jax.process_count())
    manager = processes.agreed(lambda: _opened(options))
    try:
        with _progress(options.steps) if processes.writes() else contextlib.nullcontext(_ignore) as watch:
            result = loop.train(options, digits, watch, manager)
    finally:
        if manager is not None:
            manager.close()
    if manager is not None:
        folder = Path(options.out)
        paths = [
            picture.draw(folder, options, result),
            history.write(folder, options, result.record, result.population, result.held_out_calibrated),
            folder / "checkpoints" / str(options.steps),
        ]
        print(*report.closing_lines(options, result), sep="\n")
        print(f"\n{report.comparison(result)}\n")
        print("wrote              ", *(os.path.relpath(path) for path in paths))
    return 0 if math.isfinite(result.record.loss[-1]) else 1


def _opened(options: Options) -> "CheckpointManager":
    """The manager of the run's checkpoints, in a folder that was made if need be."""
    from jbn.demo import checkpoints

    try:
        Path(options.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"--out is {options.out}, where no folder can be made: {error.strerror}.") from None
    manager = checkpoints.open_manager(options)
    if options.resume:
        step = manager.latest_step()
        print(f"nothing to resume in {options.out}" if step is None else f"resumed after step {step}", flush=True)
    return manager


def _ignore(look: "Look") -> None:
    """What a process does that does not write."""


def _make_cpu_devices(devices: int | None) -> None:
    """Let a CPU stand for several devices, which JAX allows until it is first used."""
    if (
        devices is not None
        and devices > 0
        and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", "")
    ):
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", devices)


@contextlib.contextmanager
def _progress(steps: int) -> Iterator[Callable[["Look"], None]]:
    """A bar on a terminal, plain lines elsewhere."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=steps, unit="step") as bar:

            def advance(look: "Look") -> None:
                bar.set_postfix_str(_described(look), refresh=False)
                bar.update(look.step - bar.n)

            yield advance
    else:
        next_line = 1

        def write(look: "Look") -> None:
            nonlocal next_line
            if look.step >= next_line:
                print(f"step {look.step:>{len(str(steps))}}/{steps}  {_described(look)}", flush=True)
                next_line = max(look.step + 1, min(steps, next_line + steps // LINES))

        yield write


def _described(look: "Look") -> str:
    return (
        f"loss {look.loss:.4f}  train {look.train_accuracy:.1%}  "
        f"held out {look.held_out_running:.1%} (batch statistics {look.held_out_batch:.1%})"
    )
