"""A batch that is split over places: each group of places must give the results of its whole batch on one place."""

import contextlib
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from support import reference
from support.tolerances import assert_close, assert_rounded
from support.transforms import MAPPED, TRANSFORMS

EIGHT = {"devices": 8}
GRID = {"rows": 4, "columns": 2}
LANES = {"devices": 8, "lanes": 4}
"""Number of places by axis; LANES has too many to send all parts in one collective."""
EVEN = ((0, 3, 5, 6), (7, 1, 2, 4))
UNEVEN = ((0, 3, 5), (7, 1, 2, 4, 6))


class Case(NamedTuple):
    """A transformation that splits a batch over places, and the groups of places that share statistics."""

    transform: str
    axes: dict[str, int] = EIGHT
    groups: tuple[tuple[int, ...], ...] | None = None
    has_relu: bool = False


CASES = {
    **{name: Case(name) for name in TRANSFORMS},
    "shard_map, two axes, relu": Case("shard_map", GRID, has_relu=True),
    "pmap, two axes": Case("pmap", GRID),
    "vmap, many lanes, relu": Case("vmap", LANES, has_relu=True),
    "jit, explicit sharding, relu": Case("jit, explicit sharding", has_relu=True),
    **{f"{name}, even groups": Case(name, groups=EVEN) for name in MAPPED if name != "pmap"},
    "shard_map, uneven groups": Case("shard_map", groups=UNEVEN),
    "pmap, uneven groups": Case("pmap", groups=UNEVEN),
}


def marks(case):
    """Eight devices are needed, except for the lanes of vmap, which run on one device."""
    return () if case.startswith("vmap") else pytest.mark.devices(8)


def each(*cases):
    """Run a test for each of these cases."""
    return pytest.mark.parametrize("case", [pytest.param(case, marks=marks(case)) for case in cases])


class Batch(NamedTuple):
    """32 examples with increasing means, so that the parts of places differ; masked values are NaN."""

    x: jnp.ndarray
    mask: np.ndarray | None
    cotangent: jnp.ndarray


def make_batch(rng, dtype, valid, center):
    x = rng.normal(size=(32, 5, 3)) + center + np.arange(32)[:, None, None]
    mask = None if valid == "all" else rng.random((32, 5) if valid != "by feature" else x.shape) < 0.3
    if valid == "by feature":
        mask[:12, :, 1] = mask[..., 2] = False
    if valid == "an empty part":
        mask[:4] = mask[-4:] = False
    if valid == "nothing":
        mask[:] = False
    if mask is not None:
        x[~mask] = np.nan
    return Batch(jnp.asarray(x, dtype), mask, jnp.asarray(rng.normal(size=x.shape), dtype))


@functools.cache
def built(name):
    """The step of a case; it is compiled once for each dtype, with and without a mask."""
    case = CASES[name]
    options = {"axis_index_groups": case.groups} if case.groups else {}
    options |= {"activation": jax.nn.relu} if case.has_relu else {}
    return TRANSFORMS[case.transform](case.axes, **options)


def assert_each_batch_is_whole(rng, name, dtype, batches):
    """Each batch, given by its mask and center, is normalized correctly under the transformation of the case."""
    params = jbn.Params(*(rng.normal(size=3).astype(np.float32) for _ in range(2)))
    for valid, center in batches:
        batch = make_batch(rng, dtype, valid, center)
        with noted(f"{name}, {dtype}, valid: {valid}, center: {center}"):
            assert_whole(built(name)(params, jbn.init(3)[1], *batch), params, batch, CASES[name])


@contextlib.contextmanager
def noted(case):
    """Add the case to the error of a failed assertion."""
    try:
        yield
    except AssertionError as error:
        error.add_note(case)
        raise


def members(group, array, places):
    """The parts of an array on the places of a group."""
    return None if array is None else np.concatenate([np.split(np.asarray(array), places)[place] for place in group])


def in_one(x, params, mask, cotangent, has_relu):
    """The reference, followed by relu if the case has it."""
    plain = reference.batch_norm(x, *params, cotangent, mask=mask)
    if not has_relu:
        return plain
    through = reference.batch_norm(x, *params, cotangent * (plain.out > 0), mask=mask)
    return through._replace(out=np.maximum(plain.out, 0))


def assert_whole(result, params, batch, case):
    """Output, gradients, and the state on all places of each group equal those of its batch on one place in float64."""
    dtype, places = batch.x.dtype.name, math.prod(case.axes.values())
    x, cotangent = (np.asarray(array, np.float64) for array in (batch.x, batch.cotangent))
    result, total = jax.tree.map(np.asarray, result), jbn.Params(0, 0)
    for group in case.groups or (range(places),):
        own, mask, own_cotangent = (members(group, array, places) for array in (x, batch.mask, cotangent))
        expected = in_one(own, params, mask, own_cotangent, case.has_relu)
        total = jbn.Params(total.scale + expected.dscale, total.bias + expected.dbias)
        for actual, value in ((result.out, expected.out), (result.dx, expected.dx)):
            assert actual.dtype == dtype
            if dtype == "float32":
                assert_close(members(group, actual, places), value, scale=5)
            else:
                assert_rounded(members(group, actual, places), value, dtype)
        good = expected.count > 0
        mean, var = (np.where(good, *pair) for pair in zip(reference.update(0, 1, expected, 0.5), (0, 1), strict=True))
        # If all places have one state, its first axis has size 1.
        held = [place % len(result.new_state.count) for place in group]
        for place in held:
            np.testing.assert_array_equal(result.new_state.count[place], good)
            assert_close(result.new_state.mean[place], mean)
            assert_close(result.new_state.var[place], var)
            for leaf in result.new_state[:2]:
                np.testing.assert_array_equal(leaf[place], leaf[held[0]])
    for actual, value in zip(result.gradients, total, strict=True):
        assert_close(actual, value, scale=np.abs(cotangent).sum())
