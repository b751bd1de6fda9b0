"""Functions that are given as arguments, schedules and activations: compiled programs are found again by their hash."""

import functools
import inspect
from typing import Any

OF_FUNCTIONS = ("builtins", "functools", "jax", "jaxlib", "numpy")
"""Packages of the types of functions, of jitted ones and of those with a derivative of their own."""


def as_constant(name: str, function: Any) -> Any:
    """A function that stands for one computation, so that compiled programs may be found again by its hash.

    A method, or an object that compares by identity, may compute something else once its attributes have changed: it is
    given as a new function each time.
    """
    try:
        hash(function)
    except TypeError:
        raise TypeError(
            f"`{name}` is {function!r}, which has no hash: expected a function, or an object with __hash__ and __eq__, "
            "such as a frozen dataclass without arrays. Apply what holds arrays to the result."
        ) from None
    if not _may_change(function):
        return function

    @functools.wraps(function)
    def called_anew(*given: Any) -> Any:
        return function(*given)

    return called_anew


def _may_change(value: Any) -> bool:
    """Whether a function, or what is bound to it, compares by identity, whatever its attributes are."""
    if isinstance(value, functools.partial):
        return any(map(_may_change, (value.func, *value.args, *value.keywords.values())))
    kind = type(value)
    by_identity = kind.__eq__ is object.__eq__ and kind.__module__.partition(".")[0] not in OF_FUNCTIONS
    return by_identity or inspect.ismethod(value)
