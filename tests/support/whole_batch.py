"""A batch that is spread over places, and what each group of places has to give: that of its whole batch on one."""

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
"""Places by axis; in the last they are too many to send their parts whole."""
EVEN = ((0, 3, 5, 6), (7, 1, 2, 4))
UNEVEN = ((0, 3, 5), (7, 1, 2, 4, 6))


class Case(NamedTuple):
    """A transformation that spreads a batch over places, and the groups of places that share statistics."""

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
    """Lanes are the only places of which one device has many."""
    return () if case.startswith("vmap") else pytest.mark.devices(8)


def each(*cases):
    """A test for each of these cases."""
    return pytest.mark.parametrize("case", [pytest.param(case, marks=marks(case)) for case in cases])


class Batch(NamedTuple):
    """32 examples in order of their means, so that the parts of places differ; what is not valid is NaN."""

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
    """A case's step, which is compiled once for all batches that have one dtype, and a mask or none."""
    case = CASES[name]
    options = {"axis_index_groups": case.groups} if case.groups else {}
    options |= {"activation": jax.nn.relu} if case.has_relu else {}
    return TRANSFORMS[case.transform](case.axes, **options)


def assert_each_batch_is_whole(rng, name, dtype, batches):
    """The norm of each batch, given by what is valid and by its center, under the transformation of the case."""
    params = jbn.Params(*(rng.normal(size=3).astype(np.float32) for _ in range(2)))
    for valid, center in batches:
        batch = make_batch(rng, dtype, valid, center)
        with noted(f"{name}, {dtype}, valid: {valid}, center: {center}"):
            assert_whole(built(name)(params, jbn.init(3)[1], *batch), params, batch, CASES[name])


@contextlib.contextmanager
def noted(case):
    """Where an assertion fails, the error tells the case."""
    try:
        yield
    except AssertionError as error:
        error.add_note(case)
        raise


def members(group, array, places):
    """The part of an array that the places of a group hold."""
    return None if array is None else np.concatenate([np.split(np.asarray(array), places)[place] for place in group])


def in_one(x, params, mask, cotangent, has_relu):
    """The reference, with relu after it where the case has one."""
    plain = reference.batch_norm(x, *params, cotangent, mask=mask)
    if not has_relu:
        return plain
    through = reference.batch_norm(x, *params, cotangent * (plain.out > 0), mask=mask)
    return through._replace(out=np.maximum(plain.out, 0))


def assert_whole(result, params, batch, case):
    """Each group equals its own batch on one device, in float64: output, state on all its places, gradients."""
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
        # Where there is one state for all, it has a first axis of size 1.
        held = [place % len(result.new_state.count) for place in group]
        for place in held:
            np.testing.assert_array_equal(result.new_state.count[place], good)
            assert_close(result.new_state.mean[place], mean)
            assert_close(result.new_state.var[place], var)
            for leaf in result.new_state[:2]:
                np.testing.assert_array_equal(leaf[place], leaf[held[0]])
    for actual, value in zip(result.gradients, total, strict=True):
        assert_close(actual, value, scale=np.abs(cotangent).sum())
