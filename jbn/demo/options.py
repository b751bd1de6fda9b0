"""The options of a training run, and their checks."""

from pathlib import Path
from typing import NamedTuple

import jbn
from jbn._arguments import RUNNING_VAR
from jbn.momentum import Schedule

AUTOMATIC = "auto"
SCHEDULES = {"warmup": jbn.momentum.warmup, "debiased": jbn.momentum.debiased}


class OptionError(ValueError):
    """An invalid option. The message names the option, its value and the allowed values."""


class Options(NamedTuple):
    """Options of `jbn train`, as on the command line. `devices=None` uses all devices of JAX; `checkpoint_every=None`
    saves one checkpoint, after the last step."""

    momentum: str = "0.99"
    running_var: str = "biased"
    batch_size: int = 128
    steps: int = 300
    learning_rate: float = 3e-3
    seed: int = 0
    devices: int | None = None
    out: str = "jbn-train"
    checkpoint_every: int | None = None
    resume: bool = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def momentum_from_text(text: str) -> float | Schedule:
    """Convert a number, `warmup:NUMBER`, `debiased:NUMBER` or `cumulative` to the momentum for `batch_norm`."""
    allowed = "expected a number in [0, 1], warmup:0.99, debiased:0.99 or cumulative"
    if text == "cumulative":
        return jbn.momentum.cumulative()
    name, colon, number = text.rpartition(":")
    try:
        value = float(number)
    except ValueError:
        raise OptionError(f"--momentum is {text!r}: {allowed}.") from None
    if (colon and name not in SCHEDULES) or not 0 <= value <= 1:
        raise OptionError(f"--momentum is {text!r}: {allowed}.")
    return SCHEDULES[name](value) if colon else value


def check_processes(options: Options) -> None:
    """Check the options for several processes before the run waits for the other processes."""
    given = {"--num-processes": options.num_processes, "--process-id": options.process_id}
    named = [name for name, value in given.items() if value is not None]
    if options.coordinator in (None, AUTOMATIC):
        if named:
            raise OptionError(f"{named[0]} needs --coordinator HOST:PORT, but --coordinator is {options.coordinator}.")
        return
    host, _, port = options.coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise OptionError(
            f"--coordinator is {options.coordinator!r}: expected HOST:PORT of process 0, such as 127.0.0.1:12345, or "
            f"{AUTOMATIC} on a cluster that JAX detects."
        )
    if options.num_processes is None or options.num_processes < 1:
        raise OptionError(f"--num-processes is {options.num_processes}: expected the number of processes, at least 1.")
    if options.process_id is None or not 0 <= options.process_id < options.num_processes:
        raise OptionError(
            f"--process-id is {options.process_id}: expected 0 to {options.num_processes - 1}, a different number in "
            "each process."
        )


def check(options: Options, examples: int, devices: int, processes: int = 1) -> None:
    """Check the options against the number of training examples, devices and processes, before any work."""
    momentum_from_text(options.momentum)
    if options.running_var not in RUNNING_VAR:
        raise OptionError(f"--running-var is {options.running_var!r}: expected one of {', '.join(RUNNING_VAR)}.")
    chosen = devices if options.devices is None else options.devices
    every = options.steps if options.checkpoint_every is None else options.checkpoint_every
    at_least_one = {
        "--batch-size": options.batch_size,
        "--steps": options.steps,
        "--devices": chosen,
        "--checkpoint-every": every,
    }
    for name, value in at_least_one.items():
        if value < 1:
            raise OptionError(f"{name} is {value}: expected at least 1.")
    if chosen > devices:
        raise OptionError(f"--devices is {chosen}: expected at most {devices}, the number of devices that JAX finds.")
    if options.batch_size > examples:
        raise OptionError(
            f"--batch-size is {options.batch_size}: expected at most {examples}, the size of the training set."
        )
    if options.batch_size % (chosen * processes):
        raise OptionError(
            f"--batch-size is {options.batch_size}, which cannot be split evenly over {chosen * processes} devices: "
            f"expected a multiple of {chosen * processes}."
        )
    if not 0 < options.learning_rate < float("inf"):
        raise OptionError(f"--learning-rate is {options.learning_rate}: expected a positive number.")
    if not 0 <= options.seed < 2**32:
        raise OptionError(f"--seed is {options.seed}: expected 0 to {2**32 - 1}.")
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise OptionError(f"--out is {out}, which is a file: expected a folder, which may be a new one.")
