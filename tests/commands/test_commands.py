"""`jbn momentum` and `jbn inspect`: what they print, what they find, what they refuse."""

import os
import re
import runpy
import subprocess
import sys

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jbn
from jbn.cli import main


@pytest.fixture(autouse=True)
def standard_promotion():
    """optax and the losses promote implicitly."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


GOOD = jbn.State(jnp.full(3, 0.5), jnp.full(3, 2.0), jnp.int32(50))
PLANTED = {
    "nan": ("norm", GOOD._replace(mean=jnp.array([0.5, jnp.nan, 0.5])), "not finite"),
    "unset": ("norm", jbn.unset(GOOD), "unset"),
    "dead": ("norm", GOOD._replace(var=jnp.array([2.0, 0.0, 2.0])), "dead"),
    "stale": ("norm", GOOD._replace(count=jnp.int32(3)), "stale"),
    "never updated": ("norm", jbn.init(3)[1], "stale"),
    "no variance": ("norm", {"mean": GOOD.mean, "count": GOOD.count}, "missing"),
    "no mean": ("norm", {"var": GOOD.var, "count": GOOD.count}, "missing"),
    "no count": ("norm", {"mean": GOOD.mean, "var": GOOD.var}, "missing"),
}


def saved(tmp_path, tree, kind):
    path = tmp_path / kind
    if kind == "flax":
        path.write_bytes(flax.serialization.to_bytes(tree))
    elif kind == "orbax":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, tree)
    else:
        with ocp.CheckpointManager(path) as manager:
            for step in (9, 10):
                manager.save(step, args=ocp.args.StandardSave(tree if step == 10 else {"other": GOOD}))
    return path


def inspected(capsys, *arguments):
    status = main(["inspect", *map(str, arguments)])
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    return status, [line for line in lines if not line.startswith("/")], lines[-1]


@pytest.mark.parametrize("kind", ["orbax", "flax", "manager"])
@pytest.mark.parametrize(("norm", "node", "fault"), PLANTED.values(), ids=PLANTED)
def test_inspect_finds_each_planted_fault(tmp_path, capsys, kind, norm, node, fault):
    tree = {"block": {"good": GOOD, "better": GOOD, norm: node}, "dense": {"kernel": np.ones((2, 2), np.float32)}}
    status, lines, last = inspected(capsys, saved(tmp_path, tree, kind))
    assert status == 1
    assert last == "1 of 3 norms are faulty: block/norm"
    header, row = (
        re.split(r"\s{2,}", next(line for line in lines if line.startswith(word))) for word in ("norm", "block/norm")
    )
    found = dict(zip(header, row, strict=True))
    assert {name for name, value in found.items() if name in FAULTS and value not in ("0", "-")} >= {fault}


FAULTS = ("dead", "unset", "not finite", "far", "stale", "missing")


def test_inspect_is_content_with_what_is_whole(tmp_path, capsys):
    path = saved(tmp_path, {"a": GOOD, "b": GOOD}, "orbax")
    assert inspected(capsys, path)[::2] == (0, "nothing is wrong")
    assert inspected(capsys, path, "--momentum", 0.5)[::2] == (0, "nothing is wrong")
    status, lines, _ = inspected(capsys, path, "--momentum", 0.99)
    assert status == 1
    assert "61% is still the start" in "\n".join(lines)
    (tmp_path / "right").mkdir()
    right = saved(tmp_path / "right", {"a": GOOD, "b": GOOD._replace(mean=GOOD.mean + 9)}, "flax")
    assert inspected(capsys, path, "--population", right)[::2] == (1, "1 of 2 norms are faulty: b")


def test_inspect_finds_the_run_of_jbn_train(tmp_path, capsys):
    assert main(["train", "--steps", "2", "--devices", "1", "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "calibrated: with the training set's statistics" in printed
    assert "output = ratio * right output + shift" in printed
    assert inspected(capsys, tmp_path / "run")[::2] == (0, "nothing is wrong")
    assert inspected(capsys, tmp_path / "run", "--momentum", 0.99)[0] == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent", "where there is nothing"), ("empty", "0 checkpoints of orbax"), ("text", "holds no whole checkpoint")],
)
def test_inspect_refuses(tmp_path, capsys, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("no checkpoint")
    with pytest.raises(SystemExit) as end:
        main(["inspect", str(tmp_path / name)])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_inspect_without_statistics(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["inspect", str(saved(tmp_path, {"kernel": np.ones(3, np.float32)}, "flax"))])
    assert end.value.code == 2
    assert "holds no statistics" in capsys.readouterr().err


def test_a_pipe_that_closes_early(tmp_path):
    listing = subprocess.run(
        f"{sys.executable} -m jbn momentum --steps 100 | head -n 1; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        check=False,
    )
    assert listing.stdout.startswith("100 steps of 32 values")
    assert listing.stderr == ""


def test_nothing_fails_at_the_end_where_nobody_reads(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as unread, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", unread)
        assert main(["momentum", "--steps", "100"]) == 1


def test_python_runs_the_package(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jbn", "momentum", "--steps", "100"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("jbn", run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("100 steps of 32 values")


def test_momentum_tells_what_the_laws_say(tmp_path, capsys):
    picture = tmp_path / "momentum.png"
    assert main(["momentum", "--steps", "1000", "--batch-size", "32", "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    best = f"{jbn.diagnostics.best_momentum(1000, 32):.5f}"
    assert f"{best}, the best" in printed
    assert f"jbn.momentum.warmup({best})" in printed
    assert main(["momentum", "--steps", "1000000"]) == 0
    assert "Take momentum=0.99999" in capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("0.999 "))
    assert f"{0.999**1000:.2%}" in row
    assert f"{jbn.diagnostics.expected_error(0.999, 1000, 32) ** 0.5:.4g}" in row
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["momentum", "--distance", "0"]) == 0
    assert "The start is right already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps is 0: expected a finite number of at least 1"),
        (["--steps", "1000000000"], "--steps is 1000000000: expected at most 10000000"),
        (["--batch-size", "-3"], "--batch-size is -3"),
        (["--distance", "nan"], "--distance is nan"),
        (["--plot", "picture.unknown"], "--plot is picture.unknown"),
        (["--plot", "absent/picture.png"], "--plot is absent/picture.png"),
    ],
)
def test_momentum_refuses(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["momentum", *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
