"""What other libraries' own tests check and no other module of ours does; and PEERS.md, the table of all of it."""

import ast
import copy
import pickle
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge
from jax.sharding import PartitionSpec as P
from support import reference
from support.tolerances import assert_close, assert_rounded
from support.transforms import devices_of

import jbn

TESTS = Path(__file__).parents[1]
PEERS = ("PyTorch", "Flax", "Haiku", "Equinox", "Keras", "fvcore")
KEY = jax.random.key(0)


def tables():
    """The rows of PEERS.md by peer, each a list of its cells; the head and the rule beneath it left out."""
    sections = re.split(r"^## ", (TESTS / "PEERS.md").read_text(), flags=re.M)[1:]
    found = {}
    for section in sections:
        lines = [line for line in section.splitlines() if line.startswith("|")]
        found[section.splitlines()[0]] = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return found


ROWS = [(peer, row) for peer, rows in tables().items() for row in rows]


def names_in(file):
    return {node.name for node in ast.parse(next(TESTS.rglob(file)).read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_peer_has_rows():
    assert tuple(tables()) == PEERS
    assert all(tables().values())


@pytest.mark.parametrize(("peer", "row"), ROWS, ids=[f"{peer}: {row[0]}" for peer, row in ROWS])
def test_a_row_names_tests_that_exist_or_says_why_not(peer, row):
    assert len(row) == 3
    assert all(row)
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row[2])
    assert row[2].startswith("does not apply: ") != bool(named)
    assert [f"{file}::{name}" for file, name in named if name not in names_in(file)] == []
    assert row[2].count("::") == len(named)


def normal(rng, *shape, dtype="float32"):
    return jnp.asarray(rng.normal(size=shape) * 2 + 1).astype(dtype)


def drawn(rng, features, dtype="float32"):
    return jbn.Params(*(normal(rng, features, dtype=dtype) for _ in range(2)))


@pytest.mark.parametrize("shape", [(4, 8, 10, 10), (4, 1, 9, 9), (4, 9, 1, 1), (4, 8, 2, 5, 5), (4, 1, 2, 9, 9)])
@pytest.mark.parametrize(
    ("dtype", "param_dtype"),
    [("float32", "float32"), *((low, high) for low in ("bfloat16", "float16") for high in (low, "float32"))],
)
def test_features_before_places_in_any_precision(rng, shape, dtype, param_dtype):
    x, cotangent = normal(rng, *shape, dtype=dtype), normal(rng, *shape, dtype=dtype)
    params, state = drawn(rng, shape[1], param_dtype), jbn.init(shape[1])[1]
    exact = [np.asarray(array.astype(jnp.float32), np.float64) for array in (x, *params, cotangent)]
    expected = reference.batch_norm(*exact, feature_axis=1)

    def norm(params, x):
        return jbn.batch_norm(params, state, x, True, momentum=0.0, feature_axis=1)

    @jax.jit
    def forward_and_backward(params, x, cotangent):
        out, backward, new_state = jax.vjp(norm, params, x, has_aux=True)
        return out, new_state, *backward(cotangent)

    out, new_state, gradients, dx = forward_and_backward(params, x, cotangent)
    assert_rounded(out, expected.out, dtype)
    assert_rounded(dx, expected.dx, dtype)
    for gradient, value in zip(gradients, (expected.dscale, expected.dbias), strict=True):
        assert gradient.dtype == param_dtype
        assert_rounded(gradient, value, param_dtype, statistics=1e-6 * np.abs(exact[3]).sum())
    assert_close(new_state.var, expected.var)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("params", [jbn.Params(None, None), jbn.init(3)[0]], ids=["no params", "float32 params"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_result_has_the_dtype_of_the_input(rng, dtype, params, train):
    out, state = jbn.batch_norm(params, jbn.init(3)[1], normal(rng, 6, 3, dtype=dtype), train)
    assert out.dtype == dtype
    assert state.mean.dtype == state.var.dtype == jnp.float32


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (5, 4, 3)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_no_params_are_ones_and_zeros(rng, dtype, shape, train):
    x, cotangent = normal(rng, *shape, dtype=dtype), normal(rng, *shape, dtype=dtype)
    ones, state = jbn.init(3)
    results = []
    for params in (ones, jbn.Params(None, None)):
        out, backward = jax.vjp(lambda x, params=params: jbn.batch_norm(params, state, x, train)[0], x)
        results.append((out, *backward(cotangent)))
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_shared_statistics_take_half_precision_params(rng, dtype):
    params, state = drawn(rng, 3, "float16"), jbn.init(3)[1]

    def gradients(params, x):
        out, backward = jax.vjp(lambda *p: jbn.batch_norm(jbn.Params(*p), state, x, True, axis_name="d")[0], *params)
        return out, backward(jnp.ones_like(out))

    split = P("d")
    mapped = jax.shard_map(gradients, mesh=devices_of({"d": 8}), in_specs=(P(), split), out_specs=(split, P()))
    out, (dscale, dbias) = jax.jit(mapped)(params, normal(rng, 16, 3, dtype=dtype))
    assert out.dtype == dtype
    assert dscale.dtype == dbias.dtype == jnp.float16
    np.testing.assert_array_equal(dbias, [16, 16, 16])


def test_unbiased_variance_of_shards_of_different_sizes(rng):
    """Of all values, over one less than their number, whatever a device has of them."""
    sizes = np.array([1, 0, 2, 30, 3, 9, 1, 100])
    means = 10.0 ** np.arange(-4, 4)
    x = (rng.normal(size=(8, 100, 3)) * means[:, None, None] + means[:, None, None]).astype(np.float32)
    mask = np.arange(100) < sizes[:, None]
    params, state = jbn.init(3)

    def norm(x, mask):
        options = {"mask": mask, "momentum": 0.0, "running_var": "unbiased", "axis_name": "d"}
        return jbn.batch_norm(params, state, x, True, **options)[1]

    split = P("d")
    mapped = jax.shard_map(norm, mesh=devices_of({"d": 8}), in_specs=(split, split), out_specs=P())
    new_state = jax.jit(mapped)(x, mask)
    valid = x[mask].astype(np.float64)
    assert_close(new_state.mean, valid.mean(0), scale=np.abs(valid).max())
    assert_close(new_state.var, valid.var(0, ddof=1))


def test_inference_sends_nothing_and_needs_no_one_else(rng):
    params, state = jbn.init(3)

    def inference(x):
        return jbn.batch_norm(params, state, x, False, axis_name="d")[0]

    x = normal(rng, 16, 3)
    mapped = jax.jit(jax.shard_map(inference, mesh=devices_of({"d": 8}), in_specs=P("d"), out_specs=P("d")))
    program = mapped.lower(x).compile().as_text()
    assert re.findall(r"all-\w+|reduce-scatter|collective-\w+", program) == []
    assert_close(mapped(x), inference(x))


def test_a_named_lane_inside_an_unnamed_one(rng):
    """The statistics of the named lanes, and as many of them as there are unnamed lanes."""
    x = normal(rng, 10, 5, 6)
    params, state = jbn.init(5)
    inner = jax.vmap(
        lambda x: jbn.batch_norm(params, state, x, True, momentum=0.0, axis_name="batch"),
        axis_name="batch",
        in_axes=1,
        out_axes=(1, None),
    )
    out, new_state = jax.jit(jax.vmap(inner))(x)
    assert new_state.mean.shape == new_state.var.shape == (10, 5)
    for lane in range(10):
        expected = reference.batch_norm(x[lane], feature_axis=0)
        assert_close(out[lane], expected.out, scale=5)
        assert_close(new_state.var[lane], expected.var)


@pytest.mark.parametrize(("shape", "feature_axis"), [((2, 3, 4), -1), ((5, 2, 3), 1), ((5, 3, 3, 2), 1), ((6, 2), -1)])
def test_inference_repeats_training_after_an_update_with_momentum_zero(rng, shape, feature_axis):
    x, (params, state) = normal(rng, *shape), jbn.init(shape[feature_axis])
    out, new_state = jbn.batch_norm(params, state, x, True, momentum=0.0, feature_axis=feature_axis)
    assert not np.allclose(jbn.normalize(params, state, x, feature_axis=feature_axis), out)
    assert_close(jbn.normalize(params, new_state, x, feature_axis=feature_axis), out, scale=5)


def test_a_mask_changes_no_valid_value_at_inference(rng):
    x, mask = normal(rng, 6, 4, 3), rng.random((6, 4)) < 0.6
    params, (_, state) = drawn(rng, 3), jbn.init(3)
    masked, whole = (jbn.normalize(params, state, x, mask=given) for given in (mask, None))
    np.testing.assert_array_equal(masked[mask], whole[mask])


@pytest.mark.parametrize("alone", [False, True], ids=["in a batch of one", "in one lane"])
def test_one_example_has_a_gradient(rng, alone):
    x, cotangent = normal(rng, 1, 5), normal(rng, 1, 5)
    params, (_, state) = drawn(rng, 5), jbn.init(5)

    def norm(params, x):
        if not alone:
            return jbn.batch_norm(params, state, x, True)[0]
        return jax.vmap(lambda x: jbn.batch_norm(params, state, x, True, axis_name="d")[0], axis_name="d")(x)

    (dscale, dbias), dx = jax.vjp(norm, params, x)[1](cotangent)
    np.testing.assert_array_equal(dbias, cotangent[0])
    for gradient in (dscale, dx):
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@pytest.mark.parametrize("shape", [(0, 3), (0, 2, 2, 3)])
def test_no_examples_at_inference(shape):
    out, _ = jbn.batch_norm(*jbn.init(3), jnp.zeros(shape), False)
    assert out.shape == shape


def test_no_examples_on_any_device():
    params, state = jbn.init(3)

    def norm(x):
        out, backward, new_state = jax.vjp(
            lambda x: jbn.batch_norm(params, state, x, True, axis_name="d"), x, has_aux=True
        )
        return backward(out)[0], new_state

    mapped = jax.shard_map(norm, mesh=devices_of({"d": 8}), in_specs=P("d"), out_specs=(P("d"), P()))
    dx, new_state = jax.jit(mapped)(jnp.zeros((0, 2, 3)))
    assert dx.shape == (0, 2, 3)
    jax.tree.map(np.testing.assert_array_equal, new_state, state)


def test_an_empty_vector_has_no_batch():
    x = jnp.zeros(0)
    assert jbn.batch_norm(*jbn.init(0), x, False)[0].shape == (0,)
    with pytest.raises(ValueError, match=r"`x` has shape \(0,\).*Add a batch axis"):
        jbn.batch_norm(*jbn.init(0), x, True)


def test_running_statistics_are_differentiable_at_inference(x64, rng):
    """The formula with mean and var as any other values: PyTorch refuses this."""
    x = rng.normal(size=(4, 3))
    params, state = jbn.init(3, jnp.float64)
    mean_and_var = (rng.normal(size=3), rng.uniform(0.5, 2, 3))

    def ours(mean, var):
        return jnp.sum(jnp.sin(jbn.normalize(params, state._replace(mean=mean, var=var), x)))

    def plain(mean, var):
        return jnp.sum(jnp.sin((x - mean[None]) / jnp.sqrt(var + 1e-5)[None]))

    for actual, expected in zip(*(jax.jit(jax.hessian(f, (0, 1)))(*mean_and_var) for f in (ours, plain)), strict=True):
        for a, e in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-10, atol=1e-10)


def test_a_torch_norm_without_a_count_counts_from_zero():
    entries = {"running_mean": np.zeros(3, np.float32), "running_var": np.ones(3, np.float32)}
    for stored, expected in (({}, 0), ({"num_batches_tracked": np.int64(10)}, 10)):
        _, state = jbn.convert.from_torch({**entries, **stored})
        assert state.count.dtype == jnp.int32
        assert state.count.shape == ()
        assert int(state.count) == expected


def test_every_argument_may_be_named(rng):
    (params, state), x = jbn.init(3), normal(rng, 4, 3)
    named = jbn.batch_norm(params=params, state=state, x=x, train=True)
    jax.tree.map(np.testing.assert_array_equal, named, jbn.batch_norm(params, state, x, True))
    np.testing.assert_array_equal(
        jbn.normalize(params=params, state=state, x=x), jbn.batch_norm(params, state, x, False)[0]
    )


@pytest.mark.parametrize("train", [True, False])
def test_arrays_of_numpy_and_of_jax_give_the_same(rng, train):
    arrays = (drawn(rng, 3), jbn.init(3)[1], normal(rng, 6, 3))
    mask = rng.random(6) < 0.7
    results = [
        jbn.batch_norm(*jax.tree.map(kind, arrays), train, mask=kind(mask)) for kind in (np.asarray, jnp.asarray)
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.parametrize("train", [True, False])
def test_no_tracer_leaks(rng, train):
    (params, state), x = jbn.init(3), normal(rng, 8, 3)
    options = {"activation": jax.nn.relu, "mask": np.arange(8) > 2}

    def loss(params, x):
        out, new_state = jbn.batch_norm(params, state, x, train, **options)
        return jnp.sum(out**2), new_state

    module = jbn.linen.BatchNorm(use_running_average=not train)
    with jax.checking_leaks():
        jax.eval_shape(lambda: jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x))
        jax.eval_shape(lambda: module.apply(module.init(KEY, x), x, mutable=["batch_stats"]))
        jax.eval_shape(lambda: jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))(x, use_running_average=not train))


COPIES = {"pickled": lambda value: pickle.loads(pickle.dumps(value)), "copied": copy.deepcopy}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_are_the_same(rng, copied):
    x = normal(rng, 6, 3)
    pair = jbn.Params(None, jnp.ones(3)), jbn.batch_norm(*jbn.init(3), x, True)[1]
    assert jax.tree.structure(copied(pair)) == jax.tree.structure(pair)
    jax.tree.map(np.testing.assert_array_equal, copied(pair), pair)
    module = jbn.linen.BatchNorm(momentum=0.3, running_var="total")
    assert copied(module) == module
    norm = jbn.nnx.BatchNorm(3, momentum=jbn.momentum.from_torch(0.2), use_scale=False, rngs=nnx.Rngs(0))
    norm(x)
    np.testing.assert_array_equal(copied(norm)(x, use_running_average=True), norm(x, use_running_average=True))


def both(module):
    """A class of ours and Flax's of the same name, to be put into the same model."""
    return {"linen": (jbn.linen.BatchNorm, nn.BatchNorm), "nnx": (jbn.nnx.BatchNorm, nnx.BatchNorm)}[module]


def assert_trees_close(actual, expected, **bounds):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, e: assert_close(a, e, **bounds), actual, expected)


def test_a_norm_may_be_called_twice_at_initialization(rng):
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = jbn.linen.BatchNorm(use_running_average=False, axis_name="batch")
            once = norm(x)
            return once, norm(once)

    x = normal(rng, 8, 4)
    (once, twice), variables = Twice().init_with_output(KEY, x)
    assert_close(once, reference.batch_norm(x).out, scale=5)
    assert_close(twice, reference.batch_norm(once).out, scale=5)
    np.testing.assert_array_equal(variables["batch_stats"]["BatchNorm_0"]["mean"], np.zeros(4))


def test_a_bound_module_updates_its_statistics(rng):
    class Network(nn.Module):
        def setup(self):
            self.dense, self.norm = nn.Dense(3), jbn.linen.BatchNorm()

    def run(network, x):
        return network.norm(network.dense(x), use_running_average=False)

    x, network = normal(rng, 6, 4), Network()
    out, variables = nn.init_with_output(run, network)(KEY, x)
    bound = network.bind(variables, mutable="batch_stats")
    np.testing.assert_array_equal(run(bound, x), out)
    _, updated = nn.apply(run, network, mutable="batch_stats")(variables, x)
    assert np.all(updated["batch_stats"]["norm"]["mean"] != 0)
    jax.tree.map(np.testing.assert_array_equal, bound.variables["batch_stats"], updated["batch_stats"])


@pytest.mark.standard_promotion
def test_nested_scans_with_remat_stack_variables_as_flax_does(rng):
    class Layer(nn.Module):
        norm: type[nn.Module]

        @nn.compact
        def __call__(self, x):
            return x + self.norm(use_running_average=False, name="norm")(nn.Dense(4)(x))

    x, results = normal(rng, 6, 4), []
    for norm in both("linen"):
        axes = {"params": 0, "batch_stats": 0}
        stack = nn.remat_scan(Layer, lengths=(2, 3), variable_axes=axes, split_rngs={"params": True})(norm)
        variables = stack.init(KEY, x)
        assert variables["batch_stats"]["norm"]["mean"].shape == (2, 3, 4)
        results.append((variables, stack.apply(variables, x, mutable=["batch_stats"])))
    assert_trees_close(*results, condition=100)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("times", [1, 3])
def test_tables_of_linen_models_are_those_of_flax(times):
    class Network(nn.Module):
        norm: type[nn.Module]

        @nn.compact
        def __call__(self, x):
            dense, norm = nn.Dense(3), self.norm(use_running_average=True)
            for _ in range(times):
                x = norm(dense(x))
            return x

    options = {"show_repeated": True, "console_kwargs": {"force_terminal": False, "width": 200}}
    ours, flaxs = (Network(norm).tabulate(KEY, jnp.ones((2, 3)), **options) for norm in both("linen"))
    assert ours == flaxs
    assert "mean: float32[3]" in ours


class Block(nnx.Module):
    """Linear, norm and relu."""

    def __init__(self, rngs, norm=jbn.nnx.BatchNorm, features=3):
        self.linear = nnx.Linear(features, features, use_bias=False, rngs=rngs)
        self.norm = norm(features, momentum=0.5, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.linear(x)))


@pytest.mark.standard_promotion
def test_tables_of_nnx_models_are_those_of_flax():
    options = {"console_kwargs": {"force_terminal": False, "width": 200}}
    ours, flaxs = (Block(nnx.Rngs(0), norm) for norm in both("nnx"))
    assert nnx.tabulate(ours, jnp.ones((2, 3)), **options) == nnx.tabulate(flaxs, jnp.ones((2, 3)), **options)
    assert repr(ours).splitlines()[0] == repr(flaxs).splitlines()[0]
    assert "BatchStat: 6 (24 B)" in repr(ours)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("param_dtype", ["float32", "float16"])
def test_nnx_equals_linen(rng, dtype, param_dtype, masked):
    x, mask = normal(rng, 10, 5), rng.random(10) < 0.6 if masked else None
    options = {"use_running_average": False, "dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(param_dtype)}
    linen_norm, nnx_norm = jbn.linen.BatchNorm(**options), jbn.nnx.BatchNorm(5, rngs=nnx.Rngs(0), **options)
    variables = linen_norm.init(KEY, x)
    out, updated = linen_norm.apply(variables, x, mask=mask, mutable=["batch_stats"])
    np.testing.assert_array_equal(nnx_norm(x, mask=mask), out)
    for name, value in {**variables["params"], **updated["batch_stats"]}.items():
        np.testing.assert_array_equal(getattr(nnx_norm, name)[...], value)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("update", [True, False])
def test_inside_spectral_norm(rng, update):
    x, results = normal(rng, 10, 5), []
    for norm in both("linen"):
        layers = nn.Sequential([nn.Dense(4), norm(use_running_average=not update)])
        spectral = nn.SpectralNorm(layers)
        variables = spectral.init(KEY, x, update_stats=update)
        results.append(spectral.apply(variables, x, update_stats=update, mutable=["batch_stats"]))
    assert_trees_close(*results)
    results = []
    for norm in both("nnx"):
        layers = nnx.Sequential(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), norm(4, rngs=nnx.Rngs(0)))
        results.append(nnx.SpectralNorm(layers, update_stats=update, rngs=nnx.Rngs(1))(x))
    assert_close(*results)


def test_initializers_are_no_part_of_the_graph():
    ones, zeros = (
        jbn.nnx.BatchNorm(3, scale_init=init, bias_init=init, rngs=nnx.Rngs(0))
        for init in (nnx.initializers.ones, nnx.initializers.zeros)
    )
    assert nnx.graphdef(ones) == nnx.graphdef(zeros)
    assert np.all(ones.bias[...] == 1)


def test_scale_and_bias_carry_their_sharding():
    mesh = jax.make_mesh((1,), ("features",), axis_types=(jax.sharding.AxisType.Auto,))
    metadata = {"out_sharding": ("features",)}
    with jax.set_mesh(mesh):
        norm = jbn.nnx.BatchNorm(3, scale_metadata=metadata, bias_metadata=metadata, rngs=nnx.Rngs(0))
    for param in (norm.scale, norm.bias):
        assert param.out_sharding == ("features",)


def test_attributes_and_views():
    block = Block(nnx.Rngs(0))
    for changed in (nnx.view, nnx.with_attributes):
        other = changed(block, use_running_average=True)
        assert other.norm.use_running_average is True
        assert block.norm.use_running_average is False
        assert other.norm.mean is block.norm.mean
        with pytest.raises(ValueError, match="unknown"):
            changed(block, use_running_average=True, unknown=True)
    elsewhere = nnx.with_attributes(block, only=nnx.Linear, use_running_average=True, raise_if_not_found=False)
    assert elsewhere.norm.use_running_average is False
    with pytest.raises(ValueError, match="unknown"):
        block.set_attributes(use_running_average=True, unknown=True)
    block = Block(nnx.Rngs(0))
    block.set_attributes(use_running_average=True)
    assert block.norm.use_running_average is True


def test_the_text_of_views_names_each_class_once():
    text = nnx.view_info(nnx.Sequential(Block(nnx.Rngs(0)), Block(nnx.Rngs(1))))
    assert text.count("BatchNorm:") == 1
    assert "use_running_average" in text
    assert "BatchNorm" not in nnx.view_info(Block(nnx.Rngs(0)), only=nnx.Linear)


def squares(model, x):
    return jnp.mean(model(x) ** 2)


def stacked(norm, axes=0):
    @nnx.split_rngs(splits=4)
    @nnx.vmap(in_axes=0, out_axes=axes)
    def make(rngs):
        return Block(rngs, norm)

    return make(nnx.Rngs(0))


def ensemble(norm, x):
    model = stacked(norm)
    return nnx.vmap(lambda model, x: model(x), in_axes=(0, None))(model, x), model


def lanes_of_one_model(norm, x):
    """Params are shared, and each lane has statistics of its own."""
    axes = nnx.StateAxes({nnx.BatchStat: 0, ...: None})
    model = nnx.vmap(lambda: Block(nnx.Rngs(0), norm), out_axes=axes, axis_size=4)()
    assert model.norm.scale.shape == (3,)
    assert model.norm.mean.shape == (4, 3)
    out = nnx.vmap(lambda model, x: model(x), in_axes=(axes, 0))(model, jnp.stack([x, x + 1, 2 * x, 3 - x]))
    return out, model


def axes_of_each_variable(norm, x):
    axes = nnx.StateAxes({nnx.PathContains("mean"): 1, nnx.PathContains("bias"): None, ...: 0})
    return nnx.vmap(lambda: norm(3, rngs=nnx.Rngs(0)), out_axes=axes, axis_size=5)()


def scan_over_layers(axis):
    """Params along the first axis; all layers update the same statistics, or, not carried, read them only."""

    def program(norm, x):
        model = stacked(norm, nnx.StateAxes({nnx.Param: 0, ...: None}))
        axes = nnx.StateAxes({nnx.Param: 0, ...: axis})
        scan = nnx.scan(lambda model, x: model(x), in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)
        return scan(model, x), model

    return program


def step_in_tree_mode(norm, x):
    model = Block(nnx.Rngs(0), norm)
    model.set_attributes(use_running_average=True)
    step = nnx.jit(lambda model, x: nnx.grad(squares, graph=False)(model, x), graph=False)
    return jax.tree.leaves(step(model, x)), model


def step_on_mutable_arrays(norm, x):
    with nnx.var_defaults(hijax=True):
        model = Block(nnx.Rngs(0), norm)

    @jax.jit
    def step(x):
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        gradient = jax.grad(lambda params: squares(nnx.merge(graph, params, rest), x))
        return jax.tree.leaves(gradient(nnx.with_vars(params, hijax=False)))

    return step(x), model


def one_layer_in_two_blocks(norm, x):
    first, second = Block(nnx.Rngs(0), norm), Block(nnx.Rngs(1), norm)
    second.linear = first.linear
    model = nnx.Sequential(first, second)
    return nnx.jit(nnx.grad(squares))(model, x), model


def train_and_evaluate_by_views(norm, x):
    model = Block(nnx.Rngs(0), norm)
    evaluated = nnx.view(model, use_running_average=True)
    before = evaluated(x)
    nnx.jit(lambda model, x: model(x))(model, x)
    return before, evaluated(x), model


def split_and_called(norm, x):
    graph, params, statistics = nnx.split(Block(nnx.Rngs(0), norm), nnx.Param, nnx.BatchStat)
    assert set(params) == {"linear", "norm"}
    assert set(statistics["norm"]) == {"mean", "var"}
    return nnx.call((graph, params, statistics))(x)[0], nnx.merge(graph, params, statistics)


PROGRAMS = {
    "ensemble": ensemble,
    "lanes of one model": lanes_of_one_model,
    "axes of each variable": axes_of_each_variable,
    "scan, statistics carried": scan_over_layers(nnx.Carry),
    "scan, statistics read": scan_over_layers(None),
    "tree mode": step_in_tree_mode,
    "mutable arrays": step_on_mutable_arrays,
    "one layer in two blocks": one_layer_in_two_blocks,
    "views": train_and_evaluate_by_views,
    "split and call": split_and_called,
}


def arrays(results):
    """Every array of nested results, modules by their state."""
    return [
        np.asarray(leaf)
        for result in (results if isinstance(results, tuple) else (results,))
        for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(result)) if isinstance(result, nnx.Module) else result)
    ]


@pytest.mark.standard_promotion
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_nnx_programs_give_what_flax_gives(rng, program):
    x = normal(rng, 8, 3)
    ours, flaxs = (arrays(program(norm, x)) for norm in both("nnx"))
    for a, e in zip(ours, flaxs, strict=True):
        assert_close(a, e, condition=10)


@pytest.mark.standard_promotion
def test_bridges_between_linen_and_nnx(rng):
    x, results = normal(rng, 6, 3), []
    for norm in both("linen"):
        module = bridge.ToNNX(norm(use_running_average=False, momentum=0.5), rngs=nnx.Rngs(0))
        bridge.lazy_init(module, x)
        results.append((module(x, mutable=["batch_stats"]), nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))))
    assert_trees_close(*results)
    results = []
    for norm in both("nnx"):
        module = bridge.to_linen(norm, 3, momentum=0.5)
        variables = module.init(KEY, x)
        assert {"params", "batch_stats"} <= set(variables)
        out, updated = module.apply(variables, x, mutable=["batch_stats"])
        results.append((out, jax.tree.leaves(updated["batch_stats"])))
    assert_trees_close(*results)
