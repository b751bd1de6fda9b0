"""What the tests of commands share: the devices, a network that compiles soon, and commands run in this process."""

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
    """Made before any command runs, which may still ask for another number of them until then."""
    return jax.devices()


@pytest.fixture(scope="module")
def small():
    """One narrow block, compiled without optimizations, which would take longer than they save."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(model, "STAGES", small_network.STAGES)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


class Ended(NamedTuple):
    """How a command ended, and what it printed."""

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
    """A function that starts Python with one CPU device, for what it prints to be read.

    They compile without optimizations, which is most of their time.
    """
    environment = {
        **{name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        # Of their own, since a process that is killed may leave half an entry.
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
