"""Health of a tree of statistics: each planted fault is found, in trees of every kind."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from support.refusals import Refused, assert_refused, jitted

import jbn
from jbn import diagnostics

STATE = jbn.init(3)[1]
FAULTS = ("dead", "unset", "not finite", "far", "stale", "missing")


def row_of(table, norm):
    (row,) = [dict(zip(table.columns, row, strict=True)) for row in table.rows if row[0] == norm]
    return row


def test_health_finds_each_planted_fault():
    good = jbn.State(jnp.full(3, 0.5), jnp.full(3, 2.0), jnp.full(3, 50.0))
    tree = {
        "good": good,
        "nan": good._replace(mean=jnp.array([0.5, jnp.nan, jnp.inf])),
        "negative": good._replace(var=jnp.array([2.0, -1.0, 2.0])),
        "unset": jbn.unset(good),
        "dead": good._replace(var=jnp.array([0.0, 1e-12, 2.0])),
        "behind": good._replace(count=jnp.array([50.0, 20.0, 30.0])),
        "one left out": good._replace(count=jnp.array([50.0, 0.0, 50.0])),
        "averaged": good._replace(count=jnp.array([50.0, 49.5, 50.0])),
        "a count of nan": good._replace(count=jnp.array([50.0, jnp.nan, 50.0])),
        "untouched": jbn.init(3)[1]._replace(count=good.count),
        "one mean of 0": good._replace(mean=jnp.array([0.0, 0.5, 0.5]), var=jnp.ones(3)),
        "no var": {"mean": good.mean, "count": good.count},
        "no count": {"mean": good.mean, "var": good.var},
    }
    table = diagnostics.health(tree)
    faults = {
        "nan": {"not finite": 2},
        "negative": {"not finite": 1},
        "unset": {"unset": 3, "stale": "0 of 50 updates"},
        "dead": {"dead": 2},
        "behind": {"stale": "20 of 50 updates"},
        "one left out": {"stale": "1 never updated"},
        "a count of nan": {"stale": "0 of 50 updates"},
        "untouched": {"stale": "never updated"},
        "no var": {"missing": "var"},
        "no count": {"missing": "count"},
    }
    for norm in tree:
        found = {fault: value for fault, value in row_of(table, norm).items() if fault in FAULTS and value}
        assert found == faults.get(norm, {}), norm
    population = jax.tree.map(lambda leaf: leaf, {"good": good._replace(mean=jnp.array([0.5, 5.0, 0.5]))})
    assert row_of(diagnostics.health({"good": good}, population), "good")["far"] == 1
    started = diagnostics.health({"good": good}, momentum=0.99)
    assert row_of(started, "good")["stale"] == "initial values weigh 61%"
    assert row_of(diagnostics.health({"good": good}, momentum=0.5), "good")["stale"] is None
    flax = {"good": {"mean": good.mean, "var": good.var}}
    for updates, reason in ((None, None), (40, "initial values weigh 67%"), (500, None)):
        assert row_of(diagnostics.health(flax, momentum=0.99, updates=updates), "good")["stale"] == reason
    assert row_of(diagnostics.health({"good": good}, momentum=0.99, updates=500), "good")["stale"] == started.rows[0][7]
    once = {"good": good._replace(count=jnp.ones(3))}
    assert row_of(diagnostics.health(once, momentum=0.01), "good")["stale"] is None
    assert row_of(diagnostics.health(once, momentum=0.0101), "good")["stale"] == "initial values weigh 1%"


@pytest.mark.standard_promotion
def test_health_of_flax_models(rng):
    x = rng.normal(size=(8, 3)).astype(np.float32)

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.LayerNorm()(jbn.linen.BatchNorm(use_running_average=False)(jbn.linen.BatchNorm(False)(x)))

    variables = jax.jit(Model().init)(jax.random.key(0), x)
    stats = jax.jit(lambda x: Model().apply(variables, x, mutable=["batch_stats"]))(x)[1]["batch_stats"]
    whole = diagnostics.health({"params": variables["params"], "batch_stats": stats})
    assert [row_of(whole, f"batch_stats/BatchNorm_{i}")["missing"] for i in range(2)] == [None, None]
    del stats["BatchNorm_1"]
    copies = {"opt_state": optax.adam(0.1).init(variables["params"]), "ema": variables["params"]}
    partial = diagnostics.health({"params": variables["params"], "batch_stats": stats, **copies})
    assert [row[0] for row in partial.rows] == ["batch_stats/BatchNorm_0", "params/BatchNorm_1"]
    assert row_of(partial, "params/BatchNorm_1")["missing"] == "mean, var"
    model = nnx.Sequential(jbn.nnx.BatchNorm(3, momentum=jbn.momentum.warmup(0.9), rngs=nnx.Rngs(0)))
    nnx.jit(lambda model, x: model(x))(model, x)
    (row,) = diagnostics.health(nnx.state(model)).rows
    assert row[:6] == ("layers/0", 3, 1, 0, 0, 0)


def test_other_variables_of_a_norm_are_no_fault():
    """Bounds of renormalization, steps, and counts of any form, which other libraries store beside mean and var."""
    norm = {"mean": jnp.full(3, 0.5), "var": jnp.full(3, 2.0)}
    key = jax.random.key(0)
    for extra in ({"r_max": 3.0, "steps": jnp.int32(7)}, {"count": {"value": 7}}, {"count": key}, {"count": "seven"}):
        tree = {"batch_stats": {"bn": {**norm, **extra}}, "params": {"bn": {"scale": jnp.ones(3)}}}
        (row,) = diagnostics.health(tree).rows
        assert not diagnostics.is_faulty(row), extra


def test_health_of_statistics_that_do_not_fit_each_other():
    table = diagnostics.health({"mean": jnp.zeros(3), "var": jnp.ones(2)})
    assert row_of(table, "")["not finite"] == 3


REFUSED = {
    "no statistics": Refused(
        lambda: diagnostics.health({"a": 1}), ValueError, "tree", "holds no statistics", "nodes that have float"
    ),
    "traced": Refused(
        jitted(diagnostics.health, tree=STATE), TypeError, "tree", "is traced", "call them outside of jit"
    ),
    "a schedule": Refused(
        lambda: diagnostics.health(STATE, momentum=jbn.momentum.warmup(0.99)),
        TypeError,
        "momentum",
        "is jbn.momentum.warmup(0.99): expected a number in [0, 1]. Under warmup, debiased and cumulative",
        "so leave it out",
    ),
    "momentum": Refused(lambda: diagnostics.health(STATE, momentum=2), ValueError, "momentum", "is 2", "in [0, 1]"),
    "updates": Refused(lambda: diagnostics.health(STATE, updates=-1), ValueError, "updates", "is -1", "at least 0"),
    "other norms": Refused(
        lambda: diagnostics.health({"a": STATE}, {"b": STATE}), ValueError, "tree", "different norms", "the same"
    ),
}


def test_errors_name_the_tree_and_say_how_to_mend_it():
    assert_refused(REFUSED)
