"""Round trips through orbax and flax.serialization are bit-equal; what is no such checkpoint gives one clear error."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx, serialization

import jbn


@pytest.fixture
def tree(rng):
    """What a training loop saves: params and states of two norms, one without scale, and an optimizer's state."""
    params, state = jbn.init(3)
    for _ in range(3):
        _, state = jbn.batch_norm(params, state, rng.normal(size=(5, 3)).astype(np.float32), True)
    other = jbn.Params(None, params.bias + 0.1), jbn.unset(state)
    return {"first": (params, state), "second": other, "optimizer": optax.adam(1e-3).init(params)}


def save_by_orbax(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def save_by_flax(path, tree):
    path.write_bytes(serialization.to_bytes(tree))


SAVES = {"orbax": save_by_orbax, "flax.serialization": save_by_flax}
by_format = pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)


def assert_bit_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_array_equal(a, e)


@by_format
def test_round_trip_is_bit_equal(tmp_path, tree, save):
    save(tmp_path / "saved", tree)
    assert_bit_equal(jbn.checkpoint.restore(tmp_path / "saved", tree), tree)
    assert_bit_equal(jbn.checkpoint.restore(str(tmp_path / "saved"), jax.eval_shape(lambda: tree)), tree)


@by_format
def test_training_goes_on_as_if_it_had_not_stopped(tmp_path, tree, save, rng):
    save(tmp_path / "saved", tree)
    restored = jbn.checkpoint.restore(tmp_path / "saved", tree)
    step = jax.jit(jbn.batch_norm, static_argnums=3)
    x = rng.normal(size=(5, 3)).astype(np.float32)
    for name in ("first", "second"):
        assert_bit_equal(step(*restored[name], x, True), step(*tree[name], x, True))


@by_format
def test_checkpoints_of_flax_batch_norm(tmp_path, save, rng):
    x = rng.normal(size=(5, 3)).astype(np.float32)
    norm = nn.BatchNorm(use_running_average=False)
    variables = norm.init(jax.random.key(0), x)
    _, updated = norm.apply(variables, x, mutable=["batch_stats"])
    save(tmp_path / "saved", {**variables, **updated})
    target = jbn.linen.BatchNorm(use_running_average=False).init(jax.random.key(1), x)
    restored = jbn.checkpoint.restore(tmp_path / "saved", target)
    params, state = jbn.convert.from_linen(restored)
    expected = nn.BatchNorm(use_running_average=True).apply(restored, x)
    np.testing.assert_allclose(jbn.normalize(params, state, x), expected, rtol=1e-5, atol=1e-6)


@by_format
def test_state_of_an_nnx_model(tmp_path, save):
    model, other = (module.BatchNorm(3, rngs=nnx.Rngs(0)) for module in (nnx, jbn.nnx))
    model(jnp.arange(12.0).reshape(4, 3))
    save(tmp_path / "saved", nnx.to_pure_dict(nnx.state(model)))
    nnx.update(other, jbn.checkpoint.restore(tmp_path / "saved", nnx.to_pure_dict(nnx.state(other))))
    assert_bit_equal(nnx.to_pure_dict(nnx.state(other)), nnx.to_pure_dict(nnx.state(model)))


@by_format
def test_one_error_lists_how_the_tree_differs(tmp_path, tree, save):
    save(tmp_path / "saved", {"norm": tree["first"], "more": jnp.ones(2)})
    params, state = jbn.init(5, np.float32)
    target = {"norm": (params, state._replace(count=jnp.float32(0))), "other": jnp.ones(2)}
    with pytest.raises(ValueError, match="is not one of `target`") as caught:
        jbn.checkpoint.restore(tmp_path / "saved", target)
    lines = {line.strip() for line in str(caught.value).splitlines()[1:]}
    misshaped = {f"norm/{leaf} has shape (3,), not (5,)" for leaf in ("0/scale", "0/bias", "1/mean", "1/var")}
    assert lines == {"other is missing", "more is extra", "norm/1/count has dtype int32, not float32", *misshaped}


@pytest.mark.parametrize("content", [b"", b"hello world", b"\x80", "half"])
def test_files_that_are_no_whole_checkpoint(tmp_path, tree, content):
    path = tmp_path / "saved"
    save_by_flax(path, tree)
    path.write_bytes(path.read_bytes()[:200] if content == "half" else content)
    with pytest.raises(ValueError, match=r"saved (holds no whole checkpoint|is not one of `target`)"):
        jbn.checkpoint.restore(path, tree)


def test_directories_that_are_no_checkpoint(tmp_path, tree):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"holds no whole checkpoint.*no metadata of orbax"):
        jbn.checkpoint.restore(tmp_path, tree)


CUT_OFF = """
import glob, os, sys
import jbn

target = jbn.init(3)
for damage in ("_METADATA", "manifest.ocdbt", "d/*"):
    for file in glob.glob(f"{sys.argv[1]}/{damage.replace('*', '')}/{damage}"):
        os.truncate(file, os.path.getsize(file) // 2)
    try:
        jbn.checkpoint.restore(f"{sys.argv[1]}/{damage.replace('*', '')}", target)
    except ValueError as error:
        assert "holds no whole checkpoint" in str(error), error
    else:
        raise SystemExit(f"{damage} was cut off, and restored")
"""


def test_a_checkpoint_that_was_cut_off(tmp_path):
    """In a process of its own, since readers of orbax go on complaining in their threads for a while."""
    for damage in ("_METADATA", "manifest.ocdbt", "d/"):
        save_by_orbax(tmp_path / damage, jbn.init(3))
    subprocess.run([sys.executable, "-c", CUT_OFF, str(tmp_path)], check=True)


@by_format
def test_structure_is_by_path(tmp_path, save):
    """A field, a key and a place are one to both formats, and what is empty is not stored."""
    params, state = jbn.init(3)
    save(tmp_path / "saved", {"norm": (params, state), "empty": {}})
    for target in ({"norm": [params, state]}, {"norm": {"0": params, "1": state}, "other": {}, "none": None}):
        assert_bit_equal(jbn.checkpoint.restore(tmp_path / "saved", target), target)


@by_format
def test_numbers(tmp_path, save):
    tree = {"rate": 0.5, "step": np.int32(7), "on": True, "host": np.arange(3.0)}
    save(tmp_path / "saved", tree)
    restored = jbn.checkpoint.restore(tmp_path / "saved", {**tree, "rate": 0.0, "step": np.int32(0), "on": False})
    assert (restored["rate"], int(restored["step"]), restored["on"]) == (0.5, 7, True)
    np.testing.assert_array_equal(restored["host"], tree["host"])


@by_format
@pytest.mark.parametrize(("value", "other"), [(jnp.float32(2.5), 0), (jnp.int32(5), True), (2**30 + 1, 0.0), (2.5, 1)])
def test_numbers_are_not_cast_in_silence(tmp_path, save, value, other):
    save(tmp_path / "saved", {"a": value})
    with pytest.raises(ValueError, match="a has dtype"):
        jbn.checkpoint.restore(tmp_path / "saved", {"a": other})


@by_format
@pytest.mark.parametrize("value", [np.int64(2**40 + 3), 1 / 3])
def test_64_bits_are_not_cut_in_silence(tmp_path, save, value):
    stored = np.array([value])
    save(tmp_path / "saved", {"a": stored})
    restored = jbn.checkpoint.restore(tmp_path / "saved", {"a": jax.ShapeDtypeStruct((1,), stored.dtype)})
    assert restored["a"].dtype == stored.dtype
    np.testing.assert_array_equal(restored["a"], stored)


def test_random_keys_are_refused(tmp_path):
    save_by_orbax(tmp_path / "saved", {"key": jax.random.key(0)})
    with pytest.raises(TypeError, match=r"`target` has a random key at key: save and restore jax.random.key_data"):
        jbn.checkpoint.restore(tmp_path / "saved", {"key": jax.random.key(0)})
    with pytest.raises(ValueError, match=r"key has (shape|dtype)"):
        jbn.checkpoint.restore(tmp_path / "saved", {"key": jnp.zeros(2, jnp.uint32)})


@pytest.mark.parametrize("path", [None, 3])
def test_paths_that_are_none(path):
    with pytest.raises(TypeError, match="`path` is a "):
        jbn.checkpoint.restore(path, jbn.init(3))


def test_the_tree_itself_is_named(tmp_path):
    save_by_flax(tmp_path / "saved", jnp.ones(4))
    with pytest.raises(ValueError, match=r"the tree itself has shape \(4,\), not \(5,\)"):
        jbn.checkpoint.restore(tmp_path / "saved", jnp.ones(5))


def test_shardings_are_those_of_the_target(tmp_path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("devices",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    save_by_orbax(tmp_path / "saved", jbn.init(8))
    target = jax.device_put(jbn.init(8), whole)
    assert jbn.checkpoint.restore(tmp_path / "saved", target)[1].mean.sharding == whole


def test_numbers_that_jax_does_not_have(tmp_path):
    """Without 64 bits, jax would cut them."""
    tree = {"step": np.int64(2**40), "rate": 0.5, "scale": np.ones(2)}
    save_by_flax(tmp_path / "saved", tree)
    restored = jbn.checkpoint.restore(tmp_path / "saved", tree)
    assert (restored["step"], restored["rate"], restored["scale"].dtype) == (2**40, 0.5, np.float64)


def test_relative_paths(tmp_path, tree, monkeypatch):
    save_by_orbax(tmp_path / "saved", tree)
    monkeypatch.chdir(tmp_path)
    assert_bit_equal(jbn.checkpoint.restore("saved", tree), tree)


def test_checkpoint_managers_are_pointed_into(tmp_path):
    with ocp.CheckpointManager(tmp_path / "all") as manager:
        manager.save(3, args=ocp.args.StandardSave(jbn.init(3)))
    assert_bit_equal(jbn.checkpoint.restore(tmp_path / "all" / "3" / "default", jbn.init(3)), jbn.init(3))
    with pytest.raises(ValueError, match="in a CheckpointManager's directory give step/default"):
        jbn.checkpoint.restore(tmp_path / "all", jbn.init(3))


def test_files_that_may_not_be_read(tmp_path, tree, monkeypatch):
    save_by_flax(tmp_path / "saved", tree)

    def refused(self):
        raise PermissionError(f"[Errno 13] Permission denied: {self}")

    monkeypatch.setattr(pathlib.Path, "read_bytes", refused)
    with pytest.raises(PermissionError):
        jbn.checkpoint.restore(tmp_path / "saved", tree)


def test_targets_that_are_no_arrays(tmp_path, tree):
    save_by_flax(tmp_path / "saved", tree)
    with pytest.raises(TypeError, match="`target` has a object at norm/0: expected arrays"):
        jbn.checkpoint.restore(tmp_path / "saved", {"norm": [object()]})


def test_nothing_there(tmp_path, tree):
    with pytest.raises(FileNotFoundError, match=r"`path` is .*missing, where there is nothing"):
        jbn.checkpoint.restore(tmp_path / "missing", tree)


@pytest.mark.parametrize("kind", ["orbax", "bytes"])
def test_read_gives_what_is_stored(tmp_path, kind):
    tree = {"norm": jbn.init(3)[1], "kernel": np.ones((2, 2), np.float16), "step": 7}
    path = tmp_path / kind
    if kind == "orbax":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, tree)
    else:
        path.write_bytes(serialization.to_bytes(tree))
    found = jbn.checkpoint.read(path)
    np.testing.assert_array_equal(found["norm"]["var"], np.ones(3))
    assert found["norm"]["count"].dtype == np.int32
    assert found["kernel"].dtype == np.float16
    assert found["step"] == 7
    assert jbn.checkpoint.latest(path) == path


def test_latest_and_read_refuse(tmp_path):
    for call in (jbn.checkpoint.read, jbn.checkpoint.latest):
        with pytest.raises(FileNotFoundError, match="where there is nothing"):
            call(tmp_path / "absent")
    with pytest.raises(ValueError, match="a folder with 0 checkpoints of orbax"):
        jbn.checkpoint.latest(tmp_path)
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        jbn.checkpoint.read(tmp_path)
