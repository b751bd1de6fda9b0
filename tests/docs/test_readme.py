"""The README is correct."""

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from support import reference
from support.tolerances import assert_close

import jbn

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_first_console_block_has_the_two_commands_that_ci_reads_and_runs():
    commands = ['pip install -e ".[demo]" && jbn train', 'pip install -e ".[test]" && pytest']
    assert blocks("console")[0].splitlines() == commands


def test_pytorch_defaults_as_stated(rng):
    page = (ROOT / "docs" / "pytorch.md").read_text()
    (call,) = re.findall(r"`jbn\.batch_norm\(\.\.\., (momentum=.*?feature_axis=1)\)`", page)
    options = eval(f"dict({call})", {"jbn": jbn})
    x = rng.normal(size=(6, 3, 4)).astype(np.float32) + 2
    _, state = jbn.batch_norm(*jbn.init(3), x, True, **options)
    expected = reference.batch_norm(x, feature_axis=1)
    assert_close(state.mean, 0.1 * expected.mean)
    assert_close(state.var, 0.9 + 0.1 * expected.var * 24 / 23)


def test_readme_is_short_and_speaks_to_users():
    assert len(README.splitlines()) <= 200
    assert [name for name in ("DESIGN", "issue", "session") if name in README] == []


@pytest.mark.parametrize("file", ["README.md", *(f"notebooks/{path.name}" for path in sorted(ROOT.glob("*/*.ipynb")))])
def test_files_that_are_named_exist(file):
    """Files of jbn/, tests/ and notebooks/, also those in commands and patterns with `*`."""
    named = re.findall(r"(?<![\w./-])((?:jbn|tests|notebooks)/[\w./*-]*\w)(?![\w<])", (ROOT / file).read_text())
    assert [path for path in named if not any(ROOT.glob(path))] == []


def test_the_oldest_versions_are_the_lower_bounds():
    bounds = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    pinned = (ROOT / ".ci" / "oldest.txt").read_text().splitlines()
    pins = [line for line in pinned if "#" not in line]
    assert [bound.replace(">=", "==") for bound in bounds] == pins[: len(bounds)]


def test_the_changelog_has_this_version():
    versions = re.findall(r"^## \[([\d.]+)\]", CHANGELOG, re.MULTILINE)
    assert versions[0] == jbn.__version__ or (jbn.__version__.endswith(".dev0") and "## [Unreleased]" in CHANGELOG)


def test_warmup_takes_the_start_away(rng):
    params, state = jbn.init(3)
    x = (rng.normal(size=(5, 64, 3)) * 2 + 5).astype(np.float32)
    for batch in x:
        _, state = jbn.batch_norm(params, state, batch, True, momentum=jbn.momentum.warmup(0.99))
    assert_close(state.mean, x.astype(np.float64).mean((0, 1)))
    assert_close(state.var, x.astype(np.float64).var(1).mean(0))
