"""A jit for programs that run once or twice, for which LLVM's optimization would take longer than it saves."""

import functools

import jax

UNOPTIMIZED = {"xla_backend_optimization_level": 0}
"""What is left out comes after all that XLA decides about devices and memory."""
compiled = functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
