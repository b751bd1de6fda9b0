"""Several processes on one machine, joined as hosts are; and runs that are killed and resumed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint
import pytest
from flax import serialization
from support import steps_of_processes
from support.tolerances import assert_close

TIME_LIMIT = 300
"""Seconds after which a process that waits for another in vain is ended."""


def start(*command, devices=1):
    """A process with so many CPU devices, for what it prints to be read."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(started):
    """Exit status and output of each process; none is left behind."""
    try:
        outputs = [process.communicate(timeout=TIME_LIMIT)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def steps_in_turn(devices, dtype, folder):
    """The run after each step of one process, which leaves the run before each in the folder."""
    run, after = steps_of_processes.fresh_run(dtype), []
    after_step = steps_of_processes.make_stepper(devices, dtype)
    for number in range(steps_of_processes.STEPS):
        (folder / f"before_{number}").write_bytes(serialization.to_bytes(run))
        run = after_step(number, run)
        after.append(run)
    return after


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_steps_from_common_states_equal_those_of_one_process(request, tmp_path, dtype, count):
    """In float64 those of one device; in float32 those of as many devices, since another split rounds otherwise, and a
    rounding that carries a relu over its kink moves a gradient by far more than itself."""
    if dtype == "float64":
        request.getfixturevalue("x64")
    devices = jax.devices()[: count if dtype == "float32" else 1]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        expected = steps_in_turn(devices, dtype, tmp_path)
    command = (steps_of_processes.__file__, f"127.0.0.1:{free_port()}", count)
    results = finished([start(*command, process, tmp_path, dtype) for process in range(count)])
    assert [status for status, _ in results] == [0] * count, results
    for number, one in enumerate(expected):
        many = serialization.from_bytes(one, (tmp_path / f"after_{number}").read_bytes())
        for actual, value in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
            assert_close(actual, value, dtype)


def accuracy(folder):
    return json.loads((folder / "history.json").read_text())["looks"][-1]["held_out_running"]


@pytest.mark.parametrize("count", [2, 4])
def test_a_run_of_several_processes(tmp_path, count):
    """It learns, and process 0 alone prints and writes."""
    shared = ["-m", "jbn", "train", "--steps", 40, "--momentum", 0.9, "--coordinator", f"127.0.0.1:{free_port()}"]
    started = [
        start(*shared, "--num-processes", count, "--process-id", process, "--out", tmp_path / str(process))
        for process in range(count)
    ]
    (status, printed), *others = finished(started)
    assert status == 0, printed
    assert "step 40/40" in printed
    for status, printed in others:
        assert status == 0, printed
        assert "step" not in printed
    assert os.listdir(tmp_path) == ["0"]
    history = json.loads((tmp_path / "0" / "history.json").read_text())
    assert history["processes"] == len(history["device"]) == count
    assert accuracy(tmp_path / "0") > 0.95


def test_a_refusal_ends_all_processes(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mine.txt").write_text("mine")
    shared = ["-m", "jbn", "train", "--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2]
    started = [start(*shared, "--process-id", process, "--out", tmp_path) for process in range(2)]
    (first, said), (second, echoed) = finished(started)
    assert (first, second) == (2, 2), (said, echoed)
    assert "holds what is no checkpoint" in said
    assert "process 0 refused to start" in echoed


def trained(out, *options, **environment):
    return start("-m", "jbn", "train", "--steps", 12, "--checkpoint-every", 1, "--out", out, *options, **environment)


def kill_while_saving(process, folder, step):
    """End a run at once, while it writes the checkpoint of this step or of a later one."""
    deadline = time.monotonic() + TIME_LIMIT
    while time.monotonic() < deadline and process.poll() is None:
        names = os.listdir(folder) if folder.exists() else []
        if any(not name.isdigit() and int(name.split(".")[0]) >= step for name in names):
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def saved_after(out, step):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        return jax.tree.leaves(checkpointer.restore(out / "checkpoints" / str(step) / "run"))


def test_a_killed_run_resumes_where_it_was(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    ((status, printed),) = finished([trained(whole)])
    assert status == 0, printed
    folder = cut / "checkpoints"
    kill_while_saving(trained(cut), folder, 5)
    assert not (cut / "history.json").exists()
    left = max(int(name) for name in os.listdir(folder) if name.isdigit())
    assert left >= 4
    ((status, printed),) = finished([trained(cut, "--resume")])
    assert status == 0, printed
    assert f"resumed after step {left}\n" in printed
    assert f"step {left}/12" not in printed
    histories = [json.loads((out / "history.json").read_text()) for out in (whole, cut)]
    for name in ("loss", "train_accuracy", "looks", "population"):
        assert histories[0][name] == histories[1][name], name
    for actual, expected in zip(saved_after(cut, 12), saved_after(whole, 12), strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert all(name.isdigit() for name in os.listdir(folder))
