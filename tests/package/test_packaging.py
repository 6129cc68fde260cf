"""The package as it is installed: wheel, sdist, and what an import brings with it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def python(code: str, cwd: Path, executable: Path | str = sys.executable) -> dict:
    """What ``code`` prints as JSON, run where neither the working folder nor PYTHONPATH is seen."""
    return json.loads(run(executable, "-I", "-c", code, cwd=cwd).splitlines()[-1])


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """The sdist, the wheel made from it, and the wheel made from the source tree."""
    folder = tmp_path_factory.mktemp("build")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("nmsolve", "kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--outdir", folder / "from-sdist", tree, cwd=folder)
    run(*build, "--wheel", "--outdir", folder / "from-tree", tree, cwd=folder)
    (sdist,) = folder.glob("from-sdist/*.tar.gz")
    (wheel,) = folder.glob("from-sdist/*.whl")
    (direct,) = folder.glob("from-tree/*.whl")
    return {"sdist": sdist, "wheel": wheel, "direct": direct}


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The Python of a new environment that holds the wheel, and sees this one's other packages."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    executable = folder / "env" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", executable, "install", "--no-deps", "--no-index")
    run(*pip, built["wheel"], cwd=folder)
    # A folder that a .pth file names is searched, but its own .pth files are not run: an editable nmsolve
    # stays out of sight.
    site = Path(python("import json, site; print(json.dumps(site.getsitepackages()))", folder, executable)[0])
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("\n".join(sorted(paths)))
    return executable


def test_sdist_and_tree_build_the_same_wheel(built):
    from_sdist, from_tree = contents(built["wheel"]), contents(built["direct"])
    assert from_sdist.keys() == from_tree.keys()
    records = {name for name in from_tree if name.endswith("/RECORD")}
    assert {name for name in from_tree if from_sdist[name] != from_tree[name]} <= records


def test_wheel_holds_the_package_and_nothing_else(built):
    names = {name for name in contents(built["wheel"]) if ".dist-info/" not in name}
    sources = {f"nmsolve/{p.relative_to(ROOT / 'nmsolve')}" for p in (ROOT / "nmsolve").rglob("*.py")}
    kernels = {f"nmsolve/kernels/{p.relative_to(ROOT / 'kernels')}" for p in (ROOT / "kernels").rglob("*.py")}
    assert names == sources | kernels | {"nmsolve/py.typed"}


def test_sdist_is_complete(built):
    with tarfile.open(built["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "kernels/__init__.py", "nmsolve/py.typed"} <= names


def test_the_installed_wheel_solves_a_mask(installed, tmp_path):
    found = python(
        """
import json, importlib.metadata, importlib.util, torch
import nmsolve, nmsolve.kernels
scores = torch.randn(40, 24, generator=torch.Generator().manual_seed(0)).abs()
solution = nmsolve.transposable_mask(scores, 4, 8, return_solution=True)
nmsolve.check_mask(solution.mask, 4, 8)
print(json.dumps({
    "files": [nmsolve.__file__, nmsolve.kernels.__file__],
    "gap": solution.max_gap,
    "kept": int(solution.mask.sum()),
    "top-level kernels": importlib.util.find_spec("kernels") is not None,
    "versions": [nmsolve.__version__, importlib.metadata.version("nmsolve")],
}))
""",
        tmp_path,
        installed,
    )
    environment = installed.parents[1]
    assert all(Path(file).is_relative_to(environment) for file in found["files"]), found
    assert found["kept"] == 40 * 24 // 2
    assert found["gap"] <= 1e-6
    assert not found["top-level kernels"]
    assert len(set(found["versions"])) == 1


def test_the_command_is_installed(installed, tmp_path):
    assert "usage" in run(installed.parent / "nmsolve", "--help", cwd=tmp_path).lower()


def test_kernels_refuse_another_name(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import kernels"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "nmsolve.kernels" in done.stderr


WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""


def test_works_with_neither_triton_nor_numba(tmp_path):
    found = python(
        "HIDDEN = ('triton', 'numba')\n"
        + WITHOUT
        + """
import json, torch, nmsolve
mask = nmsolve.transposable_mask(torch.rand(16, 16), 2, 4)
nmsolve.check_mask(mask, 2, 4)
said = {}
for backend in ("triton", "cpu"):
    try:
        nmsolve.transposable_mask(torch.rand(4, 4), 2, 4, backend=backend)
    except nmsolve.BackendError as error:
        said[backend] = str(error)
print(json.dumps(said | {"loaded": [name for name in HIDDEN if name in sys.modules]}))
""",
        tmp_path,
    )
    assert "triton" in found["triton"]
    assert "numba" in found["cpu"]
    assert not found["loaded"]


def test_import_brings_nothing_beyond_torch(tmp_path):
    found = python(
        """
import json, sys, time, torch
before, start = set(sys.modules), time.perf_counter()
from nmsolve import *
seconds = time.perf_counter() - start
tops = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps({"seconds": seconds, "new": sorted(tops - sys.stdlib_module_names)}))
""",
        tmp_path,
    )
    assert set(found["new"]) <= {"nmsolve", "torch"} | {
        n for n in found["new"] if n.startswith("__editable__")
    }
    assert found["seconds"] < 1
