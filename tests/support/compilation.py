"""A jit for programs that run once or twice, where LLVM's optimization takes longer than it saves."""

import functools

import jax

UNOPTIMIZED = {"xla_backend_optimization_level": 0}
"""Level 0 skips only passes after those in which XLA decides about devices and memory."""
compiled = functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
