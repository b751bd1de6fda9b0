"""`jbn bench`: measure speed and memory of jbn and of other libraries on this machine."""

import functools
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from jbn.demo.options import OptionError

ROUNDS, QUICK_ROUNDS = 15, 7


def add_parser(commands: Any) -> None:
    """Add the options of `jbn bench`."""
    purpose = "compare the time of training steps with jbn, Flax and PyTorch"
    parser = commands.add_parser("bench", help=purpose, description=purpose)
    parser.add_argument("--quick", action="store_true", help="measure only a few small cases")
    apart = "measure a single norm in all installed libraries, with forward and backward pass compiled separately"
    parser.add_argument("--apart", action="store_true", help=apart)
    parser.add_argument("--out", metavar="FOLDER", help="write bench.json, bench.txt and bench.png into this folder")
    parser.add_argument("--cases", metavar="TEXT", default="", help="measure only the cases with TEXT in their name")
    peers = "compare only with these libraries, separated by commas, such as linen,torch-last"
    parser.add_argument("--peers", metavar="NAMES", help=peers)
    rounds = f"number of times to measure each program (default: {ROUNDS}, or {QUICK_ROUNDS} with --quick)"
    parser.add_argument("--rounds", type=int, help=rounds)
    parser.set_defaults(run=run)


def run(given: dict[str, Any]) -> int:
    """Measure, print the tables, and write them to --out if it is given."""
    # Keras reads this variable once, at its first import.
    os.environ.setdefault("KERAS_BACKEND", "jax")
    from tqdm import tqdm

    from jbn.bench import picture, report, run, step_report, steps, torch_programs

    measure, tell = (run, report) if given["apart"] else (steps, step_report)
    rounds = _rounds(given)
    chosen = _chosen(given, measure)
    folder = _folder(given["out"])
    layers, missing = run.importable(_peers(given["peers"], measure.PEERS))
    with tqdm(total=measure.work(chosen), desc="bench", disable=not sys.stderr.isatty()) as bar:
        records = list(measure.run(chosen, layers, rounds, functools.partial(_tick, bar)))
    machine = report.machine(torch_programs.description() if "torch-last" in layers else None)
    command = shlex.join(["jbn", "bench", *_arguments(given, rounds)])
    left_out = [f"not measured: {peer} ({reason})" for peer, reason in missing.items()]
    text = "\n".join([*_heading(machine), *tell.lines(records, layers), *left_out, f"to repeat: {command}"])
    print(text)
    if folder:
        data = {"command": command, **machine, "records": report.data(records, tell.BASE)}
        draw = functools.partial(picture.draw, peers=list(layers)) if given["apart"] else picture.draw_steps
        _write(folder, text, data, draw(records, title=machine["device"]))
    return 0


def _tick(bar: Any, what: str) -> None:
    bar.set_postfix_str(what)
    bar.update()


def _rounds(given: dict[str, Any]) -> int:
    rounds = given["rounds"] if given["rounds"] is not None else QUICK_ROUNDS if given["quick"] else ROUNDS
    if rounds < 1:
        raise OptionError(f"--rounds is {rounds}: expected at least 1.")
    return rounds


def _chosen(given: dict[str, Any], measure: Any) -> list[Any]:
    import jax

    known = measure.quick_cases() if given["quick"] else measure.all_cases(jax.default_backend() == "cpu")
    chosen = [case for case in known if given["cases"] in case.label]
    if not chosen:
        labels = sorted({case.label for case in known})
        raise OptionError(f"--cases is {given['cases']!r}, which is not in the name of any case: {', '.join(labels)}.")
    return chosen


def _heading(machine: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    first = f"{machine['device']}, {machine['cores']} cores; Python {machine['python']}, {versions}"
    return [first, machine["torch"] or "PyTorch is not measured", ""]


def _peers(given: str | None, known: tuple[str, ...]) -> list[str]:
    if given is None:
        return list(known)
    names = [name.strip() for name in given.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise OptionError(f"--peers has {', '.join(map(repr, unknown))}: expected names from {', '.join(known[1:])}.")
    return ["jbn", *(name for name in names if name != "jbn")]


def _arguments(given: dict[str, Any], rounds: int) -> list[str]:
    """The arguments that repeat the run, except --out."""
    found = [f"--{option}" for option in ("quick", "apart") if given[option]]
    for option in ("cases", "peers"):
        if given[option]:
            found += [f"--{option}", given[option]]
    return [*found, "--rounds", str(rounds)]


def _folder(out: str | None) -> Path | None:
    """The folder for the files; created before the first measurement, so that a bad path fails early."""
    if out is None:
        return None
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"--out is {out}, but this folder cannot be created: {error}.") from None
    return folder


def _write(folder: Path, text: str, data: dict[str, Any], figure: Any) -> None:
    (folder / "bench.txt").write_text(text + "\n")
    (folder / "bench.json").write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
    figure.savefig(folder / "bench.png", dpi=150)
    print("wrote", ", ".join(str(folder / f"bench.{ending}") for ending in ("txt", "json", "png")))
