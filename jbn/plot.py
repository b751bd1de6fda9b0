"""Pictures of the moving average and of what it does to inference, by matplotlib."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jbn import diagnostics
from jbn._arguments import checked_epsilon
from jbn._statistics.nodes import shown
from jbn.diagnostics._compare import distances as channel_distances
from jbn.diagnostics._compare import found, pairs, wide
from jbn.diagnostics._laws import checked_count, written
from jbn.diagnostics._laws import momenta as kept_at_each
from jbn.momentum import Schedule

try:
    from matplotlib import pyplot
    from matplotlib.axes import Axes
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"`jbn.plot` needs {error.name}, which is not installed: pip install 'jbn[plot]'", name=error.name
    ) from None

FEW = 12
MOMENTA = {"0.9": 0.9, "0.99": 0.99, "0.999": 0.999}
POINTS = 200


def moving_average(
    steps: Any, batches: Any, running: Any, population: float | None = None, *, statistic: str = "mean", ax: Any = None
) -> Axes:
    """A moving average over the steps of a run, beside the batches that it averages and what it should come to.

    running[t] = momentum * running[t - 1] + (1 - momentum) * batches[t]

    Args:
        steps: (n,) array, the steps.
        batches: (n,) array, the batch's statistic at each.
        running: (n,) array, the running statistic after each.
        population: the population's statistic, or None.
        statistic: what it is, for the label of the axis.
        ax: matplotlib axes to draw into; None makes a figure.

    Returns:
        The axes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: ax is no matplotlib axes.
        ValueError: steps, batches and running are not of one shape (n,).

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> import jbn
        >>> ax = jbn.plot.moving_average([1, 2, 3], [2.0, 3.0, 2.5], [0.2, 0.5, 0.7], 2.5)
        >>> ax.get_xlabel()
        'step'

    Source:
        Ioffe and Szegedy, Batch Normalization, 2015, section 3.1.
    """
    shapes = {"steps": np.shape(steps), "batches": np.shape(batches), "running": np.shape(running)}
    if len(set(shapes.values())) > 1 or len(shapes["steps"]) != 1:
        found = ", ".join(f"`{name}` has shape {shape}" for name, shape in shapes.items())
        raise ValueError(f"{found}: expected one shape (n,), a value a step.")
    ax = _axes(ax)
    ax.plot(steps, batches, ".", color="0.6", label="batches")
    ax.plot(steps, running, "o-" if len(steps) <= FEW else "-", color="C3", label="running")
    if population is not None:
        ax.axhline(population, color="C2", linestyle="--", label="population")
    ax.set(xlabel="step", ylabel=statistic, title=f"moving average of the {statistic}")
    ax.legend()
    return ax


def initial_weight(steps: int, momenta: Mapping[str, float | Schedule] = MOMENTA, *, ax: Any = None) -> Axes:
    """What is left of the initial mean 0 and variance 1 over the steps, for several momenta.

    prod(m_t), which is momentum ** t for a number

    Args:
        steps: the last step to show, an int of at least 1.
        momenta: numbers or schedules by the names to show.
        ax: matplotlib axes to draw into; None makes a figure.

    Returns:
        The axes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: steps is no int, momenta no mapping, or ax no matplotlib axes.
        ValueError: steps or a momentum is out of range, or there is no momentum.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> import jbn
        >>> ax = jbn.plot.initial_weight(300, {"0.99": 0.99, "warmup": jbn.momentum.warmup(0.99)})
        >>> [line.get_label() for line in ax.lines]
        ['0.99', 'warmup']

    Source:
        `jbn.diagnostics.initial_weight`.
    """
    if not isinstance(momenta, Mapping):
        raise TypeError(f"`momenta` is {momenta!r}: expected a mapping from the names to show: {{'0.9': 0.9}}.")
    if not momenta:
        raise ValueError("`momenta` is empty: expected at least one, such as {'0.9': 0.9}.")
    ax = _axes(ax)
    updates = np.arange(checked_count("steps", steps, 1) + 1)
    for name, momentum in momenta.items():
        ax.plot(updates, np.concatenate([[1.0], np.cumprod(kept_at_each(momentum, steps))]), label=name)
    ax.set(
        xlabel="updates", ylabel="weight of the start", ylim=(-0.02, 1.02), title="what is left of mean 0, variance 1"
    )
    ax.legend(title="momentum")
    return ax


def error_against_momentum(
    steps: int, batch_size: int, *, distances: Sequence[float] = (0.1, 1.0, 10.0), ax: Any = None
) -> Axes:
    """The expected error of the running mean against the momentum, its optimum marked, for several starts.

    sqrt(expected_error), in standard deviations of the population

    Args:
        steps: the updates made, an int of at least 1.
        batch_size: independent values behind a batch's mean, an int of at least 1.
        distances: of the start from the population's mean, in standard deviations.
        ax: matplotlib axes to draw into; None makes a figure.

    Returns:
        The axes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: steps or batch_size is no int, or ax no matplotlib axes.
        ValueError: one of them is out of range, or there is no distance.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> import jbn
        >>> jbn.plot.error_against_momentum(1000, 32).get_xscale()
        'log'

    Source:
        `jbn.diagnostics.expected_error` and `best_momentum`.
    """
    checked_count("steps", steps, 1)
    if np.ndim(distances) != 1 or not len(distances):
        raise ValueError(f"`distances` is {distances!r}: expected a sequence of at least one, in standard deviations.")
    ax = _axes(ax)
    rates = np.geomspace(1, 1e-2 / steps, POINTS)
    for place, distance in enumerate(distances):
        errors = [diagnostics.expected_error(1 - rate, steps, batch_size, distance) ** 0.5 for rate in rates]
        best = diagnostics.best_momentum(steps, batch_size, distance)
        lowest = diagnostics.expected_error(best, steps, batch_size, distance) ** 0.5
        ax.plot(rates, errors, color=f"C{place}", label=f"start {distance:g} sd away, best {written(best)}")
        if best < 1:
            ax.plot(1 - best, lowest, "o", color=f"C{place}")
    ax.set(xscale="log", yscale="log", xlabel="1 - momentum", ylabel="error of the running mean (sd)")
    ax.set_title(f"error after {steps} steps of {batch_size}")
    ax.invert_xaxis()
    ax.margins(y=0.15)
    ax.legend()
    return ax


def running_against_population(state: Any, population: Any, *, epsilon: float = 1e-5, ax: Any = None) -> Axes:
    """The error of each channel at inference, layer by layer, a dot a channel and a bar at the median.

    error = sqrt(shift**2 + (ratio - 1)**2), as in `jbn.diagnostics.compare`

    Args:
        state: a tree of running statistics, of any kind that `jbn.calibrate` takes.
        population: a tree with the same nodes, as `jbn.calibrate` gives.
        epsilon: that of the norms.
        ax: matplotlib axes to draw into; None makes a figure.

    Returns:
        The axes. Channels whose statistics are unset or not finite have no place on it: the layer's name counts them.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: epsilon is no number, a tree is traced, or ax is no matplotlib axes.
        ValueError: a tree holds no statistics, or they have other nodes or shapes.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> import jbn
        >>> state, population = {"stem": jbn.init(8)[1]}, {"stem": jbn.init(8)[1]}
        >>> ax = jbn.plot.running_against_population(state, population)
        >>> ax.get_ylabel()
        'error of the normalized output (sd)'

    Source:
        `jbn.diagnostics.compare`.
    """
    added, ax = checked_epsilon(epsilon), _axes(ax)
    errors = {path: channel_distances(*pair, added)[0] for path, pair in pairs(state, population).items()}
    _dots_by_norm(ax, errors, "unset or not finite")
    ax.set(ylabel="error of the normalized output (sd)", title="running against population statistics")
    ax.set_ylim(bottom=0)
    return ax


def standard_deviations(state: Any, *, ax: Any = None) -> Axes:
    """The running standard deviation of each channel, norm by norm, a dot a channel and a bar at the median.

    sqrt(var), on a logarithmic axis

    Args:
        state: a tree of running statistics, of any kind that `jbn.calibrate` takes.
        ax: matplotlib axes to draw into; None makes a figure.

    Returns:
        The axes. Channels that are dead, unset or not finite have no place on it: the norm's name counts them.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: the tree is traced, or ax is no matplotlib axes.
        ValueError: the tree holds no statistics.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> import jbn
        >>> ax = jbn.plot.standard_deviations({"stem": jbn.init(8)[1]})
        >>> ax.get_ylabel()
        'running standard deviation'

    Source:
        jbn's own convention.
    """
    ax, forest = _axes(ax), found(state, "`state`")
    with np.errstate(invalid="ignore"):
        deviations = {path: np.sqrt(wide(forest.at(path)["var"])) for path in forest.nodes}
    drawn = {path: np.where(values > 0, values, np.nan) for path, values in deviations.items()}
    _dots_by_norm(ax, drawn, "dead or unset")
    ax.set(ylabel="running standard deviation", title="the spread of what each norm saw")
    if any(np.any(np.isfinite(values)) for values in drawn.values()):
        ax.set_yscale("log")
    return ax


def _dots_by_norm(ax: Axes, values: Mapping[Any, np.ndarray], lost: str) -> None:
    """A dot for each channel of each norm; those that are not finite are counted in the norm's name."""
    labels = []
    for place, (path, channels) in enumerate(values.items()):
        usable = channels[np.isfinite(channels)]
        across = place + np.linspace(-0.3, 0.3, len(usable)) if len(usable) > 1 else [place] * len(usable)
        ax.plot(across, usable, ".", color="C3", alpha=0.5)
        if len(usable):
            ax.hlines(np.median(usable), place - 0.4, place + 0.4, color="0.2")
        number = channels.size - len(usable)
        labels.append((shown(path) or "norm") + (f" ({number} {lost})" if number else ""))
    ax.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    ax.set_xlim(-0.6, len(labels) - 0.4)


def _axes(ax: Any) -> Axes:
    """The given axes, or those of a new figure."""
    if ax is not None and not isinstance(ax, Axes):
        raise TypeError(f"`ax` is a {type(ax).__name__}: expected axes of matplotlib, as in _, ax = pyplot.subplots().")
    return pyplot.subplots(layout="constrained")[1] if ax is None else ax
