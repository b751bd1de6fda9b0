"""Conversion from and to PyTorch, of a state_dict written by hand and of a trained model."""

import copy

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from support.conversion import (
    assert_bit_equal,
    assert_predicts_and_trains,
    assert_same_prediction,
    drawn,
    network,
    positive,
)
from support.tolerances import assert_close

import jbn
from jbn.convert import from_torch, join, split

VECTORS = ("weight", "bias", "running_mean", "running_var")


@pytest.fixture
def state_dict(rng):
    """A network with the layout of `torch.nn.Module.state_dict()`; its second norm has no weight and bias."""
    return {
        "conv.weight": drawn(rng, 8, 3, 3, 3),
        **{f"bn.{name}": positive(rng, 8) for name in VECTORS},
        "bn.num_batches_tracked": np.array(5, np.int64),
        **{f"layer1.0.bn.{name}": positive(rng, 6) for name in VECTORS[2:]},
        "layer1.0.bn.num_batches_tracked": np.array(7, np.int64),
        "fc.weight": drawn(rng, 4, 6),
        "fc.bias": drawn(rng, 4),
    }


def test_norms_of_a_state_dict_are_found_by_their_prefix(state_dict):
    norms, rest = split(state_dict, "torch")
    assert list(norms) == ["bn", "layer1.0.bn"]
    assert sorted(rest) == ["conv.weight", "fc.bias", "fc.weight"]
    assert norms["layer1.0.bn"][0] == jbn.Params(None, None)
    assert [set(state.count.tolist()) for _, state in norms.values()] == [{5}, {7}]


def test_a_state_dict_comes_back_bit_for_bit(state_dict):
    assert_bit_equal(join(*split(state_dict, "torch"), "torch"), state_dict)


def test_a_norm_predicts_and_trains_by_the_formulas_of_torch(rng, state_dict):
    norms, _ = split(state_dict, "torch")
    options = {"momentum": jbn.momentum.from_torch(0.1), "running_var": "unbiased", "feature_axis": 1, "epsilon": 1e-5}
    stored = [state_dict[f"bn.{name}"] for name in VECTORS]
    assert_predicts_and_trains(norms["bn"], stored, drawn(rng, 5, 8, 4, 3), rule=(0.9, "unbiased"), **options)


@pytest.mark.standard_promotion
def test_a_torch_norm_predicts_the_same_in_a_flax_model(rng, state_dict):
    norms, _ = split(state_dict, "torch")
    variables = join({"BatchNorm_0": norms["bn"]}, {}, "linen")

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True)(x)

    x = drawn(rng, 10, 8)
    weight, bias, mean, var = (state_dict[f"bn.{name}"].astype(float) for name in VECTORS)
    assert_same_prediction(Network().apply(variables, x), (x - mean) / np.sqrt(var + 1e-5) * weight + bias)


def test_a_norm_without_a_count_counts_from_zero():
    entries = {"running_mean": np.zeros(3, np.float32), "running_var": np.ones(3, np.float32)}
    for stored, expected in (({}, 0), ({"num_batches_tracked": np.int64(10)}, 10)):
        _, state = from_torch({**entries, **stored})
        assert state.count.dtype == jnp.float32
        np.testing.assert_array_equal(state.count, [expected] * 3)


@pytest.fixture(scope="module")
def trained():
    """The torch module, and a model after five steps of training."""
    import torch

    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 6, 3, bias=False),
        torch.nn.BatchNorm2d(6),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(6, 4),
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(5):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(torch.tensor(drawn(rng, 8, 3, 8, 8))), torch.arange(8) % 4)
        loss.backward()
        optimizer.step()
    return torch, model


@pytest.fixture
def torch_model(trained):
    """The torch module, and a copy of the trained model that a test may change."""
    torch, model = trained
    return torch, copy.deepcopy(model)


@pytest.mark.needs("torch")
def test_a_model_trained_in_torch_predicts_and_trains_the_same(rng, torch_model):
    torch, model = torch_model
    norms, rest = split(model.state_dict(), "torch")
    assert list(norms) == ["1", "4"]
    assert sorted(rest) == ["0.bias", "0.weight", "3.weight", "8.bias", "8.weight"]
    assert all((state.count == 5).all() for _, state in norms.values())
    weights = {name: jnp.asarray(tensor.numpy()) for name, tensor in rest.items()}
    run = network(
        [(weights["0.weight"], weights["0.bias"]), (weights["3.weight"], None)],
        (weights["8.weight"].T, weights["8.bias"]),
        layout=("NCHW", "OIHW"),
        momentum=jbn.momentum.from_torch(0.1),
        running_var="unbiased",
    )
    x = drawn(rng, 8, 3, 8, 8)
    assert_same_prediction(run(norms.values(), x, False)[0], model.eval()(torch.tensor(x)).detach())
    model.train()(torch.tensor(x))
    after, _ = split(model.state_dict(), "torch")
    for state, (_, expected) in zip(run(norms.values(), x, True)[1], after.values(), strict=True):
        assert (state.count == 6).all() and (expected.count == 6).all()
        assert_close(state.mean, expected.mean, condition=10)
        assert_close(state.var, expected.var, condition=10)


@pytest.mark.needs("torch")
def test_torch_loads_what_comes_back(torch_model):
    torch, model = torch_model
    state_dict = model.state_dict()
    back = join(*split(state_dict, "torch"), "torch")
    assert_bit_equal(back, state_dict)
    model.load_state_dict({name: torch.as_tensor(array) for name, array in back.items()})


@pytest.mark.needs("torch")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_torch_writes_to_its_memory_later_does_not_reach_jbn(torch_model, dtype):
    torch, model = torch_model
    model = model.to(getattr(torch, dtype))
    norms, _ = split(model.state_dict(), "torch")
    before = np.array(norms["1"][0].scale)
    with torch.no_grad():
        model[1].weight.fill_(7)
    np.testing.assert_array_equal(norms["1"][0].scale, before)


@pytest.mark.needs("torch")
def test_tensors_without_data_are_refused():
    import torch

    with pytest.raises(ValueError, match="`running_mean` is a Tensor, which cannot be converted to an array"):
        from_torch(torch.nn.BatchNorm1d(3, device="meta").state_dict())
    with pytest.raises(ValueError, match="`weight` Attempted to use an uninitialized parameter"):
        from_torch(torch.nn.LazyBatchNorm1d().state_dict())


@pytest.mark.needs("torch")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_tensors_have_float32_statistics_and_load_back(torch_model, dtype):
    torch, model = torch_model
    norms, _ = split(model.to(getattr(torch, dtype)).state_dict(), "torch")
    params, state = norms["1"]
    assert params.scale.dtype == dtype
    assert state.mean.dtype == jnp.float32
    np.testing.assert_array_equal(state.mean, model[1].running_mean.float().numpy())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    back = join(*split(before, "torch"), "torch")
    model.load_state_dict({name: torch.as_tensor(array) for name, array in back.items()})
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    strided = torch.arange(8.0).to(getattr(torch, dtype))[::2]
    entries = {"weight": strided, "running_mean": strided, "running_var": strided}
    np.testing.assert_array_equal(from_torch(entries)[1].mean, [0, 2, 4, 6])
