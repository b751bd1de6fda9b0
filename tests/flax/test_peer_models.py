"""What other libraries' own tests check of modules in Flax models: jbn's modules do what Flax's do in their place."""

import copy
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge
from support import reference
from support.compilation import compiled
from support.tolerances import assert_close

import jbn

KEY = jax.random.key(0)


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape) * 2 + 1, jnp.float32)


def pickled(value):
    return pickle.loads(pickle.dumps(value))


def both(module):
    """A class of ours and Flax's of the same name, to be put into the same model."""
    return {"linen": (jbn.linen.BatchNorm, nn.BatchNorm), "nnx": (jbn.nnx.BatchNorm, nnx.BatchNorm)}[module]


def assert_trees_close(actual, expected, **bounds):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, e: assert_close(a, e, **bounds), actual, expected)


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


class Block(nnx.Module):
    """Linear, norm and relu."""

    def __init__(self, rngs, norm=jbn.nnx.BatchNorm, features=3):
        self.linear = nnx.Linear(features, features, use_bias=False, rngs=rngs)
        self.norm = norm(features, momentum=0.5, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.linear(x)))


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


def squares(model, x):
    return jnp.mean(model(x) ** 2)


def stacked(norm, axes=0):
    @nnx.split_rngs(splits=4)
    @nnx.vmap(in_axes=0, out_axes=axes)
    def make(rngs):
        return Block(rngs, norm)

    return make(nnx.Rngs(0))


def ensemble(norm, x):
    model = stacked(norm)
    return nnx.vmap(lambda model, x: model(x), in_axes=(0, None))(model, x), model


def lanes_of_one_model(norm, x):
    """Params are shared, and each lane has statistics of its own."""
    axes = nnx.StateAxes({nnx.BatchStat: 0, ...: None})
    model = nnx.vmap(lambda: Block(nnx.Rngs(0), norm), out_axes=axes, axis_size=4)()
    assert model.norm.scale.shape == (3,)
    assert model.norm.mean.shape == (4, 3)
    out = nnx.vmap(lambda model, x: model(x), in_axes=(axes, 0))(model, jnp.stack([x, x + 1, 2 * x, 3 - x]))
    return out, model


def axes_of_each_variable(norm, x):
    axes = nnx.StateAxes({nnx.PathContains("mean"): 1, nnx.PathContains("bias"): None, ...: 0})
    return nnx.vmap(lambda: norm(3, rngs=nnx.Rngs(0)), out_axes=axes, axis_size=5)()


def scan_over_layers(axis):
    """Params along the first axis; all layers update the same statistics, or, not carried, read them only."""

    def program(norm, x):
        model = stacked(norm, nnx.StateAxes({nnx.Param: 0, ...: None}))
        axes = nnx.StateAxes({nnx.Param: 0, ...: axis})
        scan = nnx.scan(lambda model, x: model(x), in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)
        return scan(model, x), model

    return program


def step_in_tree_mode(norm, x):
    model = Block(nnx.Rngs(0), norm)
    model.set_attributes(use_running_average=True)
    step = nnx.jit(lambda model, x: nnx.grad(squares, graph=False)(model, x), graph=False)
    return jax.tree.leaves(step(model, x)), model


def one_layer_in_two_blocks(norm, x):
    first, second = Block(nnx.Rngs(0), norm), Block(nnx.Rngs(1), norm)
    second.linear = first.linear
    model = nnx.Sequential(first, second)
    return nnx.jit(nnx.grad(squares))(model, x), model


def train_and_evaluate_by_views(norm, x):
    model = Block(nnx.Rngs(0), norm)
    evaluated = nnx.view(model, use_running_average=True)
    before = evaluated(x)
    nnx.jit(lambda model, x: model(x))(model, x)
    return before, evaluated(x), model


def split_and_called(norm, x):
    graph, params, statistics = nnx.split(Block(nnx.Rngs(0), norm), nnx.Param, nnx.BatchStat)
    assert set(params) == {"linear", "norm"}
    assert set(statistics["norm"]) == {"mean", "var"}
    return nnx.call((graph, params, statistics))(x)[0], nnx.merge(graph, params, statistics)


PROGRAMS = {
    "ensemble": ensemble,
    "lanes of one model": lanes_of_one_model,
    "axes of each variable": axes_of_each_variable,
    "scan, statistics carried": scan_over_layers(nnx.Carry),
    "scan, statistics read": scan_over_layers(None),
    "tree mode": step_in_tree_mode,
    "one layer in two blocks": one_layer_in_two_blocks,
    "views": train_and_evaluate_by_views,
    "split and call": split_and_called,
}


def arrays(results):
    """Every array of nested results, modules by their state."""
    return [
        leaf
        for result in (results if isinstance(results, tuple) else (results,))
        for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(result)) if isinstance(result, nnx.Module) else result)
    ]


@pytest.mark.standard_promotion
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_nnx_programs_give_what_flax_gives(rng, program):
    both_programs = compiled(lambda x: [arrays(program(norm, x)) for norm in both("nnx")])
    for a, e in zip(*both_programs(normal(rng, 8, 3)), strict=True):
        assert_close(a, e, condition=10)


@pytest.mark.standard_promotion
def test_a_step_on_mutable_arrays_gives_what_flax_gives(rng):
    """Mutable arrays are made outside of jit."""

    def step_on_mutable_arrays(norm, x):
        with nnx.var_defaults(hijax=True):
            model = Block(nnx.Rngs(0), norm)

        @compiled
        def step(x):
            graph, params, rest = nnx.split(model, nnx.Param, ...)
            gradient = jax.grad(lambda params: squares(nnx.merge(graph, params, rest), x))
            return jax.tree.leaves(gradient(nnx.with_vars(params, hijax=False)))

        return step(x), model

    x = normal(rng, 8, 3)
    for a, e in zip(*(arrays(step_on_mutable_arrays(norm, x)) for norm in both("nnx")), strict=True):
        assert_close(a, e, condition=10)


@pytest.mark.standard_promotion
def test_bridges_between_linen_and_nnx_give_what_flax_gives(rng):
    x, results = normal(rng, 6, 3), []
    for norm in both("linen"):
        module = bridge.ToNNX(norm(use_running_average=False, momentum=0.5), rngs=nnx.Rngs(0))
        bridge.lazy_init(module, x)
        results.append((module(x, mutable=["batch_stats"]), nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))))
    assert_trees_close(*results)
    results = []
    for norm in both("nnx"):
        module = bridge.to_linen(norm, 3, momentum=0.5)
        variables = module.init(KEY, x)
        assert {"params", "batch_stats"} <= set(variables)
        out, updated = module.apply(variables, x, mutable=["batch_stats"])
        results.append((out, jax.tree.leaves(updated["batch_stats"])))
    assert_trees_close(*results)
