"""The command line: `jbn train`."""

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax

import jbn
from jbn.demo.options import OptionError, Options, check

if TYPE_CHECKING:
    from jbn.demo.loop import Look

LINES = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `jbn`; 0 when all went well, 1 when a run failed, 2 when it was asked for what cannot be."""
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    del given["command"]
    try:
        return _train(Options(**given))
    except ModuleNotFoundError as error:
        if (error.name or "jbn").startswith("jbn"):
            raise
        parser.exit(1, f"jbn train needs {error.name}, which is not installed: pip install 'jbn[demo]'\n")
    except KeyboardInterrupt:
        parser.exit(130, "\njbn train: interrupted, nothing was written\n")
    except OptionError as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jbn", description="Batch normalization for JAX.")
    parser.add_argument("--version", action="version", version=f"jbn {jbn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
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
        "devices": "devices to share the batch and its statistics, all by default; on a CPU as many are made",
        "out": "folder for the picture, the history and the checkpoint",
    }
    for name, default in Options()._asdict().items():
        kind = int if default is None else type(default)
        train.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=explained[name])
    return parser


def _train(options: Options) -> int:
    """Check, train, write and tell."""
    _make_cpu_devices(options.devices)
    from jbn.demo import data, loop, picture, record, report

    digits = data.load()
    check(options, examples=len(digits.train.labels), devices=jax.local_device_count())
    folder = Path(options.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"--out is {folder}, where no folder can be made: {error.strerror}.") from None
    with _progress(options.steps) as watch:
        result = loop.train(options, digits, watch)
    paths = [
        picture.draw(folder, options, result),
        record.write_history(folder, options, result),
        record.write_checkpoint(folder, result),
    ]
    print(*report.closing_lines(options, result), sep="\n")
    print("wrote              ", *(os.path.relpath(path) for path in paths))
    return 0 if math.isfinite(result.looks[-1].loss) else 1


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
