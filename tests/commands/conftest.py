"""Fixtures of the command tests: devices, a small network that compiles fast, and commands in this process."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
from support import small_network

from jbn.cli.main import main
from jbn.demo import model


@pytest.fixture(scope="session", autouse=True)
def devices():
    """Create the devices before any command runs, because a command could still change their number."""
    return jax.devices()


@pytest.fixture(scope="module")
def small():
    """Use one narrow block, compiled without optimizations, which would take longer than they save."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(model, "STAGES", small_network.STAGES)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


class Ended(NamedTuple):
    """Exit status and output of a command."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def command():
    """A function that runs a command line in this process."""

    def run(*arguments):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main([*map(str, arguments)])
            except SystemExit as ended:
                status = ended.code
        return Ended(status, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """A function that starts a Python process with one CPU device and captures its output.

    The process compiles without optimizations, because most of its time is compilation.
    """
    environment = {
        **{name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        # A separate cache, because a killed process can leave an incomplete entry.
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
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
