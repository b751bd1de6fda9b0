"""The arguments of the public functions and of the Flax modules: keywords, order, defaults and types."""

import ast
import inspect
import itertools

import flax.linen
import flax.nnx
from support.public_names import PUBLIC, called, kind_of
from support.sources import TREES

import jbn

SIGNATURES = {
    name: inspect.signature(value).parameters for name, value in PUBLIC.items() if kind_of(name) == "function"
}
OPTIONS = {
    key: one.default
    for name in [*SIGNATURES, "jbn.batch_norm"]
    for key, one in SIGNATURES[name].items()
    if one.kind == one.KEYWORD_ONLY
}
"""The default of each keyword-only argument, taken from batch_norm if it has the argument."""
OTHERWISE = {
    ("jbn.init", "dtype"): "of what is made, not of a result; second as in jnp.zeros",
    ("jbn.calibrate", "weights"): "a function of each of `batches`, which it stands beside",
    ("jbn.diagnostics.health", "momentum"): "None asks for nothing that needs it",
    ("jbn.renorm.r_max", "end"): "as published, unlike that of d_max",
}
FLAX = {
    "jbn.linen.BatchNorm": (jbn.linen.BatchNorm, flax.linen.BatchNorm),
    "jbn.nnx.BatchNorm": (jbn.nnx.BatchNorm, flax.nnx.BatchNorm),
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


def test_flax_modules_take_what_those_of_flax_do():
    """Names, order, kinds and defaults of the arguments."""
    offenders = []
    for (name, kinds), method in itertools.product(FLAX.items(), ("__init__", "__call__")):
        ours, theirs = (inspect.signature(getattr(kind, method)).parameters for kind in kinds)
        if [key for key in ours if key in theirs] != list(theirs):
            offenders.append(f"{name}.{method} takes {list(ours)}, and Flax {list(theirs)}")
        shared = theirs.keys() & ours.keys()
        given = {key for key in shared if ours[key].kind != theirs[key].kind}
        default = {key for key in shared if ours[key].default != theirs[key].default}
        offenders += [f"{name}.{method} takes `{key}` in another way than Flax" for key in given]
        offenders += [f"{name}.{method}: the default of `{key}`" for key in default]
    assert not offenders, "\n".join(offenders)


def test_flax_modules_have_the_defaults_of_the_core():
    core = inspect.signature(jbn.batch_renorm).parameters
    offenders = []
    for name in PUBLIC:
        if kind_of(name) not in ("linen", "nnx"):
            continue
        given = {
            {"axis": "feature_axis"}.get(key, key): one
            for key, one in inspect.signature(called(name)).parameters.items()
        }
        differ = [key for key in given if key in core and given[key].default != core[key].default]
        offenders += [f"{name}: `{key}` is {given[key].default!r}, not {core[key].default!r}" for key in differ]
    assert not offenders, "\n".join(offenders)


def test_every_signature_has_types():
    untyped = []
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            given = [one for one in ast.iter_child_nodes(node.args) if isinstance(one, ast.arg)]
            bare = [f"takes {one.arg}" for one in given if not (one.annotation or one.arg in ("self", "cls"))]
            bare += ["returns"] if node.returns is None else []
            untyped += [f"{module}:{node.lineno}: no type for what {node.name} {what}" for what in bare]
    assert not untyped, "\n".join(untyped)
