"""The training step over all devices, and the evaluations; each is one compiled program."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

import jbn
from jbn.demo import model
from jbn.demo.data import Array, Examples

AXIS = "devices"


class Run(NamedTuple):
    """Everything that a step changes: parameters, running statistics and optimizer state."""

    params: model.Tree
    state: model.Tree
    optimizer: optax.OptState


class Metrics(NamedTuple):
    """Mean loss and accuracy of a batch."""

    loss: jax.Array
    accuracy: jax.Array


Step = Callable[[Run, Examples], tuple[Run, Metrics]]


def make_step(mesh: Mesh, optimizer: optax.GradientTransformation, **norm_options: Any) -> Step:
    """Build one optimizer step on a batch split over the devices of the mesh, which share batch statistics."""
    norm = functools.partial(jbn.batch_norm, axis_name=AXIS, **norm_options)

    def loss(params: model.Tree, state: model.Tree, batch: Examples) -> tuple[jax.Array, Any]:
        logits, new_state = model.apply(params, state, batch.images, True, norm)
        metrics = jax.lax.pmean(_metrics(logits, batch.labels), AXIS)
        return metrics.loss, (new_state, metrics)

    @chex.assert_max_traces(n=1)
    def step(run: Run, batch: Examples) -> tuple[Run, Metrics]:
        gradients, (state, metrics) = jax.grad(loss, has_aux=True)(run.params, run.state, batch)
        updates, memory = optimizer.update(gradients, run.optimizer, run.params)
        params = cast(model.Tree, optax.apply_updates(run.params, updates))
        return Run(params, state, memory), metrics

    everywhere, split = PartitionSpec(), PartitionSpec(AXIS)
    sharded = jax.shard_map(step, mesh=mesh, in_specs=(everywhere, split), out_specs=everywhere)
    return jax.jit(sharded, donate_argnums=0)


@functools.partial(jax.jit, static_argnames="train")
def evaluate(params: model.Tree, state: model.Tree, examples: Examples, *, train: bool) -> Metrics:
    """Loss and accuracy with running statistics, or if `train`, with the statistics of the examples as one batch."""
    logits, _ = model.apply(params, state, examples.images, train, jbn.batch_norm)
    return _metrics(logits, examples.labels)


@functools.partial(jax.jit, static_argnames="axis_name")
def batch_statistics(params: model.Tree, state: model.Tree, images: Array, axis_name: str | None = None) -> model.Tree:
    """Mean and variance of this batch in each norm. The state is unset first, so that the batch replaces it."""
    norm = functools.partial(jbn.batch_norm, axis_name=axis_name)
    return model.apply(params, jbn.unset(state), images, True, norm)[1]


def make_shared_statistics(mesh: Mesh) -> Callable[[model.Tree, model.Tree, Array], model.Tree]:
    """Build `batch_statistics` for a batch split over the devices of the mesh."""
    everywhere, split = PartitionSpec(), PartitionSpec(AXIS)
    shared = functools.partial(batch_statistics, axis_name=AXIS)
    return jax.jit(jax.shard_map(shared, mesh=mesh, in_specs=(everywhere, everywhere, split), out_specs=everywhere))


def _metrics(logits: jax.Array, labels: Array) -> Metrics:
    loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
    return Metrics(loss, jnp.mean(jnp.argmax(logits, axis=-1) == labels))
