"""The counts of compiled programs in `jbn bench`, the expected results, and the timing."""

import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbn.bench import counts, data, numbers, programs, run, steps, timing
from jbn.bench.cases import Case, all_cases, quick_cases
from jbn.bench.layers import LAYERS, linen_layer

SMALL = Case("small", (16, 8, 4))


def test_a_copy_is_two_passes_and_one_kernel():
    found = counts.count(programs.copy_program(SMALL).compiled, SMALL.size)
    assert found == (2.0, 1, 0, 2 * SMALL.size)


def test_rows_that_are_read_count_as_what_they_are():
    x = jnp.ones((64, 256))
    compiled = jax.jit(lambda x: x[3] * 2 + x[5]).lower(x).compile()
    assert counts.count(compiled, x.nbytes).passes == 0


def test_tuples_of_a_tpu_layout_are_read():
    text = """HloModule m

ENTRY %main (p: f32[8,128]) -> (f32[8,128], f32[8,128]) {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %f = (f32[8,128]{1,0:T(8,128)}, /*index=1*/f32[8,128]{1,0:T(8,128)S(1)}) fusion(%p), kind=kLoop, calls=%g
}
"""

    class Compiled:
        def as_text(self):
            return text

        def memory_analysis(self):
            return self

        temp_size_in_bytes = 12

    assert counts.count(Compiled(), 4096) == (2.0, 1, 12, 2 * 4096)


@pytest.mark.parametrize(
    "case",
    [
        SMALL._replace(relu=True),
        SMALL._replace(masked=True),
        SMALL._replace(relu=True, masked=True, dtype="bfloat16"),
    ],
    ids=["relu", "masked", "masked relu in bfloat16"],
)
def test_the_formula_is_that_of_jbn(case):
    batch = data.batch(case, np.random.default_rng(0))
    errors = run._errors(case, {"jbn": LAYERS["jbn"]()}, batch)
    assert 0 < errors["jbn"] <= numbers.allowed(case.dtype)


def test_wrong_numbers_are_noticed():
    layer = LAYERS["jbn"]()
    wrong = layer._replace(train=lambda scale, *rest: layer.train(scale * 1.0001, *rest))
    batch = data.batch(SMALL, np.random.default_rng(0))
    errors = run._errors(SMALL, {"right": layer, "wrong": wrong}, batch)
    assert 0 < errors["right"] < numbers.allowed("float32") < errors["wrong"]
    assert numbers.error([np.array([1.0, np.nan])], (np.array([1.0, 2.0]),)) == math.inf


@pytest.mark.standard_promotion
def test_far_from_zero_jbn_is_right_and_the_fast_variance_is_not():
    errors, allowed = run.far_errors({"jbn": LAYERS["jbn"](), "linen": linen_layer()})
    assert errors["jbn"] < allowed < errors["linen"]


def test_times_are_taken_in_turn():
    order = []

    def program(name):
        return programs.Program(lambda number: name, order.append, lambda _: time.sleep(timing.SHORTEST))

    found = timing.measure({name: program(name) for name in "abc"}, 8)
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 8, "b": 8, "c": 8}
    rounds = ["".join(order[start : start + 6]) for start in range(9, len(order), 6)]
    # Each sample is one run here, after one run that is not timed.
    assert all(sorted(turn[::2]) == ["a", "b", "c"] and turn[::2] == turn[1::2] for turn in rounds)
    assert len({turn[0] for turn in rounds}) > 1


def test_cases_fit_on_this_machine_and_quick_ones_are_few():
    assert run.work(quick_cases()) <= 10
    assert max(case.size for case in all_cases(on_cpu=True) if isinstance(case, Case)) < 2**28
    assert steps.work(steps.quick_cases()) < steps.work(steps.all_cases(on_cpu=True))
    assert [case.dtype for case in steps.all_cases(on_cpu=False) if case.name == "resnet50"] == ["float32", "bfloat16"]
