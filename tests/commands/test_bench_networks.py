"""The chains of layers and the ResNet-50 that `jbn bench` measures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.compilation import compiled
from support.tolerances import assert_close

import jbn
from jbn.bench import programs, report, resnet50, run, torch_programs
from jbn.bench.cases import Case, Chain, Network
from jbn.bench.layers import LAYERS

JBN = LAYERS["jbn"]()
CHAINS = [Chain(name, 32, 8, 2, name == "scanned", "float32") for name in ("unrolled", "scanned")]
chain_program = functools.cache(programs.chain_program)
NORM = resnet50.Norm(
    jbn.init, lambda params, state, x, activation: jbn.batch_norm(params, state, x, True, activation=activation)
)


def test_chains_are_measured_where_a_library_has_them(monkeypatch):
    """PyTorch has no scan; another program stands for its chain here."""
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
    """The norm after a layer takes the scale of each column of the weights away: the loss cannot change with it."""
    weights, gradient = np.asarray(weights, np.float64), np.asarray(gradient, np.float64)
    assert weights.shape == gradient.shape == (2, 8, 8)
    lengths = np.linalg.norm(weights, axis=1) * np.linalg.norm(gradient, axis=1)
    assert np.all(lengths > 0)
    # Within what epsilon leaves of the scale.
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


def test_the_network_is_resnet_50():
    """PyTorch's has 25,557,032 parameters too, of which 1000 are the bias of its last layer."""
    params, state = jax.eval_shape(functools.partial(resnet50.init, norm=NORM), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 25_557_032 - 1000
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.bfloat16)
    logits, new_state = jax.eval_shape(functools.partial(resnet50.apply, NORM), params, state, images)
    assert (logits.shape, logits.dtype) == ((2, 1000), jnp.float32)
    assert new_state == state


@pytest.fixture
def small_network(monkeypatch):
    """A stem and a few blocks, compiled without LLVM's optimization, which would take longer than it saves."""

    def of_blocks(number):
        monkeypatch.setattr(resnet50, "STAGES", ((4, number),))
        monkeypatch.setattr(resnet50, "HALVES", (("stem",), ("stage0",)))
        monkeypatch.setattr(jax, "jit", compiled)

    return of_blocks


def test_a_scan_over_blocks_changes_nothing(small_network):
    small_network(3)
    params, state = jax.jit(functools.partial(resnet50.init, norm=NORM, classes=10))(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    unrolled, scanned = (
        jax.jit(functools.partial(resnet50.apply, NORM, scan=scan))(params, state, images) for scan in (False, True)
    )
    assert scanned[0].shape == (4, 10)
    for actual, expected in zip(jax.tree.leaves(scanned), jax.tree.leaves(unrolled), strict=True):
        assert_close(actual, expected)


@pytest.mark.slow
def test_a_step_of_the_network_learns_and_is_the_same_under_the_policy(small_network):
    small_network(2)
    found = run._networks(Network("resnet50", 1, "float32"), dict.fromkeys(("jbn", "keras"), JBN))
    assert found.keys() == {"jbn", "jbn-remat"}
    *_, images, labels = given = found["jbn"].prepare(0)
    plain, remat = (found[name].run(given) for name in ("jbn", "jbn-remat"))
    for actual, expected in zip(jax.tree.leaves(remat), jax.tree.leaves(plain), strict=True):
        assert_close(actual, expected)
    params, state, loss = plain
    *_, later = found["jbn"].run((params, state, images, labels))
    assert later < loss
