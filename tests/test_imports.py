"""Who may import whom, read from the sources: imports inside functions count too."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
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

LAUNCHERS = {"nmsolve.gpu", "nmsolve.gpu_permute"}
NUMBA = {"nmsolve._cpu", "nmsolve.cpu", "nmsolve.cpu_permute"}
REFERENCES = {"nmsolve.reference", "nmsolve.reference_permute"}


def imports(module: str, *, top_level_only: bool = False) -> Iterator[str]:
    """The dotted names that ``module`` imports; ``from a import b`` gives ``a.b`` where that is a module.

    Imports for the type checker alone (under ``if TYPE_CHECKING``) are left out of the top-level ones.
    """
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import"
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
        "import torch.nn\nfrom nmsolve import masks\nif TYPE_CHECKING:\n    import jax\n"
        "def f():\n    from triton import language\n    class C:\n        import numba\n"
    )
    monkeypatch.setitem(MODULES, "nmsolve.module", file)
    monkeypatch.setitem(MODULES, "nmsolve.masks", file)
    assert set(imports("nmsolve.module")) == {"torch.nn", "nmsolve.masks", "jax", "triton", "numba"}
    assert set(imports("nmsolve.module", top_level_only=True)) == {"torch.nn", "nmsolve.masks"}
    assert foreign("nmsolve.module") == {"torch", "jax", "triton", "numba"}


def test_kernels_import_only_triton():
    kernels = [module for module in MODULES if inside(module, "nmsolve.kernels")]
    assert kernels
    for module in kernels:
        assert foreign(module) <= {"triton"}, module
        assert all(inside(name, "nmsolve.kernels") for name in own(module)), module


# Module -> (foreign packages, nmsolve modules) that it may import.
LEAVES = {
    "nmsolve.errors": (set(), set()),
    "nmsolve.schedule": (set(), set()),
    "nmsolve.pattern": (set(), {"nmsolve.errors"}),
    "nmsolve.blocks": ({"torch"}, {"nmsolve.errors", "nmsolve.pattern"}),
    "nmsolve.solution": ({"torch"}, {"nmsolve.errors", "nmsolve.pattern", "nmsolve.blocks"}),
    "nmsolve.reference": (
        {"torch"},
        {"nmsolve.schedule", "nmsolve.pattern", "nmsolve.blocks", "nmsolve.solution"},
    ),
    "nmsolve._cpu": ({"numba", "numpy", "llvmlite"}, {"nmsolve.schedule"}),
    "nmsolve.cpu": (
        {"torch", "numba", "numpy", "llvmlite"},
        {"nmsolve._cpu", "nmsolve.schedule", "nmsolve.pattern", "nmsolve.blocks", "nmsolve.solution"},
    ),
}


@pytest.mark.parametrize("module", sorted(LEAVES))
def test_leaves_import_no_more_than_they_may(module):
    packages, modules = LEAVES[module]
    for part in [name for name in MODULES if inside(name, module)]:
        assert foreign(part) <= packages
        for name in own(part):
            assert any(inside(name, allowed) for allowed in (module, *modules)), f"{part} imports {name}"


@pytest.mark.parametrize(
    ("package", "users"),
    [
        ("nmsolve.kernels", LAUNCHERS),
        ("nmsolve.cli", set()),
        ("nmsolve.integrations", set()),
    ],
)
def test_only_these_import(package, users):
    found = {module for module in MODULES if any(inside(name, package) for name in own(module))}
    assert {module for module in found if not inside(module, package)} == users & set(MODULES)


def test_nothing_installed_imports_tests_or_bench():
    outside = {path.stem for folder in ("tests", "bench") for path in (ROOT / folder).rglob("*.py")}
    for module in MODULES:
        assert not foreign(module) & (outside | {"tests", "bench", "kernels"}), module


@pytest.mark.parametrize(
    ("package", "backends"),
    [("triton", {"nmsolve.kernels", *LAUNCHERS}), ("numba", NUMBA)],
)
def test_optional_packages_are_imported_only_by_their_backend(package, backends):
    for module in MODULES:
        at_import = {name.partition(".")[0] for name in imports(module, top_level_only=True)}
        assert package not in at_import or any(inside(module, backend) for backend in backends), module


@pytest.mark.parametrize("layer", ["nmsolve.permute", "nmsolve.prune"])
def test_layers_use_the_public_functions_and_no_backend(layer):
    for module in [name for name in MODULES if inside(name, layer)]:
        for name in own(module):
            assert not any(inside(name, backend) for backend in LAUNCHERS | NUMBA | REFERENCES), (
                f"{module}: {name}"
            )


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
