"""The table of `diagnostics.compare` about running and population statistics, and how it prints."""

import math

import jax.numpy as jnp
import numpy as np
from support.refusals import Refused, assert_refused, jitted

import jbn
from jbn import diagnostics

STATE = jbn.init(3)[1]


def test_compare_says_what_inference_does(rng):
    """The output with running statistics is ratio * right + shift, and the error is the root mean square error."""
    x = rng.normal(size=(4096, 3)) * [1, 2, 3] + [0, 5, -5]
    params, state = jbn.init(3)
    state = jbn.State(jnp.array([0.5, 0.0, -5.0]), jnp.array([1.0, 1.0, 36.0]), jnp.full(3, 9.0))
    population = jbn.State(*(jnp.float32(leaf) for leaf in (x.mean(0), x.var(0))), jnp.full(3, 9.0))
    table = diagnostics.compare({"norm": state}, {"norm": population})
    x = x.astype(np.float32)
    wrong, right = (np.asarray(jbn.normalize(params, each, x), np.float64) for each in (state, population))
    errors = [row[2] for row in table.rows]
    assert errors == sorted(errors, reverse=True)
    for norm, channel, error, shift, ratio, *_ in table.rows:
        assert norm == "norm"
        np.testing.assert_allclose(wrong[:, channel], ratio * right[:, channel] + shift, atol=1e-4)
        root_mean_square = np.sqrt(np.mean((wrong[:, channel] - right[:, channel]) ** 2))
        np.testing.assert_allclose(error, root_mean_square, rtol=1e-3)
    broken = state._replace(var=jnp.array([jnp.nan, -jnp.inf, 1.0]))
    assert [row[2] for row in diagnostics.compare(broken, population).rows[:2]] == [math.inf, math.inf]


def test_features_of_several_axes():
    _, state = jbn.init((2, 3))
    table = diagnostics.compare(state, state)
    assert [row[1] for row in table.rows] == [(i, j) for i in range(2) for j in range(3)]
    assert "(1, 2)" in str(table)


def test_tables_are_plain_data_and_print_well():
    table = diagnostics.compare(jbn.init(30)[1], jbn.init(30)[1])
    for row in table.rows:
        assert {type(value) for value in row} <= {str, int, float}
    lines = str(table).splitlines()
    assert len(lines) == 22
    assert lines[-1] == "... and 10 more"
    assert len({len(line) for line in lines[:-1]}) == 1
    assert table.text(rows=2).count("\n") == 3
    assert table.text(rows=30).count("\n") == 30, "a heading and all rows, and no line that says that 0 more follow"


REFUSED = {
    "traced": Refused(
        jitted(diagnostics.compare, state=STATE, population=STATE), TypeError, "state", "is traced", "outside of jit"
    ),
    "other norms": Refused(
        lambda: diagnostics.compare({"a": STATE}, {"b": STATE}),
        ValueError,
        "state",
        "only one of them has 'a', 'b'",
        "expected the same",
    ),
    "other shapes": Refused(
        lambda: diagnostics.compare(STATE, jbn.init(2)[1]),
        ValueError,
        "population",
        "[(3,), (3,), (2,), (2,)]",
        "expected one shape",
    ),
}


def test_errors_name_the_tree_and_say_how_to_mend_it():
    assert_refused(REFUSED)
