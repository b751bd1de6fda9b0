"""The names that jbn promises: every public function and class, by the way that a user writes it."""

import inspect
from types import ModuleType
from typing import Any

import jbn


def offered(module: ModuleType) -> dict[str, Any]:
    """The functions and classes that a module lists, or that it defines without an underscore."""
    names = getattr(module, "__all__", vars(module))
    values = {name: getattr(module, name) for name in names if not name.startswith("_")}
    own = {
        name: value for name, value in values.items() if getattr(value, "__module__", "").startswith(module.__name__)
    }
    return {f"{module.__name__}.{name}": value for name, value in own.items()}


MODULES = [module for name in jbn.__all__ if inspect.ismodule(module := getattr(jbn, name))]
PUBLIC = {name: value for module in [jbn, *MODULES] for name, value in offered(module).items()}
