"""`jbn bench`: the counts and errors that it reports, and the command."""

import functools
import json
import math
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tolerances import assert_close

import jbn
from jbn import cli
from jbn.bench import cases, counts, data, numbers, picture, programs, report, resnet50, run, timing, torch_programs
from jbn.bench.cases import MODES, Case, Chain, Network, all_cases, quick_cases
from jbn.bench.layers import LAYERS, linen_layer
from jbn.bench.run import Record

SMALL = Case("small", (16, 8, 4))
CHAINS = [Chain(name, 32, 8, 2, name == "scanned", "float32") for name in ("unrolled", "scanned")]


def test_a_copy_is_two_passes_and_one_kernel():
    found = counts.count(programs.copy_program(SMALL).compiled, SMALL.size)
    assert (found.passes, found.kernels, found.temporary_bytes) == (2.0, 1, 0)


def test_rows_that_are_read_count_as_what_they_are():
    x = jnp.ones((64, 256))
    compiled = jax.jit(lambda x: x[3] * 2 + x[5]).lower(x).compile()
    assert counts.count(compiled, x.nbytes).passes == 0


def test_tuples_of_a_tpu_layout_are_read():
    text = """HloModule m

ENTRY %main (p: f32[8,128]) -> (f32[8,128], f32[8,128]) {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %f = (f32[8,128]{1,0:T(8,128)}, /*index=1*/f32[8,128]{1,0:T(8,128)S(1)}) fusion(%p), kind=kLoop, calls=%g
}
"""

    class Compiled:
        def as_text(self):
            return text

        def memory_analysis(self):
            return self

        temp_size_in_bytes = 12

    assert counts.count(Compiled(), 4096) == (2.0, 1, 12)


@pytest.mark.parametrize("case", [SMALL, SMALL._replace(relu=True), SMALL._replace(masked=True)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_formula_is_that_of_jbn(case, dtype):
    case = case._replace(dtype=dtype)
    batch = data.batch(case, np.random.default_rng(0))
    errors = run._errors(case, {"jbn": LAYERS["jbn"]()}, batch)
    assert 0 < errors["jbn"] <= numbers.allowed(dtype)


def test_wrong_numbers_are_noticed():
    layer = LAYERS["jbn"]()
    wrong = layer._replace(train=lambda scale, *rest: layer.train(scale * 1.0001, *rest))
    batch = data.batch(SMALL, np.random.default_rng(0))
    errors = run._errors(SMALL, {"right": layer, "wrong": wrong}, batch)
    assert errors["right"] < numbers.allowed("float32") < errors["wrong"]
    assert numbers.error([np.array([1.0, np.nan])], (np.array([1.0, 2.0]),)) == math.inf


@pytest.mark.standard_promotion
def test_far_from_zero_jbn_is_right_and_the_fast_variance_is_not():
    errors, allowed = run.far_errors({"jbn": LAYERS["jbn"](), "linen": linen_layer()})
    assert errors["jbn"] < allowed < errors["linen"]


@pytest.mark.standard_promotion
@pytest.mark.parametrize("mode", MODES)
def test_every_peer_runs_and_is_right_near_zero(mode):
    layers, missing = run.importable(run.PEERS)
    assert not missing
    (record,) = run.run([SMALL._replace(modes=(mode,))], layers, 1)
    assert record.seconds.keys() == layers.keys()
    assert all(error <= numbers.allowed("float32") for error in record.errors.values()), record.errors
    assert record.residual_bytes.get("jbn", SMALL.size) < 1.2 * SMALL.size


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    "case", [SMALL, Case("conv", (4, 6, 6, 8)), Case("dense", (16, 4))], ids=lambda case: case.name
)
def test_pytorch_gets_its_channels_where_the_name_says(case):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[peers]'")
    batch = data.batch(case, np.random.default_rng(0))
    last, first = (torch_programs._placed(batch.x, channels_last) for channels_last in (True, False))
    assert last.shape == first.shape == (case.shape[0], case.shape[-1], *case.shape[1:-1])
    assert last.stride(1) == 1
    assert first.is_contiguous()
    assert torch.equal(last, first)
    errors = run._errors(case, {"torch-last": None, "torch-first": None}, batch)
    assert all(error <= numbers.allowed("float32") for error in errors.values()), errors


def test_the_clock_waits_for_pytorch_on_a_gpu(monkeypatch):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[peers]'")
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append("cuda"))
    torch_programs._wait(None)
    assert waited == []
    monkeypatch.setattr(torch_programs, "_device", lambda: torch.device("cuda"))
    torch_programs._wait(None)
    assert waited == ["cuda"]


@pytest.mark.standard_promotion
def test_chains_are_measured_where_a_library_has_them():
    layers = {"jbn": LAYERS["jbn"](), "torch-last": None, "torch-first": None}
    unrolled, scanned = run.run(CHAINS, layers, 1)
    assert unrolled.seconds.keys() == {"jbn", "torch-last"}
    assert scanned.seconds.keys() == {"jbn"}
    ((name, mode, _, memory, torch),) = report.times([scanned], ["torch-last"]).rows
    assert (name, mode, memory, torch) == ("scanned 2x32x8 float32", "forward+backward", None, None)
    ((*_, of, passes, _, _, kept),) = report.counts([scanned], ["jbn", "linen"]).rows
    assert (of, passes, kept) == ("jbn", None, None)


@pytest.mark.standard_promotion
def test_gradients_of_a_chain_do_not_scale_its_weights(monkeypatch):
    """The norm after a layer takes the scale of each column of the weights away: the loss cannot change with it."""
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[peers]'")
    gradients = {}
    for chain in CHAINS:
        program = programs.chain_program(LAYERS["jbn"](), chain)
        weights, *_ = given = program.prepare(0)
        gradients[chain.name] = (weights, program.run(given)[1])
    assert_close(gradients["scanned"][1], gradients["unrolled"][1])
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, weights: (weights, *grad(loss, weights)))
    program = torch_programs.chain_program(CHAINS[0])
    gradients["torch"] = (tensor.detach().numpy() for tensor in program.run(program.prepare(0)))
    for name, (weights, gradient) in gradients.items():
        weights, gradient = np.asarray(weights, np.float64), np.asarray(gradient, np.float64)
        assert weights.shape == gradient.shape == (2, 8, 8)
        lengths = np.linalg.norm(weights, axis=1) * np.linalg.norm(gradient, axis=1)
        assert np.all(lengths > 0), name
        # Within what epsilon leaves of the scale.
        np.testing.assert_array_less(np.abs((weights * gradient).sum(1)), 1e-3 * lengths, name)


NORM = resnet50.Norm(
    jbn.init, lambda params, state, x, activation: jbn.batch_norm(params, state, x, True, activation=activation)
)


def test_the_network_is_resnet_50():
    """PyTorch's has 25,557,032 parameters too, of which 1000 are the bias of its last layer."""
    params, state = jax.eval_shape(functools.partial(resnet50.init, norm=NORM), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 25_557_032 - 1000
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.bfloat16)
    logits, new_state = jax.eval_shape(functools.partial(resnet50.apply, NORM), params, state, images)
    assert (logits.shape, logits.dtype) == ((2, 1000), jnp.float32)
    assert new_state == state


@pytest.fixture
def small_network(monkeypatch):
    """A stem and three blocks, compiled without LLVM's optimization, which would take longer than it saves."""
    monkeypatch.setattr(resnet50, "STAGES", ((4, 3),))
    monkeypatch.setattr(resnet50, "HALVES", (("stem",), ("stage0",)))
    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0}))


def test_a_scan_over_blocks_changes_nothing(small_network):
    params, state = jax.jit(functools.partial(resnet50.init, norm=NORM, classes=10))(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    unrolled, scanned = (
        jax.jit(functools.partial(resnet50.apply, NORM, scan=scan))(params, state, images) for scan in (False, True)
    )
    assert scanned[0].shape == (4, 10)
    for actual, expected in zip(jax.tree.leaves(scanned), jax.tree.leaves(unrolled), strict=True):
        assert_close(actual, expected)


def test_a_step_of_the_network_learns_and_is_the_same_under_the_policy(small_network):
    layers = dict.fromkeys(("jbn", "keras"), LAYERS["jbn"]())
    found = run._networks(Network("resnet50", 1, "float32"), layers)
    assert found.keys() == {"jbn", "jbn-remat"}
    *_, images, labels = given = found["jbn"].prepare(0)
    plain, remat = (found[name].run(given) for name in ("jbn", "jbn-remat"))
    for actual, expected in zip(jax.tree.leaves(remat), jax.tree.leaves(plain), strict=True):
        assert_close(actual, expected)
    params, state, loss = plain
    *_, later = found["jbn"].run((params, state, images, labels))
    assert later < loss


def test_times_are_taken_in_turn():
    order = []

    def program(name):
        return programs.Program(lambda number: name, order.append, lambda _: time.sleep(timing.SHORTEST))

    found = timing.measure({name: program(name) for name in "abc"}, 8)
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 8, "b": 8, "c": 8}
    rounds = ["".join(order[start : start + 6]) for start in range(9, len(order), 6)]
    # Each sample is of one run here, and after one that is not timed.
    assert all(sorted(turn[::2]) == ["a", "b", "c"] and turn[::2] == turn[1::2] for turn in rounds)
    assert len({turn[0] for turn in rounds}) > 1


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    def absent():
        raise ImportError("no such library")

    monkeypatch.setitem(LAYERS, "haiku", absent)
    assert run.importable(["jbn", "haiku"])[1] == {"haiku": "no such library"}


def test_keras_is_left_out_on_another_backend(monkeypatch):
    keras = SimpleNamespace(backend=SimpleNamespace(backend=lambda: "tensorflow"))
    monkeypatch.setitem(sys.modules, "keras", keras)
    layers, missing = run.importable(["jbn", "keras"])
    assert list(layers) == ["jbn"]
    assert "set KERAS_BACKEND=jax" in missing["keras"]


def test_pytorch_is_left_out_where_it_is_not_installed(monkeypatch):
    def absent():
        raise ImportError("no such library")

    monkeypatch.setattr(run.torch_programs, "description", absent)
    layers, missing = run.importable(["jbn", "torch-last", "torch-first"])
    assert list(layers) == ["jbn"]
    assert missing == dict.fromkeys(["torch-last", "torch-first"], "no such library")


def test_cases_fit_on_this_machine_and_quick_ones_are_few():
    assert run.work(quick_cases()) <= 10
    assert max(case.size for case in all_cases(on_cpu=True) if isinstance(case, Case)) < 2**28
    assert sum(isinstance(case, Network) for case in all_cases(on_cpu=False)) == 2


def record(**changed):
    seconds = {"jbn": [1.0, 1.0, 2.0], "linen": [2.0, 3.0, 2.0], "nnx": [0.5, 0.5, 1.0]}
    record = Record("a", "forward", seconds, {}, {}, {"linen": 0.0, "nnx": 0.0}, 1e-3, 100, 3, [1.0, 1.0, 2.0])
    return record._replace(**changed)


def test_ratios_are_of_the_same_round():
    assert report.rival(record(), "linen") == timing.Spread(2.0, 1.5, 2.5)
    assert report.rival(record(errors={"linen": 0.1}), "linen") is None
    assert report.rival(record(), "keras") is None


def test_report_says_who_wins_and_who_is_wrong():
    peers = ["linen", "nnx", "keras"]
    assert report.times([record()], peers).rows == [("a", "forward", "1e+03", "150%", "2.00 ±0.50", "0.50 ±0.00", None)]
    lines = "\n".join(report.summary([record()], peers, {"linen": 3.0, "nnx": 0.0}, 0.1))
    assert "linen: 2.00 times jbn's time" in lines
    assert "faster than jbn at a, forward: nnx (0.50)" in lines
    assert "wrong are linen (3)" in lines
    wrong = record(errors={"nnx": 0.1})
    assert report.times([wrong], ["nnx"]).rows[0][-1].endswith("!")
    assert "nnx" not in "\n".join(report.summary([wrong], peers, {}, 0.1))
    assert json.loads(json.dumps(report.data([record(errors={"nnx": math.inf})]), allow_nan=False))[0]["errors"] == {
        "nnx": None
    }


def test_a_measurement_without_counts_has_no_line():
    counted = counts.Counts(4.0, 5, 50)
    of_both = record(counts={"jbn": counted, "linen": counted._replace(passes=6.0)}, residual_bytes={"jbn": 110})
    assert report.counts([of_both, record(counts={})], ["jbn", "linen"]).rows == [
        ("a", "forward", "jbn", "4.0 / 3", "5", "0.50", "1.10"),
        ("a", "forward", "linen", "6.0 / 3", "5", "0.50", None),
    ]


def test_the_picture_has_those_who_ran():
    figure = picture.draw([record(), record(errors={"nnx": 0.1})], ["linen", "nnx", "keras"], "a machine")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["linen", "nnx"]
    (axes,) = figure.axes
    dots = {container.get_label(): container.lines[0].get_xdata() for container in axes.containers}
    assert {name: list(ratios) for name, ratios in dots.items()} == {"linen": [2.0, 2.0], "nnx": [0.5]}


def test_the_machine_is_described(monkeypatch):
    monkeypatch.setattr(report, "PACKAGES", ("jax", "a-package-that-is-not-here"))
    assert report.machine(None)["versions"] == {"jax": jax.__version__}
    card = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(jax, "devices", lambda: [card])
    assert report.machine(None)["device"] == "NVIDIA H100 80GB HBM3 (gpu)"


@pytest.mark.standard_promotion
def test_command_compares_with_all_that_it_knows(monkeypatch, capsys):
    """And shows jbn's checkpoint policy beside them, where a network was measured."""
    monkeypatch.setattr(cases, "quick_cases", lambda: [Network("resnet50", 1, "float32")])
    monkeypatch.setattr(run, "PEERS", ("jbn", "linen"))
    monkeypatch.setattr(programs, "network_program", lambda *given: programs.copy_program(SMALL))
    assert cli.main(["bench", "--quick", "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    header, row, *_ = (line.split() for line in printed.splitlines() if line.startswith(("case", "resnet50")))
    assert header == ["case", "what", "ms", "memory", "linen", "jbn-remat"]
    assert row[:6] == ["resnet50", "batch", "1", "float32", "training", "step"]
    assert "without PyTorch" in printed
    assert printed.endswith("again: jbn bench --quick --rounds 1\n")


@pytest.mark.standard_promotion
def test_command_writes_what_it_found(tmp_path, capsys):
    arguments = ["bench", "--quick", "--cases", "masked", "--peers", "linen", "--rounds", "1", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "masked sequence 16x256x256 float32" in printed
    assert "again: jbn bench --quick --cases masked --peers linen --rounds 1" in printed
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["versions"]["jax"] == jax.__version__
    assert found["records"][0]["seconds"].keys() == {"jbn", "linen"}
    assert (tmp_path / "bench.txt").read_text() in printed
    assert (tmp_path / "bench.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds is 0"),
        (["--cases", "nothing"], "--cases is 'nothing'"),
        (["--peers", "linen,tensorflow"], "--peers has 'tensorflow'"),
        (["--out", "/dev/null/here"], "--out is /dev/null/here"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["bench", "--quick", *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
