"""What the compiled programs move and keep, so that no later change loses it unseen."""

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
    # of a case and a mode: passes over an array like x, and temporary arrays like x
    (CONV, "inference"): (2, 0),
    (CONV, "backward"): (6, 0),
    (CONV, "forward+backward"): (10, 0),
    (CONV._replace(relu=True), "forward"): (4, 0),
    (CONV._replace(relu=True), "backward"): (9, 0),
    (CONV._replace(relu=True), "forward+backward"): (13, 0),
    (CONV._replace(dtype="bfloat16"), "inference"): (2, 0),
    (CONV._replace(dtype="bfloat16"), "backward"): (11, 2),
    (CONV._replace(dtype="bfloat16", relu=True), "forward"): (4, 0),
    (CONV._replace(dtype="bfloat16", relu=True), "backward"): (13, 2),
}


@pytest.fixture(scope="module", autouse=True)
def unoptimized():
    """LLVM's optimization comes after all that is read here, and takes time."""
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


def test_a_cheap_derivative_is_repeated_on_a_gpu_alone():
    """By barriers, without which XLA would write it to memory for both of its users."""
    params, state = jbn.init(3)

    def barriers(activation, *platforms):
        def loss(x):
            return jnp.sum(jbn.batch_norm(params, state, x, True, activation=activation)[0] ** 2)

        traced = jax.jit(jax.grad(loss)).trace(jnp.ones((8, 3)))
        return [
            traced.lower(lowering_platforms=(platform,)).as_text().count("optimization_barrier")
            for platform in platforms
        ]

    assert barriers(jax.nn.relu, "cuda", "cpu", "tpu") == [2, 0, 0]
    assert barriers(jax.nn.gelu, "cuda") == [0]
    assert barriers(None, "cuda") == [0]
