"""The other libraries in `jbn bench`: each is measured with its own layout, or named if it is missing."""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbn.bench import data, networks, numbers, run, torch_programs, torch_steps
from jbn.bench.cases import MODES, Case
from jbn.bench.layers import LAYERS

pytestmark = pytest.mark.standard_promotion

SMALL = Case("small", (16, 8, 4))
OF_FLAX = ("linen", "linen-2pass", "nnx")
OTHERS = [name for name in run.PEERS if name not in ("jbn", *OF_FLAX)]


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["jbn", *OF_FLAX], id="jbn and Flax"),
        pytest.param(OTHERS, id="the others", marks=pytest.mark.needs("haiku", "equinox", "keras", "torch")),
    ],
)
def test_every_library_runs_in_every_mode_and_is_right_near_zero(names):
    layers, missing = run.importable(names)
    assert not missing
    records = list(run.run([SMALL], layers, 1))
    assert [record.mode for record in records] == list(MODES)
    for record in records:
        assert list(record.seconds) == names, record.mode
        assert record.errors.keys() == set(names), record.mode
        assert all(error <= numbers.allowed("float32") for error in record.errors.values()), record.errors
        assert record.residual_bytes.get("jbn", SMALL.size) < 1.2 * SMALL.size, record.mode


@pytest.mark.needs("torch")
@pytest.mark.parametrize(
    "case", [SMALL, Case("conv", (4, 6, 6, 8)), Case("dense", (16, 4))], ids=lambda case: case.name
)
def test_pytorch_gets_its_channels_where_the_name_says(case):
    import torch

    batch = data.batch(case, np.random.default_rng(0))
    last, first = (torch_programs.placed(batch.x, channels_last) for channels_last in (True, False))
    assert last.shape == first.shape == (case.shape[0], case.shape[-1], *case.shape[1:-1])
    assert last.stride(1) == 1
    assert first.is_contiguous()
    assert torch.equal(last, first)
    errors = run._errors(case, {"torch-last": None, "torch-first": None}, batch)
    assert all(error <= numbers.allowed("float32") for error in errors.values()), errors


@pytest.mark.needs("torch")
def test_the_clock_waits_for_pytorch_on_a_gpu(monkeypatch):
    import torch

    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append("cuda"))
    monkeypatch.setattr(torch_programs, "device", lambda: torch.device("cpu"))
    torch_programs.wait(None)
    assert waited == []
    monkeypatch.setattr(torch_programs, "device", lambda: torch.device("cuda"))
    torch_programs.wait(None)
    assert waited == ["cuda"]


@pytest.mark.needs("torch")
def test_pytorchs_steps_are_those_of_the_same_networks():
    import torch

    norm = networks.NORMS["linen"]
    small = {"mlp": (networks.MLP(norm, 8), (16, 4)), "resnet": (networks.ResNet(norm, (2,)), (2, 16, 16, 3))}
    for name, (network, shape) in small.items():
        x = jax.random.normal(jax.random.key(0), shape)
        made = torch_steps.network_of(network, shape[-1])
        of_flax = jax.eval_shape(network.init, jax.random.key(0), x)["params"]
        sizes = sum(leaf.size for leaf in jax.tree.leaves(of_flax))
        assert sum(leaf.numel() for leaf in made.parameters()) == sizes, name
        for narrow in (x, x.astype(jnp.bfloat16)):
            program = torch_steps.step_program(network, [narrow])
            losses = [float(program.run(program.prepare(number))) for number in range(3)]
            assert losses[-1] < losses[0], (name, losses)
    for argnums in ((0,), (0, 1)):
        program = torch_steps.eager_program(argnums, [jnp.ones((4, 3)).at[0].set(2)])
        _, gradients = program.run(program.prepare(0))
        assert [tuple(gradient.shape) for gradient in gradients] == [(3,), (3,), (4, 3)][: 1 + len(argnums)]
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


def absent():
    raise ImportError("no such library")


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(LAYERS, "haiku", absent)
    assert run.importable(["jbn", "haiku"])[1] == {"haiku": "no such library"}


def test_keras_is_left_out_on_another_backend(monkeypatch):
    keras = SimpleNamespace(backend=SimpleNamespace(backend=lambda: "tensorflow"))
    monkeypatch.setitem(sys.modules, "keras", keras)
    layers, missing = run.importable(["jbn", "keras"])
    assert list(layers) == ["jbn"]
    assert "set KERAS_BACKEND=jax" in missing["keras"]


def test_pytorch_is_left_out_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(run.torch_programs, "description", absent)
    layers, missing = run.importable(["jbn", "torch-last", "torch-first"])
    assert list(layers) == ["jbn"]
    assert missing == dict.fromkeys(["torch-last", "torch-first"], "no such library")
