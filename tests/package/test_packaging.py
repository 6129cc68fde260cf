"""The package as it is installed: wheel, sdist, and what an import brings with it."""

from __future__ import annotations

import json
import os
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


FROM_THE_ROOT = """
import sys
assert "" in sys.path or ROOT in sys.path
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer
from transformers.utils import import_utils

import nmsolve.kernels.exact

sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
config = LlamaConfig(**sizes)
assert AutoModelForCausalLM.from_config(config)(torch.arange(4)[None]).logits.shape == (1, 4, 8)
assert not import_utils.is_kernels_available() or hasattr(sys.modules["kernels"], "get_kernel")
print(nmsolve.kernels.exact.__file__)
"""


@pytest.mark.parametrize("how", ["-c", "-m"])
def test_transformers_works_in_the_root(how, tmp_path):
    """It looks for PyPI's package ``kernels``, and finds the folder of that name."""
    pytest.importorskip("transformers")
    pytest.importorskip("triton")
    code = f"ROOT = {str(ROOT)!r}\n{FROM_THE_ROOT}"
    (tmp_path / "from_the_root.py").write_text(code)
    command = [sys.executable, how, code if how == "-c" else "from_the_root"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[-1]).parts[-2:] == ("kernels", "exact.py")


@pytest.mark.parametrize("installed", [False, True])
def test_who_asks_for_kernels_in_the_root(installed, tmp_path):
    """Gets PyPI's package where it is installed, else something without any use."""
    if installed:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("from kernels.layer import get_kernel")
        (tmp_path / "kernels" / "layer.py").write_text("get_kernel = print")
    code = f"""
import json, sys
sys.path[:] = [{str(ROOT)!r}, {str(tmp_path)!r}, *(p for p in sys.path if "site-packages" not in p)]
import kernels
print(json.dumps([kernels.__file__, getattr(kernels, "__version__", None), hasattr(kernels, "get_kernel")]))
"""
    file, version, usable = python(code, tmp_path)
    assert Path(file) == (tmp_path if installed else ROOT) / "kernels" / "__init__.py"
    assert (version, usable) == ((None, True) if installed else ("0", False))


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
import json, torch, nmsolve, nmsolve.backends.triton.launch_table
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


USES_TORCH = """
import json, torch, nmsolve
from nmsolve.backends.dispatch import backend_reasons
nmsolve.check_mask(nmsolve.transposable_mask(torch.rand(16, 16), 2, 4), 2, 4)
nmsolve.sinkhorn(torch.rand(1, 4, 4)), nmsolve.assignment(torch.rand(1, 4, 4))
nmsolve.hierarchical_mask(torch.rand(16, 16), nmsolve.VNMPattern(4, 2, 8))
print(json.dumps(backend_reasons("cpu")["cpu"]))
"""


def test_works_with_a_numba_that_does_not(tmp_path):
    """One that NumPy is too new for says so when it is imported; one can be told to compile nothing."""
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text("raise ImportError('Numba needs an older NumPy')")
    prepare = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    assert python(prepare + USES_TORCH, tmp_path) == "numba cannot be imported: Numba needs an older NumPy"
    told = python("import os; os.environ['NUMBA_DISABLE_JIT'] = '1'" + USES_TORCH, tmp_path)
    assert "NUMBA_DISABLE_JIT" in told


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
