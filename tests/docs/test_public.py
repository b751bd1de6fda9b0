"""The public names: a script that uses all of them, and the modules that load at first access."""

import re
from pathlib import Path

import jax
import pytest
from support import user_script
from support.public_names import PUBLIC

import jbn


def test_a_script_that_calls_every_public_name(capsys):
    with jax.numpy_dtype_promotion("standard"):
        user_script.main()
    assert jbn.__version__ in capsys.readouterr().out
    text = Path(user_script.__file__).read_text()
    names = sorted({f"jbn.{name}" for name in jbn.__all__} | PUBLIC.keys())
    assert [name for name in names if not re.search(rf"{re.escape(name)}\b", text)] == []


def test_modules_that_load_when_touched_are_found():
    assert {"checkpoint", "diagnostics", "linen", "nnx", "plot"} <= set(dir(jbn))
    absent = "haiku"
    with pytest.raises(AttributeError, match="no attribute 'haiku'"):
        getattr(jbn, absent)
