"""Statistics of jbn 0.1, with one count for all features of a norm, become those of 0.2."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from support.refusals import Refused, assert_refused
from support.tolerances import assert_same_trees

import jbn

SCHEDULE = jbn.momentum.warmup(0.9)


def state(features, count):
    return jbn.State(jnp.full(features, 2.0), jnp.full(features, 3.0), count)


def test_each_feature_of_a_state_gets_the_count():
    old = {"stem": state(3, jnp.int32(7)), "two axes": state((2, 3), np.int32(9)), "kernel": jnp.ones(3)}
    expected = {**old, "stem": state(3, jnp.full(3, 7.0)), "two axes": state((2, 3), jnp.full((2, 3), 9.0))}
    assert_same_trees(jbn.upgrade(old), expected)


def test_what_has_a_count_for_each_feature_or_none_is_returned_unchanged():
    tree = {"new": state(3, jnp.array([1.0, 2.0, 2.5])), "without": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}
    assert_same_trees(jbn.upgrade(tree), tree)


def test_each_layer_of_a_stack_keeps_its_own_count():
    """Statistics stacked by `nn.scan`: the count of shape (L,) becomes (L, C), or (C, L) with the layers last."""
    expected = state((2, 3), jnp.array([[4.0] * 3, [5.0] * 3]))
    assert_same_trees(jbn.upgrade(state((2, 3), jnp.int32([4, 5]))), expected)
    expected = state((3, 2), jnp.array([[4.0, 5.0]] * 3))
    assert_same_trees(jbn.upgrade(state((3, 2), jnp.int32([4, 5]))), expected)


@pytest.mark.standard_promotion
def test_variables_of_linen_train_on():
    norm = jbn.linen.BatchNorm(use_running_average=False, momentum=SCHEDULE)
    model, x = linen.Sequential([norm]), jnp.arange(6.0).reshape(2, 3)
    variables = model.init(jax.random.key(0), x)
    (node,) = variables["batch_stats"].values()
    node["count"] = jnp.int32(1)
    _, updated = model.apply(jbn.upgrade(variables), x, mutable=["batch_stats"])
    (node,) = updated["batch_stats"].values()
    np.testing.assert_array_equal(node["count"], [2, 2, 2])
    np.testing.assert_allclose(node["mean"], x.mean(0) / 2, rtol=1e-6)


def test_the_state_of_an_nnx_model_is_loaded():
    def made():
        return nnx.Sequential(jbn.nnx.BatchNorm(3, momentum=SCHEDULE, rngs=nnx.Rngs(0)))

    old, new = made(), made()
    old.layers[0].count.set_value(jnp.int32(5))
    nnx.update(new, jbn.upgrade(nnx.state(old)))
    np.testing.assert_array_equal(new.layers[0].count[...], [5, 5, 5])


REFUSED = {
    "count of another shape": Refused(
        lambda: jbn.upgrade({"stem": state(3, jnp.int32([1, 2]))}),
        ValueError,
        "tree",
        "at stem: `count` has shape (2,), but `mean` has (3,)",
        "expected (), or the leading or trailing axes of `mean`",
    ),
    "no statistics": Refused(
        lambda: jbn.upgrade({"a": 1}), ValueError, "tree", "holds no statistics", "nodes that have float `mean`"
    ),
}


def test_errors_name_the_tree_and_say_what_fits():
    assert_refused(REFUSED)
