"""What docstrings, signatures, names and imports of jbn keep to; all are found, so that a new one is tested too."""

import ast
import builtins
import functools
import inspect
import itertools
import os
import re
import subprocess
import sys
import textwrap
import tokenize
from graphlib import TopologicalSorter
from pathlib import Path

import flax.linen
import flax.nnx
import pytest
from support.public_names import PUBLIC

import jbn

PACKAGE = Path(jbn.__file__).parent
SOURCES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {module: ast.parse(path.read_text()) for module, path in SOURCES.items()}
FILES = [*SOURCES.values(), *sorted(Path(__file__).parents[1].rglob("*.py"))]
ON_TOP = {"__main__", "cli", "commands", "demo", "bench"}
LIBRARY = [module for module in SOURCES if ON_TOP.isdisjoint(module.split("."))]

METHODS = {
    f"{name}.{attribute}": value
    for name, kind in PUBLIC.items()
    if inspect.isclass(kind)
    for attribute, value in vars(kind).items()
    if inspect.isfunction(value) and value.__module__ == kind.__module__
    if attribute == "__call__" or not attribute.startswith("_")
}
DOCUMENTED = {**PUBLIC, **METHODS}
HEADINGS = {
    "function": ("Args", "Returns", "Raises", "Example", "Source"),
    "method": ("Args", "Returns", "Raises"),
    "tuple": ("Attributes", "Example"),
    "linen": ("Attributes", "Example", "Source"),
    "nnx": ("Args", "Raises", "Example", "Source"),
}
NEVER_RAISED = {("jbn.merge", "NameError")}  # it merges over no axis


def kind_of(name):
    if name in METHODS:
        return "method"
    if inspect.isfunction(PUBLIC[name]):
        return "function"
    return "tuple" if issubclass(PUBLIC[name], tuple) else name.split(".")[1]


def called(name):
    """The function whose signature is that of a name: of a Flax module, its constructor."""
    return DOCUMENTED[name].__init__ if kind_of(name) in ("linen", "nnx") else DOCUMENTED[name]


def parameters_of(name):
    """The arguments of a function, the fields of a NamedTuple, the attributes that a Flax module adds."""
    inherited = {"self", "parent", "name"}
    if name == "jbn.linen.BatchRenorm":
        inherited |= inspect.signature(jbn.linen.BatchNorm.__init__).parameters.keys()
    found = inspect.signature(called(name)).parameters
    return {re.match(r"[*\w]+", str(one))[0]: one for key, one in found.items() if key not in inherited}


def sections_of(name):
    """The text under each heading of a docstring, and under none."""
    every = "|".join({heading for headings in HEADINGS.values() for heading in headings})
    first, *parts = re.split(rf"^({every}):\n", inspect.getdoc(DOCUMENTED[name]) or "", flags=re.MULTILINE)
    return {"": first} | {heading: textwrap.dedent(text) for heading, text in zip(parts[::2], parts[1::2], strict=True)}


def entries_of(name, *headings):
    """What a docstring says of each name under these headings."""
    text = "".join(sections_of(name).get(heading, "") for heading in headings)
    _, *parts = re.split(r"^([*\w]+): ", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def raised_by(function, seen):
    """The exceptions that a function raises, by itself and by what it calls of jbn by a global name."""
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


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_first_line_is_one_sentence(name):
    first, *others = sections_of(name)[""].splitlines()
    assert re.fullmatch(r"(?!.*[.!?] ).*\w.*\.", first), f"{name}: {first!r} is not one sentence"
    assert not "".join(others[:1]), f"{name} has no empty line after the first"


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_sections_are_those_of_its_kind(name):
    omitted = set() if parameters_of(name) else {"Args"}
    if inspect.signature(called(name)).return_annotation is None:
        omitted.add("Returns")
    expected = ["", *(heading for heading in HEADINGS[kind_of(name)] if heading not in omitted)]
    sections = sections_of(name)
    assert list(sections) == expected, f"{name} has the sections {list(sections)}, not {expected}"
    assert all(text.strip() for text in sections.values()), f"{name} has an empty section"


@pytest.mark.parametrize("name", DOCUMENTED)
def test_each_argument_is_documented_in_its_order(name):
    documented, given = list(entries_of(name, "Args", "Attributes")), list(parameters_of(name))
    assert documented == given, f"{name} documents {documented}, but takes {given}"


@pytest.mark.parametrize("name", DOCUMENTED)
def test_shape_and_dtype_of_each_array_are_said(name):
    words = {"shape": r"shape|array|number|scalar", "dtype": r"\b(bool|float|int|number)"}
    texts = entries_of(name, "Args", "Attributes")
    for argument, one in parameters_of(name).items():
        kind = str(one.annotation)
        if re.search("Array|ndarray", kind) and "Callable" not in kind:
            unsaid = [what for what, pattern in words.items() if not re.search(pattern, texts.get(argument, ""))]
            assert not unsaid, f"{name} does not say the {' and '.join(unsaid)} of `{argument}`"


@pytest.mark.parametrize("name", [name for name in DOCUMENTED if "Raises" in HEADINGS[kind_of(name)]])
def test_what_is_raised_is_documented(name):
    documented = set(entries_of(name, "Raises"))
    assert documented or sections_of(name)["Raises"].strip() == "Nothing.", f"{name} has no entry under Raises"
    unknown = {each for each in documented if not issubclass(getattr(builtins, each, object), Exception)}
    assert not unknown, f"{name} documents {unknown}, which are no exceptions"
    raised = {each for each in raised_by(called(name), set()) if (name, each) not in NEVER_RAISED}
    assert raised <= documented, f"{name} raises {raised - documented}, which it does not document"


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_runs_and_uses_it(name):
    example = sections_of(name)["Example"]
    assert ">>> " in example, f"{name} has no example that the doctests run"
    if kind_of(name) != "tuple":  # which a function may give
        assert name in example, f"the example of {name} does not use it"


SIGNATURES = {
    name: inspect.signature(value).parameters for name, value in PUBLIC.items() if kind_of(name) == "function"
}
OPTIONS = {
    key: one.default
    for name in [*SIGNATURES, "jbn.batch_norm"]
    for key, one in SIGNATURES[name].items()
    if one.kind == one.KEYWORD_ONLY
}
"""The default of each argument that some function takes by keyword only: that of batch_norm where it has one."""
OTHERWISE = {
    ("jbn.init", "dtype"): "of what is made, not of a result; second as in jnp.zeros",
    ("jbn.calibrate", "weights"): "a function of each of `batches`, which it stands beside",
    ("jbn.diagnostics.health", "momentum"): "None asks for nothing that needs it",
    ("jbn.renorm.r_max", "end"): "as published, unlike that of d_max",
}


def test_options_are_keywords_with_one_default():
    otherwise = {
        (name, key)
        for name, parameters in SIGNATURES.items()
        for key, one in parameters.items()
        if key in OPTIONS and one.default is not one.empty
        if one.kind != one.KEYWORD_ONLY or one.default != OPTIONS[key]
    }
    assert otherwise == OTHERWISE.keys()


def test_options_come_in_one_order():
    options = {name: [key for key in parameters if key in OPTIONS] for name, parameters in SIGNATURES.items()}
    differ = [
        (one, other)
        for one, other in itertools.combinations(options, 2)
        if [key for key in options[one] if key in options[other]]
        != [key for key in options[other] if key in options[one]]
    ]
    assert differ == []


FLAX = {
    "linen": (jbn.linen.BatchNorm, flax.linen.BatchNorm),
    "nnx": (jbn.nnx.BatchNorm, flax.nnx.BatchNorm),
}
REFUSED = {"use_fast_variance", "force_float32_reductions", "promote_dtype"}


@pytest.mark.parametrize("module", FLAX)
@pytest.mark.parametrize("method", ["__init__", "__call__"])
def test_flax_modules_take_what_those_of_flax_do(module, method):
    ours, theirs = (inspect.signature(getattr(kind, method)).parameters for kind in FLAX[module])
    assert [key for key in ours if key in theirs] == list(theirs), "names and order"
    assert {key for key in theirs if ours[key].kind != theirs[key].kind} == set(), "how they are given"
    differ = {key for key in theirs if ours[key].default != theirs[key].default}
    assert differ == REFUSED & theirs.keys(), "defaults"


@pytest.mark.parametrize("name", [name for name in PUBLIC if kind_of(name) in ("linen", "nnx")])
def test_flax_modules_have_the_defaults_of_the_core(name):
    core = inspect.signature(jbn.batch_renorm).parameters
    given = inspect.signature(called(name)).parameters
    differ = {key for key in given if key in core and given[key].default != core[key].default}
    if "axis" in given and given["axis"].default != core["feature_axis"].default:
        differ.add("axis")
    assert not differ, f"{name} has other defaults than jbn.batch_renorm for {differ}"


@pytest.mark.parametrize("module", SOURCES)
def test_every_signature_has_types(module):
    functions = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    untyped = [f"{node.name} returns" for node in functions if node.returns is None]
    for node in functions:
        given = [one for one in ast.iter_child_nodes(node.args) if isinstance(one, ast.arg)]
        untyped += [
            f"{node.name} takes {one.arg}" for one in given if not (one.annotation or one.arg in ("self", "cls"))
        ]
    assert not untyped, f"{module} has no types for what {untyped}"


BANNED_WORDS = {"eps", "gamma", "beta", "inv", "mu"}
BANNED_FILES = {"utils", "util", "helpers", "helper", "misc", "common"}


def names_given_in(tree):
    """All that a module gives a name to, and the options of the command line."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                yield name
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name
            case ast.Constant(value=str(text)) if text.startswith("--"):
                yield text.replace("-", "_")


@pytest.mark.parametrize("module", SOURCES)
def test_names_are_words_of_the_field(module):
    banned = {name for name in names_given_in(TREES[module]) if BANNED_WORDS & set(name.lower().split("_"))}
    assert not banned, f"{module} gives the names {banned}"


def comments_of(path):
    with tokenize.open(path) as file:
        return [token.string for token in tokenize.generate_tokens(file.readline) if token.type == tokenize.COMMENT]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_are_named_by_what_is_in_them(path):
    words = {word for part in path.relative_to(PACKAGE.parent).with_suffix("").parts for word in part.split("_")}
    assert not words & BANNED_FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_comments_leave_nothing_for_later(path):
    later = [comment for comment in comments_of(path) if re.search("TODO|FIXME|XXX", comment)]
    assert not later, f"{path}: {later}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_check_that_is_silenced_has_its_code_and_a_reason(path):
    silenced = [one for one in comments_of(path) if re.search("(type|pyright): *ignore|noqa|pragma:|fmt:|ruff:", one)]
    unexplained = [one for one in silenced if not re.fullmatch(r"# [\w :]+(\[[\w, -]+\]|: [A-Z]+\d+)  \w.*", one)]
    assert not unexplained, f"{path}: {unexplained}"


@pytest.mark.parametrize("module", LIBRARY)
def test_the_library_prints_and_logs_nothing(module):
    for node in ast.walk(TREES[module]):
        match node:
            case ast.Call(func=ast.Name(id="print") | ast.Attribute(attr="print" | "write")):
                pytest.fail(f"{module}:{node.lineno} prints")
            case ast.alias(name="logging") | ast.ImportFrom(module="logging"):
                pytest.fail(f"{module}:{node.lineno} logs")


@functools.cache
def imports_of(module):
    """The modules of jbn that one imports, anywhere in it."""
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            names = [one.name for one in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}:{node.lineno} imports by a relative name"
            names = [f"{node.module}.{one.name}" for one in node.names]
        else:
            continue
        found |= {name if name in SOURCES else name.rpartition(".")[0] for name in names}
    return found & SOURCES.keys()


# What each module of the library imports of jbn, from the ground up; a dot is for its own package.
IMPORTS = {
    "_arguments": "",
    "_activation": "",
    "_collectives": "",
    "_fusion": "",
    "_nodes": "",
    "_precision": "",
    "momentum": "_arguments",
    "renorm": "_arguments momentum",
    "_shift": "_precision",
    "_shifted_moments": "_collectives _fusion _precision _shift",
    "_checkpoint_policy": "_shifted_moments",
    "_moments": "_arguments _collectives _precision _shifted_moments",
    "_standardize": "_activation _collectives _fusion _shifted_moments",
    "_state": "_arguments _moments _nodes momentum",
    "_normalize": "_activation _arguments _precision _shifted_moments _standardize _state",
    "_forward": "_activation _arguments _collectives _moments _normalize _shifted_moments _standardize _state renorm",
    "_batch_norm": "_activation _collectives _forward _state momentum",
    "_batch_renorm": "_activation _collectives _forward _state momentum renorm",
    "_merge_states": "_arguments _shifted_moments _state",
    "_fold": "_arguments _precision _standardize _state",
    "_calibration_faults": "_nodes",
    "_calibrate": "_calibration_faults _nodes",
    "_flax": "_arguments _batch_norm _batch_renorm _state",
    "linen": "_batch_renorm _collectives _flax _state momentum",
    "nnx": "_arguments _batch_renorm _collectives _flax _state momentum",
    "checkpoint": "",
    "convert._names": "_arguments _precision _state",
    "convert._equinox": "._names _state",
    "convert._flax": "._names _state",
    "convert._haiku": "._names _state",
    "convert._keras": "._names _state",
    "convert._torch": "._names _state",
    "convert._places": "._equinox ._flax ._haiku ._keras ._names ._torch _state",
    "convert._trees": "._names ._places _state",
    "convert": "._equinox ._flax ._haiku ._keras ._torch ._trees",
    "diagnostics._table": "",
    "diagnostics._compare": "._table _arguments _nodes",
    "diagnostics._laws": "_arguments momentum",
    "diagnostics._variance": "._laws _arguments momentum",
    "diagnostics._health": "._compare ._laws ._table _arguments _nodes",
    "diagnostics": "._compare ._health ._laws ._table ._variance",
    "plot": "_arguments _nodes diagnostics diagnostics._compare diagnostics._laws momentum",
}


@pytest.mark.parametrize("module", IMPORTS)
def test_each_module_of_the_library_imports_what_is_below_it(module):
    room = module.partition(".")[0]
    found = sorted(name.removeprefix("jbn.").replace(f"{room}.", ".") for name in imports_of(f"jbn.{module}"))
    assert found == sorted(IMPORTS[module].split()), module


def test_each_module_of_the_library_has_a_place():
    assert {"jbn", *(f"jbn.{module}" for module in IMPORTS)} == set(LIBRARY)


def test_no_module_imports_itself_by_way_of_others():
    TopologicalSorter({module: imports_of(module) for module in SOURCES}).prepare()  # a cycle is an error that shows it


def test_nothing_imports_what_sits_on_top():
    importers = {name: {module for module in SOURCES if name in imports_of(module)} for name in SOURCES}
    on_top = set(SOURCES) - set(LIBRARY)
    assert {name: found for name in on_top if (found := importers[name] - on_top)} == {}
    for name in ("jbn.linen", "jbn.nnx"):
        assert importers[name] <= {"jbn", *on_top}, name  # jbn names them to type checkers only


def run(script):
    """What a fresh interpreter prints, on a CPU that nothing was set up on."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    return result.stdout.split()


def test_import_loads_jax_and_jbn_and_nothing_else():
    """What is loaded beside jax is what takes time beside jax."""
    added = run("import sys, jax, jax.numpy; before = {*sys.modules}; import jbn; print(*{*sys.modules} - before)")
    of_others = [name for name in added if name.split(".")[0] not in {"jbn", *sys.stdlib_module_names}]
    assert of_others == ["jax.ad_checkpoint"]
    assert {f"jbn.{name}" for name in jbn._WHEN_TOUCHED}.isdisjoint(added)
    heavy = {"flax", "optax", "chex", "matplotlib", "orbax", "scipy.optimize"}
    assert heavy.isdisjoint(run("import jbn, sys; print(*sys.modules)"))


def test_import_leaves_the_devices_to_be_set_up():
    assert run("import jbn, jax; jax.config.update('jax_num_cpu_devices', 3); print(jax.device_count())") == ["3"]
