"""Every refusal of the command line, a row each: exit status 2, the option, what it got, and how to mend it.

A `raise` of the commands that no row reaches fails `test_every_raise_has_a_row`.
"""

import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import flax.serialization
import jax
import numpy as np
import pytest
from support import raises

import jbn
from jbn.cli import main
from jbn.demo import checkpoints


def nothing(_):
    """Most mistakes need no file."""


class Row(NamedTuple):
    """What is written on the command line, what its error says, and what is there before, made from a run."""

    command: str
    option: str
    given: str
    advice: str
    prepare: Callable[[Path], None] = nothing


def notes(_):
    Path("notes").write_text("mine")


def notes_among_checkpoints(_):
    Path("mixed/checkpoints").mkdir(parents=True)
    Path("mixed/checkpoints/notes").write_text("mine")


def unfinished(run):
    shutil.copytree(run, "unfinished")


def damaged(run):
    shutil.copytree(run, "damaged")
    Path("damaged/checkpoints/1/record/metadata").write_text("")


def statistics(_):
    for name in ("one", "other"):
        Path(name).write_bytes(flax.serialization.to_bytes({name: jbn.init(3)[1]}))


def kernel(_):
    Path("kernel").write_bytes(flax.serialization.to_bytes({"kernel": np.ones(3, np.float32)}))


TRAIN = {
    "momentum a text": Row("train --momentum warm", "--momentum", "is 'warm'", "warmup:0.99, debiased:0.99 or cum"),
    "momentum above 1": Row("train --momentum 1.5", "--momentum", "is '1.5'", "expected a number in [0, 1]"),
    "rule": Row("train --running-var both", "--running-var", "is 'both'", "expected one of biased, unbiased, total"),
    "steps": Row("train --steps 0", "--steps", "is 0", "expected at least 1"),
    "devices": Row("train --devices 99", "--devices", "is 99", "expected at most 8, as many as JAX finds here"),
    "more than there is": Row("train --batch-size 99999", "--batch-size", "is 99999", "the training set's size"),
    "uneven batch": Row("train --batch-size 30 --devices 4", "--batch-size", "is 30", "expected a multiple of 4"),
    "learning rate": Row("train --learning-rate nan", "--learning-rate", "is nan", "expected a positive number"),
    "seed": Row("train --seed -1", "--seed", "is -1", "expected 0 to 4294967295"),
    "checkpoints": Row("train --checkpoint-every 0", "--checkpoint-every", "is 0", "expected at least 1"),
    "no port": Row("train --coordinator here", "--coordinator", "is 'here'", "HOST:PORT of process 0, as in 127.0.0.1"),
    "no number": Row("train --coordinator h:1", "--num-processes", "is None", "expected how many take part"),
    "no process": Row("train --coordinator h:1 --num-processes 2", "--process-id", "is None", "one of 0 to 1, another"),
    "no coordinator": Row("train --process-id 0", "--process-id", "that is None", "needs --coordinator HOST:PORT"),
    "no cluster": Row("train --coordinator auto", "--coordinator", "is auto", "where no run could be joined"),
    "no folder": Row("train --out /dev/null/here", "--out", "is /dev/null/here", "where no folder can be made"),
    "a file": Row("train --out notes", "--out", "is notes, which is a file", "expected a folder", notes),
    "others' files": Row("train --out mixed", "--out", "no checkpoint", "name another folder", notes_among_checkpoints),
    "unfinished": Row("train --out unfinished", "--out", "ended after step 1", "give --resume to go on", unfinished),
    "other options": Row(
        "train --out unfinished --steps 2 --devices 1 --checkpoint-every 1 --resume --seed 1",
        "--seed",
        "is 1, but the run in unfinished was begun with 0",
        "--resume needs the same",
        unfinished,
    ),
    "damaged": Row("train --out damaged --resume", "--out", "a damaged checkpoint", "delete that folder, and", damaged),
}
OTHERS = {
    "bench, rounds": Row("bench --rounds 0", "--rounds", "is 0", "expected at least 1"),
    "bench, cases": Row("bench --quick --cases none", "--cases", "is 'none'", "which is in none of:"),
    "bench, peers": Row("bench --quick --peers mxnet", "--peers", "has 'mxnet'", "expected some of linen"),
    "bench, folder": Row("bench --quick --out /dev/null/here", "--out", "/dev/null/here", "no folder can be made"),
    "inspect, absent": Row("inspect absent", "checkpoint", "is absent", "expected a file or directory"),
    "inspect, no checkpoint": Row("inspect notes", "checkpoint", "is notes", "flax.serialization.to_bytes", notes),
    "inspect, no statistics": Row("inspect kernel", "`tree`", "no statistics", "float `mean` and `var`", kernel),
    "inspect, other norms": Row("inspect one --population other", "`population`", "'one', 'other'", "same", statistics),
    "inspect, epsilon": Row("inspect one --epsilon 0", "`epsilon`", "is 0.0", "a positive number", statistics),
    "inspect, population": Row("inspect one --population no", "--population", "is no", "expected a file", statistics),
    "momentum, steps": Row("momentum --steps 0", "--steps", "is 0", "a finite number of at least 1"),
    "momentum, many steps": Row("momentum --steps 99999999", "--steps", "is 99999999", "expected at most 10000000"),
    "momentum, distance": Row("momentum --distance nan", "--distance", "is nan", "a finite number of at least 0"),
    "momentum, picture": Row("momentum --plot a.unknown", "--plot", "is a.unknown", "no picture can be written"),
}
ROWS = {**{f"train, {name}": row for name, row in TRAIN.items()}, **OTHERS}


class Refusal(NamedTuple):
    """How a command ended, what it wrote to standard error, and the lines at which functions of jbn were left."""

    status: int
    message: str
    left: frozenset[tuple[str, int]]


@pytest.fixture(autouse=True)
def standard_promotion():
    """optax and the losses promote implicitly."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 2 steps that was interrupted after the first."""
    folder, save = tmp_path_factory.mktemp("run"), checkpoints.save

    def save_and_stop(manager, progress, options):
        save(manager, progress, options)
        manager.wait_until_finished()
        raise KeyboardInterrupt

    command = "train --steps 2 --devices 1 --checkpoint-every 1 --out"
    with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(checkpoints, "save", save_and_stop)
        main([*command.split(), str(folder)])
    return folder


@pytest.fixture
def refusal(run, tmp_path_factory, monkeypatch):
    def refusal_of(name):
        monkeypatch.chdir(tmp_path_factory.mktemp("folder"))
        row, errors = ROWS[name], io.StringIO()
        row.prepare(run)
        with contextlib.redirect_stderr(errors):
            ended, left = raises.watched(lambda: main(row.command.split()))
        return Refusal(ended.code, errors.getvalue(), left)

    return refusal_of


@pytest.mark.parametrize("name", ROWS)
def test_the_command_names_the_option_and_says_what_it_got_and_how_to_mend_it(refusal, name):
    row, found = ROWS[name], refusal(name)
    assert found.status == 2
    message = found.message.split(": error: ")[1]
    for part in (row.option, row.given, row.advice):
        assert part in message


def test_every_raise_has_a_row(refusal):
    reached = set().union(*(refusal(name).left for name in ROWS))
    assert sorted(raises.statements(of_the_command_line=True) - reached) == []
