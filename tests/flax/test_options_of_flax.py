"""Every option of Flax's norms, in models that train: a change of one name gives the same results as Flax."""

import functools
import inspect

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from support.compilation import compiled
from support.tolerances import UNIT, assert_same_trees

import jbn

pytestmark = pytest.mark.standard_promotion

LANES, STEPS = 4, 2
normal = nn.initializers.normal()
COMMON = {
    "use_running_average": True,
    "axis": 1,
    "momentum": 0.5,
    "epsilon": 1e-2,
    "dtype": jnp.bfloat16,
    "param_dtype": jnp.bfloat16,
    "use_bias": False,
    "use_scale": False,
    "bias_init": normal,
    "scale_init": normal,
    "axis_name": "lanes",
    "use_fast_variance": False,
}
"""A value that is not the default, for each option that both modules have."""
LINEN = {**COMMON, "force_float32_reductions": False}
NNX = {
    **COMMON,
    "promote_dtype": lambda arrays, *, dtype=None: promote_dtype(arrays, dtype=dtype),
    "bias_metadata": {"tag": "b"},
    "scale_metadata": {"tag": "s"},
}
BY_GROUPS = {"axis_name": "lanes", "axis_index_groups": [[0, 1], [2, 3]]}


class Model(nn.Module):
    """Dense, norm, dense."""

    norm: type

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(self.norm()(nn.Dense(5)(x))))


class NNXModel(nnx.Module):
    """Dense, norm, dense."""

    def __init__(self, norm):
        rngs = nnx.Rngs(0)
        self.first, self.norm, self.last = nnx.Linear(3, 5, rngs=rngs), norm(5, rngs=rngs), nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


def linen_model(module, options):
    """Initial variables, and a function (params, statistics, x) -> (out, statistics) for training."""
    options = {"use_running_average": False, **options}
    model = Model(functools.partial(module, **options))
    start = model.init(jax.random.key(0), jnp.zeros((2, 5, 3)))

    def apply(params, statistics, x):
        out, new = model.apply({"params": params, "batch_stats": statistics}, x, mutable=["batch_stats"])
        return out, new["batch_stats"]

    return start["params"], start["batch_stats"], apply


def nnx_model(module, options):
    graph, params, statistics = nnx.split(NNXModel(functools.partial(module, **options)), nnx.Param, nnx.BatchStat)

    def apply(params, statistics, x):
        model = nnx.merge(graph, params, statistics, copy=True)
        out = model(x)
        return out, nnx.state(model, nnx.BatchStat)

    return params, statistics, apply


def trained(params, statistics, apply, mapped):
    """Parameters and statistics after some steps of gradient descent, with gradients averaged over lanes."""

    def loss(params, statistics, x):
        out, statistics = apply(params, statistics, x)
        return jnp.mean(jnp.square(out.astype(jnp.float32) - x[..., :2])), statistics

    def step(params, statistics, x):
        gradients, statistics = jax.grad(loss, has_aux=True)(params, statistics, x)
        gradients = jax.lax.pmean(gradients, "lanes")
        descended = jax.tree.map(lambda leaf, slope: (leaf - 0.1 * slope).astype(leaf.dtype), params, gradients)
        return descended, statistics

    step = mapped(step)
    held = jax.tree.map(lambda leaf: jnp.stack([leaf] * LANES), (params, statistics))
    for seed in range(STEPS):
        x = np.random.default_rng(seed).normal(size=(LANES, 6, 5, 3)).astype(np.float32)
        held = step(*held, x + 1)
    return held


def vmapped(step):
    return compiled(jax.vmap(step, axis_name="lanes"))


def pmapped(step):
    return jax.pmap(step, axis_name="lanes", devices=jax.devices()[:LANES])


def assert_trains_as_flax(models, options, mapped=vmapped):
    """Equal up to rounding, in the dtype of the result if it is narrow, since gradients pass through it."""
    make, modules = models
    ours, flaxs = (trained(*make(module, options), mapped) for module in modules)
    assert jax.tree.structure(ours) == jax.tree.structure(flaxs)
    narrow = any(value is jnp.bfloat16 for value in options.values())
    bound = 4 * UNIT["bfloat16"] if narrow else 2e-5
    for a, e in zip(jax.tree.leaves(ours), jax.tree.leaves(flaxs), strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(e, np.float64), rtol=bound, atol=bound)


LINEN_MODELS = linen_model, (jbn.linen.BatchNorm, nn.BatchNorm)
NNX_MODELS = nnx_model, (jbn.nnx.BatchNorm, nnx.BatchNorm)
CASES = [pytest.param(LINEN_MODELS, {name: value}, id=f"linen-{name}") for name, value in LINEN.items()]
CASES += [pytest.param(NNX_MODELS, {name: value}, id=f"nnx-{name}") for name, value in NNX.items()]


@pytest.mark.parametrize(("models", "options"), CASES)
def test_a_model_trains_as_with_flaxs_norm(models, options):
    assert_trains_as_flax(models, options)


@pytest.mark.devices(LANES)
@pytest.mark.parametrize("models", [LINEN_MODELS, NNX_MODELS], ids=["linen", "nnx"])
def test_groups_of_devices_train_as_with_flaxs_norm(models):
    assert_trains_as_flax(models, BY_GROUPS, pmapped)


@pytest.mark.parametrize("module", ["linen", "nnx"])
def test_no_option_of_flax_is_forgotten(module):
    given, flaxs = {"linen": (LINEN, nn.BatchNorm), "nnx": (NNX, nnx.BatchNorm)}[module]
    names = set(inspect.signature(flaxs.__init__).parameters) - {"self", "num_features", "rngs", "parent", "name"}
    assert given.keys() | {"axis_index_groups"} == names


EVERY = {name: value for name, value in COMMON.items() if name not in ("use_bias", "use_scale", "use_running_average")}
EVERY = {**EVERY, "use_bias": True, "use_scale": True, "use_running_average": False, "axis_index_groups": None}


def test_a_linen_model_with_every_option_trains_and_its_bytes_load_into_flaxs():
    """In float32, since without float32 reductions Flax's statistics get the dtype of half-precision parameters."""
    options = {**LINEN, **EVERY, "param_dtype": jnp.float32}
    assert_trains_as_flax(LINEN_MODELS, options)
    held = trained(*linen_model(jbn.linen.BatchNorm, options), vmapped)
    loaded = flax.serialization.from_bytes(linen_model(nn.BatchNorm, options)[:2], flax.serialization.to_bytes(held))
    assert_same_trees(loaded, held)


def test_an_nnx_model_with_every_option_trains_and_its_state_loads_into_flaxs():
    options = {**NNX, **EVERY}
    assert_trains_as_flax(NNX_MODELS, options)
    ours, flaxs = (NNXModel(functools.partial(module, **options)) for module in (jbn.nnx.BatchNorm, nnx.BatchNorm))
    ours.norm.mean[...] = jnp.arange(5.0)
    nnx.update(flaxs, nnx.state(ours))
    assert jax.tree.structure(nnx.state(flaxs)) == jax.tree.structure(nnx.state(ours))
    np.testing.assert_array_equal(flaxs.norm.mean[...], jnp.arange(5.0))
