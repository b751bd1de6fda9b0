"""Examples and scripts compile many programs and run each of them once or twice."""

import jax
import pytest


@pytest.fixture(autouse=True)
def quick_compilation():
    """LLVM's optimization would take longer than it saves."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
