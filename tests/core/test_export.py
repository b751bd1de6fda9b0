"""Norms in exported programs: exported for a symbolic batch size, as bytes that run without jbn."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import export
from support import reference
from support.inputs import ill_conditioned
from support.tolerances import assert_close

import jbn

RUN = """
import sys, numpy as np
from jax import export
for name in ("norm", "network"):
    inference = export.deserialize(bytearray(open(name, "rb").read()))
    for size in (1, 7, 64):
        np.save(f"{name}{size}", inference.call(np.load(f"x{size}.npy")))
assert "jbn" not in sys.modules and "flax" not in sys.modules
"""


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        return jbn.linen.BatchNorm(use_running_average=True, activation=jax.nn.relu)(x)


def inference_of_norm(rng):
    params, state = jbn.init(3)
    state = state._replace(mean=rng.normal(size=3).astype(np.float32), var=np.float32([0.5, 1, 9]))
    return lambda x: jbn.normalize(params, state, x, activation=jax.nn.relu)


def inference_of_network():
    network = Network()
    variables = jax.jit(network.init)(jax.random.key(0), jnp.ones((1, 5, 5, 3)))
    return lambda x: network.apply(variables, x)


@pytest.mark.slow
def test_inference_runs_at_any_batch_size_from_its_bytes_alone(tmp_path, rng):
    functions = {"norm": jax.jit(inference_of_norm(rng)), "network": jax.jit(inference_of_network())}
    (size,) = export.symbolic_shape("size")
    for name, inference in functions.items():
        exported = export.export(inference)(jax.ShapeDtypeStruct((size, 5, 5, 3), jnp.float32))
        (tmp_path / name).write_bytes(exported.serialize())
    batches = {size: rng.normal(size=(size, 5, 5, 3)).astype(np.float32) for size in (1, 7, 64)}
    for size, batch in batches.items():
        np.save(tmp_path / f"x{size}", batch)
    subprocess.run([sys.executable, "-c", RUN], check=True, cwd=tmp_path)
    for name, inference in functions.items():
        for size, batch in batches.items():
            assert_close(np.load(tmp_path / f"{name}{size}.npy"), inference(batch))


@pytest.mark.parametrize(("train", "masked", "others"), [(True, True, (4,)), (True, False, ()), (False, True, (4,))])
def test_norms_of_unknown_batch_size_are_those_of_the_formula(rng, train, masked, others):
    params = jbn.Params(*(rng.normal(size=3).astype(np.float32) for _ in range(2)))
    state = jbn.init(3)[1]
    norm = functools.partial(jbn.batch_norm, params, state, train=train, momentum=0.5, activation=jax.nn.relu)
    shape = (*export.symbolic_shape("b"), *others, 3)
    mask = jax.ShapeDtypeStruct(shape[:-1], jnp.bool) if masked else None
    exported = export.export(jax.jit(lambda x, mask: norm(x, mask=mask)))(
        jax.ShapeDtypeStruct(shape, jnp.float32), mask
    )
    for size in (1, 3, 64):
        x = rng.normal(size=(size, *others, 3)).astype(np.float32) + 1e3
        mask = rng.random(x.shape[:-1]) < 0.7 if masked else None
        out, new_state = exported.call(x, mask)
        batch = reference.batch_norm(x, *params, mask=mask)
        expected = batch.out if train else masked_inference(x, params, mask)
        assert_close(out, np.maximum(expected, 0), scale=np.abs(expected).max())
        mean, var = reference.update(0, 1, batch, 0.5) if train and batch.count.any() else state[:2]
        assert_close(new_state.mean, mean)
        assert_close(new_state.var, var)


def masked_inference(x, params, mask):
    return np.where(mask[..., None], reference.inference(x, np.zeros(3), np.ones(3), *params), 0)


def test_moments_of_unknown_batch_size_are_as_exact_far_from_zero(rng):
    params, state = jbn.init(4)
    norm = jax.jit(lambda x: jbn.batch_norm(params, state, x, True, momentum=0.0)[1].var)
    exported = export.export(norm)(jax.ShapeDtypeStruct((*export.symbolic_shape("b"), 4), jnp.float32))
    for case in ("first row far", "second row far"):
        x, _ = ill_conditioned(rng, 2**16, 1e4, case)
        np.testing.assert_allclose(exported.call(x), reference.batch_norm(x).var, rtol=1e-5)
