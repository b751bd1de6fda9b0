"""Modules in Flax models: tables, copies, nested transforms and sharding equal those with Flax's norm."""

import copy
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from support import reference
from support.compilation import compiled
from support.flax_models import Block, assert_trees_close, both, normal
from support.tolerances import assert_close

import jbn

KEY = jax.random.key(0)


def pickled(value):
    return pickle.loads(pickle.dumps(value))


def test_a_norm_may_be_called_twice_at_initialization(rng):
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = jbn.linen.BatchNorm(use_running_average=False, axis_name="batch")
            once = norm(x)
            return once, norm(once)

    x = normal(rng, 8, 4)
    (once, twice), variables = compiled(Twice().init_with_output)(KEY, x)
    assert_close(once, reference.batch_norm(x).out, scale=5)
    assert_close(twice, reference.batch_norm(once).out, scale=5)
    np.testing.assert_array_equal(variables["batch_stats"]["BatchNorm_0"]["mean"], np.zeros(4))


def test_a_bound_module_updates_its_statistics(rng):
    class Network(nn.Module):
        def setup(self):
            self.dense, self.norm = nn.Dense(3), jbn.linen.BatchNorm()

    def run(network, x):
        return network.norm(network.dense(x), use_running_average=False)

    @compiled
    def bound_and_applied(x):
        network = Network()
        out, variables = nn.init_with_output(run, network)(KEY, x)
        bound = network.bind(variables, mutable="batch_stats")
        _, updated = nn.apply(run, network, mutable="batch_stats")(variables, x)
        return (run(bound, x), bound.variables["batch_stats"]), (out, updated["batch_stats"])

    bound, applied = bound_and_applied(normal(rng, 6, 4))
    assert np.all(applied[1]["norm"]["mean"] != 0)
    jax.tree.map(np.testing.assert_array_equal, bound, applied)


@pytest.mark.standard_promotion
def test_nested_scans_with_remat_stack_variables_as_flax_does(rng):
    class Layer(nn.Module):
        norm: type[nn.Module]

        @nn.compact
        def __call__(self, x):
            return x + self.norm(use_running_average=False, name="norm")(nn.Dense(4)(x))

    @compiled
    def initialized_and_applied(x):
        results = []
        for norm in both("linen"):
            axes = {"params": 0, "batch_stats": 0}
            stack = nn.remat_scan(Layer, lengths=(2, 3), variable_axes=axes, split_rngs={"params": True})(norm)
            variables = stack.init(KEY, x)
            assert variables["batch_stats"]["norm"]["mean"].shape == (2, 3, 4)
            results.append((variables, stack.apply(variables, x, mutable=["batch_stats"])))
        return results

    assert_trees_close(*initialized_and_applied(normal(rng, 6, 4)), condition=100)


@pytest.mark.parametrize("train", [True, False])
def test_no_tracer_leaks_from_modules(rng, train):
    x = normal(rng, 8, 3)
    module = jbn.linen.BatchNorm(use_running_average=not train)
    with jax.checking_leaks():
        jax.eval_shape(lambda: module.apply(module.init(KEY, x), x, mutable=["batch_stats"]))
        jax.eval_shape(lambda: jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))(x, use_running_average=not train))


@pytest.mark.parametrize("copied", [pickled, copy.deepcopy])
def test_copies_of_modules_are_the_same(rng, copied):
    x = normal(rng, 6, 3)
    module = jbn.linen.BatchNorm(momentum=0.3, running_var="total")
    assert copied(module) == module
    norm = jbn.nnx.BatchNorm(3, momentum=jbn.momentum.from_torch(0.2), use_scale=False, rngs=nnx.Rngs(0))
    norm.mean[...] = x[0]
    np.testing.assert_array_equal(copied(norm)(x, use_running_average=True), norm(x, use_running_average=True))


def scheduled(seed=0):
    """A new norm with schedules, as each run of a script makes one."""
    return jbn.nnx.BatchRenorm(
        3,
        momentum=jbn.momentum.warmup(np.float32(0.5)),
        r_max=jbn.renorm.r_max(end=20, begin=10),
        rngs=nnx.Rngs(seed),
    )


def test_modules_that_are_made_alike_run_through_one_trace_and_map_over_each_other(rng):
    traces = []

    @nnx.jit
    def apply(model, x):
        traces.append(None)
        return model(x)

    x, models = normal(rng, 6, 3), [scheduled(seed) for seed in range(3)]
    for model in models:
        apply(model, x)
    assert len(traces) == 1
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *(nnx.state(model) for model in models[:2]))
    np.testing.assert_array_equal(mean["mean"][...], models[0].mean[...])
    assert jax.tree.structure(models[0]) == jax.tree.structure(models[1])
    linens = [jbn.linen.BatchNorm(momentum=jbn.momentum.warmup(momentum)) for momentum in (0.5, np.float64(0.5))]
    assert linens[0] == linens[1] == pickled(linens[0])
    assert hash(linens[0]) == hash(linens[1])


@pytest.mark.standard_promotion
@pytest.mark.parametrize("times", [1, 3])
def test_tables_of_linen_models_are_those_of_flax(times):
    class Network(nn.Module):
        norm: type[nn.Module]

        @nn.compact
        def __call__(self, x):
            dense, norm = nn.Dense(3), self.norm(use_running_average=True)
            for _ in range(times):
                x = norm(dense(x))
            return x

    options = {"show_repeated": True, "console_kwargs": {"force_terminal": False, "width": 200}}
    ours, flaxs = (Network(norm).tabulate(KEY, jnp.ones((2, 3)), **options) for norm in both("linen"))
    assert ours == flaxs
    assert "mean: float32[3]" in ours


@pytest.mark.standard_promotion
def test_tables_of_nnx_models_are_those_of_flax():
    options = {"console_kwargs": {"force_terminal": False, "width": 200}}
    ours, flaxs = (Block(nnx.Rngs(0), norm) for norm in both("nnx"))
    assert nnx.tabulate(ours, jnp.ones((2, 3)), **options) == nnx.tabulate(flaxs, jnp.ones((2, 3)), **options)
    assert repr(ours).splitlines()[0] == repr(flaxs).splitlines()[0]
    assert "BatchStat: 6 (24 B)" in repr(ours)


def test_nnx_equals_linen_bit_for_bit(rng):
    x, mask = normal(rng, 10, 5), rng.random(10) < 0.6
    dtypes = [(*pair, pair[0] != pair[1]) for pair in itertools.product((jnp.float32, jnp.float16), repeat=2)]

    @compiled
    def trained(x, mask):
        results = []
        for dtype, param_dtype, masked in dtypes:
            options = {"use_running_average": False, "dtype": dtype, "param_dtype": param_dtype}
            given = {"mask": mask if masked else None}
            linen_norm, nnx_norm = jbn.linen.BatchNorm(**options), jbn.nnx.BatchNorm(5, rngs=nnx.Rngs(0), **options)
            variables = linen_norm.init(KEY, x)
            out, updated = linen_norm.apply(variables, x, **given, mutable=["batch_stats"])
            vectors = {**variables["params"], **updated["batch_stats"]}
            results.append(
                ((out, vectors), (nnx_norm(x, **given), {name: getattr(nnx_norm, name)[...] for name in vectors}))
            )
        return results

    for case, (of_linen, of_nnx) in zip(dtypes, trained(x, mask), strict=True):
        jax.tree.map(lambda a, e, case=case: np.testing.assert_array_equal(a, e, err_msg=str(case)), of_nnx, of_linen)


@pytest.mark.standard_promotion
def test_norms_inside_spectral_norm_give_what_flax_gives(rng):
    @compiled
    def of_linen(x):
        results = []
        for norm, update in itertools.product(both("linen"), (True, False)):
            spectral = nn.SpectralNorm(nn.Sequential([nn.Dense(4), norm(use_running_average=not update)]))
            variables = spectral.init(KEY, x, update_stats=update)
            results.append(spectral.apply(variables, x, update_stats=update, mutable=["batch_stats"]))
        return results[:2], results[2:]

    @compiled
    def of_nnx(x):
        results = []
        for norm, update in itertools.product(both("nnx"), (True, False)):
            layers = nnx.Sequential(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), norm(4, rngs=nnx.Rngs(0)))
            results.append(nnx.SpectralNorm(layers, update_stats=update, rngs=nnx.Rngs(1))(x))
        return results[:2], results[2:]

    x = normal(rng, 10, 5)
    assert_trees_close(*of_linen(x))
    assert_trees_close(*of_nnx(x))


def test_initializers_are_no_part_of_an_nnx_graph():
    ones, zeros = (
        jbn.nnx.BatchNorm(3, scale_init=init, bias_init=init, rngs=nnx.Rngs(0))
        for init in (nnx.initializers.ones, nnx.initializers.zeros)
    )
    assert nnx.graphdef(ones) == nnx.graphdef(zeros)
    assert np.all(ones.bias[...] == 1)


def test_scale_and_bias_of_nnx_carry_their_sharding():
    mesh = jax.make_mesh((1,), ("features",), axis_types=(jax.sharding.AxisType.Auto,))
    metadata = {"out_sharding": ("features",)}
    with jax.set_mesh(mesh):
        norm = jbn.nnx.BatchNorm(3, scale_metadata=metadata, bias_metadata=metadata, rngs=nnx.Rngs(0))
    for param in (norm.scale, norm.bias):
        assert param.out_sharding == ("features",)


def test_attributes_set_on_a_model_reach_its_norms_and_views_have_their_own():
    block = Block(nnx.Rngs(0))
    for changed in (nnx.view, nnx.with_attributes):
        other = changed(block, use_running_average=True)
        assert other.norm.use_running_average is True
        assert block.norm.use_running_average is False
        assert other.norm.mean is block.norm.mean
        with pytest.raises(ValueError, match="unknown"):
            changed(block, use_running_average=True, unknown=True)
    elsewhere = nnx.with_attributes(block, only=nnx.Linear, use_running_average=True, raise_if_not_found=False)
    assert elsewhere.norm.use_running_average is False
    with pytest.raises(ValueError, match="unknown"):
        block.set_attributes(use_running_average=True, unknown=True)
    block = Block(nnx.Rngs(0))
    block.set_attributes(use_running_average=True)
    assert block.norm.use_running_average is True


def test_the_text_of_views_names_each_class_once():
    text = nnx.view_info(nnx.Sequential(Block(nnx.Rngs(0)), Block(nnx.Rngs(1))))
    assert text.count("BatchNorm:") == 1
    assert "use_running_average" in text
    assert "BatchNorm" not in nnx.view_info(Block(nnx.Rngs(0)), only=nnx.Linear)
