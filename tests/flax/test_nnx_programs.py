"""Programs from Flax's own tests and examples of NNX models: jbn's norm gives the same results as Flax's."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.nnx import bridge
from support.compilation import compiled
from support.flax_models import Block, assert_trees_close, both, normal
from support.tolerances import assert_close

KEY = jax.random.key(0)


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
    """The lanes share parameters, and each lane has statistics of its own."""
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
    """Parameters are stacked; all layers update the same statistics in the carry, or only read them."""

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
    """Every array in nested results, with modules replaced by their state."""
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
    """Mutable arrays are created outside of jit."""

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
