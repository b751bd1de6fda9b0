"""Automatic and explicit sharding: for any split of the batch, results equal one device's and are split like it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import reference
from support.compilation import compiled
from support.refusals import Refused, assert_refused
from support.tolerances import assert_close
from support.transforms import devices_of, step

import jbn

pytestmark = pytest.mark.devices(8)

SPLITS = {
    "examples": P(("rows", "columns")),
    "height": P(None, ("rows", "columns")),
    "examples and height": P("rows", "columns"),
    "height and width": P(None, "rows", "columns"),
    "features": P(None, None, None, ("rows", "columns")),
    "examples and features": P("rows", None, None, "columns"),
    "width and features": P(None, None, "rows", "columns"),
}
GRID = {"rows": 4, "columns": 2}
EXPLICIT = (AxisType.Explicit,) * 2
one_step = compiled(step)


def assert_one_device(result, params, x, mask, cotangent, **options):
    """Results equal the reference, for the running statistics of jbn.init and momentum 0.5."""
    expected = reference.batch_norm(x, *params, cotangent, mask=mask, **options)
    mean, var = reference.update(0, 1, expected, 0.5)
    assert_close(result.out, expected.out, scale=5)
    assert_close(result.dx, expected.dx, scale=5)
    assert_close(result.new_state.mean[0], mean)
    assert_close(result.new_state.var[0], var)
    for gradient, value in zip(result.gradients, (expected.dscale, expected.dbias), strict=True):
        assert_close(gradient, value, scale=np.abs(cotangent).sum())


def make_batch(rng, masked):
    """A batch far from 0 whose examples have increasing means; masked values are NaN."""
    x = (rng.normal(size=(8, 8, 4, 16)) + 1e4 + np.arange(8)[:, None, None]).astype(np.float32)
    mask = rng.random((8, 8, 4)) < 0.3 if masked else None
    if masked:
        x[~mask] = np.nan
    params = jbn.Params(*(rng.normal(size=16).astype(np.float32) for _ in range(2)))
    return params, x, mask, rng.normal(size=x.shape).astype(np.float32)


@pytest.mark.parametrize(
    ("kind", "split", "masked"),
    [
        *((AxisType.Auto, split, True) for split in SPLITS if split not in ("examples", "height")),
        (AxisType.Auto, "height", False),
        *((AxisType.Explicit, split, True) for split in ("examples", "height", "features", "width and features")),
    ],
)
def test_any_split_of_the_batch_gives_the_results_of_one_device(rng, kind, split, masked):
    """Params and state are split like the features of the batch."""
    params, x, mask, cotangent = make_batch(rng, masked)
    mesh = devices_of(GRID, axis_types=(kind, kind))
    features = P(*SPLITS[split][3:])
    with jax.set_mesh(mesh):
        spread, spread_cotangent = jax.device_put((x, cotangent), NamedSharding(mesh, SPLITS[split]))
        spread_mask = jax.device_put(mask, NamedSharding(mesh, P(*SPLITS[split][:3])))
        spread_params, state = jax.device_put((params, jbn.init(16)[1]), NamedSharding(mesh, features))
        result = one_step(spread_params, state, spread, spread_mask, spread_cotangent)
    for array in (result.out, result.dx):
        assert array.sharding.is_equivalent_to(spread.sharding, x.ndim)
    for vector in (*result.gradients, *(leaf[0] for leaf in result.new_state)):
        assert vector.sharding.is_equivalent_to(NamedSharding(mesh, features), 1)
    assert_one_device(result, params, x, mask, cotangent)


@pytest.mark.parametrize(
    ("split", "masked"),
    [("height and width", True), ("examples and features", False)],
)
def test_explicit_sharding_needs_no_mesh_around_it(rng, split, masked):
    params, x, mask, cotangent = make_batch(rng, masked)
    spread = jax.device_put(x, NamedSharding(devices_of(GRID, axis_types=EXPLICIT), SPLITS[split]))
    result = one_step(params, jbn.init(16)[1], spread, mask, cotangent)
    assert jax.typeof(result.out) == jax.typeof(result.dx) == jax.typeof(spread)
    assert_one_device(result, params, x, mask, cotangent)


def test_replicated_state_stays_replicated_where_features_are_split(rng):
    """Otherwise a loop could not carry it."""
    x = rng.normal(size=(8, 8, 4, 16)).astype(np.float32) + 3
    params, state = jbn.init((8, 16))
    result = under_explicit_sharding(params, state, x, feature_axis=(1, 3))
    assert_one_device(result, params, x, None, x, feature_axis=(1, 3))


def test_ghost_batches_of_split_features_leave_the_state_replicated(rng):
    x = rng.normal(size=(8, 8, 4, 16)).astype(np.float32) + 3
    result = under_explicit_sharding(*jbn.init(16), x, ghost_batch_size=4)
    ghosts = [reference.batch_norm(half, cotangent=half) for half in np.split(x, 2)]
    for field in ("out", "dx"):
        assert_close(getattr(result, field), np.concatenate([getattr(ghost, field) for ghost in ghosts]), scale=5)
    for gradient, field in zip(result.gradients, ("dscale", "dbias"), strict=True):
        assert_close(gradient, sum(getattr(ghost, field) for ghost in ghosts), scale=np.abs(x).sum())
    mean, var = reference.update(0, 1, reference.batch_norm(x), 0.5)
    assert_close(result.new_state.mean[0], mean)
    assert_close(result.new_state.var[0], var)


def under_explicit_sharding(params, state, x, **options):
    """A step from a replicated state on a batch whose first and second axes are split."""
    mesh = devices_of({"rows": 2, "columns": 4}, axis_types=EXPLICIT)
    with jax.set_mesh(mesh):
        split = jax.device_put(x, NamedSharding(mesh, P("rows", "columns")))
        program = functools.partial(step, **options)
        result = compiled(program)(params, state, split, None, split)
        types = jax.eval_shape(program, params, state, split, None, split)
    assert jax.typeof(result.out) == jax.typeof(result.dx) == jax.typeof(split)
    # The types in the program are checked, since XLA may leave the results split.
    assert not any(any(leaf.sharding.spec) for leaf in (*types.new_state, *types.gradients) if leaf.sharding)
    return result


def ghosts_on_devices(size):
    """The types of x and of the output, for 16 examples on 8 devices."""
    mesh = devices_of({"devices": 8}, axis_types=(AxisType.Explicit,))
    x = jax.device_put(jnp.ones((16, 3)), NamedSharding(mesh, P("devices")))

    def norm(x):
        return jbn.batch_norm(*jbn.init(3), x, True, ghost_batch_size=size)[0]

    with jax.set_mesh(mesh):
        return jax.typeof(x), jax.eval_shape(norm, x)


def test_ghost_batches_may_not_reach_over_borders_of_devices():
    given, out = ghosts_on_devices(2)
    assert out.sharding == given.sharding
    message = ("is 4, but each of 8 devices has 2 of the 16 examples", "expected a divisor of 2")
    row = Refused(lambda: ghosts_on_devices(4), ValueError, "ghost_batch_size", *message)
    assert_refused({"ghosts of 4": row})
