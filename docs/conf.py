"""The documentation site: `sphinx-build -W -c docs . build/site`, from the root of the repository."""

import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert

sys.path.insert(0, str(Path(__file__).parent))
import equations

import jbn

project = "jbn"
author = copyright = "The jbn authors"
version = release = jbn.__version__

# The source is the whole repository, so that links between pages, notebooks and files are the same here and there.
root_doc = "docs/index"
include_patterns = ["docs/**", "notebooks/**", "tests/PEERS.md", "CHANGELOG.md", "CONTRIBUTING.md"]
exclude_patterns = ["docs/redirect", "docs/static", "docs/bench", "**/.ipynb_checkpoints"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx_copybutton"]

html_theme = "furo"
html_title = f"jbn {version}"
html_extra_path = ["redirect"]
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_math_renderer = "mathml"
pygments_style, pygments_dark_style = "a11y-light", "a11y-high-contrast-dark"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the tests run the notebooks; the site shows the outputs that are kept in them
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

default_role = "py:obj"
autodoc_typehints = "none"  # the docstrings say types and shapes
autodoc_preserve_defaults = True
autosummary_generate = False  # the pages of the reference are written by hand
napoleon_custom_sections = ["Returns", ("Source", "References")]  # "Returns" as text: it has no type before a colon


def with_equations(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: their equations become formulas, and what has a meaning in reST is quoted."""
    text = "\n".join(lines).replace("Raises:\n    Nothing.\n\n", "").replace("Attributes:\n", "Args:\n")
    text = re.sub(r"\n\nSource:\n    jbn's own convention\.", "", text)
    lines[:] = "\n\n".join(map(_in_rest, text.split("\n\n"))).split("\n")


def _in_rest(paragraph: str) -> str:
    """A paragraph of a docstring in reST."""
    if ">>>" in paragraph:
        return paragraph
    found = equations.equations(paragraph)
    return "\n\n".join(f".. math:: {one}" for one in found) if found else _quoted(paragraph)


def _quoted(text: str) -> str:
    """The text with the signs of reST quoted where they are arithmetic, outside of backticks."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if at % 2 else re.sub(r"([*|]|_\b(?=[^\w]))", r"\\\1", part) for at, part in enumerate(parts))


def setup(app: Any) -> None:
    """Register what turns docstrings and formulas into HTML that needs neither a script nor a network."""
    app.connect("autodoc-process-docstring", with_equations, priority=400)  # before napoleon's
    app.connect("autodoc-process-signature", as_it_is_written)
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))


def as_it_is_written(app: Any, what: str, name: str, thing: Any, options: Any, signature: str, returned: str) -> Any:
    """The signature of a Flax module without Flax's own arguments, and with the names of functions and types."""
    signature = re.sub(r", parent=.*(?=\)$)", "", signature or "")
    return re.sub(r"<(?:function|class) '?(?:\w+\.)*(\w+)'?(?: at \w+)?>", r"\1", signature), returned


def _inline(translator: Any, node: Any) -> None:
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def _block(translator: Any, node: Any) -> None:
    translator.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode
