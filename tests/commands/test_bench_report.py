"""The report of `jbn bench`: ratios, tables, summary, JSON, the picture and the machine."""

import json
import math
from types import SimpleNamespace

import jax

from jbn.bench import counts, picture, report, step_report, timing
from jbn.bench.run import Record


def record(**changed):
    seconds = {"jbn": [1.0, 1.0, 2.0], "linen": [2.0, 3.0, 2.0], "nnx": [0.5, 0.5, 1.0]}
    record = Record("a", "forward", seconds, {}, {}, {"linen": 0.0, "nnx": 0.0}, 1e-3, 100, 3, [1.0, 1.0, 2.0])
    return record._replace(**changed)


def test_ratios_are_of_the_same_round():
    assert report.rival(record(), "linen") == timing.Spread(2.0, 1.5, 2.5)
    assert report.rival(record(errors={"linen": 0.1}), "linen") is None
    assert report.rival(record(), "keras") is None


def test_the_report_says_who_wins():
    peers = ["linen", "nnx", "keras"]
    assert report.times([record()], peers).rows == [("a", "forward", "1e+03", "150%", "2.00 ±0.50", "0.50 ±0.00", None)]
    lines = "\n".join(report.summary([record()], peers, {"linen": 3.0, "nnx": 0.0}, 0.1))
    assert "linen: 2.00 times jbn's time" in lines
    assert "faster than jbn at a, forward: nnx (0.50)" in lines


def test_the_report_says_who_is_wrong_far_from_zero():
    lines = "\n".join(report.summary([record()], ["linen", "nnx"], {"linen": 3.0, "nnx": 0.0}, 0.1))
    assert "wrong results from linen (error 3)" in lines
    assert "all results are correct" in "\n".join(report.summary([record()], ["nnx"], {"nnx": 0.0}, 0.1))


def test_wrong_numbers_are_marked_and_win_nothing():
    wrong = record(errors={"nnx": 0.1})
    assert report.times([wrong], ["nnx"]).rows[0][-1].endswith("!")
    assert "nnx" not in "\n".join(report.summary([wrong], ["linen", "nnx"], {}, 0.1))


def test_an_infinite_error_is_null_in_json():
    found = json.loads(json.dumps(report.data([record(errors={"nnx": math.inf})]), allow_nan=False))
    assert found[0]["errors"] == {"nnx": None}


def whole_step(**changed):
    first = {"linen": [(1.0, 1.0, 6.0), (1.0, 1.0, 2.0)], "jbn": [(1.0, 1.0, 3.0)]}
    seconds = {"linen": [2.0, 3.0, 2.0], "jbn": [1.0, 1.5, 1.0], "torch-last": [4.0, 6.0, 4.0]}
    counted = {"jbn": counts.Counts(4.0, 5, 2**20, 3 * 2**20)}
    return record(mode="training step", seconds=seconds, errors={}, counts=counted, first=first)._replace(**changed)


def test_a_step_stands_beside_flax_by_the_least_first_and_the_median_later_step():
    assert step_report.table([whole_step()]).rows == [
        ("a", "linen", "2.00", "2.00", None, "2e+03", "2e+03 to 2.5e+03", None, None, None, None),
        ("a", "jbn", "2.00", "3.00", "1.25", "1e+03", "1e+03 to 1.25e+03", "0.50 ±0.00", "3", "5", "1"),
        ("a", "torch-last", None, None, None, "4e+03", "4e+03 to 5e+03", "2.00 ±0.00", None, None, None),
    ]
    eager = whole_step(mode="eager gradient", first=None)
    assert step_report.summary([whole_step(), eager]) == [
        "jbn: first step 1.25, later steps 0.50, eager gradient 0.50 times Flax Linen's time (geometric means)",
        "torch-last: later steps 2.00, eager gradient 2.00 times Flax Linen's time (geometric means)",
    ]


def test_without_flax_there_is_no_ratio():
    alone = whole_step(seconds={"jbn": [1.0]}, first={"jbn": [(1.0, 1.0, 3.0)]}, counts={})
    assert step_report.table([alone]).rows == [
        ("a", "jbn", "2.00", "3.00", None, "1e+03", "1e+03 to 1e+03", None, None, None, None)
    ]
    assert step_report.summary([alone]) == []
    assert report.data([alone], "linen")[0]["ratios"] == {}


def test_the_picture_of_steps_has_later_and_first_steps_with_names_and_units():
    later, first = picture.draw_steps([whole_step()], "a machine").axes
    dots = [
        {container.get_label(): list(container.lines[0].get_xdata()) for container in ax.containers}
        for ax in (later, first)
    ]
    assert dots == [{"jbn": [0.5], "torch-last": [2.0]}, {"jbn": [1.25]}]
    assert "median time of a later step / Flax Linen's" in later.get_xlabel()
    assert "shortest time to trace, lower and compile" in first.get_xlabel()
    assert later.get_ylabel()


def test_a_measurement_without_counts_has_no_line():
    counted = counts.Counts(4.0, 5, 50, 400)
    of_both = record(counts={"jbn": counted, "linen": counted._replace(passes=6.0)}, residual_bytes={"jbn": 110})
    assert report.counts([of_both, record(counts={})], ["jbn", "linen"]).rows == [
        ("a", "forward", "jbn", "4.0 / 3", "5", "0.50", "1.10"),
        ("a", "forward", "linen", "6.0 / 3", "5", "0.50", None),
    ]


def test_the_picture_has_those_who_ran():
    figure = picture.draw([record(), record(errors={"nnx": 0.1})], ["linen", "nnx", "keras"], "a machine")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["linen", "nnx"]
    (axes,) = figure.axes
    dots = {container.get_label(): container.lines[0].get_xdata() for container in axes.containers}
    assert {name: list(ratios) for name, ratios in dots.items()} == {"linen": [2.0, 2.0], "nnx": [0.5]}


def test_the_machine_is_described(monkeypatch):
    monkeypatch.setattr(report, "PACKAGES", ("jax", "a-package-that-is-not-here"))
    assert report.machine(None)["versions"] == {"jax": jax.__version__}
    card = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(jax, "devices", lambda: [card])
    assert report.machine(None)["device"] == "NVIDIA H100 80GB HBM3 (gpu)"
