"""Settings for examples and scripts, which compile many programs and run each once or twice."""

import jax
import pytest


@pytest.fixture(autouse=True)
def quick_compilation():
    """Disable the optimization by LLVM, which would take more time than it saves."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
