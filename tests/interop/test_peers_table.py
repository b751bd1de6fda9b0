"""PEERS.md, a table of the tests of other libraries: each row names a test of jbn or says why there is none."""

import ast
import functools
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PEERS = ("PyTorch", "Flax", "Haiku", "Equinox", "Keras", "fvcore")
NOT_OURS = "does not apply: "


def tables():
    """The rows of PEERS.md by peer, each a list of cells, without the head and the rule below it."""
    sections = re.split(r"^## ", (TESTS / "PEERS.md").read_text(), flags=re.M)[1:]
    found = {}
    for section in sections:
        lines = [line for line in section.splitlines() if line.startswith("|")]
        found[section.splitlines()[0]] = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return found


@functools.cache
def names_in(file):
    """The names of the tests in a file, given relative to tests/; empty if there is no such file."""
    path = TESTS / file
    source = ast.parse(path.read_text()) if path.is_file() else ast.Module([], [])
    return {node.name for node in source.body if isinstance(node, ast.FunctionDef)}


def faults(row):
    """The problems of a row of the table."""
    if len(row) != 3 or not all(row):
        return [f"has {len([cell for cell in row if cell])} cells, not 3"]
    ours = row[2]
    named = re.findall(r"`(\w+/test_\w+\.py)::(test_\w+)`", ours)
    found = [f"{file}::{name} does not exist" for file, name in named if name not in names_in(file)]
    if ours.count("::") != len(named):
        found.append("a test is not written as `folder/file.py::test_name`")
    if ours.startswith(NOT_OURS) == ("::" in ours):
        found.append(f"names no test and does not start with {NOT_OURS!r}, or does both")
    return found


def test_the_table_has_rows_for_every_peer():
    found = tables()
    assert tuple(found) == PEERS
    assert all(found.values())


def test_every_row_names_tests_that_exist_or_says_why_there_is_none():
    offenders = [
        f"{peer}: {row[0]}: {fault}" for peer, rows in tables().items() for row in rows for fault in faults(row)
    ]
    assert not offenders, "\n".join(offenders)
