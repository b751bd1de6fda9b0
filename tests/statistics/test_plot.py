"""What the pictures show: labels, units, and the numbers behind the lines. They are drawn without a screen."""

import importlib
import sys

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot

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
}


def test_matplotlib_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "jbn.plot")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jbn\[plot\]'"):
        importlib.import_module("jbn.plot")


@pytest.mark.parametrize("draw", PICTURES.values(), ids=PICTURES)
def test_each_draws_where_it_is_told(draw):
    _, ax = pyplot.subplots()
    assert draw(ax=ax) is ax
    assert draw() is not ax
    assert ax.get_ylabel()
    assert ax.get_title()
    ax.figure.canvas.draw()


def test_a_population_is_drawn_where_it_is_known():
    labels = [
        [text.get_text() for text in plot.moving_average([1, 2], [1.0, 2.0], [0.1, 0.3], *known).get_legend().texts]
        for known in ((), (2.0,))
    ]
    assert labels == [["batches", "running"], ["batches", "running", "population"]]


def test_initial_weight():
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
    assert curve.get_label() == f"start 1 sd away, best {1 - best:.5f}"
    assert len(plot.error_against_momentum(10, 32, distances=[0.0]).lines) == 1


def test_lost_channels_are_counted():
    labels = [label.get_text() for label in PICTURES["layers"]().get_xticklabels()]
    assert labels == ["head (2 unset or not finite)", "stem"]


@pytest.mark.parametrize(
    ("draw", "error", "match"),
    [
        (lambda: jbn.plot.moving_average([1, 2], [0.0], [0.0, 1.0]), ValueError, r"`batches` has shape \(1,\)"),
        (lambda: jbn.plot.moving_average(1, 2, 3), ValueError, r"expected one shape \(n,\)"),
        (lambda: jbn.plot.initial_weight(10, [0.9]), TypeError, r"`momenta` is \[0.9\]"),
        (lambda: jbn.plot.initial_weight(10, {}), ValueError, "`momenta` is empty"),
        (lambda: jbn.plot.error_against_momentum(0, 32), ValueError, "`steps` is 0"),
        (lambda: jbn.plot.error_against_momentum(10, 32, distances=[]), ValueError, r"`distances` is \[\]"),
        (lambda: jbn.plot.error_against_momentum(10, 32, distances=1.0), ValueError, "`distances` is 1.0"),
    ],
)
def test_bad_input(draw, error, match):
    with pytest.raises(error, match=match):
        draw()
