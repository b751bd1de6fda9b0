"""The `raise` statements of jbn, and those that a call comes to."""

import ast
import sys
from pathlib import Path

import jbn

PACKAGE = Path(jbn.__file__).parent
OF_THE_COMMAND_LINE = ("cli.py", "commands", "demo")
OF_BENCHMARKS = ("bench",)
SOURCES = {str(path): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def statements(of_the_command_line=False):
    """File and line of every `raise` with a message of its own, of the library or of its command line.

    The one AttributeError is Python's word for a name that a module does not have.
    """
    found = set()
    for path, source in SOURCES.items():
        part = Path(path).relative_to(PACKAGE).parts[0]
        if part in OF_BENCHMARKS or (part in OF_THE_COMMAND_LINE) != of_the_command_line:
            continue
        for node in ast.walk(source):
            has_message = isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args
            if has_message and ast.unparse(node.exc.func) != "AttributeError":
                found.add((path, node.lineno))
    return found


def watched(call):
    """The error of a call, and the lines at which functions of jbn were left, by a `raise` or a `return`.

    A profiler sees errors that jbn catches too, such as those that it lists in another's message.
    """
    error, left = None, set()

    def watch(frame, event, _):
        if event == "return" and frame.f_code.co_filename in SOURCES:
            left.add((frame.f_code.co_filename, frame.f_lineno))

    sys.setprofile(watch)
    try:
        call()
    except (Exception, SystemExit) as raised:
        error = raised
    finally:
        sys.setprofile(None)
    return error, frozenset(left)
