"""Pictures: labels, units, colors, and the numbers behind the lines. They are drawn without a screen."""

import importlib
import sys
from unittest import mock

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import colors, pyplot
from support.refusals import Refused, assert_refused

import jbn
from jbn import plot

mpl.use("agg")


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


STATE = {"stem": jbn.init(4)[1], "head": jbn.unset(jbn.init(2)[1])}
RIGHT = {"stem": jbn.init(4)[1], "head": jbn.init(2)[1]}
PICTURES = {
    "average": lambda **ax: plot.moving_average([1, 2, 3], [1.0, 2.0, 3.0], [0.1, 0.3, 0.6], 2.0, **ax),
    "weight": lambda **ax: plot.initial_weight(100, {"0.9": 0.9, "warmup": jbn.momentum.warmup(0.9)}, **ax),
    "error": lambda **ax: plot.error_against_momentum(1000, 32, **ax),
    "layers": lambda **ax: plot.running_against_population(STATE, RIGHT, **ax),
    "deviations": lambda **ax: plot.standard_deviations(STATE, **ax),
}


@pytest.mark.parametrize("draw", PICTURES.values(), ids=PICTURES)
def test_each_draws_where_it_is_told(draw):
    _, ax = pyplot.subplots()
    assert draw(ax=ax) is ax
    assert draw() is not ax
    assert all((ax.get_xlabel(), ax.get_ylabel(), ax.get_title()))
    ax.figure.canvas.draw()


@pytest.mark.parametrize("draw", PICTURES.values(), ids=PICTURES)
def test_color_blind_readers_can_tell_the_colors_apart(draw):
    assert {colors.to_hex(line.get_color()).upper() for line in draw().lines} <= {*plot.COLORS, "#999999"}


def test_a_population_is_drawn_where_it_is_known():
    labels = [
        [text.get_text() for text in plot.moving_average([1, 2], [1.0, 2.0], [0.1, 0.3], *known).get_legend().texts]
        for known in ((), (2.0,))
    ]
    assert labels == [["batches", "running"], ["batches", "running", "population"]]


def test_the_title_says_where_the_average_ends():
    assert PICTURES["average"]().get_title() == "running mean ends at 0.6, population mean is 2"
    assert plot.moving_average([], [], [], statistic="variance").get_title() == "running variance"


def test_the_weight_of_the_start_is_drawn_for_each_momentum():
    ax = PICTURES["weight"]()
    np.testing.assert_allclose(ax.lines[0].get_ydata(), 0.9 ** np.arange(101))
    assert ax.lines[1].get_ydata()[0] == 1
    np.testing.assert_array_equal(ax.lines[1].get_ydata()[1:], np.zeros(100))


def test_the_optimum_is_marked():
    ax = plot.error_against_momentum(1000, 32, distances=[1.0])
    curve, mark = ax.lines
    (best,), (error,) = mark.get_data()
    np.testing.assert_allclose(1 - best, jbn.diagnostics.best_momentum(1000, 32))
    assert error <= curve.get_ydata().min()
    assert curve.get_label() == f"1 sd: {1 - best:.5f}"
    assert len(plot.error_against_momentum(10, 32, distances=[0.0]).lines) == 1


def test_lost_channels_are_counted():
    labels = [label.get_text() for label in PICTURES["layers"]().get_xticklabels()]
    assert labels == ["head (2 unset or not finite)", "stem"]


def imported_without_matplotlib():
    with mock.patch.dict(sys.modules, matplotlib=None):
        del sys.modules["jbn.plot"]
        importlib.import_module("jbn.plot")


REFUSED = {
    "no matplotlib": Refused(
        imported_without_matplotlib,
        ModuleNotFoundError,
        "jbn.plot",
        "needs matplotlib",
        "pip install 'jbn[plot]'",
    ),
    "batches": Refused(
        lambda: plot.moving_average([1, 2], [0], [0, 1]),
        ValueError,
        "batches",
        "has shape (1,)",
        "expected one shape (n,)",
    ),
    "numbers": Refused(lambda: plot.moving_average(1, 2, 3), ValueError, "steps", "()", "expected one shape (n,)"),
    "momenta": Refused(lambda: plot.initial_weight(9, [0.9]), TypeError, "momenta", "is [0.9]", "{'0.9': 0.9}"),
    "no momenta": Refused(
        lambda: plot.initial_weight(9, {}), ValueError, "momenta", "is empty", "expected at least one"
    ),
    "steps": Refused(lambda: plot.error_against_momentum(0, 32), ValueError, "steps", "is 0", "an int of at least 1"),
    "no distances": Refused(
        lambda: plot.error_against_momentum(9, 32, distances=[]), ValueError, "distances", "is []", "at least one"
    ),
    "distances a number": Refused(
        lambda: plot.error_against_momentum(9, 32, distances=1.0), ValueError, "distances", "is 1.0", "at least one"
    ),
    "epsilon": Refused(
        lambda: plot.running_against_population(STATE, STATE, epsilon=None),
        TypeError,
        "epsilon",
        "is None",
        "a number such as 1e-5",
    ),
    "axes": Refused(
        lambda: plot.running_against_population(STATE, STATE, ax=("figure", "axes")),
        TypeError,
        "ax",
        "is a tuple",
        "_, ax = pyplot.subplots()",
    ),
}


def test_errors_name_the_argument_and_say_how_to_mend_it():
    assert_refused(REFUSED)
