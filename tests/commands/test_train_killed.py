"""A run of `jbn train` that is killed while it saves a checkpoint, and then resumed."""

import json
import os
import signal
import time

import jax
import numpy as np
import orbax.checkpoint
import pytest
from support.subprocesses import SMALL, TIME_LIMIT, finished

SAVED, CUT, STEPS = 2, 3, 8
"""A run is killed while it writes the checkpoint of step CUT or later, so that a checkpoint of step SAVED or later is
complete. It has enough steps that the kill comes before the last step, on a busy machine too."""


def kill_while_saving(process, folder):
    deadline = time.monotonic() + TIME_LIMIT
    while time.monotonic() < deadline and process.poll() is None:
        names = os.listdir(folder) if folder.exists() else []
        if any(not name.isdigit() and int(name.split(".")[0]) >= CUT for name in names):
            process.send_signal(signal.SIGKILL)
            break
    printed, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, printed


def saved_after(out, step):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        return jax.tree.leaves(checkpointer.restore(out / "checkpoints" / str(step) / "run"))


@pytest.mark.slow
def test_a_killed_run_resumes_where_it_was(tmp_path, start):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = (*SMALL, "--steps", STEPS, "--checkpoint-every", 1, "--out")
    ((status, printed),) = finished([start(*command, whole)])
    assert status == 0, printed
    folder = cut / "checkpoints"
    kill_while_saving(start(*command, cut), folder)
    assert not (cut / "history.json").exists()
    left = max(int(name) for name in os.listdir(folder) if name.isdigit())
    assert left >= SAVED
    ((status, printed),) = finished([start(*command, cut, "--resume")])
    assert status == 0, printed
    assert f"resumed after step {left}\n" in printed
    assert f"step {left}/{STEPS}" not in printed
    histories = [json.loads((out / "history.json").read_text()) for out in (whole, cut)]
    for name in ("loss", "train_accuracy", "looks", "population"):
        assert histories[0][name] == histories[1][name], name
    for actual, expected in zip(saved_after(cut, STEPS), saved_after(whole, STEPS), strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert all(name.isdigit() for name in os.listdir(folder))
