"""Errors of calibration: faults of norms, found by running the step from chosen statistics, and their messages."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jbn._statistics.nodes import Forest, Path, Statistics, shown

FEW = 5
LINES = 10
ROUNDING = 2.0**-20
Run = Callable[[Statistics], Statistics]
"""A step on one batch: a function from statistics to new statistics."""

NOT_OURS = (
    "averages its statistics with unset ones, so it is not a norm of jbn: use jbn.linen.BatchNorm, jbn.nnx.BatchNorm "
    "or jbn.batch_norm, which accept its variables"
)
STANDS_STILL = (
    "was not updated: it is frozen or in eval mode, is not called, or no batch has finite, valid values there. Leave "
    "it out with `select`, or run it in training mode"
)
POISONED = "received no finite values: a norm before it, which is also listed, was unset and returned NaN"
NOT_FINITE = "has statistics that are not finite, so it is not a norm of jbn: use one of those"
NO_WEIGHT = "has weight 0 in every batch that has values for it: give `weights` above 0, or leave it out with `select`"
SEVERAL_CALLS = (
    "so its statistics are not those of one batch: give each call a norm of its own. Or let `step` run the model once "
    "per batch, pass update_statistics=False in a second pass that must stay, and give microbatches as batches"
)
EMPTY = "`batches` is empty: expected at least one batch. A generator that was read before is empty: create it again."
WEIGHTLESS = "`batches` yielded no batch with a weight above 0: expected at least one."


def check_same_nodes(forest: Forest, chosen: list[Path], new: Forest) -> None:
    """Check that the step returns a tree like the one that it was given."""
    missing = [path for path in chosen if path not in new.nodes]
    if missing:
        raise ValueError(
            f"`step` returns no statistics at {listed(missing)}, only at {listed(list(new.nodes))}: expected the new "
            "state, a tree like `state`."
        )
    for path in chosen:
        for field in ("mean", "var"):
            given, before = (np.shape(tree.at(path)[field]) for tree in (new, forest))
            if given != before:
                raise ValueError(f"`step` returns `{field}` of shape {given} at {named(path)}: expected {before}.")


def usable(fields: Mapping[str, Any]) -> np.ndarray:
    """The features with statistics of a batch, which are finite: not unset, NaN or infinite."""
    return np.isfinite(fields["mean"]) & np.isfinite(fields["var"])


def check_batch(found: Statistics, number: int) -> None:
    """Check that no statistics are averages with unset ones or come from several calls of a norm."""
    problems: dict[Path, str] = {}
    for path, fields in found.items():
        if np.any(np.isneginf(fields["var"]) & (fields["mean"] != 0)):
            problems[path] = NOT_OURS
        elif np.max(fields.get("count", 1), initial=1) > 1:
            problems[path] = f"ran {int(np.max(fields['count']))} times in a step, {SEVERAL_CALLS}"
    _refuse(
        _lines(problems),
        f"`step` on batch {number} gave no statistics of that batch for {len(problems)} of {len(found)} norms",
    )


class Last(NamedTuple):
    """The last batch that was run: its number, the step on it, and the resulting statistics."""

    number: int
    run: Run
    found: Statistics


def check_known(counts: Mapping[Path, np.ndarray], weighed: Mapping[Path, np.ndarray], last: Last) -> None:
    """Check that each feature has statistics of some batch; `weighed` marks those with a weight in some batch."""
    number, run, found = last
    lost = {path: count == 0 for path, count in counts.items() if np.any(count == 0)}
    if not lost:
        return
    # A run from set statistics tells norms that are not updated from norms that received NaN.
    from_common = run(everywhere(found, mean=0, var=1))
    lines = []
    for path, features in lost.items():
        weightless = ~weighed[path] | usable(found[path])
        unset = np.isneginf(found[path]["var"])
        moved = (from_common[path]["mean"] != 0) | (from_common[path]["var"] != 1)
        reasons = {
            STANDS_STILL: unset & ~moved & ~weightless,
            POISONED: unset & moved & ~weightless,
            NOT_FINITE: ~unset & ~weightless,
            NO_WEIGHT: weightless,
        }
        lines += [
            f"{named(path)}{_at(features & where)} {reason}"
            for reason, where in reasons.items()
            if np.any(features & where)
        ]
    batches = f"{number + 1} batch{'es' * (number > 0)}"
    _refuse(lines, f"`step` on {batches} gave no statistics for features of {len(lost)} of {len(found)} norms")


def _at(features: np.ndarray) -> str:
    """The features of a norm as text for a message; empty if all features are concerned."""
    if features.all():
        return ""
    places = [place[0] if len(place) == 1 else place for place in map(tuple, np.argwhere(features).tolist())]
    more = f" and {len(places) - FEW} more" if len(places) > FEW else ""
    return f" at feature{'s' * (len(places) > 1)} {', '.join(map(str, places[:FEW]))}{more}"


def check_ran_once(run: Run, found: Statistics) -> None:
    """Check that norms without a count ran once in a step.

    One call that starts from the moments of its own batch leaves them unchanged. After several calls the statistics are
    a mixture of batches, which the same calls change again.
    """
    if all("count" in fields for fields in found.values()):
        return
    again = run(found)
    suspects = [path for path, fields in found.items() if "count" not in fields and _differ(fields, again[path])]
    # A step that draws new random numbers, as for dropout, gives other statistics in each run.
    if suspects and not _any_differ(found, run(everywhere(found, mean=0, var=-np.inf)), suspects):
        problems = dict.fromkeys(suspects, f"ran more than once in a step, {SEVERAL_CALLS}")
        _refuse(
            _lines(problems), f"after `step`, {len(problems)} of {len(found)} norms do not have moments of one batch"
        )


def everywhere(nodes: Iterable[Path], mean: float, var: float) -> Statistics:
    """The same mean and variance for all nodes, and a count of 0."""
    return {path: {"mean": mean, "var": var, "count": 0} for path in nodes}


def named(path: Path) -> str:
    """The path of a node, for a message."""
    return shown(path) or "(the tree itself)"


def listed(paths: list[Path]) -> str:
    """Some paths, for a message."""
    return ", ".join(map(named, paths[:FEW])) + (f" and {len(paths) - FEW} more" if len(paths) > FEW else "")


def _any_differ(found: Statistics, again: Statistics, paths: list[Path]) -> bool:
    return any(_differ(found[path], again[path]) for path in paths)


def _differ(fields: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Whether the means differ by more than the rounding errors of the layers before can explain."""
    both = usable(fields) & usable(others)
    mean, var, other = (np.where(both, value, 0) for value in (fields["mean"], fields["var"], others["mean"]))
    return bool(np.any(np.abs(mean - other) > ROUNDING * (np.abs(mean) + np.sqrt(var))))


def _lines(problems: Mapping[Path, str]) -> list[str]:
    return [f"{named(path)} {problem}" for path, problem in problems.items()]


def _refuse(lines: list[str], what: str) -> None:
    if lines:
        # Causes come before their consequences, since there may be hundreds of consequences.
        lines = sorted(lines, key=lambda line: line.endswith(POISONED))
        if len(lines) > LINES:
            lines[LINES:] = [f"and {len(lines) - LINES} more"]
        raise ValueError("\n  ".join([f"{what}:", *lines]))
