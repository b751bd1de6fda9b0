"""How commands start, and how they end if a pipe closes, an extra is missing, or the user interrupts them."""

import os
import runpy
import subprocess
import sys

import pytest

import jbn
from jbn.cli import momentum, train
from jbn.cli.main import main

pytestmark = pytest.mark.standard_promotion


def test_the_version_is_told(command):
    assert command("--version").out == f"jbn {jbn.__version__}\n"


def test_python_runs_the_package(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jbn", "momentum", "--steps", "100"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("jbn", run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("100 steps of 32 values")


def test_a_pipe_that_closes_early_ends_the_command_quietly():
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


def test_a_command_that_is_interrupted_ends_quietly(command, monkeypatch):
    """`jbn train` also says how to continue, see test_train_resume.py."""

    def interrupt(given):
        raise KeyboardInterrupt

    monkeypatch.setattr(momentum, "run", interrupt)
    ended = command("momentum")
    assert (ended.status, ended.out, ended.err) == (130, "", "\njbn momentum: interrupted\n")


def test_a_missing_extra_is_named(command, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "jbn.demo.data", raising=False)
    monkeypatch.delattr(jbn.demo, "data", raising=False)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    ended = command("train", "--out", tmp_path)
    assert ended.status == 1
    assert "pip install 'jbn[demo]'" in ended.err


def test_a_fault_of_our_own_is_not_called_a_missing_extra(monkeypatch):
    def broken(options):
        raise ModuleNotFoundError("No module named 'jbn.absent'", name="jbn.absent")

    monkeypatch.setattr(train, "run", broken)
    with pytest.raises(ModuleNotFoundError, match=r"jbn\.absent"):
        main(["train"])
