"""`jbn bench`: the counts and errors that it reports, and the command."""

import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbn import cli
from jbn.bench import counts, data, numbers, programs, report, run, timing
from jbn.bench.cases import MODES, Case, Network, all_cases, quick_cases
from jbn.bench.layers import LAYERS, linen_layer
from jbn.bench.run import Record

SMALL = Case("small", (16, 8, 4))


def test_a_copy_is_two_passes_and_one_kernel():
    found = counts.count(programs.copy_program(SMALL).compiled, SMALL.size)
    assert (found.passes, found.kernels, found.temporary_bytes) == (2.0, 1, 0)


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

    assert counts.count(Compiled(), 4096) == (2.0, 1, 12)


@pytest.mark.parametrize("case", [SMALL, SMALL._replace(relu=True), SMALL._replace(masked=True)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_formula_is_that_of_jbn(case, dtype):
    case = case._replace(dtype=dtype)
    batch = data.batch(case, np.random.default_rng(0))
    errors = run._errors(case, {"jbn": LAYERS["jbn"]()}, batch)
    assert 0 < errors["jbn"] <= numbers.allowed(dtype)


def test_wrong_numbers_are_noticed():
    layer = LAYERS["jbn"]()
    wrong = layer._replace(train=lambda scale, *rest: layer.train(scale * 1.0001, *rest))
    batch = data.batch(SMALL, np.random.default_rng(0))
    errors = run._errors(SMALL, {"right": layer, "wrong": wrong}, batch)
    assert errors["right"] < numbers.allowed("float32") < errors["wrong"]
    assert numbers.error([np.array([1.0, np.nan])], (np.array([1.0, 2.0]),)) == math.inf


@pytest.mark.peers
def test_far_from_zero_jbn_is_right_and_the_fast_variance_is_not():
    errors, allowed = run.far_errors({"jbn": LAYERS["jbn"](), "linen": linen_layer()})
    assert errors["jbn"] < allowed < errors["linen"]


@pytest.mark.peers
@pytest.mark.parametrize("mode", MODES)
def test_every_peer_runs_and_is_right_near_zero(mode):
    layers, missing = run.importable(run.PEERS)
    assert not missing
    (record,) = run.run([SMALL._replace(modes=(mode,))], layers, 1)
    assert record.seconds.keys() == layers.keys()
    assert all(error <= numbers.allowed("float32") for error in record.errors.values()), record.errors
    assert record.residual_bytes.get("jbn", SMALL.size) < 1.2 * SMALL.size


def test_times_are_taken_in_turn():
    order = []

    def program(name):
        return programs.Program(lambda number: name, order.append, lambda _: time.sleep(timing.SHORTEST))

    found = timing.measure({name: program(name) for name in "abc"}, 8)
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 8, "b": 8, "c": 8}
    rounds = ["".join(order[start : start + 6]) for start in range(9, len(order), 6)]
    # Each sample is of one run here, and after one that is not timed.
    assert all(sorted(turn[::2]) == ["a", "b", "c"] and turn[::2] == turn[1::2] for turn in rounds)
    assert len({turn[0] for turn in rounds}) > 1


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    def absent():
        raise ImportError("no such library")

    monkeypatch.setitem(LAYERS, "haiku", absent)
    assert run.importable(["jbn", "haiku"])[1] == {"haiku": "no such library"}


def test_pytorch_is_left_out_where_it_is_not_installed(monkeypatch):
    def absent():
        raise ImportError("no such library")

    monkeypatch.setattr(run.torch_programs, "description", absent)
    layers, missing = run.importable(["jbn", "torch-last", "torch-first"])
    assert list(layers) == ["jbn"]
    assert missing == dict.fromkeys(["torch-last", "torch-first"], "no such library")


def test_cases_fit_on_this_machine_and_quick_ones_are_few():
    assert run.work(quick_cases()) <= 10
    assert max(case.size for case in all_cases(on_cpu=True) if isinstance(case, Case)) < 2**28
    assert sum(isinstance(case, Network) for case in all_cases(on_cpu=False)) == 2


def record(**changed):
    seconds = {"jbn": [1.0, 1.0, 2.0], "linen": [2.0, 3.0, 2.0], "nnx": [0.5, 0.5, 1.0]}
    record = Record("a", "forward", seconds, {}, {}, {"linen": 0.0, "nnx": 0.0}, 1e-3, 100, 3, [1.0, 1.0, 2.0])
    return record._replace(**changed)


def test_ratios_are_of_the_same_round():
    assert report.rival(record(), "linen") == timing.Spread(2.0, 1.5, 2.5)
    assert report.rival(record(errors={"linen": 0.1}), "linen") is None
    assert report.rival(record(), "keras") is None


def test_report_says_who_wins_and_who_is_wrong():
    peers = ["linen", "nnx", "keras"]
    assert report.times([record()], peers).rows == [("a", "forward", "1e+03", "150%", "2.00 ±0.50", "0.50 ±0.00", None)]
    lines = "\n".join(report.summary([record()], peers, {"linen": 3.0, "nnx": 0.0}, 0.1))
    assert "linen: 2.00 times jbn's time" in lines
    assert "faster than jbn at a, forward: nnx (0.50)" in lines
    assert "wrong are linen (3)" in lines
    wrong = record(errors={"nnx": 0.1})
    assert report.times([wrong], ["nnx"]).rows[0][-1].endswith("!")
    assert "nnx" not in "\n".join(report.summary([wrong], peers, {}, 0.1))
    assert json.loads(json.dumps(report.data([record(errors={"nnx": math.inf})]), allow_nan=False))[0]["errors"] == {
        "nnx": None
    }


@pytest.mark.peers
def test_command_writes_what_it_found(tmp_path, capsys):
    arguments = ["bench", "--quick", "--cases", "masked", "--peers", "linen", "--rounds", "1", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "masked sequence 16x256x256 float32" in printed
    assert "again: jbn bench --quick --cases masked --peers linen --rounds 1" in printed
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["versions"]["jax"] == jax.__version__
    assert found["records"][0]["seconds"].keys() == {"jbn", "linen"}
    assert (tmp_path / "bench.txt").read_text() in printed
    assert (tmp_path / "bench.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds is 0"),
        (["--cases", "nothing"], "--cases is 'nothing'"),
        (["--peers", "linen,tensorflow"], "--peers has 'tensorflow'"),
        (["--out", "/dev/null/here"], "--out is /dev/null/here"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["bench", "--quick", *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
