"""What `jbn train` rejects: bad options, unreachable processes, and folders with other files."""

from pathlib import Path

import jax.numpy as jnp
import pytest
from support.command_refusals import Refused, assert_commands_refused

import jbn
from jbn.demo import checkpoints
from jbn.demo.history import Record
from jbn.demo.options import Options
from jbn.demo.step import Run

pytestmark = pytest.mark.standard_promotion

OPTIONS = {
    "momentum a text": Refused("--momentum warm", "--momentum", "is 'warm'", "warmup:0.99, debiased:0.99 or cum"),
    "momentum above 1": Refused("--momentum 1.5", "--momentum", "is '1.5'", "expected a number in [0, 1]"),
    "unknown schedule": Refused("--momentum slow:0.9", "--momentum", "is 'slow:0.9'", "warmup:0.99, debiased:0.99"),
    "rule": Refused("--running-var both", "--running-var", "is 'both'", "expected one of biased, unbiased, total"),
    "steps": Refused("--steps 0", "--steps", "is 0", "expected at least 1"),
    "no devices": Refused("--devices 0", "--devices", "is 0", "expected at least 1"),
    "checkpoints": Refused("--checkpoint-every 0", "--checkpoint-every", "is 0", "expected at least 1"),
    "devices": Refused("--devices 99", "--devices", "is 99", "expected at most 8, the number of devices"),
    "large batch": Refused(
        "--batch-size 1438", "--batch-size", "is 1438", "at most 1437, the size of the training set"
    ),
    "uneven batch": Refused("--batch-size 30 --devices 4", "--batch-size", "is 30", "expected a multiple of 4"),
    "rate below 0": Refused("--learning-rate -1", "--learning-rate", "is -1.0", "expected a positive number"),
    "rate no number": Refused("--learning-rate nan", "--learning-rate", "is nan", "expected a positive number"),
    "seed below 0": Refused("--seed -1", "--seed", "is -1", "expected 0 to 4294967295"),
    "large seed": Refused("--seed 4294967296", "--seed", "is 4294967296", "expected 0 to 4294967295"),
}

PROCESSES = {
    "no port": Refused("--coordinator here", "--coordinator", "is 'here'", "HOST:PORT of process 0, such as 127.0.0.1"),
    "how many": Refused(
        "--coordinator h:1 --process-id 0", "--num-processes", "is None", "expected the number of processes"
    ),
    "no process": Refused(
        "--coordinator h:1 --num-processes 2", "--process-id", "is None", "expected 0 to 1, a different"
    ),
    "process": Refused("--coordinator h:1 --num-processes 2 --process-id 2", "--process-id", "is 2", "expected 0 to 1"),
    "no coordinator": Refused(
        "--process-id 0", "--process-id", "--coordinator is None", "needs --coordinator HOST:PORT"
    ),
    "no cluster": Refused("--coordinator auto", "--coordinator", "is auto", "the processes could not connect"),
}


def notes():
    Path("notes").write_text("mine")


def notes_among_checkpoints():
    Path("mixed/checkpoints").mkdir(parents=True)
    Path("mixed/checkpoints/notes").write_text("mine")


def unfinished():
    """Write the checkpoint of a run that ended after the first of two steps."""
    options = Options(steps=2, devices=1, checkpoint_every=1, out="run")
    Path("run").mkdir()
    with checkpoints.open_manager(options) as manager:
        run = Run({"kernel": jnp.ones(3)}, {"stem": jbn.init(3)[1]}, {"count": jnp.int32(1)})
        checkpoints.save(manager, checkpoints.Progress(1, run, Record([2.0], [0.5], [])), options)


def damaged():
    unfinished()
    Path("run/checkpoints/1/record/metadata").write_text("")


FOLDERS = {
    "no folder": Refused("--out /dev/null/here", "--out", "is /dev/null/here", "this folder cannot be created"),
    "a file": Refused("--out notes", "--out", "is notes, which is a file", "expected a folder", notes),
    "others' files": Refused(
        "--out mixed", "--out", "not checkpoints", "Choose another folder", notes_among_checkpoints
    ),
    "unfinished": Refused("--out run", "--out", "a run of 2 steps that ended after step 1", "--resume", unfinished),
    "other seed": Refused(
        "--out run --steps 2 --resume --seed 1",
        "--seed",
        "is 1, but the run in run started with 0",
        "--resume needs the same",
        unfinished,
    ),
    "other steps": Refused(
        "--out run --steps 1 --resume", "--steps", "started with 2", "--resume needs the same", unfinished
    ),
    "damaged": Refused("--out run --resume", "--out", "a damaged checkpoint", "Delete this folder; --resume", damaged),
}


@pytest.mark.devices(8)
@pytest.mark.parametrize("rows", [OPTIONS, PROCESSES, FOLDERS], ids=["options", "processes", "folders"])
def test_train_names_the_option_and_how_to_mend_it_and_writes_nothing(rows, command, tmp_path, monkeypatch):
    rows = {name: row._replace(command=f"train {row.command}") for name, row in rows.items()}
    assert_commands_refused(rows, command, tmp_path, monkeypatch)
