"""Memory traffic and temporary memory of compiled programs, so that a regression fails a test."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from jbn.bench import counts, data, programs
from jbn.bench.cases import Case, Chain
from jbn.bench.layers import LAYERS

CONV = Case("conv", (8, 28, 28, 128))
MOST = {
    # For a case and a mode: passes over an array as large as x, and temporary arrays as large as x.
    (CONV, "inference"): (2, 0),
    (CONV, "backward"): (8, 0),
    (CONV, "forward+backward"): (14, 0),
    (CONV._replace(relu=True), "forward"): (6, 0),
    (CONV._replace(relu=True), "backward"): (11, 1),
    (CONV._replace(relu=True), "forward+backward"): (20, 2),
    (CONV._replace(dtype="bfloat16"), "inference"): (2, 0),
    (CONV._replace(dtype="bfloat16"), "backward"): (15, 4),
    (CONV._replace(dtype="bfloat16", relu=True), "forward"): (10, 2),
    (CONV._replace(dtype="bfloat16", relu=True), "backward"): (20, 6),
}


@pytest.fixture(scope="module", autouse=True)
def unoptimized():
    """LLVM's optimization comes after everything that is read here, so it is skipped to save time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.cpu
@pytest.mark.parametrize(("case", "mode"), MOST)
def test_passes_and_temporary_memory(case, mode):
    given = data.on_device([data.batch(case, np.random.default_rng(0))], channels_first=False)
    found = counts.count(programs.layer_program(LAYERS["jbn"](), case, mode, given).compiled, case.size)
    passes, temporaries = MOST[case, mode]
    assert found.passes <= passes
    assert found.temporary_bytes < (temporaries + 0.1) * case.size


@pytest.mark.cpu
@pytest.mark.standard_promotion
@pytest.mark.parametrize(("dtype", "most"), [("float32", 0.70), ("bfloat16", 0.75)])
def test_scanned_layers_need_less_memory_than_flax(dtype, most):
    chain = Chain("scanned", 256, 64, 8, True, dtype)
    ours, theirs = (
        programs.chain_program(LAYERS[name](), chain).compiled.memory_analysis().temp_size_in_bytes
        for name in ("jbn", "linen")
    )
    assert ours <= most * theirs


COMPILED = "/jax/core/compile/backend_compile_duration"


def test_numbers_as_momentum_and_bounds_compile_once():
    """A hundred numbers of at least 1/2: which side of 1/2 a momentum is on is static in the program."""
    params, state = jbn.init(3)
    x, compiled = jnp.ones((8, 3)), []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))

    def everything(number):
        jbn.batch_norm(params, state, x, True, momentum=number)
        jbn.batch_renorm(params, state, x, True, momentum=number, r_max=1 + number, d_max=number)
        jbn.update(state, jbn.Moments(*state), momentum=number)

    everything(0.5)
    assert COMPILED in compiled
    compiled.clear()
    for number in np.linspace(0.5, 1, 100):
        everything(number)
    assert COMPILED not in compiled


def test_norms_of_one_shape_are_traced_once_for_values_and_derivatives():
    """An activation is called once in its check, once for the value, and once for each term of the tangent."""
    params, state = jbn.init(3)
    calls = []

    def activation(x):
        calls.append(x)
        return jax.nn.silu(x)

    def loss(x):
        for _ in range(3):
            x, _ = jbn.batch_norm(params, state, x, True, activation=activation)
        return jnp.sum(x)

    jax.jit(jax.grad(loss)).trace(jnp.ones((4, 3)))
    assert len(calls) == 5


BARRIERS = {
    # Options, dtype of x, and the number of barriers in a program for a GPU, a TPU and a CPU. On a TPU, one of them is
    # for the center about which sums are computed again.
    "an activation": ({"activation": jax.nn.silu}, "float32", [2, 3, 2]),
    "none": ({}, "float32", [0, 1, 0]),
    "none, bfloat16": ({}, "bfloat16", [1, 1, 0]),
    "a join": ({"activation": jax.nn.relu, "shortcut": jnp.ones((8, 3))}, "float32", [1, 1, 0]),
    "a mask": ({"mask": jnp.ones(8, bool)}, "float32", [1, 1, 1]),
}


def test_barriers_stand_where_a_compiler_would_lose_time_or_memory_without_them():
    """`for_xla.py` says what each barrier is for."""
    params, state = jbn.init(3)
    for name, (options, dtype, expected) in BARRIERS.items():

        def loss(x, options=options):
            return jnp.sum(jbn.batch_norm(params, state, x, True, **options)[0].astype(jnp.float32) ** 2)

        traced = jax.jit(jax.grad(loss)).trace(jnp.ones((8, 3), dtype))
        programs = [traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cuda", "tpu", "cpu")]
        assert [program.count("optimization_barrier") for program in programs] == expected, name
