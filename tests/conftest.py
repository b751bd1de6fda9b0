"""Eight host devices for every test, strict promotion for those of jbn, and 64-bit arithmetic on demand."""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import numpy as np
import pytest
from hypothesis import settings

settings.register_profile("quick", max_examples=20, deadline=None, derandomize=True, database=None)
settings.register_profile("thorough", max_examples=2000, deadline=None)
settings.register_profile("free_shapes", max_examples=200, deadline=None)
settings.load_profile("quick")


def pytest_addoption(parser):
    parser.addoption("--no-skips", action="store_true", help="fail when a test was skipped")


def pytest_sessionfinish(session, exitstatus):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter is not None and reporter.stats.get("skipped")
    if session.config.getoption("--no-skips") and skipped and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def strict_promotion(request):
    """Implicit promotion of ranks and dtypes is an error in jbn; peers are free to use it."""
    if request.node.get_closest_marker("peers"):
        yield
        return
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


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
