"""`jbn train` in several processes on this machine, connected as hosts are."""

import json
import os
import socket

import jax
import numpy as np
import pytest
from flax import serialization
from support import steps_of_processes
from support.compilation import compiled
from support.subprocesses import SMALL, finished
from support.tolerances import assert_close

from jbn.demo import model, processes
from jbn.demo.options import Options, check_processes

pytestmark = pytest.mark.standard_promotion


def coordinator():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def steps_in_turn(devices, dtype, folder):
    """The run after each step of one process. The folder then holds the run before each step."""
    run, after = steps_of_processes.fresh_run(dtype, compiled(lambda key: model.init(key))), []
    after_step = steps_of_processes.make_stepper(devices, dtype)
    for number in range(steps_of_processes.STEPS):
        (folder / f"before_{number}").write_bytes(serialization.to_bytes(run))
        run = after_step(number, run)
        after.append(run)
    return after


@pytest.mark.slow
def test_steps_of_two_processes_equal_those_of_one(tmp_path, start, small, x64):
    """Compare in float64, with the narrowest tolerance. In float32, another split of the batch rounds differently, and
    rounding that changes the sign of the input of a relu changes a gradient by far more than its own size.
    """
    expected = steps_in_turn(jax.devices()[:1], "float64", tmp_path)
    command = ("-m", "support.steps_of_processes", coordinator(), 2)
    results = finished([start(*command, process, tmp_path, "float64") for process in range(2)])
    assert [status for status, _ in results] == [0, 0], results
    for number, one in enumerate(expected):
        two = serialization.from_bytes(one, (tmp_path / f"after_{number}").read_bytes())
        for actual, value in zip(jax.tree.leaves(two), jax.tree.leaves(one), strict=True):
            assert_close(actual, value, "float64")


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
    assert "holds files that are not checkpoints" in said
    assert "process 0 did not start" in echoed


def test_the_coordinator_is_handed_to_jax(monkeypatch):
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given: joined.append(given))
    for options in (Options(), Options(coordinator="h:1", num_processes=2, process_id=1), Options(coordinator="auto")):
        check_processes(options)
        processes.join(options)
    assert joined == [("h:1", 2, 1), (None, None, None)]


def test_every_bit_comes_from_the_process_that_writes(monkeypatch):
    """The transport between processes adds zeros to the values."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    sums = processes.multihost_utils
    monkeypatch.setattr(sums, "broadcast_one_to_all", lambda tree: jax.tree.map(lambda array: array + 0, tree))
    sent = [np.array([[-0.0, np.nan, 1.5]], np.float32), np.array(7, np.int32), np.array(True), np.zeros((0, 2))]
    for actual, expected in zip(processes.from_writer(sent), sent, strict=True):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        assert actual.tobytes() == expected.tobytes()
