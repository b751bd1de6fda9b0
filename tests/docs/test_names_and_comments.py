"""The names in jbn, the names of its files and of the tests', and their comments."""

import ast
import re
import tokenize

import pytest
from support.sources import FILES, PACKAGE, TREES

BANNED_WORDS = {"eps", "gamma", "beta", "inv", "mu"}
BANNED_FILES = {"utils", "util", "helpers", "helper", "misc", "common"}


def names_given_in(tree):
    """All names that a module defines, and the options of the command line."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                yield name
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name
            case ast.Constant(value=str(text)) if text.startswith("--"):
                yield text.replace("-", "_")


@pytest.fixture(scope="module")
def comments():
    """Every comment, with its file and line."""
    found = []
    for path in FILES:
        with tokenize.open(path) as file:
            tokens = [one for one in tokenize.generate_tokens(file.readline) if one.type == tokenize.COMMENT]
        found += [(f"{path.relative_to(PACKAGE.parent)}:{one.start[0]}", one.string) for one in tokens]
    return found


def test_names_are_words_of_the_field():
    banned = [
        f"{module}: {name}"
        for module, tree in TREES.items()
        for name in names_given_in(tree)
        if BANNED_WORDS & set(name.lower().split("_"))
    ]
    assert not banned, "\n".join(banned)


def test_files_are_named_by_what_is_in_them():
    paths = [path.relative_to(PACKAGE.parent).with_suffix("") for path in FILES]
    banned = [str(path) for path in paths if BANNED_FILES & {word for part in path.parts for word in part.split("_")}]
    assert not banned, "\n".join(banned)


def test_comments_leave_nothing_for_later(comments):
    later = [f"{place}: {comment}" for place, comment in comments if re.search("TODO|FIXME|XXX", comment)]
    assert not later, "\n".join(later)


def test_a_check_that_is_silenced_has_its_code_and_a_reason(comments):
    unexplained = [
        f"{place}: {comment}"
        for place, comment in comments
        if re.search("(type|pyright): *ignore|noqa|pragma:|fmt:|ruff:", comment)
        if not re.fullmatch(r"# [\w :]+(\[[\w, -]+\]|: [A-Z]+\d+)  \w.*", comment)
    ]
    assert not unexplained, "\n".join(unexplained)
