"""What the Linen and the NNX module have in common: the options of Flax that are refused, and why."""

from typing import Any

NOT_NEEDED = {
    "use_fast_variance": "jbn's variance is exact at the speed of the fast one, so that there is nothing to choose",
    "force_float32_reductions": "jbn reduces in float32 at least, whatever the dtype of its input",
    "promote_dtype": "jbn normalizes in float32 at least, and `dtype` is the dtype of the result",
}


def refuse_not_needed(**given: Any) -> None:
    """Options of Flax that would have nothing to do are refused, rather than taken and ignored."""
    for name, value in given.items():
        if value is not None:
            raise TypeError(f"`{name}` is {value!r}, but it is not needed: {NOT_NEEDED[name]}. Leave it out.")
