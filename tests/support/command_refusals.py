"""Command lines that end in an error: exit status 2, the option, what it got, how to fix it, and no file changed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


def nothing() -> None:
    """Most mistakes need no file."""


class Refused(NamedTuple):
    """A command line, the parts of its error message, and a function that creates the files it starts with."""

    command: str
    option: str
    given: str
    advice: str
    prepare: Callable[[], Any] = nothing


def files() -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


def assert_commands_refused(
    rows: Mapping[str, Refused], command: Callable[..., Any], folder: Path, monkeypatch
) -> None:
    """Each command, run in a new folder by the fixture `command`, fails as its row says."""
    found = []
    for name, row in rows.items():
        (folder / name).mkdir()
        monkeypatch.chdir(folder / name)
        row.prepare()
        before = files()
        ended = command(*row.command.split())
        message = ended.err.rpartition(": error: ")[2]
        missing = [part for part in (row.option, row.given, row.advice) if part not in message]
        if ended.status != 2 or missing:
            found.append(f"{name}: exit status {ended.status}, without {missing}: {ended.err or ended.out}")
        if files() != before:
            found.append(f"{name}: {files().keys() ^ before.keys() or 'a file'} was changed")
    assert not found, "\n".join(found)
