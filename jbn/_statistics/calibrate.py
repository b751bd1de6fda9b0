"""Population statistics for all norms of a model, from its batches and without changes to the model."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jbn._statistics import nodes
from jbn._statistics.batch_weights import weights_by_feature
from jbn._statistics.faults import (
    EMPTY,
    WEIGHTLESS,
    Last,
    check_batch,
    check_known,
    check_ran_once,
    check_same_nodes,
    everywhere,
    listed,
    named,
    usable,
)
from jbn._statistics.nodes import Forest, Path, Statistics, shown

Step = Callable[[Any, Any], Any]

SIGNATURES = {
    "step": "(state, batch) -> new state, as in calibrate(step, state, batches)",
    "weights": "batch -> weight",
    "select": "path -> bool",
}
OUTSIDE = "but calibrate merges on the host: call it outside of jit, and jit `step`."


class Population(NamedTuple):
    """Merged statistics of the batches so far, in float64 by feature: total weight, mean, biased variance, batches."""

    weight: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    batches: np.ndarray


def calibrate(
    step: Step,
    state: Any,
    batches: Iterable[Any],
    weights: Callable[[Any], Any] | None = None,
    *,
    select: Callable[[str], bool] | None = None,
    progress: bool = False,
) -> Any:
    """Replace the running statistics of every norm in a model with population statistics.

    mean = sum(w_i * mean_i) / sum(w_i),  var = sum(w_i * (var_i + (mean_i - mean)**2)) / sum(w_i)

    The sums run over the batches i. `step` runs on each batch from `unset(state)`, so that it returns the moments of
    that batch. They are merged in float64 on the host, feature by feature. A feature that a batch leaves unset has
    weight 0 in that batch. The result is exact if every norm is a norm of jbn and is called once per step, and if the
    weights are proportional to the numbers of values that it sees.

    Args:
        step: function (state, batch) -> new state: the forward pass of the model in training mode, with fixed
            parameters. Compile it with `jax.jit`.
        state: any tree with nodes that hold `mean` and `var`: jbn's states, Linen's `batch_stats`, or an NNX module.
        batches: iterable of batches for `step`, of any sizes; it is read once. Limit an endless iterator with
            itertools.islice.
        weights: function batch -> weight. It is needed if the number of valid values is not proportional to the number
            of examples, as with masks. A weight is a number of at least 0. If masks differ between features, it is a
            tree like `state` that holds, for each norm, an array with one weight per feature. None weights a batch by
            its number of examples, which is the size of the leading axis of all its arrays. A batch of weight 0 is
            skipped.
        select: function path -> whether to calibrate the node there; a path is the keys to the node, joined by slashes.
            The other nodes keep their statistics, which frozen norms normalize by. None selects all nodes.
        progress: show a progress bar on standard error, with tqdm.

    Returns:
        The tree, with population `mean` and `var` in each selected node. A `count`, if the node has one, is the number
        of batches in which the feature had values. Everything else is unchanged.

    Raises:
        ModuleNotFoundError: `progress` needs tqdm.
        TypeError: `step`, `weights` or `select` is not a function, `batches` is not iterable or is traced, or `state`
            is traced or in half precision.
        ValueError: there are no statistics or no batches, a weight is not a number of at least 0, a node ran more than
            once, or every batch left a feature unset or not finite. The error names the nodes and the likely reason.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jbn
        >>> params, state = jbn.init(1)
        >>> step = jax.jit(lambda state, x: jbn.batch_norm(params, state, x, True)[1])
        >>> state = jbn.calibrate(step, state, [jnp.array([[0.0], [2.0]]), jnp.array([[4.0], [6.0]])])
        >>> print(state.mean, state.var, state.count)
        [3.] [5.] [2.]

        Linen and NNX models:

        >>> from flax import linen, nnx
        >>> model = linen.Sequential([linen.Dense(2), jbn.linen.BatchNorm(use_running_average=False)])
        >>> x = jnp.arange(6.0).reshape(3, 2)
        >>> variables = model.init(jax.random.key(0), x)
        >>> step = lambda v, x: {**v, **model.apply(v, x, mutable="batch_stats")[1]}
        >>> variables = jbn.calibrate(jax.jit(step), variables, [x])
        >>> model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), jbn.nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
        >>> model = jbn.calibrate(jax.jit(lambda model, x: (model(x), model)[1]), model, [x])

    Source:
        Ioffe and Szegedy, Batch Normalization, 2015, algorithm 2, lines 7 to 11; Wu and Johnson, Rethinking "Batch" in
        BatchNorm, 2021, section 3. The merge follows Chan, Golub and LeVeque, 1979.
    """
    _check_functions(step=step, weights=weights, select=select)
    if not isinstance(batches, Iterable):
        raise TypeError(f"`batches` is a {type(batches).__name__}: expected an iterable of batches for `step`.")
    forest = nodes.find(state, "`state`")
    chosen = _chosen(forest, select)
    nothing = {path: np.zeros(np.shape(forest.at(path)["mean"])) for path in chosen}
    totals = {path: Population(zeros, zeros, zeros, zeros) for path, zeros in nothing.items()}
    weighed = {path: zeros > 0 for path, zeros in nothing.items()}
    number, last = None, None
    for number, batch in enumerate(_watched(batches, progress)):
        given = weights_by_feature(batch, number, weights, forest, chosen)
        if not any(weight.any() for weight in given.values()):
            continue
        run = functools.partial(_run, step, forest, chosen, batch)
        found = run(everywhere(chosen, mean=0, var=-np.inf))
        check_batch(found, number)
        if last is None:
            check_ran_once(run, found)
        last = Last(number, run, found)
        totals = {path: _merged(total, given[path], found[path]) for path, total in totals.items()}
        weighed = {path: before | (given[path] > 0) for path, before in weighed.items()}
    if last is None:
        raise ValueError(EMPTY if number is None else WEIGHTLESS)
    check_known({path: total.batches for path, total in totals.items()}, weighed, last)
    return forest.replaced({path: _as_before(path, forest.at(path), total) for path, total in totals.items()})


def _run(step: Step, forest: Forest, chosen: list[Path], batch: Any, start: Statistics) -> Statistics:
    """The statistics of the chosen nodes, as NumPy arrays, after a step that starts from `start`."""
    # The step gets new arrays, since it may donate the buffers of its state.
    values = {
        path: {field: _placed(start.get(path, fields)[field], leaf) for field, leaf in fields.items()}
        for path, fields in ((path, forest.at(path)) for path in forest.nodes)
    }
    new = nodes.find(step(forest.replaced(values), batch), "the result of `step`")
    if any(isinstance(leaf, Tracer) for leaf in new.leaves):
        raise TypeError(f"`batches` are traced, {OUTSIDE}")
    check_same_nodes(forest, chosen, new)
    return dict(zip(chosen, jax.device_get([new.at(path) for path in chosen]), strict=True))


def _placed(value: Any, leaf: Any) -> jax.Array:
    """The value as a new array with the shape, dtype and placement of the leaf."""
    value = value if isinstance(value, jax.Array) else np.asarray(value).astype(jnp.result_type(leaf))
    return jnp.zeros_like(leaf) + value


def _merged(total: Population, given: np.ndarray, fields: Mapping[str, Any]) -> Population:
    """Merge one more batch into the population; it has weight 0 in features that it left unset."""
    known = usable(fields)
    mean, var = (np.where(known, fields[field], 0) for field in ("mean", "var"))
    mean, var = (value.astype(np.result_type(value, np.float64)) for value in (mean, var))
    added = np.where(known, given, 0)
    weight = total.weight + added
    share = added / np.where(weight > 0, weight, 1)
    distance = mean - total.mean
    merged = (1 - share) * total.var + share * var + share * (1 - share) * np.square(np.abs(distance))
    return Population(weight, total.mean + share * distance, merged, total.batches + (added > 0))


def _as_before(path: Path, fields: Mapping[str, Any], total: Population) -> dict[str, Any]:
    """Population mean, variance and count, with the dtypes and placement of the node's arrays."""
    found = {}
    if "count" in fields and np.shape(fields["count"]) == total.batches.shape:
        found["count"] = _placed(total.batches, fields["count"])
    for field, value in (("mean", total.mean), ("var", total.var)):
        with np.errstate(over="ignore"):
            rounded = value.astype(jnp.result_type(fields[field]))
        if not np.isfinite(rounded).all():
            raise ValueError(
                f"The population `{field}` at {named(path)} is too large for {rounded.dtype}: expected smaller values "
                "in `batches`, or a state in float64."
            )
        found[field] = _placed(rounded, fields[field])
    return found


def _chosen(forest: Forest, select: Callable[[str], bool] | None) -> list[Path]:
    """The paths of the nodes to calibrate."""
    if any(isinstance(leaf, Tracer) for leaf in forest.leaves):
        raise TypeError(f"`state` is traced, {OUTSIDE}")
    chosen = [path for path in forest.nodes if select is None or select(shown(path))]
    if not chosen:
        every = list(forest.nodes)
        raise ValueError(f"`select` selects none of the {len(every)} nodes with statistics: {listed(every)}.")
    for path in chosen:
        for field in ("mean", "var"):
            if (dtype := jnp.result_type(forest.at(path)[field])).itemsize < 4:
                raise TypeError(
                    f"`state` has `{field}` in {dtype} at {named(path)}: expected float32 or float64, since half "
                    "precision loses small updates. Convert it with `.astype`."
                )
    return chosen


def _check_functions(**functions: Any) -> None:
    for name, function in functions.items():
        if not callable(function) and not (function is None and name != "step"):
            # The value is not shown: if the arguments are swapped, it is the whole model.
            raise TypeError(f"`{name}` is a {type(function).__name__}: expected a function {SIGNATURES[name]}.")


def _watched(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    """The batches, with a progress bar if it is asked for."""
    if not progress:
        return batches
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        raise ModuleNotFoundError("`progress` needs tqdm, which is not installed: pip install tqdm") from None
    return tqdm(batches, desc="calibrate", unit="batch")
