"""The surface of the package: its names, what importing it loads, and a script that uses all of it."""

import ast
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import user_script

import jbn


def test_a_script_that_calls_every_public_name(capsys):
    with jax.numpy_dtype_promotion("standard"):
        user_script.main()
    assert jbn.__version__ in capsys.readouterr().out
    text = Path(user_script.__file__).read_text()
    names = {f"jbn.{name}" for name in jbn.__all__} | {f"jbn.momentum.{name}" for name in public(jbn.momentum)}
    names |= {f"jbn.convert.{name}" for name in jbn.convert.__all__}
    names |= {f"jbn.diagnostics.{name}" for name in jbn.diagnostics.__all__}
    names |= {
        f"jbn.{module.__name__.split('.')[1]}.{name}" for module in (jbn.renorm, jbn.plot) for name in public(module)
    }
    assert [name for name in sorted(names) if name not in text] == []


def public(module):
    return [
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", "") == module.__name__ and not name.startswith("_")
    ]


def test_import_is_light():
    heavy = ("flax", "optax", "chex", "matplotlib", "orbax")
    script = f"import jbn, sys; print([name for name in {heavy} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"


def test_core_imports_point_one_way():
    package = Path(jbn.__file__).parent
    allowed = {
        "_arguments": set(),
        "_collectives": set(),
        "momentum": {"_arguments"},
        "_shift": {"_precision"},
        "_shifted_moments": {"_collectives", "_fusion", "_precision", "_shift"},
        "_checkpoint_policy": {"_shifted_moments"},
        "_moments": {"_arguments", "_collectives", "_precision", "_shifted_moments"},
        "_activation": set(),
        "_standardize": {"_activation", "_collectives", "_fusion", "_shifted_moments"},
        "_fusion": set(),
        "_precision": set(),
        "_state": {"_arguments", "_moments", "_nodes", "momentum"},
        "_nodes": set(),
        "renorm": {"_arguments", "momentum"},
        "_normalize": {"_activation", "_arguments", "_precision", "_shifted_moments", "_standardize", "_state"},
        "_forward": {
            "_activation",
            "_arguments",
            "_collectives",
            "_moments",
            "_shifted_moments",
            "_normalize",
            "_standardize",
            "_state",
            "renorm",
        },
        "_batch_norm": {"_activation", "_collectives", "_forward", "_state", "momentum"},
        "_batch_renorm": {"_activation", "_collectives", "_forward", "_state", "momentum", "renorm"},
        "_calibrate": {"_calibration_faults", "_nodes"},
        "_calibration_faults": {"_nodes"},
        "_merge_states": {"_arguments", "_moments", "_shifted_moments", "_state"},
        "_fold": {"_arguments", "_precision", "_standardize", "_state"},
        "_flax": {"_arguments", "_batch_norm", "_batch_renorm", "_state"},
        "linen": {"_batch_renorm", "_collectives", "_flax", "_state", "momentum"},
        "nnx": {"_arguments", "_batch_renorm", "_collectives", "_flax", "_state", "momentum"},
        "checkpoint": set(),
    }
    for module, below in allowed.items():
        assert imported_by(package / f"{module}.py") <= below, module
    for path in (package / "diagnostics").glob("_*.py"):
        assert imported_by(path) <= {"_arguments", "_nodes", "diagnostics", "momentum"}, path
    for path in (package / "convert").glob("_*.py"):
        assert imported_by(path) <= {"_arguments", "_moments", "_precision", "_state", "convert"}, path


def imported_by(path):
    """The modules of jbn that a file imports, by the first part of their name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "jbn":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jbn."):
            names.add(node.module.split(".")[1])
    return names


def test_every_public_name_is_documented():
    for name in jbn.__all__:
        value = getattr(jbn, name)
        if callable(value) and not isinstance(value, type):
            for heading in ("Args:", "Returns:", "Raises:", "Example:", "Source:"):
                assert heading in value.__doc__, (name, heading)
        elif isinstance(value, type):
            assert "Attributes:" in value.__doc__
            assert "Example:" in value.__doc__
    functions = [getattr(jbn.momentum, name) for name in public(jbn.momentum)]
    functions += [getattr(jbn.convert, name) for name in jbn.convert.__all__]
    functions += [jbn.checkpoint.latest, jbn.checkpoint.read, jbn.checkpoint.restore]
    functions += [getattr(module, name) for module in (jbn.renorm, jbn.plot) for name in public(module)]
    functions += [
        value for name in jbn.diagnostics.__all__ if not isinstance(value := getattr(jbn.diagnostics, name), type)
    ]
    for function in functions:
        for heading in ("Returns:", "Raises:", "Example:", "Source:"):
            assert heading in function.__doc__, (function, heading)
    for module in (jbn.linen.BatchNorm, jbn.linen.BatchRenorm, jbn.nnx.BatchNorm, jbn.nnx.BatchRenorm):
        for heading in ("momentum:", "Example:", "Source:"):
            assert heading in module.__doc__


def test_modules_that_load_when_touched_are_found():
    assert {"checkpoint", "diagnostics", "linen", "nnx", "plot"} <= set(dir(jbn))
    absent = "haiku"
    with pytest.raises(AttributeError, match="no attribute 'haiku'"):
        getattr(jbn, absent)
