"""The source files of jbn and of its tests, parsed."""

import ast
from pathlib import Path

import jbn

PACKAGE = Path(jbn.__file__).parent
SOURCES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
"""The path of each module of jbn, by its dotted name."""
TREES = {module: ast.parse(path.read_text()) for module, path in SOURCES.items()}
FILES = [*SOURCES.values(), *sorted(Path(__file__).parents[1].rglob("*.py"))]
"""The files of jbn and of tests/."""
ON_TOP = {"__main__", "cli", "demo", "bench"}
"""The command line, and the packages that it runs, which may print and log."""
LIBRARY = [module for module in SOURCES if ON_TOP.isdisjoint(module.split("."))]
