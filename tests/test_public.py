"""The surface of the package: its names, what importing it loads, and a script that uses all of it."""

import subprocess
import sys
from pathlib import Path

import jax
import user_script

import jbn


def test_a_script_that_calls_every_public_name(capsys):
    with jax.numpy_dtype_promotion("standard"):
        user_script.main()
    assert jbn.__version__ in capsys.readouterr().out
    text = Path(user_script.__file__).read_text()
    names = {f"jbn.{name}" for name in jbn.__all__} | {f"jbn.momentum.{name}" for name in public(jbn.momentum)}
    assert [name for name in sorted(names) if name not in text] == []


def public(module):
    return [
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", "") == module.__name__ and not name.startswith("_")
    ]


def test_import_is_light():
    script = "import jbn, sys; print([name for name in ('flax', 'optax', 'chex', 'matplotlib') if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"


def test_core_imports_point_one_way():
    package = Path(jbn.__file__).parent
    allowed = {
        "_arguments": set(),
        "_collectives": set(),
        "momentum": {"_arguments"},
        "_shift": set(),
        "_moments": {"_arguments", "_collectives", "_shift"},
        "_standardize": {"_collectives", "_moments"},
        "_state": {"_arguments", "_moments", "momentum"},
        "_batch_norm": {"_arguments", "_collectives", "_moments", "_standardize", "_state", "momentum"},
    }
    for module, below in allowed.items():
        lines = (package / f"{module}.py").read_text().splitlines()
        imported = {
            line.removeprefix("from jbn.").split(" ")[0] if line.startswith("from jbn.") else line.split(" ")[3]
            for line in lines
            if line.startswith(("from jbn.", "from jbn import"))
        }
        assert imported <= below, (module, imported)


def test_every_public_name_is_documented():
    for name in jbn.__all__:
        value = getattr(jbn, name)
        if callable(value) and not isinstance(value, type):
            for heading in ("Args:", "Returns:", "Raises:", "Example:", "Source:"):
                assert heading in value.__doc__, (name, heading)
        elif isinstance(value, type):
            assert "Attributes:" in value.__doc__
            assert "Example:" in value.__doc__
    for name in public(jbn.momentum):
        for heading in ("Returns:", "Raises:", "Example:", "Source:"):
            assert heading in getattr(jbn.momentum, name).__doc__, (name, heading)
