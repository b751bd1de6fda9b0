"""Pictures of the moving average and of its effect on inference, drawn with matplotlib."""

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

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The palette of Okabe and Ito, with colors that color-blind readers can tell apart."""
BLUE, VERMILLION = COLORS[:2]
LINES = ("-", "--", "-.", ":")
FEW = 12
MOMENTA = {"0.9": 0.9, "0.99": 0.99, "0.999": 0.999}
POINTS = 200


def moving_average(
    steps: Any, batches: Any, running: Any, population: float | None = None, *, statistic: str = "mean", ax: Any = None
) -> Axes:
    """Draw a moving average over the steps of a run, with the batch statistics and the population statistic.

    running[t] = momentum * running[t - 1] + (1 - momentum) * batches[t]

    Args:
        steps: (n,) array of steps.
        batches: (n,) array with the batch statistic at each step.
        running: (n,) array with the running statistic after each step.
        population: the population statistic, or None.
        statistic: name of the statistic, for the title and the label of the axis.
        ax: matplotlib axes to draw into; None creates a figure.

    Returns:
        The axes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: ax is not a matplotlib axes.
        ValueError: steps, batches and running do not all have the same shape (n,).

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
        raise ValueError(f"{found}: expected one shape (n,), one value for each step.")
    ax, title = _axes(ax), f"running {statistic}"
    ax.plot(steps, batches, ".", color="0.6", label="batches")
    ax.plot(steps, running, "o-" if len(steps) <= FEW else "-", color=VERMILLION, label="running")
    if len(steps):
        title += f" ends at {wide(running)[-1]:.3g}"
    if population is not None:
        ax.axhline(population, color=BLUE, linestyle="--", label="population")
        title += f", population {statistic} is {wide(population).item():.3g}"
    ax.set(xlabel="step", ylabel=statistic, title=title)
    ax.legend()
    return ax


def initial_weight(steps: int, momenta: Mapping[str, float | Schedule] = MOMENTA, *, ax: Any = None) -> Axes:
    """Draw the weight of the initial mean 0 and variance 1 over the updates, for several momenta.

    weight = prod(m_t)

    m_t is the momentum of update t. For a constant momentum the weight after t updates is momentum ** t.

    Args:
        steps: number of updates to show, an int of at least 1.
        momenta: mapping from names for the legend to numbers or schedules.
        ax: matplotlib axes to draw into; None creates a figure.

    Returns:
        The axes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: steps is not an int, momenta not a mapping, or ax not a matplotlib axes.
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
        raise TypeError(f"`momenta` is {momenta!r}: expected a mapping from names to momenta, such as {{'0.9': 0.9}}.")
    if not momenta:
        raise ValueError("`momenta` is empty: expected at least one, such as {'0.9': 0.9}.")
    ax = _axes(ax)
    updates = np.arange(checked_count("steps", steps, 1) + 1)
    for place, (name, momentum) in enumerate(momenta.items()):
        weights = np.concatenate([[1.0], np.cumprod(kept_at_each(momentum, steps))])
        ax.plot(updates, weights, label=name, **_style(place))
    ax.set(xlabel="number of updates", ylabel="weight of the initial values (share)", ylim=(-0.02, 1.02))
    ax.set_title("a larger momentum keeps the initial mean 0 and variance 1 longer")
    ax.legend(title="momentum")
    return ax


def error_against_momentum(
    steps: int, batch_size: int, *, distances: Sequence[float] = (0.1, 1.0, 10.0), ax: Any = None
) -> Axes:
    """Draw the expected error of the running mean against the momentum, with the best momentum marked.

    error = sqrt(expected_error)

    The error is in standard deviations of the population. There is one curve for each initial distance.

    Args:
        steps: number of updates, an int of at least 1.
        batch_size: number of independent values in the mean of a batch, an int of at least 1.
        distances: distances of the initial mean from the population mean, in standard deviations.
        ax: matplotlib axes to draw into; None creates a figure.

    Returns:
        The axes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: steps or batch_size is not an int, or ax not a matplotlib axes.
        ValueError: an argument is out of range, or there is no distance.

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
        raise ValueError(f"`distances` is {distances!r}: expected a sequence of numbers, at least one.")
    ax = _axes(ax)
    rates = np.geomspace(1, 1e-2 / steps, POINTS)
    for place, distance in enumerate(distances):
        errors = [diagnostics.expected_error(1 - rate, steps, batch_size, distance) ** 0.5 for rate in rates]
        best = diagnostics.best_momentum(steps, batch_size, distance)
        lowest = diagnostics.expected_error(best, steps, batch_size, distance) ** 0.5
        style = _style(place)
        ax.plot(rates, errors, label=f"{distance:g} sd: {written(best)}", **style)
        if best < 1:
            ax.plot(1 - best, lowest, "o", color=style["color"])
    ax.set(xscale="log", yscale="log", xlabel="1 - momentum", ylabel="expected error of the running mean (sd)")
    ax.set_title(f"best momentum depends on the initial distance\n({steps} updates, batch size {batch_size})")
    ax.invert_xaxis()
    ax.margins(y=0.15)
    ax.legend(title="initial distance: best momentum")
    return ax


def running_against_population(state: Any, population: Any, *, epsilon: float = 1e-5, ax: Any = None) -> Axes:
    """Draw the error of the normalized output of each channel at inference, norm by norm.

    error = sqrt(shift**2 + (ratio - 1)**2)

    Shift and ratio are those of `jbn.diagnostics.compare`. Each channel is a dot, and a bar marks the median.

    Args:
        state: a tree of running statistics, of any kind that `jbn.calibrate` accepts.
        population: a tree with the same nodes, as `jbn.calibrate` returns it.
        epsilon: epsilon of the norms.
        ax: matplotlib axes to draw into; None creates a figure.

    Returns:
        The axes. Channels with statistics that are unset or not finite are not drawn. The label of the norm gives their
        number.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: epsilon is not a number, a tree is traced, or ax is not a matplotlib axes.
        ValueError: a tree holds no statistics, or nodes or shapes differ.

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
    ax.set(ylabel="error of the normalized output (sd)", title="error at inference from running statistics")
    ax.set_ylim(bottom=0)
    return ax


def standard_deviations(state: Any, *, ax: Any = None) -> Axes:
    """Draw the running standard deviation of each channel on a logarithmic axis, norm by norm.

    deviation = sqrt(var)

    Each channel is a dot, and a bar marks the median.

    Args:
        state: a tree of running statistics, of any kind that `jbn.calibrate` accepts.
        ax: matplotlib axes to draw into; None creates a figure.

    Returns:
        The axes. Channels that are dead, unset or not finite are not drawn. The label of the norm gives their number.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: the tree is traced, or ax is not a matplotlib axes.
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
    ax.set(ylabel="running standard deviation", title="spread of the inputs of each norm in training")
    if any(np.any(np.isfinite(values)) for values in drawn.values()):
        ax.set_yscale("log")
    return ax


def _dots_by_norm(ax: Axes, values: Mapping[Any, np.ndarray], lost: str) -> None:
    """Draw a dot for each channel of each norm; the label of the norm counts the channels that are not finite."""
    labels = []
    for place, (path, channels) in enumerate(values.items()):
        usable = channels[np.isfinite(channels)]
        across = place + np.linspace(-0.3, 0.3, len(usable)) if len(usable) > 1 else [place] * len(usable)
        ax.plot(across, usable, ".", color=BLUE, alpha=0.5)
        if len(usable):
            ax.hlines(np.median(usable), place - 0.4, place + 0.4, color=VERMILLION)
        number = channels.size - len(usable)
        labels.append((shown(path) or "norm") + (f" ({number} {lost})" if number else ""))
    ax.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    ax.set_xlim(-0.6, len(labels) - 0.4)
    ax.set_xlabel("norm (dot: one channel, bar: median)")


def _style(place: int) -> dict[str, str]:
    """Color and line style of one of several curves."""
    return {"color": COLORS[place % len(COLORS)], "linestyle": LINES[place % len(LINES)]}


def _axes(ax: Any) -> Axes:
    """The given axes, or those of a new figure."""
    if ax is not None and not isinstance(ax, Axes):
        raise TypeError(f"`ax` is a {type(ax).__name__}: expected matplotlib axes, as in _, ax = pyplot.subplots().")
    return pyplot.subplots(layout="constrained")[1] if ax is None else ax
