"""The lesson of `jbn train`: the same training with two momenta, and the advice that the command prints."""

import math

import chex
import numpy as np
import pytest

from jbn.demo import data, loop, report
from jbn.demo.options import Options

pytestmark = [pytest.mark.standard_promotion, pytest.mark.slow]


@pytest.fixture(scope="module")
def lesson():
    """The example of the README with two momenta; each run looks after its first and its last step."""
    digits = data.load()
    options = {text: Options(momentum=text, steps=60, devices=1) for text in ("0.999", "warmup:0.999")}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "LOOKS", 2)
        return {text: (chosen, loop.train(chosen, digits, lambda look: None)) for text, chosen in options.items()}


def words(lines):
    """Join wrapped lines into one."""
    return " ".join(" ".join(lines).split())


def with_look(result, look):
    """Replace all looks of a result by one."""
    return result._replace(record=result.record._replace(looks=[look]))


def last_look(lesson, momentum):
    return lesson[momentum][1].record.looks[-1]


def test_training_does_not_see_the_momentum(lesson):
    slow, warm = lesson["0.999"][1], lesson["warmup:0.999"][1]
    assert slow.record.loss == warm.record.loss
    assert slow.record.train_accuracy == warm.record.train_accuracy
    chex.assert_trees_all_equal(slow.run.params, warm.run.params)


def test_inference_collapses_with_a_slow_average_and_few_steps(lesson):
    look = last_look(lesson, "0.999")
    assert look.held_out_batch > 0.95
    assert look.held_out_running < 0.5


def test_warmup_recovers_most_of_it(lesson):
    look = last_look(lesson, "warmup:0.999")
    assert look.held_out_batch - 0.1 < look.held_out_running


def test_closing_lines_say_what_to_do(lesson):
    collapsed = words(report.closing_lines(*lesson["0.999"]))
    assert f"{0.999**60:.1%} of the weight in the running statistics" in collapsed
    assert "--momentum warmup:0.999" in collapsed
    options, result = lesson["warmup:0.999"]
    stale = result.record.looks[-1]._replace(held_out_running=0.9, held_out_batch=0.97)
    lines = words(report.closing_lines(options, with_look(result, stale)))
    assert "0.0% of the weight in the running statistics" in lines
    assert "Early batches, which come from older network weights" in lines
    good = with_look(result, stale._replace(held_out_running=0.97))
    assert "Nothing. Inference is about as accurate" in report.closing_lines(options, good)[-1]
    diverged = with_look(result, stale._replace(loss=math.nan))
    assert "lower --learning-rate" in report.closing_lines(options, diverged)[-1]
    untrained = with_look(result, stale._replace(held_out_batch=0.4))
    assert "not trained yet" in report.closing_lines(options, untrained)[-1]
    for entry in report.closing_lines(*lesson["0.999"]):
        assert all(len(line) <= report.WIDTH for line in entry.splitlines())


def test_the_memory_of_an_average_is_its_start_and_the_age_of_its_batches():
    for steps in (1, 7, 300):
        start, age = report.memory("0.99", steps)
        np.testing.assert_allclose(start, 0.99**steps, rtol=1e-4, err_msg=f"{steps} steps")
        weights = 0.99 ** np.arange(steps)
        expected = np.average(np.arange(steps), weights=weights)
        np.testing.assert_allclose(age, expected, rtol=1e-3, err_msg=f"{steps} steps")
        start, age = report.memory("cumulative", steps)
        assert start == 0, steps
        np.testing.assert_allclose(age, (steps - 1) / 2, rtol=1e-4, err_msg=f"{steps} steps")
        assert report.memory("1", steps) == (1, 0), steps
    assert report.memory("0.9", 0) == (1, 0)
