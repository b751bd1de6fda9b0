"""What can be wrong with a norm that is calibrated, found by running the step from chosen statistics, and said."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from jbn._statistics.nodes import Forest, Path, Statistics, shown

FEW = 5
LINES = 10
ROUNDING = 2.0**-20
Run = Callable[[Statistics], Statistics]
"""A step on one batch, from statistics to statistics."""

NOT_OURS = (
    "averages its statistics with the unset ones, so that it is none of jbn's: use jbn.linen.BatchNorm, "
    "jbn.nnx.BatchNorm or jbn.batch_norm, which take its variables"
)
STANDS_STILL = (
    "is left as it was: it is frozen or in eval mode, is not run, or this batch is not finite or not valid there. "
    "Leave it out by `select`, or run it in training mode"
)
POISONED = "saw no finite values: a norm named here that comes before it was unset, and gave NaN"
NOT_FINITE = "has statistics that are not finite, which those of jbn's norms never become: use one of them"
SEVERAL_CALLS = "so that its statistics are those of no one batch: give each call a norm of its own"


def check_same_nodes(forest: Forest, chosen: list[Path], new: Forest) -> None:
    """The step gives back a tree like the one that it got."""
    missing = [path for path in chosen if path not in new.nodes]
    if missing:
        raise ValueError(
            f"`step` gives no statistics at {_list(missing)}, but at {_list(list(new.nodes))}: expected the new state, "
            "a tree like `state`."
        )
    for path in chosen:
        for field in ("mean", "var"):
            given, before = (np.shape(tree.at(path)[field]) for tree in (new, forest))
            if given != before:
                raise ValueError(f"`step` gives `{field}` of shape {given} at {named(path)}: expected {before}.")


def check_known(run: Run, found: Statistics, number: int) -> None:
    """Every norm took over the moments of the batch, and of one call."""
    problems: dict[Path, str] = {}
    unset = {path for path, fields in found.items() if np.isneginf(fields["var"]).any()}
    # From common statistics instead of unset ones, those that stand still are told from those that NaN came to.
    from_common = run(everywhere(found, mean=0, var=1)) if unset else {}
    for path, fields in found.items():
        if path in unset and np.any(fields["mean"] != 0):
            problems[path] = NOT_OURS
        elif path in unset:
            moved = np.any(from_common[path]["mean"] != 0) or np.any(from_common[path]["var"] != 1)
            problems[path] = POISONED if moved else STANDS_STILL
        elif not (np.isfinite(fields["mean"]).all() and np.isfinite(fields["var"]).all()):
            problems[path] = NOT_FINITE
        elif np.max(fields.get("count", 1), initial=1) > 1:
            problems[path] = f"ran {int(np.max(fields['count']))} times in a step, {SEVERAL_CALLS}"
    _refuse(problems, f"`step` on batch {number} gave no statistics for {len(problems)} of {len(found)} norms")


def check_ran_once(run: Run, found: Statistics) -> None:
    """Norms without a count ran once: one call that starts from its batch's own statistics leaves them as they are.

    After several calls they are a mixture of batches, which the same calls move on.
    """
    if all("count" in fields for fields in found.values()):
        return
    again = run(found)
    suspects = [path for path, fields in found.items() if "count" not in fields and _differ(fields, again[path])]
    # A step that draws random numbers anew, as for dropout, moves all by itself.
    if suspects and not _any_differ(found, run(everywhere(found, mean=0, var=-np.inf)), suspects):
        problems = dict.fromkeys(suspects, f"ran more than once in a step, {SEVERAL_CALLS}")
        _refuse(problems, f"after `step`, {len(problems)} of {len(found)} norms have no moments of one batch")


def everywhere(nodes: Iterable[Path], mean: float, var: float) -> Statistics:
    """The same mean and variance for all, and a count of 0."""
    return {path: {"mean": mean, "var": var, "count": 0} for path in nodes}


def named(path: Path) -> str:
    """A node, for a message."""
    return shown(path) or "(the tree itself)"


def _any_differ(found: Statistics, again: Statistics, paths: list[Path]) -> bool:
    return any(_differ(found[path], again[path]) for path in paths)


def _differ(fields: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Whether the means are further apart than rounding could have brought them in the layers before."""
    rounding = ROUNDING * (np.abs(fields["mean"]) + np.sqrt(fields["var"]))
    return bool(np.any(np.abs(fields["mean"] - others["mean"]) > rounding))


def _refuse(problems: Mapping[Path, str], what: str) -> None:
    if problems:
        # The causes before their consequences, of which there may be hundreds.
        lines = [f"{named(path)} {problem}" for path, problem in problems.items()]
        lines.sort(key=lambda line: line.endswith(POISONED))
        if len(lines) > LINES:
            lines[LINES:] = [f"and {len(lines) - LINES} more"]
        raise ValueError("\n  ".join([f"{what}:", *lines]))


def _list(paths: list[Path]) -> str:
    """Some paths, for a message."""
    return ", ".join(map(named, paths[:FEW])) + (f" and {len(paths) - FEW} more" if len(paths) > FEW else "")
