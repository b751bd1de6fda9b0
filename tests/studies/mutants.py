"""Mutation testing of the mathematics: plant one small fault at a time, and check that a test finds it.

    python tests/studies/mutants.py --wing statistics --out mutants.json

Draws mutants of one part of the library with a fixed seed, runs the tests of each mutant in a copy of the repository,
and lists the survivors. A survivor shows a missing test, or has no observable effect. A run takes hours. A run with an
existing --out file continues: it repeats the survivors, except those known to be equivalent, and runs the rest. So
run with --near first, then without: most mutants fail a quick test near them.
"""

import argparse
import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
WINGS = {
    "core": {
        "_core/moments": "core/test_inner_moments core/test_merge core/test_masks core/test_derivatives",
        "_core/standardize": "core/test_inner_for_xla core/test_derivatives core/test_batch_renorm core/test_residuals",
        "_core/batch_norm": "core/test_inference core/test_ghost_batches core/test_masks core/test_batch_norm",
        "_core/batch_renorm": "core/test_renorm_schedules core/test_batch_renorm",
        "_core/state": "core/test_state core/test_batch_norm",
        "_core/sharing": "core/test_inner_sharing core/test_what_is_sent core/test_sharding core/test_tensor_parallel",
        "_core/for_xla": "core/test_inner_for_xla core/test_compiled_programs",
        "_core/checkpoint_policy": "core/test_checkpoint_policy",
        "_arguments": "core/test_bad_input core/test_wrong_kinds core/test_masks",
        "_complex": "core/test_complex core/test_moments",
        "_dtypes": "core/test_bad_input core/test_wrong_kinds core/test_complex",
        "_functions": "core/test_compiled_programs core/test_momentum core/test_batch_norm",
        "_rule": "core/test_bad_input core/test_wrong_kinds core/test_ghost_batches core/test_batch_norm",
        "_scheduled": "core/test_bad_input core/test_momentum core/test_renorm_schedules core/test_state",
        "_statistics/unset": "core/test_state",
        "momentum": "core/test_momentum core/test_bad_input",
        "renorm": "core/test_renorm_schedules core/test_bad_input",
    },
    "statistics": {
        "_statistics/calibrate": "statistics/test_calibrate statistics/test_calibrate_faults",
        "_statistics/faults": "statistics/test_calibrate_faults statistics/test_calibrate",
        "_statistics/merge_states": "statistics/test_merge_states statistics/test_properties_of_statistics",
        "_fold": "interop/test_fold core/test_exactness statistics/test_properties_of_statistics",
        "convert/_names": "interop/test_convert_one_norm interop/test_convert_torch interop/test_convert_trees",
        "convert/_places": "interop/test_convert_trees interop/test_convert_torch interop/test_convert_keras",
        "convert/_trees": "interop/test_convert_trees interop/test_convert_flax",
        "convert/_torch": "interop/test_convert_torch interop/test_convert_one_norm",
        "convert/_keras": "interop/test_convert_keras interop/test_convert_one_norm",
        "convert/_flax": "interop/test_convert_flax interop/test_convert_one_norm",
        "convert/_haiku": "interop/test_convert_haiku interop/test_convert_one_norm",
        "convert/_equinox": "interop/test_convert_equinox interop/test_convert_one_norm",
        "diagnostics/_laws": "statistics/test_laws",
        "diagnostics/_variance": "statistics/test_laws",
        "diagnostics/_compare": "statistics/test_compare statistics/test_health",
        "diagnostics/_health": "statistics/test_health",
        "diagnostics/_table": "statistics/test_compare statistics/test_health",
    },
}
"""The modules to mutate, each with the tests near it, which run first; the other tests of the wing follow."""
FOLDERS = {"core": ["core", "statistics"], "statistics": ["statistics", "interop", "core"]}
EQUIVALENT = {
    "1cc65fe178f3fae6": "changes only how many norms a message lists",
    "1f42298a27b90ddf": "moves a bound on rounding errors; both values keep the promise",
    "3217558c0acdd944": "adding 0 to a term that has the right type changes no value",
    "39907736796d47fe": "16 parts may be sent either way",
    "453aa34e04bf2da8": "only the type of the number is read",
    "549fa8cc7b2cfe09": "an optimization barrier changes no value",
    "5997c25d4296cb4a": "an optimization barrier changes no value",
    "24fccb048157ce76": "the count is a constant of the program in both forms",
    "947002159487831e": "changes only the size of a cache",
    "55cdd8ded00f7c0c": "an unset feature is not corrected, so any variance that gives finite numbers will do",
    "b5b7e555a283b943": "changes the allowed rounding between two runs of a layer; twice the value also works",
    "bd1f7e42f6a9caf6": "masking twice equals masking once, which costs less",
    "c90886d0ab9c5d7f": "JAX clips an index to the axis, whose size is 1",
    "f295494d6c4c702d": "jax.numpy.array copies the memory of NumPy with and without the argument",
}
"""Mutants that change no result except by rounding, by key, with the reason."""
SWAPS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
CALLS = {
    "maximum": "minimum",
    "minimum": "maximum",
    "max": "min",
    "min": "max",
    "sum": "max",
    "ones": "zeros",
    "zeros": "ones",
    "ones_like": "zeros_like",
    "zeros_like": "ones_like",
    "rsqrt": "sqrt",
    "expm1": "exp",
    "all": "any",
    "any": "all",
    "isneginf": "isposinf",
    "rint": "floor",
}
WITHOUT_EFFECT = {"strict", "inline"}
"""Keywords that change no result: a check of lengths, and the form of a program."""
DROPPED = {"stop_gradient", "square", "sqrt", "expand_dims", "astype", "platform_dependent"}


class Mutant(NamedTuple):
    module: str
    line: int
    before: str
    after: str
    source: str


def main() -> None:
    arguments = _arguments()
    drawn = drawn_by(arguments.wing, arguments.seed)[: arguments.mutants : arguments.every]
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    left = [(key, mutant) for key, mutant in drawn if results.get(key) is None and key not in EQUIVALENT]
    print(f"{len(drawn)} mutants, {len(left)} still to run", flush=True)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for (key, mutant), killer in zip(
            left, pool.map(lambda pair: killed_by(pair[1], tests_of(pair[1], arguments)), left), strict=True
        ):
            results[key] = killer
            arguments.out.write_text(json.dumps(results, indent=1))
            print(f"{described(mutant)}  |  {killer or 'SURVIVES'}", flush=True)
    for key, mutant in drawn:
        if key in EQUIVALENT:
            print(f"{described(mutant)}  |  equivalent: {EQUIVALENT[key]}")
    survivors = [mutant for key, mutant in drawn if key not in EQUIVALENT and results[key] is None]
    print(f"{len(survivors)} unexplained survivors", *map(described, survivors), sep="\n")


def drawn_by(wing: str, seed: int) -> list[tuple[str, Mutant]]:
    """All mutants in an order that the seed determines, each with a key that edits of other lines do not change."""
    keyed, seen = [], Counter()
    for module in WINGS[wing]:
        lines = (ROOT / "jbn" / f"{module}.py").read_text().splitlines()
        for mutant in mutants_of(module):
            change = f"{module} {lines[mutant.line - 1].strip()} {mutant.before} {mutant.after}"
            seen[change] += 1
            keyed.append((hashed(f"{change} {seen[change]}"), mutant))
    return sorted(keyed, key=lambda pair: hashed(f"{seed} {pair[0]}"))


def hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def described(mutant: Mutant) -> str:
    return " ".join(f"{mutant.module}:{mutant.line}  {mutant.before}  ->  {mutant.after}".split())


def mutants_of(module: str) -> Iterator[Mutant]:
    """Yield every mutant of a module in the order of its source."""
    source = (ROOT / "jbn" / f"{module}.py").read_text()
    for node in _code(ast.parse(source)):
        before = ast.get_source_segment(source, node)
        for after in _replacements(node):
            if before is not None and after != before:
                yield Mutant(module, node.lineno, before, after, _spliced(source, node, after))


def _code(tree: ast.AST) -> Iterator[ast.expr]:
    """Yield the expressions that determine a result, without annotations, error messages and docstrings."""
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns") or isinstance(tree, ast.Raise):
            continue
        if isinstance(tree, ast.keyword) and tree.arg in WITHOUT_EFFECT:
            continue
        for node in value if isinstance(value, list) else [value]:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue
            if isinstance(node, ast.JoinedStr | ast.Import | ast.ImportFrom) or not isinstance(node, ast.AST):
                continue
            if isinstance(node, ast.expr) and not isinstance(node, ast.Starred | ast.Slice):
                yield node
            yield from _code(node)


def _replacements(node: ast.expr) -> Iterator[str]:
    copy = deepcopy(node)
    if isinstance(copy, ast.BinOp | ast.BoolOp) and type(copy.op) in SWAPS:
        copy.op = SWAPS[type(copy.op)]()
        yield f"({ast.unparse(copy)})"
    elif isinstance(copy, ast.Compare) and type(copy.ops[0]) in SWAPS:
        copy.ops[0] = SWAPS[type(copy.ops[0])]()
        yield f"({ast.unparse(copy)})"
    elif isinstance(copy, ast.UnaryOp) and isinstance(copy.op, ast.Not | ast.USub | ast.Invert):
        yield ast.unparse(copy.operand)
    elif isinstance(copy, ast.IfExp):
        yield f"({ast.unparse(copy.body)})"
        yield f"({ast.unparse(copy.orelse)})"
    elif isinstance(copy, ast.Constant):
        yield from _other_constants(copy.value)
    elif isinstance(copy, ast.Call):
        yield from _other_calls(copy)


def _other_constants(value: object) -> Iterator[str]:
    if isinstance(value, bool):
        yield repr(not value)
    elif isinstance(value, int | float):
        yield repr(value + 1)
        if value > 1:
            yield repr(value - 1)


def _other_calls(call: ast.Call) -> Iterator[str]:
    """Replace the function by another one, swap the two values of `where`, or replace the call by its argument."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in CALLS and isinstance(call.func, ast.Attribute):
        yield ast.unparse(ast.Call(ast.Attribute(call.func.value, CALLS[name]), call.args, call.keywords))
    if name == "where" and len(call.args) == 3:
        condition, chosen, other = call.args
        yield ast.unparse(ast.Call(call.func, [condition, other, chosen], call.keywords))
    if name in DROPPED and isinstance(call.func, ast.Attribute):
        yield ast.unparse(call.func.value if name == "astype" else call.args[0])


def _spliced(source: str, node: ast.expr, replacement: str) -> str:
    lines = source.encode().splitlines(keepends=True)
    assert node.end_lineno is not None and node.end_col_offset is not None
    start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
    encoded = source.encode()
    return (encoded[:start] + replacement.encode() + encoded[end:]).decode()


def killed_by(mutant: Mutant, tests: list[str]) -> str | None:
    """The first of these tests that fails with this mutant, or None."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("jbn", "tests", "pyproject.toml", "README.md", "CHANGELOG.md"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, Path(folder) / name)
        (Path(folder) / "jbn" / f"{mutant.module}.py").write_text(mutant.source)
        command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
        environment = os.environ | {"PYTHONPATH": folder, "JAX_COMPILATION_CACHE_DIR": str(CACHE), **CACHE_EVERYTHING}
        run = subprocess.Popen([*command, *tests], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            output, _ = run.communicate(timeout=3600)
        except subprocess.TimeoutExpired:
            run.kill()
            return "an endless loop"
        failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return None if run.returncode == 0 else (failed or ["the tests cannot be collected"])[0][:200]


def tests_of(mutant: Mutant, arguments: argparse.Namespace) -> list[str]:
    """What to give pytest: quick tests near the mutant, or all tests of the wing, with the near ones first."""
    near = [f"tests/{name}.py" for name in WINGS[arguments.wing][mutant.module].split()]
    if arguments.near:
        return ["-m", "not slow", *near]
    folders = [ROOT / "tests" / folder for folder in FOLDERS[arguments.wing]]
    others = [str(path.relative_to(ROOT)) for folder in folders for path in sorted(folder.glob("test_*.py"))]
    return list(dict.fromkeys([*near, *others]))


CACHE = Path(tempfile.gettempdir()) / "jbn-mutants-cache"
CACHE_EVERYTHING = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
"""Mutants share most compiled programs, so a cache compiles these only once."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wing", choices=WINGS, default="core", help="part of the library to mutate (default: core)")
    parser.add_argument("--near", action="store_true", help="run only quick tests near each mutant")
    parser.add_argument("--every", type=int, default=1, help="run every n-th of the drawn mutants (default: 1)")
    parser.add_argument("--mutants", type=int, default=150, help="number of mutants to draw (default: 150)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (default: 0)")
    parser.add_argument("--jobs", type=int, default=1, help="number of mutants to run in parallel (default: 1)")
    parser.add_argument(
        "--out", type=Path, default=Path("mutants.json"), help="file of the results (default: mutants.json)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
