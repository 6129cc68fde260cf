"""Who may import whom, read from the sources: imports inside functions count too."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nmsolve.backends.dispatch import BACKENDS

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"nmsolve": ROOT / "nmsolve", "nmsolve.kernels": ROOT / "kernels"}


def sources() -> dict[str, Path]:
    """Dotted module name -> file, for everything that is installed."""
    found = {}
    for package, folder in PACKAGES.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = file
    return found


MODULES = sources()

# Folder (or module of the core) -> the folders that it may import, beside itself. The order is that of the
# layers: nothing imports what stands below it here.
CORE = ("about", "errors", "pattern", "blocks", "solution", "files", "unfinished", "ranks")
LAYERS: dict[str, set[str]] = {
    "kernels": set(),
    "about": set(),
    "errors": set(),
    "pattern": {"errors"},
    "blocks": {"errors", "pattern"},
    "solution": {"errors", "pattern", "blocks"},
    "files": {"errors"},
    "unfinished": {"errors", "files"},
    "ranks": {"errors"},
    "backends": {"kernels", *CORE},
    "ops": {"backends", *CORE},
    "timing": {"ops", "backends", *CORE},
    "checkpoint": {"ops", "backends", *CORE},
    "prune": {"checkpoint", "ops", "backends", *CORE},
    "train": {"prune", "checkpoint", "ops", "backends", *CORE},
    "permute": {"prune", "checkpoint", "ops", "backends", *CORE},
    "integrations": {"permute", "train", "prune", "checkpoint", "ops", "backends", *CORE},
    "cli": {"timing", "permute", "prune", "checkpoint", "ops", "backends", *CORE},
    "__main__": {"cli"},
}

# Packages that only these folders import, wherever the import stands.
ONLY = {
    "triton": {"kernels", "backends.triton"},
    "numba": {"backends.cpu"},
    "llvmlite": {"backends.cpu"},
}

# Foreign packages that a folder may import at all; whoever is not listed may import what nmsolve requires.
FOREIGN = {
    "kernels": {"triton"},
    "about": set(),
    "errors": set(),
    "pattern": set(),
    "blocks": {"torch"},
    "solution": {"torch"},
    "files": set(),
    "unfinished": set(),
    "ranks": {"torch"},
}


def room(module: str) -> str:
    """The folder of nmsolve, or the module of the core, that ``module`` lies in; empty for nmsolve itself."""
    return module.removeprefix("nmsolve").removeprefix(".").partition(".")[0]


def imports(module: str, *, top_level_only: bool = False) -> Iterator[str]:
    """The dotted names that ``module`` imports; ``from a import b`` gives ``a.b`` where that is a module.

    Imports for the type checker alone (under ``if TYPE_CHECKING``) are left out of the top-level ones.
    """
    return imported_by(MODULES[module], top_level_only=top_level_only)


def imported_by(file: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """The same of any file."""
    todo: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            assert node.module is not None
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module
        elif top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        elif top_level_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            todo.extend(node.orelse)
            continue
        todo.extend(ast.iter_child_nodes(node))


def foreign(module: str) -> set[str]:
    """The top-level packages outside the standard library and nmsolve that ``module`` imports."""
    tops = {name.partition(".")[0] for name in imports(module)}
    return {
        top for top in tops if top not in sys.stdlib_module_names and top not in ("nmsolve", "__future__")
    }


def own(module: str) -> set[str]:
    """The nmsolve modules that ``module`` imports."""
    return {name for name in imports(module) if name == "nmsolve" or name.startswith("nmsolve.")}


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_the_reader_sees_every_way_to_import(tmp_path, monkeypatch):
    file = tmp_path / "module.py"
    file.write_text(
        "import torch.nn\nfrom nmsolve.ops import masks\nif TYPE_CHECKING:\n    import jax\n"
        "def f():\n    from triton import language\n    class C:\n        import numba\n"
    )
    monkeypatch.setitem(MODULES, "nmsolve.module", file)
    assert set(imports("nmsolve.module")) == {"torch.nn", "nmsolve.ops.masks", "jax", "triton", "numba"}
    assert set(imports("nmsolve.module", top_level_only=True)) == {"torch.nn", "nmsolve.ops.masks"}
    assert foreign("nmsolve.module") == {"torch", "jax", "triton", "numba"}


def test_every_module_lies_in_a_room():
    assert {room(module) for module in MODULES} == {"", *LAYERS}
    loose = {path.stem for path in (ROOT / "nmsolve").glob("*.py")}
    assert loose == {"__init__", "__main__", *CORE}


def test_the_layers_are_in_order():
    seen: set[str] = set()
    for folder, below in LAYERS.items():
        assert below <= seen, folder
        seen.add(folder)


@pytest.mark.parametrize("folder", LAYERS)
def test_a_folder_imports_only_what_lies_below(folder):
    for module in [name for name in MODULES if room(name) == folder]:
        for name in own(module):
            # The public face is for those above everything that it shows.
            allowed = {folder, *LAYERS[folder], *({""} if "ops" in LAYERS[folder] else ())}
            assert room(name) in allowed, f"{module} imports {name}"


@pytest.mark.parametrize("package", ONLY)
def test_these_packages_are_imported_only_by_their_folders(package):
    homes = [f"nmsolve.{home}" for home in ONLY[package]]
    for module in MODULES:
        if package in foreign(module):
            assert any(inside(module, home) for home in homes), module


@pytest.mark.parametrize("folder", FOREIGN)
def test_foreign_packages_of_the_lowest_rooms(folder):
    for module in [name for name in MODULES if room(name) == folder]:
        assert foreign(module) <= FOREIGN[folder], module


def test_only_the_triton_backend_imports_the_kernels():
    users = {module for module in MODULES if any(inside(name, "nmsolve.kernels") for name in own(module))}
    for module in users:
        assert inside(module, "nmsolve.kernels") or inside(module, "nmsolve.backends.triton"), module


def test_a_backend_imports_no_sibling():
    siblings = {name.split(".")[2] for name in MODULES if name.count(".") > 2 and room(name) == "backends"}
    assert siblings == set(BACKENDS)
    for module in [name for name in MODULES if room(name) == "backends" and name.count(".") > 2]:
        home = module.split(".")[2]
        for name in own(module):
            if room(name) == "backends" and name.count(".") > 1:
                assert name.split(".")[2] not in siblings - {home}, f"{module} imports {name}"


def test_nobody_above_the_operators_imports_a_backend():
    """What every layer may know of backends is the table, and the devices; and timing the launch table."""
    known = {"nmsolve.backends.dispatch", "nmsolve.backends.devices"}
    for module in [name for name in MODULES if LAYERS.get(room(name), set()) >= {"backends"}]:
        found = {name for name in own(module) if room(name) == "backends"}
        tuning = room(module) in ("timing", "cli")
        assert found <= known | ({"nmsolve.backends.triton.launch_table"} if tuning else set()), module


def test_nothing_installed_imports_tests_or_bench():
    outside = {path.stem for folder in ("tests", "bench") for path in (ROOT / folder).rglob("*.py")}
    for module in MODULES:
        assert not foreign(module) & (outside | {"tests", "bench", "kernels"}), module


def test_bench_does_not_import_tests():
    helpers = {path.stem for path in (ROOT / "tests").rglob("*.py")}
    own_files = {path.stem for path in (ROOT / "bench").rglob("*.py")}
    for file in (ROOT / "bench").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert "tests" not in [name.partition(".")[0] for name in imported_by(file)], file
        assert not {name.partition(".")[0] for name in imported_by(file)} & (helpers - own_files), file
        assert 'ROOT / "tests"' not in text, file


def test_no_cycles():
    graph = {
        module: {name for name in imports(module, top_level_only=True) if name in MODULES and name != module}
        for module in MODULES
    }
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for name in sorted(graph[module]):
                visit(name, [*path, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
