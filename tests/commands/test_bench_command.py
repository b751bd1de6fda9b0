"""`jbn bench`: what it chooses to measure, prints, writes and refuses."""

import json

import jax
import pytest
from support.command_refusals import Refused, assert_commands_refused

from jbn.bench import cases, programs, run
from jbn.bench.cases import Case, Network

pytestmark = pytest.mark.standard_promotion


def test_all_that_is_known_is_compared_and_the_policy_shown_where_a_network_was_measured(command, monkeypatch):
    copy = programs.copy_program(Case("small", (16, 8, 4)))
    monkeypatch.setattr(cases, "quick_cases", lambda: [Network("resnet50", 1, "float32")])
    monkeypatch.setattr(run, "PEERS", ("jbn", "linen"))
    monkeypatch.setattr(programs, "network_program", lambda *given: copy)
    ended = command("bench", "--quick", "--rounds", 1)
    assert ended.status == 0
    header, row, *_ = (line.split() for line in ended.out.splitlines() if line.startswith(("case", "resnet50")))
    assert header == ["case", "what", "ms", "memory", "linen", "jbn-remat"]
    assert row[:6] == ["resnet50", "batch", "1", "float32", "training", "step"]
    assert "without PyTorch" in ended.out
    assert ended.out.endswith("again: jbn bench --quick --rounds 1\n")


def test_what_was_found_is_printed_and_written(command, tmp_path):
    options = ("--quick", "--cases", "masked", "--peers", "linen", "--rounds", 1)
    ended = command("bench", *options, "--out", tmp_path)
    assert ended.status == 0
    assert "masked sequence 16x256x256 float32" in ended.out
    assert "again: jbn bench --quick --cases masked --peers linen --rounds 1" in ended.out
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["versions"]["jax"] == jax.__version__
    assert found["records"][0]["seconds"].keys() == {"jbn", "linen"}
    assert (tmp_path / "bench.txt").read_text() in ended.out
    assert (tmp_path / "bench.png").stat().st_size > 1000


def test_a_library_that_is_missing_is_left_out_and_named(command, monkeypatch):
    def absent(names):
        return {"jbn": None}, dict.fromkeys(set(names) - {"jbn"}, "no such library")

    monkeypatch.setattr(run, "importable", absent)
    monkeypatch.setattr(run, "far_errors", lambda layers: ({}, 1.0))
    monkeypatch.setattr(run, "run", lambda *given: iter(()))
    ended = command("bench", "--quick", "--peers", "haiku", "--rounds", 1)
    assert ended.status == 0
    assert "left out: haiku, no such library" in ended.out


REFUSED = {
    "rounds": Refused("bench --rounds 0", "--rounds", "is 0", "expected at least 1"),
    "cases": Refused("bench --quick --cases none", "--cases", "is 'none'", "which is in none of:"),
    "peers": Refused("bench --quick --peers linen,mxnet", "--peers", "has 'mxnet'", "expected some of linen"),
    "folder": Refused("bench --quick --out /dev/null/here", "--out", "/dev/null/here", "no folder can be made"),
}


def test_bench_names_the_option_and_how_to_mend_it(command, tmp_path, monkeypatch):
    assert_commands_refused(REFUSED, command, tmp_path, monkeypatch)
