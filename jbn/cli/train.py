"""`jbn train`: train a small network on handwritten digits and show how its running statistics change."""

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
    """Add the options of `jbn train`."""
    purpose = "train a small network on handwritten digits and show how its running statistics change"
    train = commands.add_parser("train", help=purpose, description=purpose)
    explained = {
        "momentum": "share of the old running statistics kept at each update: a number, warmup:NUMBER, "
        "debiased:NUMBER or cumulative",
        "running_var": "variance in the running statistics: biased, unbiased or total",
        "batch_size": "examples per step, over all devices",
        "steps": "number of optimizer steps",
        "learning_rate": "initial learning rate of AdamW; it decays to 0 along a cosine",
        "seed": "seed of the weights and the batches; on one machine, runs with the same seed are equal bit for bit",
        "devices": "devices per process that share the batch and its statistics; a CPU is split into this many "
        "devices (default: all)",
        "out": "folder for the picture, the history and the checkpoints",
        "checkpoint_every": "steps between checkpoints (default: one checkpoint, after the last step)",
        "resume": "continue from the last complete checkpoint in --out, with the same options; if there is none, "
        "start from step 1",
        "coordinator": "HOST:PORT of process 0, which connects the processes of a run; or auto on a cluster that JAX "
        "detects, such as Slurm or a TPU pod",
        "num_processes": "number of processes",
        "process_id": "number of this process, counted from 0; only process 0 prints and writes files",
    }
    kinds = get_type_hints(Options)
    for name, default in Options()._asdict().items():
        flag = f"--{name.replace('_', '-')}"
        if kinds[name] is bool:
            train.add_argument(flag, action="store_true", help=explained[name])
        else:
            kind = next(kind for kind in (str, int, float) if kind in (kinds[name], *get_args(kinds[name])))
            shown = "" if default is None else " (default: %(default)s)"
            train.add_argument(flag, type=kind, default=default, help=explained[name] + shown)
    train.set_defaults(run=lambda given: run(Options(**given)))


def run(options: Options) -> int:
    """Check the options, train, write files and print results. Only process 0 writes and prints."""
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
    """The manager of the run's checkpoints; makes the folder where it does not exist."""
    from jbn.demo import checkpoints

    try:
        Path(options.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"--out is {options.out}, but this folder cannot be created: {error.strerror}.") from None
    manager = checkpoints.open_manager(options)
    if options.resume:
        step = manager.latest_step()
        print(f"nothing to resume in {options.out}" if step is None else f"resumed after step {step}", flush=True)
    return manager


def _ignore(look: "Look") -> None:
    """The callback of a process that does not write."""


def _make_cpu_devices(devices: int | None) -> None:
    """Split a CPU into several devices; JAX allows this only before its first use."""
    if (
        devices is not None
        and devices > 0
        and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", "")
    ):
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", devices)


@contextlib.contextmanager
def _progress(steps: int) -> Iterator[Callable[["Look"], None]]:
    """Show a progress bar on a terminal, and print lines elsewhere."""
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
        f"loss {look.loss:.4f}  accuracy: train {look.train_accuracy:.1%}, "
        f"held out {look.held_out_running:.1%} ({look.held_out_batch:.1%} with batch statistics)"
    )
