"""The README is correct."""

import contextlib
import io
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from support import reference
from support.public_names import PUBLIC
from support.tolerances import assert_close

import jbn

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


EXAMPLES = re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def heading_of(code):
    """The heading above an example, as words joined by dashes."""
    headings = re.findall(r"^## (.+)$", README[: README.index(code)], re.MULTILINE)
    return re.sub(r"\W+", "-", headings[-1].lower())


def example(code, output):
    marks = [pytest.mark.needs("torch")] if "import torch" in code else []
    return pytest.param(code, output, id=heading_of(code), marks=marks)


def test_every_example_stands_beside_what_it_prints():
    assert [code for code, _ in EXAMPLES] == blocks("python")


def printed_by_a_new_process(code):
    """The output of code that must run before jax is first used."""
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.standard_promotion
@pytest.mark.parametrize(("code", "output"), [example(*one) for one in EXAMPLES])
def test_example_prints_what_stands_beside_it(code, output):
    if "jax_num_cpu_devices" in code:
        assert printed_by_a_new_process(code) == output
        return
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert printed.getvalue() == output


def test_the_first_console_block_has_the_two_commands_that_ci_reads_and_runs():
    commands = ['pip install -e ".[demo]" && jbn train', 'pip install -e ".[test]" && pytest']
    assert blocks("console")[0].splitlines() == commands


def test_pytorch_defaults_as_stated(rng):
    (call,) = re.findall(r"`jbn\.batch_norm\(\.\.\., (momentum=.*?feature_axis=1)\)`", README)
    options = eval(f"dict({call})", {"jbn": jbn})
    x = rng.normal(size=(6, 3, 4)).astype(np.float32) + 2
    _, state = jbn.batch_norm(*jbn.init(3), x, True, **options)
    expected = reference.batch_norm(x, feature_axis=1)
    assert_close(state.mean, 0.1 * expected.mean)
    assert_close(state.var, 0.9 + 0.1 * expected.var * 24 / 23)


def test_readme_speaks_to_users():
    assert [name for name in ("DESIGN", "issue", "session") if name in README] == []


@pytest.mark.parametrize("file", ["README.md", *(f"notebooks/{path.name}" for path in sorted(ROOT.glob("*/*.ipynb")))])
def test_files_that_are_named_exist(file):
    """Files of jbn/, tests/ and notebooks/, also those in commands and patterns with `*`."""
    named = re.findall(r"(?<![\w./-])((?:jbn|tests|notebooks)/[\w./*-]*\w)(?![\w<])", (ROOT / file).read_text())
    assert [path for path in named if not any(ROOT.glob(path))] == []


def test_the_table_has_every_public_name_in_the_words_of_its_documentation():
    table = dict(re.findall(r"^\| `(jbn\.[\w.]+)` \| (.*) \|$", README, re.MULTILINE))
    assert table == {name: value.__doc__.splitlines()[0] for name, value in PUBLIC.items()}


def test_the_oldest_versions_are_the_lower_bounds():
    bounds = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    pinned = (ROOT / ".ci" / "oldest.txt").read_text().splitlines()
    pins = [line for line in pinned if "#" not in line]
    assert [bound.replace(">=", "==") for bound in bounds] == pins[: len(bounds)]


def test_the_changelog_ends_at_this_version():
    versions = re.findall(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == jbn.__version__


def test_warmup_takes_the_start_away(rng):
    params, state = jbn.init(3)
    x = (rng.normal(size=(5, 64, 3)) * 2 + 5).astype(np.float32)
    for batch in x:
        _, state = jbn.batch_norm(params, state, batch, True, momentum=jbn.momentum.warmup(0.99))
    assert_close(state.mean, x.astype(np.float64).mean((0, 1)))
    assert_close(state.var, x.astype(np.float64).var(1).mean(0))
