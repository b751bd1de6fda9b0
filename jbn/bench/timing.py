"""Time programs in turn, so that other work on the machine slows all of them equally."""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jbn.bench.programs import Program

SHORTEST = 5e-3
"""Minimum duration of a sample in seconds; shorter programs run several times per sample."""

LONGEST, FEWEST = 15, 5
"""Seconds after which no new round starts, and the minimum number of rounds."""


class Spread(NamedTuple):
    """Median and quartiles of a sample."""

    median: float
    low: float
    high: float


def measure(programs: Mapping[str, Program], rounds: int) -> dict[str, list[float]]:
    """Seconds per run of each program, one number for each round. Each round has a random order of the programs.

    Slow programs get fewer than `rounds` rounds. A run that is not timed comes before each sample. Without it, the time
    of a program would depend on the caches and buffers that the program before it left.
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
    """Compute median and quartiles."""
    low, median, high = np.quantile(sample, [0.25, 0.5, 0.75])
    return Spread(float(median), float(low), float(high))


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> Spread:
    """Ratios of their time to ours, round by round. Above 1, they are slower."""
    return spread([one / other for one, other in zip(theirs, ours, strict=True)])


def _repeats(program: Program) -> int:
    """The number of runs that together last SHORTEST seconds; two warm-up runs come first."""
    for number in range(2):
        _timed(program, 1, number)
    return int(np.clip(np.ceil(SHORTEST / _timed(program, 1, 0)), 1, 100))


def _timed(program: Program, repeats: int, number: int) -> float:
    """Seconds per run. All runs start before the wait for the results, as in a training loop."""
    arguments = [program.prepare(number + run) for run in range(repeats)]
    program.wait(arguments)
    start = time.perf_counter()
    results = [program.run(given) for given in arguments]
    program.wait(results)
    return (time.perf_counter() - start) / repeats
