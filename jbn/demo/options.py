"""What a person can choose about a training run, and the checks of it."""

from pathlib import Path
from typing import NamedTuple

import jbn
from jbn._arguments import RUNNING_VAR
from jbn.momentum import Schedule

SCHEDULES = {"warmup": jbn.momentum.warmup, "debiased": jbn.momentum.debiased}


class OptionError(ValueError):
    """An option that cannot be met; the message names it, what it got and what is allowed."""


class Options(NamedTuple):
    """Options of `jbn train`, as they are written on the command line; `devices` None is all that JAX finds."""

    momentum: str = "0.99"
    running_var: str = "biased"
    batch_size: int = 128
    steps: int = 300
    learning_rate: float = 3e-3
    seed: int = 0
    devices: int | None = None
    out: str = "jbn-train"


def momentum_from_text(text: str) -> float | Schedule:
    """A number, `warmup:NUMBER`, `debiased:NUMBER` or `cumulative`, as what `batch_norm` takes."""
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


def check(options: Options, examples: int, devices: int) -> None:
    """Refuse what cannot be run with so many training examples and devices, before any work."""
    momentum_from_text(options.momentum)
    if options.running_var not in RUNNING_VAR:
        raise OptionError(f"--running-var is {options.running_var!r}: expected one of {', '.join(RUNNING_VAR)}.")
    chosen = devices if options.devices is None else options.devices
    for name, value in (("--batch-size", options.batch_size), ("--steps", options.steps), ("--devices", chosen)):
        if value < 1:
            raise OptionError(f"{name} is {value}: expected at least 1.")
    if chosen > devices:
        raise OptionError(f"--devices is {chosen}: expected at most {devices}, as many as JAX finds here.")
    if options.batch_size > examples:
        raise OptionError(
            f"--batch-size is {options.batch_size}: expected at most {examples}, the training set's size."
        )
    if options.batch_size % chosen:
        raise OptionError(
            f"--batch-size is {options.batch_size}, which {chosen} devices cannot share evenly: "
            f"expected a multiple of {chosen}."
        )
    if not 0 < options.learning_rate < float("inf"):
        raise OptionError(f"--learning-rate is {options.learning_rate}: expected a positive number.")
    if not 0 <= options.seed < 2**32:
        raise OptionError(f"--seed is {options.seed}: expected 0 to {2**32 - 1}.")
    _check_out(Path(options.out))


def _check_out(out: Path) -> None:
    """What an earlier run left may be replaced; nothing else."""
    if out.exists() and not out.is_dir():
        raise OptionError(f"--out is {out}, which is a file: expected a folder, which need not exist yet.")
    checkpoint = out / "checkpoint"
    if checkpoint.exists() and not (checkpoint / "_CHECKPOINT_METADATA").exists():
        raise OptionError(f"--out is {out}, and {checkpoint} is no checkpoint of jbn train: name another folder.")
