"""The recipes in docs/how-to: each program prints the output shown below it, and each link works."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "how-to").glob("*.md"))
PROGRAM = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", re.MULTILINE | re.DOTALL)


def programs(page):
    """Each program of a page with its expected output, named after its heading."""
    text = page.read_text()
    for found in PROGRAM.finditer(text):
        headings = re.findall(r"^#+ (.+)$", text[: found.start()], re.MULTILINE)
        yield pytest.param(*found.groups(), id=f"{page.stem}: {headings[-1]}")


@pytest.mark.standard_promotion
@pytest.mark.parametrize(("code", "output"), [program for page in PAGES for program in programs(page)])
def test_a_recipe_prints_what_stands_beneath_it(code, output):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "a recipe", "exec"), {"__name__": "__main__"})
    assert printed.getvalue() == output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_program_of_a_page_has_its_output_and_every_link_leads_somewhere(page):
    text = page.read_text()
    assert text.count("```python") == len(PROGRAM.findall(text)) > 0
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
