"""The docstring of every public name: its first line, its sections, arguments, exceptions and example.

Each test checks all names and reports every offender, so that a new name is tested without a change here.
"""

import ast
import builtins
import inspect
import re
import textwrap

from support.public_names import DOCUMENTED, PUBLIC, called, kind_of

import jbn

HEADINGS = {
    "function": ("Args", "Returns", "Raises", "Example", "Source"),
    "method": ("Args", "Returns", "Raises"),
    "tuple": ("Attributes", "Example"),
    "linen": ("Attributes", "Example", "Source"),
    "nnx": ("Args", "Raises", "Example", "Source"),
}
NEVER_RAISED = {("jbn.merge", "NameError")}  # merge takes no axis name


def parameters_of(name):
    """The arguments of a function, the fields of a NamedTuple, the attributes that a Flax module adds."""
    inherited = {"self", "parent", "name"}
    if name == "jbn.linen.BatchRenorm":
        inherited |= inspect.signature(jbn.linen.BatchNorm.__init__).parameters.keys()
    found = inspect.signature(called(name)).parameters
    return {re.match(r"[*\w]+", str(one))[0]: one for key, one in found.items() if key not in inherited}


def sections_of(name):
    """The text under each heading of a docstring, and under "" the text before the first."""
    every = "|".join({heading for headings in HEADINGS.values() for heading in headings})
    first, *parts = re.split(rf"^({every}):\n", inspect.getdoc(DOCUMENTED[name]) or "", flags=re.MULTILINE)
    return {"": first} | {heading: textwrap.dedent(text) for heading, text in zip(parts[::2], parts[1::2], strict=True)}


def entries_of(name, *headings):
    """The description of each name in a docstring under these headings."""
    text = "".join(sections_of(name).get(heading, "") for heading in headings)
    _, *parts = re.split(r"^([*\w]+): ", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def raised_by(function, seen):
    """The exceptions that a function raises itself or in the functions of jbn that it calls by a global name."""
    function = inspect.unwrap(function)
    if function in seen:
        return set()
    seen.add(function)
    nodes = list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))))
    found = {node.exc.func.id for node in nodes if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)}
    for chain in {ast.unparse(node) for node in nodes if isinstance(node, ast.Name | ast.Attribute)}:
        first, *attributes = chain.split(".")
        value = function.__globals__.get(first)
        for attribute in attributes:
            value = getattr(value, attribute, None)
        if inspect.isfunction(inspect.unwrap(value)) and value.__module__.startswith("jbn"):
            found |= raised_by(value, seen)
    return found


def assert_none(offenders):
    assert not offenders, "\n".join(offenders)


def test_the_first_line_is_one_sentence():
    offenders = []
    for name in DOCUMENTED:
        first, *others = sections_of(name)[""].splitlines() or [""]
        if not re.fullmatch(r"(?!.*[.!?] ).*\w.*\.", first):
            offenders.append(f"{name}: {first!r} is not one sentence")
        if "".join(others[:1]):
            offenders.append(f"{name} has no empty line after the first")
    assert_none(offenders)


def test_the_sections_are_those_of_its_kind():
    offenders = []
    for name in DOCUMENTED:
        omitted = set() if parameters_of(name) else {"Args"}
        if inspect.signature(called(name)).return_annotation is None:
            omitted.add("Returns")
        expected = ["", *(heading for heading in HEADINGS[kind_of(name)] if heading not in omitted)]
        sections = sections_of(name)
        if list(sections) != expected:
            offenders.append(f"{name} has the sections {list(sections)}, not {expected}")
        offenders += [f"{name}: {heading!r} is empty" for heading, text in sections.items() if not text.strip()]
    assert_none(offenders)


def test_each_argument_is_documented_in_its_order():
    offenders = []
    for name in DOCUMENTED:
        documented, given = list(entries_of(name, "Args", "Attributes")), list(parameters_of(name))
        if documented != given:
            offenders.append(f"{name} documents {documented}, but takes {given}")
    assert_none(offenders)


def test_shape_and_dtype_of_each_array_are_said():
    words = {"shape": r"shape|array|number|scalar", "dtype": r"\b(bool|float|int|number)"}
    offenders = []
    for name in DOCUMENTED:
        texts = entries_of(name, "Args", "Attributes")
        for argument, one in parameters_of(name).items():
            if not re.search("Array|ndarray", str(one.annotation)) or "Callable" in str(one.annotation):
                continue
            unsaid = [what for what, pattern in words.items() if not re.search(pattern, texts.get(argument, ""))]
            offenders += [f"{name} does not say the {what} of `{argument}`" for what in unsaid]
    assert_none(offenders)


def test_what_is_raised_is_documented():
    offenders = []
    for name in DOCUMENTED:
        if "Raises" not in HEADINGS[kind_of(name)]:
            continue
        documented = set(entries_of(name, "Raises"))
        if not documented and sections_of(name).get("Raises", "").strip() != "Nothing.":
            offenders.append(f"{name} has no entry under Raises")
        unknown = {each for each in documented if not issubclass(getattr(builtins, each, object), Exception)}
        raised = {each for each in raised_by(called(name), set()) if (name, each) not in NEVER_RAISED}
        offenders += [f"{name} documents {each}, which is no exception" for each in unknown]
        offenders += [f"{name} raises {each}, which it does not document" for each in raised - documented]
    assert_none(offenders)


def test_the_example_runs_and_uses_it():
    """pytest runs the examples themselves, as doctests of jbn/."""
    examples = {name: sections_of(name).get("Example", "") for name in PUBLIC}
    offenders = [f"{name} has no example that the doctests run" for name in PUBLIC if ">>> " not in examples[name]]
    for name in PUBLIC:
        if kind_of(name) != "tuple" and name not in examples[name]:  # a function may give the tuple
            offenders.append(f"the example of {name} does not use it")
    assert_none(offenders)
