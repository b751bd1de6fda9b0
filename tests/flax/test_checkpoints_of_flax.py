"""Checkpoints of a ResNet load with jbn's norm in place of Flax's and the reverse, in Linen and in NNX."""

import functools

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import orbax.checkpoint
import pytest
from flax import linen, nnx
from support import networks as resnet
from support.tolerances import assert_close

import jbn

pytestmark = pytest.mark.standard_promotion

SIZE = {"width": 4, "stages": 2}
NORMS = {"linen": {"jbn": jbn.linen.BatchNorm, "flax": linen.BatchNorm}}
NORMS["nnx"] = {"jbn": jbn.nnx.BatchNorm, "flax": nnx.BatchNorm}
both_directions = pytest.mark.parametrize(("source", "target"), [("jbn", "flax"), ("flax", "jbn")])


# Cached, because programs are compiled for each network object.
@functools.cache
def network(framework, norm):
    make = {"linen": resnet.linen_network, "nnx": resnet.nnx_network}[framework]
    return make(NORMS[framework][norm], **SIZE)


def drawn(framework, norm, rng):
    """Values that no initializer gives, so that a missing load is detected; variances are positive."""
    shapes = jax.eval_shape(network(framework, norm).init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 1, leaf.shape), leaf.dtype), shapes)


def assert_loaded(framework, source, target, saved, *loaded):
    (images, _), *_ = resnet.batches([8], 1)
    expected = resnet.inferred(network(framework, source), *saved, images)
    for variables in loaded:
        chex.assert_trees_all_equal(variables, saved, strict=True)
        assert_close(resnet.inferred(network(framework, target), *variables, images), expected)


def through_orbax(folder, saved, target):
    """The saved tree, restored by orbax with the target."""
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "checkpoint", saved)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "checkpoint", target)


@both_directions
def test_a_linen_checkpoint_loads_into_the_other(rng, tmp_path, source, target):
    saved, other = (drawn("linen", norm, rng) for norm in (source, target))
    from_bytes = flax.serialization.from_bytes(other, flax.serialization.to_bytes(saved))
    assert_loaded("linen", source, target, saved, from_bytes, through_orbax(tmp_path, saved, other))


def nnx_model(norm):
    """A model without values, into which a checkpoint is loaded."""
    return nnx.eval_shape(lambda: resnet.NnxResNet(NORMS["nnx"][norm], **SIZE, rngs=nnx.Rngs(0)))


@both_directions
def test_an_nnx_checkpoint_loads_into_the_other(rng, tmp_path, source, target):
    saved = drawn("nnx", source, rng)
    state = nnx.merge_state(*saved)
    updated = nnx_model(target)
    nnx.update(updated, state)

    restored = nnx_model(target)
    abstract = nnx.state(restored)
    pure = through_orbax(tmp_path, nnx.to_pure_dict(state), nnx.to_pure_dict(abstract))
    nnx.replace_by_pure_dict(abstract, pure)
    nnx.update(restored, abstract)
    loaded = (nnx.state(model, nnx.Param, nnx.BatchStat) for model in (updated, restored))
    assert_loaded("nnx", source, target, saved, *loaded)
