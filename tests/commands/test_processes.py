"""`jbn train` in several processes, joined on this machine as hosts are; and a run that is killed and resumed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint
import pytest
from flax import serialization
from support import steps_of_processes
from support.tolerances import assert_close

from jbn.demo import processes
from jbn.demo.options import Options, check_processes

pytestmark = pytest.mark.standard_promotion

TESTS = Path(__file__).parents[1]
TIME_LIMIT = 300
"""Seconds after which a process that waits for another in vain is ended."""
SMALL = ("-m", "support.small_network", "train", "--batch-size", 16)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A function that starts Python with one CPU device, for what it prints to be read.

    The processes share what they compile, and compile it without optimizations: that is most of their time.
    """
    environment = {
        **{name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(TESTS),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def started(*arguments):
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return started


def finished(started):
    """Exit status and output of each process; none is left behind."""
    try:
        outputs = [process.communicate(timeout=TIME_LIMIT)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


def coordinator():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def steps_in_turn(devices, dtype, folder):
    """The run after each step of one process, which leaves the run before each in the folder."""
    run, after = steps_of_processes.fresh_run(dtype), []
    after_step = steps_of_processes.make_stepper(devices, dtype)
    for number in range(steps_of_processes.STEPS):
        (folder / f"before_{number}").write_bytes(serialization.to_bytes(run))
        run = after_step(number, run)
        after.append(run)
    return after


@pytest.mark.slow
def test_steps_of_two_processes_equal_those_of_one(tmp_path, start, small, x64):
    """In float64, where a batch on one device is a fair comparison: in float32 another split rounds otherwise, and a
    rounding that carries a relu over its kink moves a gradient by far more than itself. So the tolerance is narrowest.
    """
    expected = steps_in_turn(jax.devices()[:1], "float64", tmp_path)
    command = ("-m", "support.steps_of_processes", coordinator(), 2)
    results = finished([start(*command, process, tmp_path, "float64") for process in range(2)])
    assert [status for status, _ in results] == [0, 0], results
    for number, one in enumerate(expected):
        two = serialization.from_bytes(one, (tmp_path / f"after_{number}").read_bytes())
        for actual, value in zip(jax.tree.leaves(two), jax.tree.leaves(one), strict=True):
            assert_close(actual, value, "float64")


SAVED, CUT, STEPS = 2, 3, 8
"""A run is killed while it writes the checkpoint of step CUT or of a later one, so that SAVED or a later one is whole.
It has so many steps that the kill comes before the last of them on a busy machine too."""


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


@pytest.mark.slow
def test_of_two_processes_the_first_alone_prints_and_writes(tmp_path, start):
    shared = (*SMALL, "--steps", 2, "--coordinator", coordinator(), "--num-processes", 2)
    started = [start(*shared, "--process-id", process, "--out", tmp_path / str(process)) for process in range(2)]
    (first, printed), (second, by_other) = finished(started)
    assert (first, second) == (0, 0), (printed, by_other)
    assert "step 2/2" in printed
    assert "step" not in by_other
    assert os.listdir(tmp_path) == ["0"]
    history = json.loads((tmp_path / "0" / "history.json").read_text())
    assert history["processes"] == len(history["device"]) == 2
    assert len(history["loss"]) == 2
    assert (tmp_path / "0" / "checkpoints" / "2").is_dir()


@pytest.mark.slow
def test_a_refusal_ends_all_processes(tmp_path, start):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mine.txt").write_text("mine")
    shared = ("-m", "jbn", "train", "--coordinator", coordinator(), "--num-processes", 2)
    started = [start(*shared, "--process-id", process, "--out", tmp_path) for process in range(2)]
    (first, said), (second, echoed) = finished(started)
    assert (first, second) == (2, 2), (said, echoed)
    assert "holds what is no checkpoint" in said
    assert "process 0 refused to start" in echoed


def test_the_coordinator_is_handed_to_jax(monkeypatch):
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given: joined.append(given))
    for options in (Options(), Options(coordinator="h:1", num_processes=2, process_id=1), Options(coordinator="auto")):
        check_processes(options)
        processes.join(options)
    assert joined == [("h:1", 2, 1), (None, None, None)]


def test_every_bit_comes_from_the_process_that_writes(monkeypatch):
    """Though what goes from one process to all is a sum with zeros."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    sums = processes.multihost_utils
    monkeypatch.setattr(sums, "broadcast_one_to_all", lambda tree: jax.tree.map(lambda array: array + 0, tree))
    sent = [np.array([[-0.0, np.nan, 1.5]], np.float32), np.array(7, np.int32), np.array(True), np.zeros((0, 2))]
    for actual, expected in zip(processes.from_writer(sent), sent, strict=True):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        assert actual.tobytes() == expected.tobytes()
