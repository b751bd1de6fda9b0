"""Times of programs, taken in turn, so that what else the machine does meets all of them alike."""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jbn.bench.programs import Program

SHORTEST = 5e-3
"""Seconds that a sample lasts at least; shorter programs run several times in it."""

LONGEST, FEWEST = 15, 5
"""Seconds after which no further round begins, and the rounds that there are at least."""


class Spread(NamedTuple):
    """The middle of a sample and its quartiles."""

    median: float
    low: float
    high: float


def measure(programs: Mapping[str, Program], rounds: int) -> dict[str, list[float]]:
    """Seconds a run of each program, a number for each round, in an order that chance gives to each round.

    Slow programs get fewer rounds than that.

    A run that is not timed comes before each sample: how a program finds the memory that another one left would else
    be part of its time.
    """
    names = list(programs)
    repeats = {name: _repeats(programs[name]) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for turn in range(rounds):
        if turn >= FEWEST and time.perf_counter() - start > LONGEST:
            break
        for place in np.random.default_rng(turn).permutation(len(names)):
            name = names[place]
            _timed(programs[name], 1, turn)
            seconds[name].append(_timed(programs[name], repeats[name], turn))
    return seconds


def spread(sample: Sequence[float]) -> Spread:
    """Median and quartiles."""
    low, median, high = np.quantile(sample, [0.25, 0.5, 0.75])
    return Spread(float(median), float(low), float(high))


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> Spread:
    """Their time over ours, pair by pair of the same round: above 1 they are slower."""
    return spread([one / other for one, other in zip(theirs, ours, strict=True)])


def _repeats(program: Program) -> int:
    """Runs that last long enough together, after two for warm-up."""
    for number in range(2):
        _timed(program, 1, number)
    return int(np.clip(np.ceil(SHORTEST / _timed(program, 1, 0)), 1, 100))


def _timed(program: Program, repeats: int, number: int) -> float:
    """Seconds a run; all are started before the last is waited for, as a training loop does."""
    arguments = [program.prepare(number + run) for run in range(repeats)]
    program.wait(arguments)
    start = time.perf_counter()
    results = [program.run(given) for given in arguments]
    program.wait(results)
    return (time.perf_counter() - start) / repeats
