"""`jbn bench`: speed and memory of jbn beside the other libraries, on this machine."""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from jbn.demo.options import OptionError

ROUNDS, QUICK_ROUNDS = 15, 7


def add_parser(commands: Any) -> None:
    """The options of `jbn bench`."""
    parser = commands.add_parser(
        "bench",
        help="time jbn beside Flax, Haiku, Equinox, Keras and PyTorch, as far as they are installed",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a few small cases, about a minute")
    parser.add_argument("--out", metavar="FOLDER", help="write bench.json, bench.txt and bench.png into it")
    parser.add_argument("--cases", metavar="TEXT", default="", help="only those that have this in their name")
    parser.add_argument("--peers", metavar="NAMES", help="only these, with commas between: linen,torch-last")
    parser.add_argument("--rounds", type=int, help=f"of all programs in turn; {ROUNDS}, or {QUICK_ROUNDS} with --quick")
    parser.set_defaults(run=run)


def run(given: dict[str, Any]) -> int:
    """Measure, print the tables, and write them where that was asked for."""
    # Keras chooses its backend when it is first imported.
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import jax
    from tqdm import tqdm

    from jbn.bench import cases, report, run, torch_programs

    rounds = given["rounds"] if given["rounds"] is not None else QUICK_ROUNDS if given["quick"] else ROUNDS
    if rounds < 1:
        raise OptionError(f"--rounds is {rounds}: expected at least 1.")
    chosen = cases.quick_cases() if given["quick"] else cases.all_cases(jax.default_backend() == "cpu")
    labels = sorted({case.label for case in chosen})
    chosen = [case for case in chosen if given["cases"] in case.label]
    if not chosen:
        raise OptionError(f"--cases is {given['cases']!r}, which is in none of: {', '.join(labels)}.")
    folder = _folder(given["out"])
    layers, missing = run.importable(_peers(given["peers"], run.PEERS))
    peers = [*(name for name in layers if name != "jbn"), "jbn-remat"]
    records = []
    with tqdm(total=run.work(chosen) + 1, desc="bench", disable=not sys.stderr.isatty()) as bar:
        far, far_allowed = run.far_errors(layers)
        bar.update()
        for record in run.run(chosen, layers, rounds):
            records.append(record)
            bar.set_postfix_str(f"{record.case}, {record.mode}")
            bar.update()
    if not any("jbn-remat" in record.seconds for record in records):
        peers.remove("jbn-remat")
    machine = report.machine(torch_programs.description() if "torch-last" in layers else None)
    command = shlex.join(["jbn", "bench", *_arguments(given, rounds)])
    text = _text(report, records, peers, machine, command, missing, (far, far_allowed))
    print(text)
    if folder:
        _write(folder, text, {"command": command, **machine, "records": report.data(records)}, records, peers)
    return 0


def _text(
    report: Any,
    records: Any,
    peers: list[str],
    machine: dict[str, Any],
    command: str,
    missing: dict[str, str],
    far: tuple[dict[str, float], float],
) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    times = report.times(records, peers)
    beside = [peer for peer in ("jbn", "linen", "jbn-remat") if peer == "jbn" or peer in peers]
    counts = report.counts(records, beside)
    parts = [
        f"{machine['device']}, {machine['cores']} cores; Python {machine['python']}, {versions}",
        machine["torch"] or "without PyTorch",
        "",
        times.text(len(times.rows)),
        "",
        report.LEGEND,
        "",
        counts.text(len(counts.rows)),
        "",
        report.COUNTED,
        "",
        *report.summary(records, peers, *far),
        *(f"left out: {peer}, {reason}" for peer, reason in missing.items()),
        f"again: {command}",
    ]
    return "\n".join(parts)


def _peers(given: str | None, known: tuple[str, ...]) -> list[str]:
    if given is None:
        return list(known)
    names = [name.strip() for name in given.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise OptionError(f"--peers has {', '.join(map(repr, unknown))}: expected some of {', '.join(known[1:])}.")
    return ["jbn", *(name for name in names if name != "jbn")]


def _arguments(given: dict[str, Any], rounds: int) -> list[str]:
    """What would run the same again, without --out."""
    found = ["--quick"] if given["quick"] else []
    for option in ("cases", "peers"):
        if given[option]:
            found += [f"--{option}", given[option]]
    return [*found, "--rounds", str(rounds)]


def _folder(out: str | None) -> Path | None:
    """The folder for the files, made before anything is measured."""
    if out is None:
        return None
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"--out is {out}, where no folder can be made: {error}.") from None
    return folder


def _write(folder: Path, text: str, data: dict[str, Any], records: Any, peers: list[str]) -> None:
    from jbn.bench import picture

    (folder / "bench.txt").write_text(text + "\n")
    (folder / "bench.json").write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
    picture.draw(records, peers, data["device"]).savefig(folder / "bench.png", dpi=110)
    print("wrote", ", ".join(str(folder / f"bench.{ending}") for ending in ("txt", "json", "png")))
