"""Conversion from and to the variables of Linen and NNX models; norms return to the same places."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from support.compilation import compiled
from support.conversion import drawn
from support.refusals import Refused, assert_refused
from support.tolerances import assert_close, assert_same_trees

import jbn
from jbn.convert import from_linen, from_nnx, join, split, to_linen

TWO = np.ones(2, np.float32)
BOXED = nn.Partitioned(TWO, ("model",))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.Dense(5)(x)
            x = nn.BatchNorm(use_running_average=False, momentum=0.9)(x)
        return nn.LayerNorm()(x)


@pytest.mark.standard_promotion
def test_norms_of_a_linen_model_are_taken_out_and_put_back(rng):
    model = LinenNet()

    @compiled
    def initialize_and_train(x):
        variables = model.init(jax.random.key(0), x)
        return {**variables, **model.apply(variables, x, mutable=["batch_stats"])[1]}

    variables = {**initialize_and_train(drawn(rng, 6, 4)), "cache": {"step": 3}}
    norms, rest = split(variables, "linen", count=7)
    assert list(norms) == ["BatchNorm_0", "BatchNorm_1"]
    kept = {
        jax.tree_util.keystr(path[:2], simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(rest)
    }
    assert kept == {"params/Dense_0", "params/Dense_1", "params/LayerNorm_0", "cache/step"}
    assert_same_trees(join(norms, rest, "linen"), variables)
    counted = join(norms, rest, "linen", with_count=True)["batch_stats"]["BatchNorm_0"]
    assert (counted["count"] == 7).all()
    x = drawn(rng, 6, 5)
    one = {kind: variables[kind]["BatchNorm_0"] for kind in ("params", "batch_stats")}
    expected = compiled(nn.BatchNorm(use_running_average=True).apply)(one, x)
    assert_close(compiled(jbn.normalize)(*norms["BatchNorm_0"], x), expected)


def test_norms_that_linen_scans_over_have_a_first_axis_of_layers(rng):
    stack = nn.scan(
        lambda norm, x: (norm(x), None),
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        length=3,
    )

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = jbn.linen.BatchNorm(use_running_average=False, momentum=jbn.momentum.cumulative(), name="norm")
            return stack(norm, x)[0]

    variables = compiled(Net().init)(jax.random.key(0), drawn(rng, 6, 4))
    norms, rest = split(variables, "linen")
    _, state = norms["norm"]
    assert state.mean.shape == (3, 4)
    assert state.count.shape == (3, 4)
    assert_same_trees(join(norms, rest, "linen"), variables)
    counted, _ = split(variables, "linen", count=9)
    np.testing.assert_array_equal(counted["norm"][1].count, np.full((3, 4), 9))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, use_bias=False, rngs=rngs)])
        self.last = jbn.nnx.BatchNorm(4, momentum=jbn.momentum.cumulative(), rngs=rngs)

    def __call__(self, x):
        for layer in (*self.blocks, self.last):
            x = layer(x)
        return x


@pytest.mark.standard_promotion
def test_norms_of_an_nnx_model_move_to_another_by_state_and_by_pure_dict(rng):
    model, x = NNXNet(nnx.Rngs(0)), drawn(rng, 6, 4)
    predict = nnx.jit(lambda model, x: model(x))
    predict(model, x)
    state = nnx.state(model)
    for tree in (state, nnx.to_pure_dict(state)):
        other = NNXNet(nnx.Rngs(1))
        norms, rest = split(tree, "nnx")
        assert sorted(norms) == ["blocks/1", "last"]
        assert norms["blocks/1"][0].bias is None
        np.testing.assert_array_equal(norms["last"][1].count, np.ones(4))
        assert len(jax.tree.leaves(rest)) == 3  # kernel, bias, and the count that one norm has
        nnx.update(other, join(norms, rest, "nnx"))
        for a, e in zip(jax.tree.leaves(nnx.state(other)), jax.tree.leaves(state), strict=True):
            np.testing.assert_array_equal(a, e)
    model.eval(), other.eval()
    np.testing.assert_array_equal(predict(other, x), predict(model, x))


@pytest.mark.standard_promotion
def test_norms_in_an_nnx_dict_keep_keys_that_look_like_numbers():
    model, other = (nnx.Dict({"0": nnx.BatchNorm(2, rngs=nnx.Rngs(0))}) for _ in range(2))
    model["0"].mean[...] = jnp.array([1.0, 2.0])
    nnx.update(other, join(*split(nnx.state(model), "nnx"), "nnx"))
    assert_same_trees(nnx.to_pure_dict(nnx.state(other)), nnx.to_pure_dict(nnx.state(model)))


def test_linen_modules_that_only_have_a_mean_are_left_alone():
    observed = {"batch_stats": {"observer": {"mean": TWO}, "norm": {"mean": TWO, "var": TWO}}}
    norms, rest = split(observed, "linen")
    assert list(norms) == ["norm"]
    assert rest["batch_stats"]["observer"] == {"mean": TWO}


def test_other_collections_of_linen_are_left_whole():
    """Also if they have an entry at the path of a norm."""
    variables = {"batch_stats": {"norm": {"mean": TWO, "var": TWO}}, "cache": {"norm": {"mean": TWO}}}
    _, rest = split(variables, "linen")
    assert rest["cache"] == variables["cache"]


def test_boxes_of_flax_are_refused_until_they_are_taken_out():
    variables = {"params": {"scale": BOXED}, "batch_stats": {"mean": TWO, "var": TWO}}
    with pytest.raises(
        ValueError, match=r"is a Partitioned, which cannot be converted to an array: unbox it with flax"
    ):
        from_linen(variables)
    assert from_linen(nn.meta.unbox(variables))[0].scale.shape == (2,)


def test_linen_variables_convert_inside_jit():
    norm = jbn.init(2)
    assert_same_trees(jax.jit(from_linen)(to_linen(*norm, with_count=True)), norm)


REFUSED = {
    "no variables": Refused(
        lambda: from_linen(None), TypeError, "variables", "is a NoneType", "with params and batch_stats"
    ),
    "no collection": Refused(
        lambda: from_linen({"params": 3}), TypeError, "variables['params']", "is a int", "arrays of one norm"
    ),
    "other collections": Refused(
        lambda: from_linen({"cache": {}}), ValueError, "variables", "`cache` is extra", "params and batch_stats"
    ),
    "a layer for its state": Refused(
        lambda: from_nnx(nnx.BatchNorm(2, rngs=nnx.Rngs(0))),
        TypeError,
        "entries",
        "a BatchNorm",
        "with the names scale, bias, mean",
    ),
    "no collection in a tree": Refused(
        lambda: split({"params": None}, "linen"), TypeError, "tree", "NoneType at params", "expected a mapping"
    ),
}


@pytest.mark.standard_promotion
def test_what_is_no_flax_norm_is_refused():
    assert_refused(REFUSED)
