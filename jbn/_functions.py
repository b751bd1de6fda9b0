"""Functions as arguments: schedules and activations. JAX looks up compiled programs by their hash."""

import functools
import inspect
from typing import Any

OF_FUNCTIONS = ("builtins", "functools", "jax", "jaxlib", "numpy")
"""Packages that define types of functions: plain, jitted, partial, or with a custom derivative."""


def as_constant(name: str, function: Any) -> Any:
    """A function whose hash stands for one computation, so that compiled programs can be looked up by it.

    A method, or an object that compares by identity, may compute something else after its attributes have changed.
    It is wrapped in a new function at each call.
    """
    try:
        hash(function)
    except TypeError:
        raise TypeError(
            f"`{name}` is {function!r}, which is not hashable: expected a function, or an object with __hash__ and "
            "__eq__, such as a frozen dataclass without arrays. If it holds arrays, apply it to the result instead."
        ) from None
    if not _may_change(function):
        return function

    @functools.wraps(function)
    def called_anew(*given: Any) -> Any:
        return function(*given)

    return called_anew


def _may_change(value: Any) -> bool:
    """Whether a function, or a value bound to it, compares by identity although its attributes may change."""
    if isinstance(value, functools.partial):
        return any(map(_may_change, (value.func, *value.args, *value.keywords.values())))
    kind = type(value)
    by_identity = kind.__eq__ is object.__eq__ and kind.__module__.partition(".")[0] not in OF_FUNCTIONS
    return by_identity or inspect.ismethod(value)
