"""`jbn momentum`: the table, the advice and the picture, and the options it rejects."""

import pytest
from support.command_refusals import Refused, assert_commands_refused

import jbn

pytestmark = pytest.mark.standard_promotion


def test_the_table_and_the_advice_are_those_of_the_laws(command, tmp_path):
    picture = tmp_path / "momentum.png"
    ended = command("momentum", "--steps", 1000, "--batch-size", 32, "--plot", picture)
    assert ended.status == 0
    best = f"{jbn.diagnostics.best_momentum(1000, 32):.5f}"
    assert f"{best}, the best" in ended.out
    assert f"jbn.momentum.warmup({best})" in ended.out
    row = next(line for line in ended.out.splitlines() if line.startswith("0.999 "))
    assert f"{0.999**1000:.2%}" in row
    assert f"{jbn.diagnostics.expected_error(0.999, 1000, 32) ** 0.5:.4g}" in row
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_many_steps_want_a_momentum_that_is_written_with_more_digits(command):
    assert "Use momentum=0.99999" in command("momentum", "--steps", 1000000).out


def test_a_start_that_is_right_wants_no_average(command):
    ended = command("momentum", "--distance", 0)
    assert ended.status == 0
    assert "averaging gains nothing" in ended.out


REFUSED = {
    "steps": Refused("momentum --steps 0", "--steps", "is 0", "a finite number of at least 1"),
    "many steps": Refused("momentum --steps 10000001", "--steps", "is 10000001", "expected at most 10000000"),
    "batch": Refused("momentum --batch-size -3", "--batch-size", "is -3", "a finite number of at least 1"),
    "distance": Refused("momentum --distance nan", "--distance", "is nan", "a finite number of at least 0"),
    "picture": Refused("momentum --plot a.unknown", "--plot", "is a.unknown", "no picture can be written there"),
    "folder": Refused("momentum --plot absent/a.png", "--plot", "is absent/a.png", "no picture can be written there"),
}


def test_momentum_names_the_option_and_how_to_mend_it(command, tmp_path, monkeypatch):
    assert_commands_refused(REFUSED, command, tmp_path, monkeypatch)
