"""Errors of calibrate: bad arguments, and norms without statistics of one batch, with the likely reason."""

import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.refusals import Refused, assert_refused, jitted, partly

import jbn

X = np.ones((4, 3), np.float32)
HUGE = np.float32([[1, 3e38, 1], [2, 3e38, 2]])
PARAMS, STATE = jbn.init(3)
HALF = STATE._replace(mean=STATE.mean.astype("bfloat16"))
NO_COUNT = {"mean": np.ones(2, np.float32), "var": np.ones(2, np.float32)}


def step(state, batch):
    return jbn.batch_norm(PARAMS, state, batch, True)[1]


def unchanged(state, batch):
    return state


def run_twice(tree, batch):
    """A step of a norm without a count, in which a second call changes the result of the first; one feature is 0."""
    one, found = jnp.array([1.0, 0.0]), jnp.isfinite(tree["var"])
    return {"mean": (tree["mean"] + 1) / 2 * one, "var": jnp.where(found, tree["var"], one)}


def two(states, batch):
    """A step of one norm that leaves another norm unchanged."""
    return {**states, "used": step(states["used"], batch)}


calibrate = partly(jbn.calibrate, step=step, state=STATE, batches=[X])
ARGUMENTS = {
    "step": Refused(calibrate(step=None), TypeError, "step", "is a NoneType", "expected a function (state, batch)"),
    "swapped": Refused(
        calibrate(step={"stem": STATE}, state=step),
        TypeError,
        "step",
        "is a dict: expected a function (state, batch) -> new state",
        "as in calibrate(step, state, batches).",
    ),
    "weights": Refused(calibrate(weights=[1]), TypeError, "weights", "is a list", "a function batch -> weight"),
    "select": Refused(calibrate(select="stem"), TypeError, "select", "is a str", "expected a function path -> bool"),
    "batches": Refused(calibrate(batches=3), TypeError, "batches", "is a int", "an iterable of batches for `step`"),
    "no batches": Refused(
        calibrate(batches=[]), ValueError, "batches", "is empty: expected at least one batch", "create it again"
    ),
    "no weight": Refused(
        calibrate(weights=lambda x: 0), ValueError, "batches", "no batch with a weight above 0", "at least one"
    ),
    "no statistics": Refused(calibrate(state={"a": X}), ValueError, "state", "holds no statistics", "`mean` and `var`"),
    "half precision": Refused(
        calibrate(state={"stem": HALF}), TypeError, "state", "`mean` in bfloat16 at stem", "Convert it with `.astype`"
    ),
    "state traced": Refused(
        jitted(calibrate(), state=STATE), TypeError, "state", "is traced", "call it outside of jit, and jit `step`"
    ),
    "batches traced": Refused(
        jitted(calibrate(), batches=[X]), TypeError, "batches", "are traced", "outside of jit, and jit `step`"
    ),
    "nothing selected": Refused(
        calibrate(state={"stem": STATE}, select=lambda path: False),
        ValueError,
        "select",
        "selects none of the 1 nodes with statistics",
        ": stem.",
    ),
    "negative weight": Refused(
        calibrate(weights=lambda x: -1), ValueError, "weights", "gives -1 for batch 0", "a number of at least 0"
    ),
    "weight a text": Refused(
        calibrate(weights=lambda x: "a"), ValueError, "weights", "gives 'a' for batch 0", "a number of at least 0"
    ),
    "sizes that differ": Refused(
        calibrate(batches=[(X, X[:2])]), ValueError, "batches", "leading axes of sizes [2, 4]", "Give `weights`"
    ),
    "weights of another shape": Refused(
        calibrate(weights=lambda x: np.ones(2)),
        ValueError,
        "weights",
        "gives array([1., 1.]) at (the",
        "here of shape (3,)",
    ),
    "weights of another tree": Refused(
        calibrate(state={"stem": STATE}, weights=lambda x: {"head": X[0]}),
        ValueError,
        "weights",
        "gives batch 0 a weight at head",
        "a tree like `state`",
    ),
    "weights of a part of the tree": Refused(
        calibrate(state={"a": STATE, "b": STATE}, weights=lambda x: {"a": X[0]}),
        ValueError,
        "weights",
        "gives None at b for batch 0",
        "with one array of weights in place of each norm",
    ),
    "batches of numbers": Refused(
        calibrate(batches=[[3.0, 4]]),
        ValueError,
        "batches",
        "yielded batch 0, which has no array with a leading axis",
        "Give `weights`",
    ),
    "no tqdm": Refused(
        mock.patch.dict(sys.modules, tqdm=None)(calibrate(progress=True)),
        ModuleNotFoundError,
        "progress",
        "tqdm, which is",
        "pip install tqdm",
    ),
}
STEPS = {
    "no state": Refused(
        calibrate(step=lambda state, x: x), ValueError, "step", "holds no statistics", "float `mean` and `var`"
    ),
    "another tree": Refused(
        calibrate(step=lambda state, x: {"other": state}), ValueError, "step", "at other", "a tree like `state`"
    ),
    "another shape": Refused(
        calibrate(step=lambda state, x: jbn.init(2)[1]),
        ValueError,
        "step",
        "`mean` of shape (2,) at (the tree itself)",
        "expected (3,)",
    ),
    "a norm left alone": Refused(
        calibrate(step=unchanged), ValueError, "step", "for features of 1 of 1", "Leave it out with `select`"
    ),
    "one of two left alone": Refused(
        calibrate(step=two, state={"used": STATE, "nested": {"idle": STATE}}),
        ValueError,
        "step",
        "on 1 batch gave no statistics for features of 1 of 2 norms:\n  nested/idle was not updated",
        "or run it in training mode",
    ),
    "a feature that is finite in no batch": Refused(
        calibrate(batches=[X * np.float32([1, np.nan, 1]), X * np.float32([np.nan, np.nan, 1])]),
        ValueError,
        "step",
        "on 2 batches gave no statistics for features of 1 of 1 norms:\n  (the tree itself) at feature 1 was not",
        "or no batch has finite, valid values there",
    ),
    "a feature without a weight": Refused(
        calibrate(weights=lambda x: np.float32([0, 1, 0])),
        ValueError,
        "step",
        "(the tree itself) at features 0, 2 has weight 0 in every batch",
        "give `weights` above 0",
    ),
    "a feature that is finite in no batch, at a small weight": Refused(
        calibrate(batches=[X * np.float32([1, np.nan, 1])], weights=lambda x: 0.5),
        ValueError,
        "step",
        "at feature 1 was not updated",
        "or no batch has finite, valid values there",
    ),
    "a norm run twice": Refused(
        calibrate(step=run_twice, state=NO_COUNT), ValueError, "step", "ran more than once", "give each call a norm of"
    ),
    "values that are too large": Refused(
        calibrate(batches=[HUGE, -HUGE]), ValueError, "var", "is too large for float32", "or a state in float64"
    ),
}


def test_errors_name_the_argument_and_say_how_to_mend_it():
    assert_refused(ARGUMENTS)


def test_errors_name_the_norms_that_a_step_gave_no_statistics_of():
    assert_refused(STEPS)


def test_many_consequences_of_one_fault_are_counted():
    states = {f"norm{number:02}": STATE for number in range(13)}

    @jax.jit
    def poisoned(states, x):
        x = jbn.normalize(PARAMS, states["norm00"], x)
        return {name: state if name == "norm00" else step(state, x) for name, state in states.items()}

    with pytest.raises(ValueError, match="of 13 of 13 norms:\n  norm00 was not updated") as error:
        jbn.calibrate(poisoned, states, [X])
    assert "and 3 more" in str(error.value)
    assert len(str(error.value).splitlines()) == 12
