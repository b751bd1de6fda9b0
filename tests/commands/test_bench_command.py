"""`jbn bench`: the cases it measures, what it prints and writes, and the options it rejects."""

import functools
import json

import jax
import optax
import pytest
from support.command_refusals import Refused, assert_commands_refused

from jbn.bench import eager, networks, report, run, steps, torch_programs

pytestmark = pytest.mark.standard_promotion


@pytest.fixture
def small_steps(monkeypatch):
    """Measure only one small network and one gradient outside jit, once each."""
    small = steps.Step("mlp", functools.partial(networks.MLP, width=4), (8, 4), "float32")
    monkeypatch.setattr(steps, "quick_cases", lambda: [small, eager.CASES[0]])
    monkeypatch.setattr(steps, "FIRST_STEPS", 1)
    monkeypatch.setattr(steps, "_descent", lambda: optax.sgd(0.1, momentum=0.9))
    monkeypatch.setattr(jax, "clear_caches", lambda: None)


def test_whole_steps_are_measured_beside_flax_and_written(command, small_steps, tmp_path):
    ended = command("bench", "--quick", "--peers", "linen", "--rounds", 2, "--out", tmp_path)
    assert ended.status == 0
    rows = [line.split()[3:] for line in ended.out.splitlines() if line.startswith("mlp 8x4 float32")]
    assert [name for name, *_ in rows] == ["linen", "jbn", "jbn-inside"]
    assert "to repeat: jbn bench --quick --peers linen --rounds 2\n" in ended.out
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["versions"]["jax"] == jax.__version__
    step, gradient = found["records"]
    assert [len(step["first"][name][0]) for name in ("linen", "jbn", "jbn-inside")] == [3, 3, 3]
    assert step["ratios"]["linen"]["median"] == 1
    assert step["counts"]["jbn"]["moved_bytes"] > 0
    assert gradient["seconds"].keys() == {"linen", "jbn", "jbn.batch_norm", "jbn.nnx"}
    assert (tmp_path / "bench.txt").read_text() in ended.out
    assert (tmp_path / "bench.png").stat().st_size > 1000


def test_without_pytorch_the_others_are_measured(command, small_steps, monkeypatch):
    def absent():
        raise ImportError("no such library")

    monkeypatch.setattr(torch_programs, "description", absent)
    ended = command("bench", "--quick", "--cases", "one norm", "--rounds", 1)
    assert ended.status == 0
    assert "PyTorch is not measured" in ended.out
    assert "not measured: torch-last (no such library)" in ended.out


def test_programs_compiled_apart_are_printed_and_written(command, tmp_path):
    options = ("--quick", "--apart", "--cases", "masked", "--peers", "linen", "--rounds", 1)
    ended = command("bench", *options, "--out", tmp_path)
    assert ended.status == 0
    assert "masked sequence 16x256x256 float32" in ended.out
    assert "to repeat: jbn bench --quick --apart --cases masked --peers linen --rounds 1" in ended.out
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["records"][0]["seconds"].keys() == {"jbn", "linen"}
    assert (tmp_path / "bench.png").stat().st_size > 1000


def test_a_library_that_is_missing_is_left_out_and_named(command, monkeypatch):
    def absent(names):
        return {"jbn": None}, dict.fromkeys(set(names) - {"jbn"}, "no such library")

    monkeypatch.setattr(run, "importable", absent)
    monkeypatch.setattr(report, "far_errors", lambda layers: ({}, 1.0))
    monkeypatch.setattr(run, "run", lambda *given: iter(()))
    ended = command("bench", "--quick", "--apart", "--peers", "haiku", "--rounds", 1)
    assert ended.status == 0
    assert "not measured: haiku (no such library)" in ended.out


REFUSED = {
    "rounds": Refused("bench --rounds 0", "--rounds", "is 0", "expected at least 1"),
    "cases": Refused("bench --quick --cases none", "--cases", "is 'none'", "which is not in the name of any case"),
    "peers": Refused(
        "bench --quick --peers linen,haiku", "--peers", "has 'haiku'", "expected names from linen, nnx, torch-last."
    ),
    "peers apart": Refused("bench --quick --apart --peers mxnet", "--peers", "has 'mxnet'", "expected names"),
    "folder": Refused("bench --quick --out /dev/null/here", "--out", "/dev/null/here", "this folder cannot be created"),
}


def test_bench_names_the_option_and_how_to_mend_it(command, tmp_path, monkeypatch):
    assert_commands_refused(REFUSED, command, tmp_path, monkeypatch)
