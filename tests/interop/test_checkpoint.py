"""Round trips through orbax and flax.serialization are bit-equal."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from support.compilation import compiled
from support.saving import by_format, save_by_flax, save_by_orbax
from support.tolerances import assert_same_trees

import jbn

step = compiled(jbn.batch_norm, static_argnums=3)


@pytest.fixture(scope="module")
def tree():
    """A tree that a training loop saves: params and states of two norms, one without scale, and an optimizer state."""
    rng = np.random.default_rng(0)
    params, state = jbn.init(3)
    for _ in range(3):
        _, state = step(params, state, rng.normal(size=(5, 3)).astype(np.float32), True)
    other = jbn.Params(None, params.bias + 0.1), jbn.unset(state)
    return {"first": (params, state), "second": other, "optimizer": optax.adam(1e-3).init(params)}


@by_format
def test_what_was_saved_is_restored_bit_for_bit(tmp_path, tree, save):
    save(tmp_path / "saved", tree)
    assert_same_trees(jbn.checkpoint.restore(tmp_path / "saved", tree), tree)
    assert_same_trees(jbn.checkpoint.restore(str(tmp_path / "saved"), jax.eval_shape(lambda: tree)), tree)


@by_format
def test_training_goes_on_as_if_it_had_not_stopped(tmp_path, tree, save, rng):
    save(tmp_path / "saved", tree)
    restored = jbn.checkpoint.restore(tmp_path / "saved", tree)
    x = rng.normal(size=(5, 3)).astype(np.float32)
    for name in ("first", "second"):
        assert_same_trees(step(*restored[name], x, True), step(*tree[name], x, True))


@by_format
def test_checkpoints_of_flax_linen_batch_norm_are_restored(tmp_path, save, rng):
    x = rng.normal(size=(5, 3)).astype(np.float32)
    norm = nn.BatchNorm(use_running_average=False)

    @compiled
    def train(x):
        variables = norm.init(jax.random.key(0), x)
        return {**variables, **norm.apply(variables, x, mutable=["batch_stats"])[1]}

    save(tmp_path / "saved", train(x))
    target = jax.eval_shape(jbn.linen.BatchNorm(use_running_average=False).init, jax.random.key(1), x)
    restored = jbn.checkpoint.restore(tmp_path / "saved", target)
    params, state = jbn.convert.from_linen(restored)
    expected = nn.BatchNorm(use_running_average=True).apply(restored, x)
    np.testing.assert_allclose(jbn.normalize(params, state, x), expected, rtol=1e-5, atol=1e-6)


@by_format
def test_checkpoints_of_flax_nnx_batch_norm_are_restored(tmp_path, save):
    model, other = (module.BatchNorm(3, rngs=nnx.Rngs(0)) for module in (nnx, jbn.nnx))
    model(jnp.arange(12.0).reshape(4, 3))
    save(tmp_path / "saved", nnx.to_pure_dict(nnx.state(model)))
    nnx.update(other, jbn.checkpoint.restore(tmp_path / "saved", nnx.to_pure_dict(nnx.state(other))))
    assert_same_trees(nnx.to_pure_dict(nnx.state(other)), nnx.to_pure_dict(nnx.state(model)))


@by_format
def test_a_target_has_the_structure_of_what_was_saved_by_its_paths(tmp_path, save):
    """Both formats treat fields, keys and indices alike, and store no empty nodes."""
    params, state = jbn.init(3)
    save(tmp_path / "saved", {"norm": (params, state), "empty": {}})
    for target in ({"norm": [params, state]}, {"norm": {"0": params, "1": state}, "other": {}, "none": None}):
        assert_same_trees(jbn.checkpoint.restore(tmp_path / "saved", target), target)


@by_format
def test_counts_of_jbn_0_1_become_those_of_each_feature(tmp_path, save):
    """Counts of a norm, averaged ones too, and of stacks are converted; other leaves of this shape or dtype are not."""
    step = jnp.int32(9)
    norm, stack, last = (jbn.State(jnp.ones(shape), jnp.ones(shape), None) for shape in (3, (2, 3), (3, 2)))
    old = {"norm": norm._replace(count=jnp.int32(7)), "averaged": norm._replace(count=jnp.float32(2.5)), "step": step}
    old |= {"stack": stack._replace(count=jnp.int32([1, 2])), "last": last._replace(count=jnp.int32([1, 2]))}
    counts = {"norm": jnp.full(3, 7.0), "averaged": jnp.full(3, 2.5)}
    counts |= {"stack": jnp.array([[1.0] * 3, [2.0] * 3]), "last": jnp.array([[1.0, 2.0]] * 3)}
    expected = {**{name: old[name]._replace(count=counts[name]) for name in counts}, "step": step}
    save(tmp_path / "saved", old)
    zeros = jax.tree.map(jnp.zeros_like, expected)
    for target in (zeros, jax.eval_shape(lambda: zeros)):
        assert_same_trees(jbn.checkpoint.restore(tmp_path / "saved", target), expected)


def test_counts_that_are_raised_are_where_the_target_has_them(tmp_path):
    save_by_orbax(tmp_path / "saved", jbn.State(jnp.ones(3), jnp.ones(3), jnp.int32(7)))
    (device,) = jax.devices()[-1:]
    target = jax.device_put(jbn.init(3)[1], device)
    assert jbn.checkpoint.restore(tmp_path / "saved", target).count.devices() == {device}
    host = jbn.checkpoint.restore(tmp_path / "saved", jax.tree.map(np.asarray, target))
    assert isinstance(host.count, np.ndarray)


@by_format
def test_python_numbers_are_restored(tmp_path, save):
    tree = {"rate": 0.5, "step": np.int32(7), "on": True, "host": np.arange(3.0)}
    save(tmp_path / "saved", tree)
    restored = jbn.checkpoint.restore(tmp_path / "saved", {**tree, "rate": 0.0, "step": np.int32(0), "on": False})
    assert (restored["rate"], int(restored["step"]), restored["on"]) == (0.5, 7, True)
    np.testing.assert_array_equal(restored["host"], tree["host"])


@by_format
def test_64_bits_are_not_cut_in_silence(tmp_path, save):
    for i, value in enumerate([np.int64(2**40 + 3), 1 / 3]):
        stored = np.array([value])
        save(tmp_path / str(i), {"a": stored})
        restored = jbn.checkpoint.restore(tmp_path / str(i), {"a": jax.ShapeDtypeStruct((1,), stored.dtype)})
        assert restored["a"].dtype == stored.dtype
        np.testing.assert_array_equal(restored["a"], stored)


@pytest.mark.devices(2)
def test_restored_arrays_have_the_shardings_of_the_target(tmp_path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("devices",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    save_by_orbax(tmp_path / "saved", jbn.init(8))
    target = jax.device_put(jbn.init(8), whole)
    assert jbn.checkpoint.restore(tmp_path / "saved", target)[1].mean.sharding == whole
    explicit = jax.make_mesh((len(jax.devices()),), ("devices",))
    tree = jax.device_put(jbn.init(8), jax.sharding.NamedSharding(explicit, jax.sharding.PartitionSpec()))
    on_one_device = jbn.checkpoint.restore(tmp_path / "saved", jax.eval_shape(lambda tree: tree, tree))
    assert on_one_device[1].mean.sharding.device_set == {jax.devices()[0]}


def test_64_bits_are_restored_as_numpy_where_jax_has_32(tmp_path):
    """jax would truncate them to 32 bits."""
    tree = {"step": np.int64(2**40), "rate": 0.5, "scale": np.ones(2)}
    save_by_flax(tmp_path / "saved", tree)
    restored = jbn.checkpoint.restore(tmp_path / "saved", tree)
    assert (restored["step"], restored["rate"], restored["scale"].dtype) == (2**40, 0.5, np.float64)


def test_a_path_may_be_relative(tmp_path, tree, monkeypatch):
    save_by_orbax(tmp_path / "saved", tree)
    monkeypatch.chdir(tmp_path)
    assert_same_trees(jbn.checkpoint.restore("saved", tree), tree)


def test_a_step_of_a_checkpoint_manager_is_restored_and_its_folder_refused(tmp_path):
    with ocp.CheckpointManager(tmp_path / "all") as manager:
        manager.save(3, args=ocp.args.StandardSave(jbn.init(3)))
    assert_same_trees(jbn.checkpoint.restore(tmp_path / "all" / "3" / "default", jbn.init(3)), jbn.init(3))
    with pytest.raises(ValueError, match="in the directory of a CheckpointManager, give step/default"):
        jbn.checkpoint.restore(tmp_path / "all", jbn.init(3))


@by_format
def test_read_gives_what_is_stored_and_latest_the_path_itself(tmp_path, save):
    path = tmp_path / "saved"
    save(path, {"norm": jbn.init(3)[1], "kernel": np.ones((2, 2), np.float16), "step": 7})
    found = jbn.checkpoint.read(path)
    np.testing.assert_array_equal(found["norm"]["var"], np.ones(3))
    assert found["norm"]["count"].dtype == np.float32
    assert found["kernel"].dtype == np.float16
    assert found["step"] == 7
    assert jbn.checkpoint.latest(path) == path


@pytest.mark.parametrize("folders", [("9", "10"), ("checkpoints/9/default", "checkpoints/10/default"), ("10/default",)])
def test_latest_finds_the_highest_step_and_the_only_item_of_a_checkpoint_manager(tmp_path, folders):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "_METADATA").touch()
    assert jbn.checkpoint.latest(tmp_path) == tmp_path / folders[-1]
