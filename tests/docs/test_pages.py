"""README and the pages of the site: each program prints what stands beneath it, and each link leads somewhere."""

import contextlib
import importlib.util
import inspect
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.public_names import DOCUMENTED, PUBLIC

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAM = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", re.MULTILINE | re.DOTALL)
PEERS = ("torch", "keras", "haiku", "equinox")


def name_of(page):
    return str(page.relative_to(ROOT).with_suffix(""))


def programs(page):
    """Each program of a page with what it shall print; its heading is its name."""
    text = page.read_text()
    for found in PROGRAM.finditer(text):
        code, output = found.groups()
        heading = re.findall(r"^#+ (.+)$", text[: found.start()], re.MULTILINE)[-1]
        needed = [peer for peer in PEERS if re.search(rf"^(import|from) {peer}\b", code, re.MULTILINE)]
        marks = [pytest.mark.needs(*needed)] if needed else []
        yield pytest.param(code, output, id=f"{name_of(page)}: {heading}", marks=marks)


def printed_by_a_new_process(code):
    """For code that must come before jax is first used."""
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.standard_promotion
@pytest.mark.parametrize(("code", "output"), [program for page in PAGES for program in programs(page)])
def test_a_program_prints_what_stands_beneath_it(code, output):
    if "jax_num_cpu_devices" in code:
        assert printed_by_a_new_process(code) == output
        return
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "a page", "exec"), {"__name__": "__main__"})
    assert printed.getvalue() == output


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_program_of_a_page_has_its_output_and_every_link_leads_somewhere(page):
    text = page.read_text()
    assert text.count("```python") == len(PROGRAM.findall(text))
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\((?!https?:)([^)#]+)", prose)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_reference_lists_every_public_name():
    pages = [page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md")]
    listed = [
        name for text in pages for name in re.findall(r"^\.\. auto(?:function|class):: (\S+)", text, re.MULTILINE)
    ]
    summarized = re.findall(r"^   (jbn\.\S+)$", (ROOT / "docs" / "reference" / "index.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(summarized) == sorted(PUBLIC)


@pytest.fixture(scope="module")
def equations():
    file = ROOT / "docs" / "equations.py"
    module = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("equations", file))
    spec.loader.exec_module(module)
    return module.equations


def test_expressions_become_formulas_and_sentences_do_not(equations):
    assert equations("y = (x - mean) / sqrt(var + epsilon) * a,  na = sum(|x_i|)**2\nz = (-a)**b / c * d") == [
        r"y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot a",
        r"n_{a} = \left(\sum\left(\left|x_{i}\right|\right)\right)^{2}",
        r"z = \frac{\left(-a\right)^{b}}{c} \cdot d",
    ]
    for text in ("The sums run over x, where a = 1 holds.", "y = sum(x, axis=0)", "Deprecated (soon)."):
        assert equations(text) is None


def test_every_equation_of_a_docstring_is_a_formula_on_the_site(equations):
    """A paragraph that starts like an equation is one."""
    offenders = []
    for name, value in DOCUMENTED.items():
        for paragraph in (inspect.getdoc(value) or "").split("\n\n"):
            if re.match(r"[\w.()]+ = ", paragraph) and not equations(paragraph):
                offenders.append(f"{name}: {paragraph}")
    assert offenders == []
