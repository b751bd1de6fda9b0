"""The networks and chains of layers that `jbn bench` measures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.compilation import compiled
from support.tolerances import assert_close

from jbn.bench import networks, programs, report, run, steps, torch_programs
from jbn.bench.cases import Case, Chain
from jbn.bench.layers import LAYERS

JBN = LAYERS["jbn"]()
CHAINS = [Chain(name, 32, 8, 2, name == "scanned", "float32") for name in ("unrolled", "scanned")]
chain_program = functools.cache(programs.chain_program)


def test_chains_are_measured_where_a_library_has_them(monkeypatch):
    """PyTorch has no scan. A copy program replaces its chain here."""
    other = programs.copy_program(Case("small", (16, 8, 4)))._replace(compiled=None)
    monkeypatch.setattr(programs, "chain_program", chain_program)
    monkeypatch.setattr(torch_programs, "chain_program", lambda chain: other)
    layers = {"jbn": JBN, "torch-last": None, "torch-first": None}
    unrolled, scanned = run.run(CHAINS, layers, 1)
    assert unrolled.seconds.keys() == {"jbn", "torch-last"}
    assert scanned.seconds.keys() == {"jbn"}
    ((name, mode, _, memory, torch),) = report.times([scanned], ["torch-last"]).rows
    assert (name, mode, memory, torch) == ("scanned 2x32x8 float32", "forward+backward", None, None)
    ((*_, of, passes, _, _, kept),) = report.counts([scanned], ["jbn", "linen"]).rows
    assert (of, passes, kept) == ("jbn", None, None)


def assert_orthogonal(gradient, weights):
    """The norm after a layer removes the scale of each column of the weights, so the loss cannot depend on it."""
    weights, gradient = np.asarray(weights, np.float64), np.asarray(gradient, np.float64)
    assert weights.shape == gradient.shape == (2, 8, 8)
    lengths = np.linalg.norm(weights, axis=1) * np.linalg.norm(gradient, axis=1)
    assert np.all(lengths > 0)
    # Epsilon leaves a small dependence on the scale.
    np.testing.assert_array_less(np.abs((weights * gradient).sum(1)), 1e-3 * lengths)


def test_gradients_of_a_chain_are_those_of_a_scan_and_do_not_scale_its_weights():
    gradients = []
    for chain in CHAINS:
        program = chain_program(JBN, chain)
        weights, *_ = given = program.prepare(0)
        gradients.append(program.run(given)[1])
        assert_orthogonal(gradients[-1], weights)
    assert_close(*gradients)


@pytest.mark.needs("torch")
def test_gradients_of_pytorchs_chain_do_not_scale_its_weights(monkeypatch):
    import torch

    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, weights: (weights, *grad(loss, weights)))
    program = torch_programs.chain_program(CHAINS[0])
    weights, gradient = (tensor.detach().numpy() for tensor in program.run(program.prepare(0)))
    assert_orthogonal(gradient, weights)


@pytest.mark.standard_promotion
def test_the_network_is_resnet_50():
    """The ResNet-50 of PyTorch has 25,557,032 parameters too."""
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.bfloat16)
    of_flax, of_jbn, _ = (
        jax.eval_shape(networks.ResNet(norm).init, jax.random.key(0), images) for norm in networks.NORMS.values()
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(of_flax["params"])) == 25_557_032
    assert of_jbn == of_flax


SMALL = {
    "resnet": steps.Step("resnet", functools.partial(networks.ResNet, blocks=(2,)), (4, 16, 16, 3), "float32"),
    "masked": steps.Step("masked", functools.partial(networks.Sequences, width=8), (8, 6, 4), "float32"),
}


@pytest.mark.parametrize("step", SMALL.values(), ids=SMALL)
@pytest.mark.slow
@pytest.mark.standard_promotion
def test_every_norm_takes_the_same_step_and_learns(step, monkeypatch):
    """Compile without LLVM optimizations, which would take longer than they save, and with one learning rate."""
    monkeypatch.setattr(jax, "jit", compiled)
    monkeypatch.setattr(steps, "_descent", lambda: optax.sgd(0.1, momentum=0.9))
    monkeypatch.setattr(steps, "FIRST_STEPS", 1)
    batch = steps._batch(step, 0)
    _, found, held = steps.first_steps(step, list(networks.NORMS), batch, lambda what: None)
    results = {name: program(*held, *batch) for name, program in found.items()}
    for name in ("jbn", "jbn-inside"):
        for actual, expected in zip(*map(jax.tree.leaves, (results[name], results["linen"])), strict=True):
            assert_close(actual, expected, condition=16, scale=1)
    *later, loss = results["jbn"]
    assert found["jbn"](*later, *batch)[-1] < loss
