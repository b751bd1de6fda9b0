"""The imports between the modules of jbn, the modules that `import jbn` loads, and no printing in the library."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter

from support.sources import LIBRARY, ON_TOP, SOURCES, TREES

import jbn

GROUND = {"_arguments", "_complex", "_dtypes", "_functions", "_rule", "_scheduled", "momentum", "renorm"}
CORE = {"_core"}
WINGS = {
    *("_flax", "linen", "nnx"),
    *("_statistics", "diagnostics", "plot"),
    *("_fold", "checkpoint", "convert"),
}
BETWEEN_WINGS = {
    ("linen", "_flax"),
    ("nnx", "_flax"),
    *((wing, "_statistics") for wing in ("diagnostics", "plot", "checkpoint", "convert")),
    ("plot", "diagnostics"),
}
"""Wings import the ground and the core, and no other wings except in these pairs."""
LAYERS = ("ground", "core", "wing", "public names", "top")


def room_of(module):
    """The file or folder in jbn/ that contains a module; "" for jbn itself."""
    return module.removeprefix("jbn").removeprefix(".").partition(".")[0]


def layer_of(module):
    room = room_of(module)
    if not room:
        return "public names"
    if room in ON_TOP:
        return "top"
    if room in GROUND:
        return "ground"
    return "core" if room in CORE else "wing"


def imports_of(module):
    """The modules of jbn that a module imports, anywhere in its code."""
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            names = [one.name for one in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}:{node.lineno} imports by a relative name"
            names = [f"{node.module}.{one.name}" for one in node.names]
        else:
            continue
        found |= {name if name in SOURCES else name.rpartition(".")[0] for name in names}
    return found & SOURCES.keys()


IMPORTS = {module: imports_of(module) for module in SOURCES}


def run(script):
    """The words that a new interpreter prints, with no devices configured."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    return result.stdout.split()


def test_imports_point_one_way():
    """Top, public names, wings, core, ground: each imports only lower layers, and a wing imports no other wing."""
    offenders = []
    for importer, imported in IMPORTS.items():
        for module in imported:
            upper, lower = (LAYERS.index(layer_of(one)) for one in (importer, module))
            rooms = room_of(importer), room_of(module)
            between = LAYERS[upper] == "wing" and upper == lower and rooms[0] != rooms[1] and rooms not in BETWEEN_WINGS
            if lower > upper or between:
                offenders.append(f"{importer} ({LAYERS[upper]}) imports {module} ({LAYERS[lower]})")
    assert not offenders, "\n".join(sorted(offenders))


def test_no_module_imports_itself_by_way_of_others():
    TopologicalSorter(IMPORTS).prepare()  # raises an error that shows the cycle


def test_every_room_of_the_house_has_a_layer():
    assert {room_of(module) for module in SOURCES} == GROUND | CORE | WINGS | ON_TOP | {""}


def test_importing_a_part_of_the_core_imports_no_other_parts():
    assert SOURCES["jbn._core"].read_text() == ""


def test_the_library_prints_and_logs_nothing():
    offenders = []
    for module in LIBRARY:
        for node in ast.walk(TREES[module]):
            match node:
                case ast.Call(func=ast.Name(id="print") | ast.Attribute(attr="print" | "write")):
                    offenders.append(f"{module}:{node.lineno} prints")
                case ast.alias(name="logging") | ast.ImportFrom(module="logging"):
                    offenders.append(f"{module}: logs")
    assert not offenders, "\n".join(offenders)


def test_import_loads_jax_and_jbn_and_nothing_else():
    """Modules that are loaded in addition to jax add to the import time."""
    loaded = run("import sys, jax, jax.numpy; print(*sys.modules, '|'); import jbn; print(*sys.modules)")
    before, after = {*loaded[: loaded.index("|")]}, {*loaded[loaded.index("|") + 1 :]}
    added = after - before
    of_others = [name for name in added if name.split(".")[0] not in {"jbn", *sys.stdlib_module_names}]
    assert of_others == ["jax.ad_checkpoint"]
    assert {f"jbn.{name}" for name in jbn._WHEN_TOUCHED}.isdisjoint(added)
    heavy = {"flax", "optax", "chex", "matplotlib", "orbax", "scipy.optimize"}
    assert heavy.isdisjoint(after)


def test_import_leaves_the_devices_to_be_set_up():
    assert run("import jbn, jax; jax.config.update('jax_num_cpu_devices', 3); print(jax.device_count())") == ["3"]
