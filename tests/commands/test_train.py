"""`jbn train`: the files and the output, the devices, and processes that only train."""

import json
import sys
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest

from jbn.cli import train
from jbn.demo import data, loop, model, processes
from jbn.demo.history import Look, Watched
from jbn.demo.options import Options, momentum_from_text

pytestmark = [pytest.mark.standard_promotion, pytest.mark.usefixtures("small")]

BATCH = 32


class Finished(NamedTuple):
    """The folder of a finished run, its history, and its exit status and output."""

    folder: object
    history: dict
    ended: object


@pytest.fixture(scope="module")
def run(small, command, tmp_path_factory):
    """A run of 12 steps with the cumulative average."""
    folder = tmp_path_factory.mktemp("run")
    options = ("--steps", 12, "--momentum", "cumulative", "--batch-size", BATCH, "--devices", 1)
    ended = command("train", *options, "--out", folder)
    assert ended.status == 0, ended.err
    return Finished(folder, json.loads((folder / "history.json").read_text()), ended)


def test_a_run_prints_its_steps_and_what_they_came_to(run):
    printed = run.ended.out
    assert printed.count("step ") >= 10
    assert "step 12/12" in printed
    assert "what to do" in printed
    assert "with calibrated statistics (jbn.calibrate on the training set)" in printed
    assert "output = ratio * calibrated output + shift" in printed


def test_a_run_writes_a_picture_and_its_history(run):
    assert (run.folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert len(run.history["loss"]) == len(run.history["train_accuracy"]) == 12
    assert run.history["options"]["seed"] == 0
    assert run.history["options"]["momentum"] == "cumulative"
    assert run.history["versions"]["jax"] == jax.__version__
    assert run.history["device"] == ["cpu"]


def test_the_checkpoint_holds_parameters_and_statistics(run):
    params, _ = jax.eval_shape(model.init, jax.random.key(1))
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(run.folder / "checkpoints" / "12" / "run")
    assert (restored["state"]["stem"]["count"] == 12).all()
    chex.assert_trees_all_equal_shapes(restored["params"]["dense"], params["dense"])
    chex.assert_tree_all_finite(restored["params"])


def test_inspect_finds_the_checkpoint_of_a_run(run, command):
    whole, slow = (command("inspect", run.folder, *more) for more in ((), ("--momentum", 0.99)))
    assert whole.status == 0
    assert whole.out.splitlines()[-1].startswith("no fault found")
    assert slow.status == 1


def test_looks_hold_what_the_norm_saw(run):
    """The running statistics are the average of the batch statistics so far."""
    looks = run.history["looks"]
    assert len(looks) == 12
    for statistic in ("mean", "var"):
        seen = np.array([look["batch"][statistic] for look in looks])
        averages = np.cumsum(seen, axis=0) / np.arange(1, 13)[:, None]
        np.testing.assert_allclose([look["running"][statistic] for look in looks], averages, atol=1e-5)


@pytest.mark.devices(2)
def test_two_devices_share_their_statistics(run):
    options = Options(steps=1, batch_size=BATCH, momentum="cumulative", devices=2)
    (two,) = loop.train(options, data.load(), lambda look: None).record.looks
    one = run.history["looks"][0]
    np.testing.assert_allclose(one["loss"], two.loss, rtol=1e-5)
    for statistic in ("mean", "var"):
        np.testing.assert_allclose(one["running"][statistic], getattr(two.running, statistic), rtol=1e-5, atol=1e-6)


@pytest.mark.devices(2)
@pytest.mark.cpu
def test_a_step_on_several_cpu_devices_waits_for_the_last(monkeypatch):
    """XLA's collectives on the CPU hang when programs in flight share the threads."""
    make_step, last = loop.make_step, []

    def watched(*given, **options):
        step = make_step(*given, **options)

        def checked(run, batch):
            assert all(metrics.loss.is_ready() for metrics in last)
            run, metrics = step(run, batch)
            last[:] = [metrics]
            return run, metrics

        return checked

    monkeypatch.setattr(loop, "LOOKS", 2)
    monkeypatch.setattr(loop, "make_step", watched)
    loop.train(Options(steps=20, batch_size=BATCH, devices=2), data.load(), lambda look: None)
    assert last


def test_a_process_that_does_not_write_only_trains(tmp_path, command, monkeypatch):
    monkeypatch.setattr(processes, "writes", lambda: False)
    monkeypatch.setattr(loop, "_look", lambda *given: pytest.fail("it looked at the network"))
    out = tmp_path / "run"
    ended = command("train", "--steps", 1, "--batch-size", BATCH, "--devices", 1, "--out", out)
    assert (ended.status, ended.out) == (0, "")
    assert not out.exists()


def test_a_cpu_stands_for_several_devices_until_jax_is_used(monkeypatch):
    """Unless XLA_FLAGS sets the number of devices."""
    asked = []
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    with monkeypatch.context() as patched:
        patched.setattr(jax.config, "update", lambda *given: asked.append(given))
        for devices in (None, 0, 3):
            train._make_cpu_devices(devices)
        assert asked == [("jax_num_cpu_devices", 3)]
        patched.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
        train._make_cpu_devices(4)
        assert asked == [("jax_num_cpu_devices", 3)]
    before = jax.devices()
    train._make_cpu_devices(len(before) + 1)
    assert jax.devices() == before


LOOKS = [Look(step, 0.5, 0.75, 0.5, 0.625, Watched([0.0], [1.0]), Watched([0.0], [1.0])) for step in range(1, 61)]


def test_where_nobody_watches_a_line_is_printed_now_and_then(capsys):
    with train._progress(60) as watch:
        for look in LOOKS:
            watch(look)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/60" for step in (1, *range(7, 60, 6), 60)]
    assert lines[-1] == "step 60/60  loss 0.5000  accuracy: train 75.0%, held out 50.0% (62.5% with batch statistics)"


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with train._progress(60) as watch:
        for look in LOOKS:
            watch(look)
    captured = capsys.readouterr()
    assert "60/60" in captured.err
    assert "held out" in captured.err
    assert captured.out == ""


def test_momentum_is_read_from_text():
    assert momentum_from_text("0.9") == 0.9
    assert float(momentum_from_text("warmup:0.5")(jnp.int32(9))) == 0.5
    assert float(momentum_from_text("debiased:0.5")(jnp.int32(0))) == 0
    assert float(momentum_from_text("cumulative")(jnp.int32(1))) == 0.5
