"""Devices of the tests, markers for packages and devices that a test needs, and strict promotion for jbn."""

import importlib.util
import os
import re
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("KERAS_BACKEND", "jax")
# Workers, child processes and later runs share compiled programs: a second run takes half the time.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import numpy as np
import pytest
from hypothesis import settings

if jax.config.jax_platforms == "cpu" and "device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", 8)
settings.register_profile("quick", max_examples=10, deadline=None, derandomize=True, database=None)
settings.register_profile("thorough", max_examples=2000, deadline=None)
settings.register_profile("free_shapes", max_examples=200, deadline=None)
settings.load_profile("quick")


def pytest_addoption(parser):
    parser.addoption("--may-skip", metavar="REGEX", help="fail if a test is skipped for another reason")


def pytest_sessionfinish(session, exitstatus):
    allowed = session.config.getoption("--may-skip")
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if allowed is None or reporter is None or exitstatus != 0:
        return
    reasons = [str(report.longrepr) for report in reporter.stats.get("skipped", ())]
    if others := [reason for reason in reasons if not re.search(allowed, reason)]:
        reporter.write_line("\n".join(["Skipped for a reason that --may-skip does not allow:", *others]), red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Skip tests that cannot run here, because a package, devices or a CPU that a marker requires is missing."""
    packages = [package for marker in item.iter_markers("needs") for package in marker.args]
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} is not installed: pip install -e '.[peers]'")
    devices = item.get_closest_marker("devices")
    if devices and jax.device_count() < devices.args[0]:
        pytest.skip(f"needs {devices.args[0]} devices, but {jax.default_backend()} has {jax.device_count()}")
    if item.get_closest_marker("cpu") and jax.default_backend() != "cpu":
        pytest.skip(f"reads a program compiled for a CPU, but the backend is {jax.default_backend()}")


@pytest.fixture(autouse=True)
def strict_promotion(request):
    """Raise an error for implicit promotion of ranks and dtypes in jbn. Flax, optax and the peers may use it."""
    if request.node.get_closest_marker("standard_promotion") or request.node.get_closest_marker("needs"):
        yield
        return
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(autouse=True)
def scopes_of_this_program(request):
    """Tests that read a compiled program use it with its own names, not a cached one with names of another program."""
    if not request.node.get_closest_marker("cpu"):
        yield
        return
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    yield
    jax.config.update("jax_compilation_cache_include_metadata_in_key", False)


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def debug_nans():
    jax.config.update("jax_debug_nans", True)
    yield
    jax.config.update("jax_debug_nans", False)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
