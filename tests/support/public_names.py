"""The public names of jbn: every public function and class, by the name that a user writes."""

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
METHODS = {
    f"{name}.{attribute}": value
    for name, kind in PUBLIC.items()
    if inspect.isclass(kind)
    for attribute, value in vars(kind).items()
    if inspect.isfunction(value) and value.__module__ == kind.__module__
    if attribute == "__call__" or not attribute.startswith("_")
}
DOCUMENTED = {**PUBLIC, **METHODS}
"""Everything that needs a docstring with sections: the public names, and the methods of the classes among them."""


def kind_of(name: str) -> str:
    """The kind of a name: "function", "method", "tuple" (a NamedTuple), or "linen" or "nnx" for a Flax module."""
    if name in METHODS:
        return "method"
    if inspect.isfunction(PUBLIC[name]):
        return "function"
    return "tuple" if issubclass(PUBLIC[name], tuple) else name.split(".")[1]


def called(name: str) -> Any:
    """The function with the signature of a name; for a Flax module, its constructor."""
    return DOCUMENTED[name].__init__ if kind_of(name) in ("linen", "nnx") else DOCUMENTED[name]
