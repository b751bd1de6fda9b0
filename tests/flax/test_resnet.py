"""A ResNet with jbn's norm in place of Flax's, in Linen and in NNX: the same variables and the same training steps.

Each step starts from common variables, since training amplifies rounding; studies/free_runs.py draws how much.
The networks have two of the four stages of a ResNet-18, which contain each kind of block.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from studies import free_runs
from support import networks as resnet

import jbn

pytestmark = pytest.mark.standard_promotion

NETWORKS = {"linen": resnet.linen_network, "nnx": resnet.nnx_network}
# Flax has two formulas: E[x^2] - E[x]^2, the default, and E[(x - E[x])^2].
NORMS = {
    ("linen", "jbn"): jbn.linen.BatchNorm,
    ("linen", "flax"): linen.BatchNorm,
    ("linen", "flax, two passes"): functools.partial(linen.BatchNorm, use_fast_variance=False),
    ("nnx", "jbn"): jbn.nnx.BatchNorm,
    ("nnx", "flax"): nnx.BatchNorm,
    ("nnx", "flax, two passes"): functools.partial(nnx.BatchNorm, use_fast_variance=False),
}
both_frameworks = pytest.mark.parametrize("framework", NETWORKS)


# Cached, because programs are compiled for each network object.
@functools.cache
def network(framework, norm, dtype="float32", activation=jax.nn.relu):
    # With this momentum a new statistic is a tenth of the batch's, not a hundredth.
    norm = functools.partial(NORMS[framework, norm], momentum=0.9)
    dtype = jnp.dtype(dtype)
    dtypes = {"dtype": dtype, "param_dtype": jnp.promote_types(dtype, jnp.float32)}
    return NETWORKS[framework](norm, width=8, stages=2, activation=activation, **dtypes)


@functools.cache
def start(framework, norm="jbn"):
    return resnet.initialized(network(framework, norm))


def from_common_states(networks, variables, steps, seed=0):
    """Each step of every network, from the variables of the first network after the step before."""
    params, batch_stats = variables
    for images, labels in resnet.batches([8], steps, seed):
        steps = [resnet.differentiated(network, params, batch_stats, images, labels) for network in networks]
        yield steps
        params, batch_stats = resnet.descended(params, steps[0].gradients), steps[0].batch_stats


class Distance(NamedTuple):
    """Distance between two steps, relative to the loss and to the norm of each leaf; the largest over the leaves."""

    loss: float
    batch_stats: float
    gradients: float


def distance(actual, expected):
    def relative(actual, expected):
        actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
        return np.linalg.norm(actual - expected) / np.linalg.norm(expected)

    trees = (jax.tree.map(relative, *pair) for pair in zip(actual, expected, strict=True))
    return Distance(*(max(jax.tree.leaves(tree)) for tree in trees))


@both_frameworks
def test_a_resnet_18_has_the_variables_of_flax(framework):
    ours, theirs = (
        jax.eval_shape(NETWORKS[framework](NORMS[framework, norm], channels=3).init, jax.random.key(0))
        for norm in ("jbn", "flax")
    )
    # The structure includes the paths and, for NNX, the Variable types and metadata.
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)
    params, batch_stats = ours
    # The number in https://github.com/kuangliu/pytorch-cifar with a stem of 3 x 3 and ten classes.
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 11_173_962
    assert len(jax.tree.leaves(batch_stats)) == 2 * 20


@both_frameworks
def test_variables_are_those_of_flax_from_the_first_value_on(framework):
    ours, theirs = start(framework, "jbn"), start(framework, "flax")
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    chex.assert_trees_all_equal(ours, theirs, strict=True)


@pytest.mark.slow
@both_frameworks
def test_training_steps_equal_those_of_flax_in_float64(x64, framework):
    networks = [network(framework, norm, "float64") for norm in ("jbn", "flax")]
    # Flax converts float32 statistics to float64 at the first update; jbn keeps the given dtype.
    variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), start(framework))
    for ours, theirs in from_common_states(networks, variables, steps=4):
        chex.assert_trees_all_equal_dtypes(ours, theirs)
        chex.assert_trees_all_close(ours[:2], theirs[:2], rtol=1e-5, atol=0)
        # A statistic in float32 would pass the check above, with an error of 1e-7.
        assert max(distance(ours, theirs)) <= 1e-10


def distances_to_two_passes(framework, dtype, seed=0):
    """Mean distances, over twenty steps, of jbn and of Flax's default formula."""
    networks = [network(framework, norm, dtype, jax.nn.silu) for norm in ("jbn", "flax")]
    exact = network(framework, "flax, two passes", "float32", jax.nn.silu)
    distances = [
        [distance(step, expected) for step in steps]
        for *steps, expected in from_common_states([*networks, exact], start(framework), steps=20, seed=seed)
    ]
    return [Distance(*each) for each in np.mean(distances, axis=0)]


@pytest.mark.slow
@pytest.mark.parametrize(("framework", "dtype"), [("linen", "bfloat16"), ("nnx", "float32")])
def test_training_steps_round_like_those_of_flax(framework, dtype):
    """The distance to Flax's two passes in float32 is at most four times that of Flax's default formula.

    The mean distances of loss, statistics and gradients are about 1e-7, 2e-7 and 2e-6 in float32, and 1e-3, 1e-3 and
    5e-2 in bfloat16. Flax's formulas share their mean and its rounding; jbn's mean is rounded differently. With 36
    orders of the batches, jbn's distance was 0.5 to 2.6 times that of Flax's default.
    The two passes are in float32 even for bfloat16. In bfloat16 both of Flax's formulas round in the same places, so
    their difference hides this rounding. jbn rounds less there: Flax rounds the gradient of x twice, and in NNX also
    scale and bias. The activation is smooth, since the slope of relu jumps: one value in its last layer that rounding
    changed from 0 to 6e-8 changed a gradient by 2e-1 of its norm.
    """
    of_ours, of_theirs = distances_to_two_passes(framework, dtype)
    assert np.all(np.array(of_ours) <= 4 * np.array(of_theirs)), (of_ours, of_theirs)


@pytest.mark.slow
def test_free_runs_are_drawn(tmp_path):
    picture = tmp_path / "free-runs.png"
    free_runs.main(["--out", str(picture), "--steps", "2", "--orders", "1", "--stages", "1"])
    assert picture.read_bytes().startswith(b"\x89PNG")
