"""`jbn train`: the lesson it shows, what it writes, what it refuses."""

import json
import math
import shutil
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest

import jbn
from jbn.cli import main
from jbn.commands import train
from jbn.demo import checkpoints, data, loop, model, processes, report
from jbn.demo.options import Options, check_processes, momentum_from_text


@pytest.fixture(autouse=True)
def standard_promotion():
    """optax and the losses promote implicitly."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def digits():
    return data.load()


@pytest.fixture(scope="module")
def lesson(digits):
    """The article's example: the same training with three ways to average."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        options = {text: Options(momentum=text, steps=60, devices=1) for text in ("0.999", "0.9", "warmup:0.999")}
        return {text: (chosen, loop.train(chosen, digits, lambda look: None)) for text, chosen in options.items()}


def words(lines):
    """The lines as one, however they were wrapped."""
    return " ".join(" ".join(lines).split())


def with_look(result, look):
    """The result of a run whose only look is this one."""
    return result._replace(record=result.record._replace(looks=[look]))


def last_look(lesson, momentum):
    return lesson[momentum][1].record.looks[-1]


def test_training_does_not_see_the_momentum(lesson):
    slow, fast = lesson["0.999"][1], lesson["0.9"][1]
    assert slow.record.loss == fast.record.loss
    assert slow.record.train_accuracy == fast.record.train_accuracy
    chex.assert_trees_all_equal(slow.run.params, fast.run.params)


def test_inference_collapses_with_a_slow_average_and_few_steps(lesson):
    look = last_look(lesson, "0.999")
    assert look.held_out_batch > 0.95
    assert look.held_out_running < 0.5
    assert last_look(lesson, "0.9").held_out_running > 0.9


def test_warmup_recovers_most_of_it(lesson):
    look = last_look(lesson, "warmup:0.999")
    assert look.held_out_batch - 0.1 < look.held_out_running


def test_closing_lines_say_what_to_do(lesson):
    collapsed = words(report.closing_lines(*lesson["0.999"]))
    assert f"{0.999**60:.1%} of the running statistics is still the initial" in collapsed
    assert "--momentum warmup:0.999" in collapsed
    options, result = lesson["warmup:0.999"]
    stale = result.record.looks[-1]._replace(held_out_running=0.9, held_out_batch=0.97)
    lines = words(report.closing_lines(options, with_look(result, stale)))
    assert "0.0% of the running statistics is still the initial" in lines
    assert "what remains is early batches" in lines
    good = with_look(result, stale._replace(held_out_running=0.97))
    assert "Nothing: inference keeps" in report.closing_lines(options, good)[-1]
    diverged = with_look(result, stale._replace(loss=math.nan))
    assert "lower --learning-rate" in report.closing_lines(options, diverged)[-1]
    untrained = with_look(result, stale._replace(held_out_batch=0.4))
    assert "not trained yet" in report.closing_lines(options, untrained)[-1]
    for entry in report.closing_lines(*lesson["0.999"]):
        assert all(len(line) <= report.WIDTH for line in entry.splitlines())


def test_looks_hold_what_the_norm_saw(lesson):
    _, result = lesson["0.9"]
    mean, var = np.zeros(loop.CHANNELS), np.ones(loop.CHANNELS)
    for look in result.record.looks:
        mean = 0.9 * mean + 0.1 * np.array(look.batch.mean)
        var = 0.9 * var + 0.1 * np.array(look.batch.var)
        np.testing.assert_allclose(look.running.mean, mean, atol=1e-5)
        np.testing.assert_allclose(look.running.var, var, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 7, 300])
def test_memory_of_an_average(steps):
    start, age = report.memory("0.99", steps)
    np.testing.assert_allclose(start, 0.99**steps, rtol=1e-4)
    weights = 0.99 ** np.arange(steps)
    np.testing.assert_allclose(age, np.average(np.arange(steps), weights=weights), rtol=1e-3)
    start, age = report.memory("cumulative", steps)
    assert start == 0
    np.testing.assert_allclose(age, (steps - 1) / 2, rtol=1e-4)
    assert report.memory("1", steps) == report.memory("0.9", 0) == (1, 0)


def test_devices_share_their_statistics(digits):
    one, two = (
        loop.train(Options(steps=1, devices=devices), digits, lambda look: None).record.looks[0] for devices in (1, 2)
    )
    np.testing.assert_allclose(one.loss, two.loss, rtol=1e-5)
    np.testing.assert_allclose(one.running, two.running, rtol=1e-5, atol=1e-6)


def test_command_line_writes_and_tells(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "--steps", "12", "--momentum", "cumulative", "--devices", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("step ") >= 10
    assert "step 12/12" in printed
    assert "what to do" in printed
    assert (out / "picture.png").read_bytes().startswith(b"\x89PNG")
    history = json.loads((out / "history.json").read_text())
    assert len(history["loss"]) == len(history["train_accuracy"]) == 12
    assert history["options"]["seed"] == 0
    assert history["options"]["momentum"] == "cumulative"
    assert history["versions"]["jax"] == jax.__version__
    assert history["device"] == ["cpu"]
    params, state = model.init(jax.random.key(1))
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(out / "checkpoints" / "12" / "run")
    assert int(restored["state"]["stem"]["count"]) == 12
    chex.assert_trees_all_equal_shapes(restored["params"]["dense"], params["dense"])
    chex.assert_tree_all_finite(restored["params"])
    assert isinstance(state["stem"], jbn.State)


def test_a_process_that_does_not_write_only_trains(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(processes, "writes", lambda: False)
    monkeypatch.setattr(loop, "_look", lambda *given: pytest.fail("it looked at the network"))
    assert main(["train", "--steps", "1", "--devices", "1", "--out", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "run").exists()


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


def test_a_cpu_stands_for_several_devices(monkeypatch):
    asked = []
    with monkeypatch.context() as patched:
        patched.setattr(jax.config, "update", lambda *given: asked.append(given))
        train._make_cpu_devices(3)
        assert asked == []
        patched.delenv("XLA_FLAGS")
        for devices in (None, 0, 3):
            train._make_cpu_devices(devices)
        assert asked == [("jax_num_cpu_devices", 3)]
    assert len(jax.devices()) == 8
    monkeypatch.delenv("XLA_FLAGS")
    train._make_cpu_devices(3)
    assert len(jax.devices()) == 8


REFUSED = {
    "momentum too large": (["--momentum", "1.5"], "--momentum is '1.5'"),
    "unknown schedule": (["--momentum", "slow:0.9"], "warmup:0.99"),
    "no number": (["--momentum", "warmup"], "--momentum is 'warmup'"),
    "running_var": (["--running-var", "half"], "--running-var is 'half'"),
    "steps": (["--steps", "0"], "--steps is 0"),
    "batch too large": (["--batch-size", "2000"], "at most 1437"),
    "uneven batch": (["--batch-size", "100", "--devices", "3"], "a multiple of 3"),
    "devices": (["--devices", "99"], "--devices is 99: expected at most 8"),
    "learning rate": (["--learning-rate", "-1"], "--learning-rate is -1.0"),
    "no devices": (["--devices", "0"], "--devices is 0: expected at least 1"),
    "seed": (["--seed", "-1"], "--seed is -1"),
    "checkpoints": (["--checkpoint-every", "0"], "--checkpoint-every is 0: expected at least 1"),
    "no port": (["--coordinator", "localhost"], "expected HOST:PORT of process 0"),
    "no number of processes": (["--coordinator", "h:1", "--process-id", "0"], "--num-processes is None"),
    "process": (["--coordinator", "h:1", "--num-processes", "2", "--process-id", "2"], "expected one of 0 to 1"),
    "no coordinator": (["--process-id", "0"], "--process-id needs --coordinator HOST:PORT"),
    "no cluster": (["--coordinator", "auto"], "--coordinator is auto, where no run could be joined"),
    "large seed": (["--seed", str(2**70)], "expected 0 to 4294967295"),
    "no folder": (["--out", "/proc/nowhere"], "--out is /proc/nowhere, where no folder can be made"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_command_line_refuses(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--out", str(tmp_path / "run"), *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_command_line_keeps_a_file_that_is_in_the_way(tmp_path, capsys):
    path = tmp_path / "notes"
    path.write_text("mine")
    with pytest.raises(SystemExit):
        main(["train", "--out", str(path)])
    assert "which is a file" in capsys.readouterr().err
    assert path.read_text() == "mine"


def test_command_line_keeps_what_it_did_not_write(tmp_path, capsys):
    theirs = tmp_path / "checkpoints" / "mine.txt"
    theirs.parent.mkdir()
    theirs.write_text("mine")
    with pytest.raises(SystemExit):
        main(["train", "--out", str(tmp_path)])
    assert "holds what is no checkpoint" in capsys.readouterr().err
    assert theirs.read_text() == "mine"


def stop_after(monkeypatch, step):
    """Interrupt the next run after the checkpoint of a step."""
    save = checkpoints.save

    def save_and_stop(manager, progress, options):
        save(manager, progress, options)
        if progress.step == step:
            manager.wait_until_finished()
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save", save_and_stop)


def test_an_unfinished_run_is_resumed_and_not_lost(tmp_path, capsys, monkeypatch):
    arguments = ["train", "--steps", "4", "--devices", "1", "--checkpoint-every", "1", "--out", str(tmp_path)]
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        with pytest.raises(SystemExit) as ended:
            main(arguments)
    assert ended.value.code == 130
    assert "--resume goes on from the last checkpoint" in capsys.readouterr().err
    refused = {
        "a new run": (arguments, "a run of 4 steps that ended after step 2: give --resume"),
        "other options": ([*arguments, "--resume", "--seed", "1"], "--seed is 1, but the run in"),
        "fewer steps": ([*arguments, "--resume", "--steps", "2"], "was begun with 4: --resume needs the same"),
    }
    for more, message in refused.values():
        with pytest.raises(SystemExit) as ended:
            main(more)
        assert ended.value.code == 2
        assert message in words(capsys.readouterr().err.splitlines())
    assert main([*arguments, "--resume"]) == 0
    printed = capsys.readouterr().out
    assert "resumed after step 2" in printed
    assert "step 1/4" not in printed
    assert len(json.loads((tmp_path / "history.json").read_text())["loss"]) == 4


def test_a_finished_run_is_told_again_or_replaced(tmp_path, capsys):
    arguments = ["train", "--steps", "2", "--devices", "1", "--out", str(tmp_path)]
    assert main([*arguments, "--resume"]) == 0
    printed = capsys.readouterr().out
    assert "nothing to resume in" in printed
    assert main([*arguments, "--resume"]) == 0
    again = capsys.readouterr().out
    assert "resumed after step 2" in again
    assert again[again.index("held-out") :] == printed[printed.index("held-out") :]
    (tmp_path / "checkpoints" / "2" / "record" / "metadata").write_text("")
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--resume"])
    assert ended.value.code == 2
    assert "delete that folder" in words(capsys.readouterr().err.splitlines())
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    arguments[2] = "1"
    assert main(arguments) == 0
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_a_run_that_diverges_says_so(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["train", "--steps", "4", "--learning-rate", "1e30", "--devices", "1", "--out", str(out)]
    for _ in range(2):
        assert main(arguments) == 1
    printed = words(capsys.readouterr().out.splitlines())
    assert "lower --learning-rate" in printed
    assert "1 update in 4 steps" in printed
    history = json.loads((out / "history.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert history["loss"][-1] is None
    assert history["looks"][-1]["batch"]["mean"] == [None] * loop.CHANNELS


def test_an_interrupted_run_ends_quietly(tmp_path, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", interrupt)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--out", str(tmp_path)])
    assert ended.value.code == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_missing_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "jbn.demo.data")
    monkeypatch.delattr(jbn.demo, "data")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--out", str(tmp_path)])
    assert ended.value.code == 1
    assert "pip install 'jbn[demo]'" in capsys.readouterr().err


def test_a_fault_of_our_own_is_not_called_a_missing_extra(monkeypatch):
    def broken(options):
        raise ModuleNotFoundError("No module named 'jbn.absent'", name="jbn.absent")

    monkeypatch.setattr(train, "run", broken)
    with pytest.raises(ModuleNotFoundError, match=r"jbn\.absent"):
        main(["train"])


def test_elsewhere_there_is_a_line_now_and_then(capsys, lesson):
    with train._progress(60) as watch:
        for look in lesson["0.9"][1].record.looks:
            watch(look)
    lines = capsys.readouterr().out.splitlines()
    assert len(lesson["0.9"][1].record.looks) == 60
    assert [line.split()[1] for line in lines] == [f"{step}/60" for step in (1, *range(7, 60, 6), 60)]


def test_a_terminal_gets_a_bar(monkeypatch, capsys, lesson):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with train._progress(60) as watch:
        for look in lesson["0.9"][1].record.looks:
            watch(look)
    captured = capsys.readouterr()
    assert "60/60" in captured.err
    assert "held out" in captured.err
    assert captured.out == ""


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"jbn {jbn.__version__}\n"


def test_momentum_from_text():
    assert momentum_from_text("0.9") == 0.9
    assert float(momentum_from_text("warmup:0.5")(jnp.int32(9))) == 0.5
    assert float(momentum_from_text("debiased:0.5")(jnp.int32(0))) == 0
    assert float(momentum_from_text("cumulative")(jnp.int32(1))) == 0.5
