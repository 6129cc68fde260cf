"""Commands given files that are wrong: one at a time, each from a seed, and what has to hold whatever it is.

One case alone, or many, with what is found::

    python tests/support/fuzzed_files.py KIND SEED
    python tests/support/fuzzed_files.py --all 5000
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import io
import json
import os
import resource
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import tiny_models
import torch
from checkpoints import llama, save_sharded
from mutations import NAMES, change_bytes, change_json, change_kind, change_safetensors, change_text
from safetensors import safe_open
from safetensors.torch import save_file

from nmsolve.cli import main
from nmsolve.cli.command import Command, run

__all__ = ["KINDS", "Bases", "check", "make_bases", "plan"]

MEMORY = 2 << 30  # that a case may take, above what the process has
SECONDS = 300  # after which it hangs: no case takes one

Work = Sequence[str] | Callable[[], object]


@dataclass
class Place:
    """Where a case happens: ``tree`` has its inputs in ``in``, and gets its output as ``out``."""

    tree: Path
    bases: Bases
    random: Random
    may_change: list[str] = field(default_factory=list)

    def take(self, base: str, name: str = "in") -> Path:
        """A copy of a right input."""
        source, target = self.bases.folder / base, self.tree / name
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)
        return target


@dataclass(frozen=True)
class Bases:
    """The right inputs, made once."""

    folder: Path


def make_bases(folder: Path) -> Bases:
    """Every input that the cases make wrong, as the commands themselves write it where they do."""
    from nmsolve.backends.triton import launch_table
    from nmsolve.permute import save_permutations

    folder.mkdir(exist_ok=True)
    small = llama(torch.float32, hidden=16, inner=32)
    save_file(small, folder / "file.safetensors", metadata={"format": "pt"})
    save_sharded(folder / "folder", small)
    model = tiny_models.make("llama")
    model.save_pretrained(folder / "model")
    _tokenizer(folder / "model")
    save_file({"tokens": tiny_models.tokens(4, 16).flatten()}, folder / "tokens.safetensors")
    (folder / "text.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8 " * 12, encoding="utf-8")
    quiet = ["--backend", "torch", "--quiet"]
    model_in = str(folder / "model")
    assert main(["mask", model_in, "--pattern", "4:8", "--out", str(folder / "masked"), *quiet]) == 0
    shutil.copy(folder / "masked/masks/model.masks.safetensors", folder / "masks.safetensors")
    orders = {"model.layers.0.mlp.down_proj": torch.randperm(tiny_models.INNER)}
    save_permutations(folder / "orders.safetensors", orders)
    launch_table.save(folder / "launch.json", {("exact", 16): (16, 8, 4, 4, 1)}, {"device": "none"})
    _unfinished(folder)
    return Bases(folder)


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{k}": k for k in range(tiny_models.VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0").save_pretrained(folder)


WANDA = ("--pattern", "4:8", "--method", "wanda", "--samples", "2", "--sequence-length", "16", "--no-picture")


def _prune(tree: Path) -> list[str]:
    given = ["prune", f"{tree}/in", "--out", f"{tree}/out", "--calibration", f"{tree}/tokens.safetensors"]
    return [*given, *WANDA, "--backend", "torch", "--quiet"]


def _unfinished(folder: Path) -> None:
    """What a run that was stopped leaves beside its output, for the same inputs at other places."""
    from nmsolve.prune import on_disk

    class StoppedRun:
        left = 12

        def check(self) -> None:
            StoppedRun.left -= 1
            if StoppedRun.left == 0:
                raise KeyboardInterrupt

    place = folder / "stopped"
    place.mkdir()
    shutil.copytree(folder / "model", place / "in")
    shutil.copy(folder / "tokens.safetensors", place)
    with contextlib.suppress(KeyboardInterrupt):
        on_disk.prune_checkpoint(
            place / "in", place / "out", "4:8", method="wanda", calibration=place / "tokens.safetensors",
            samples=2, sequence_length=16, picture=False, backend="torch", progress=False,
            interrupts=StoppedRun(),
        )  # fmt: skip
    shutil.copytree(place / ".out.unfinished", folder / "unfinished")
    assert len(list((folder / "unfinished/layers").iterdir())) >= 2
    shutil.rmtree(place)


# --- the kinds ----------------------------------------------------------------------------------------------


def _file(place: Place) -> Work:
    """A safetensors file, to mask or to permute."""
    path = place.take("file.safetensors", "in.safetensors")
    _change_file(place.random, path)
    return _mask_or_permute(place, path, "out.safetensors")


_NONE_ANY_MORE = (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error)


def _change_file(random: Random, path: Path) -> None:
    if random.random() < 0.06:
        change_kind(random, path)
        return
    data = path.read_bytes()
    for _ in range(random.choice((1, 1, 1, 2))):
        with contextlib.suppress(*_NONE_ANY_MORE):
            data = change_safetensors(random, data)
    path.write_bytes(data)


def _change_json_file(random: Random, path: Path) -> None:
    if random.random() < 0.08:
        change_kind(random, path)
        return
    data = path.read_bytes()
    if random.random() < 0.75:
        value = change_json(random, json.loads(data), random.choice((1, 1, 2, 4)))
        data = json.dumps(value, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")
    else:
        data = change_text(random, data)
    path.write_bytes(data)


def _mask_or_permute(place: Place, source: Path, out: str) -> list[str]:
    random = place.random
    command = random.choice(("mask", "mask", "permute"))
    given = [command, str(source), "--pattern", random.choice(("2:4", "4:8")), "--out", f"{place.tree}/{out}"]
    given += ["--transposable"] if random.random() < 0.4 else []
    given += ["--dry-run"] if random.random() < 0.1 else []
    if command == "mask":
        given += ["--backend", "torch"]
        given += ["--include", "*"] if random.random() < 0.2 else []
    else:
        given += ["--passes", "1"]
    return given


def _index(place: Place) -> Work:
    """A folder whose index, or one of whose files, is wrong."""
    random, folder = place.random, place.take("folder")
    index = folder / "model.safetensors.index.json"
    weight_map: dict[str, Any] = json.loads(index.read_bytes())["weight_map"]
    files, names = sorted(set(weight_map.values())), list(weight_map)
    name, file = random.choice(names), random.choice(files)
    match random.randrange(13):
        case 0 | 1 | 2 | 3:
            _change_json_file(random, index)
        case 4:
            wrong = (*NAMES, "../outside.safetensors", f"{place.tree}/outside.safetensors", "./" + file)
            place.take("file.safetensors", "outside.safetensors")
            weight_map[name] = random.choice(wrong)
            index.write_text(json.dumps({"weight_map": weight_map}))
        case 5:
            weight_map[name] = random.choice([other for other in files if other != weight_map[name]])
            index.write_text(json.dumps({"weight_map": weight_map}))
        case 6:
            weight_map |= {random.choice(NAMES) or "a": file, name: file}
            index.write_text(json.dumps({"weight_map": weight_map}))
        case 7:
            (folder / file).unlink()
        case 8:
            change_kind(random, folder / file)
        case 9:
            shutil.copy(folder / files[0], folder / random.choice(("extra.safetensors", files[1])))
        case 10:
            renamed = random.choice(("unet", "diffusion_pytorch_model", "a.b", "masks", "x" * 200))
            index.rename(folder / f"{renamed}.safetensors.index.json")
        case 11:
            _change_file(random, folder / file)
        case 12:
            _add_strange_files(place, folder)
    return _mask_or_permute(place, folder, "out")


def _add_strange_files(place: Place, folder: Path) -> None:
    """Files beside the weights, where an output has its own, or where a copy follows a link out."""
    random = place.random
    (place.tree / "secret").mkdir()
    (place.tree / "secret" / "words.txt").write_text("words")
    strange: tuple[Callable[[], object], ...] = (
        lambda: (folder / "masks").write_text("a file"),
        lambda: (folder / "masks").symlink_to("../secret"),
        lambda: (folder / "masks" / "model.masks.safetensors").mkdir(parents=True),
        lambda: (folder / "nmsolve_report.json").mkdir(),
        lambda: (folder / "permutations").write_text("a file"),
        lambda: (folder / "permutations" / "orders.safetensors").mkdir(parents=True),
        lambda: (folder / "loop").symlink_to("."),
        lambda: (folder / "loop").symlink_to("loop"),
        lambda: (folder / "out").symlink_to("../secret"),
        lambda: (folder / "words.txt").symlink_to("../secret/words.txt"),
        lambda: os.mkfifo(folder / "fifo"),
        lambda: (folder / "zero").symlink_to("/dev/zero"),
        lambda: (folder / "null.json").symlink_to("/dev/null"),
        lambda: (folder / "modules.json").write_bytes(change_text(random, b'[{"path": "../secret"}]')),
        lambda: (folder / "a\nnmsolve: error: forged\x1b[2K.txt").write_text("x"),
        lambda: (folder / "a\nforged\x1b[2K.bin").write_text("x"),
        lambda: Path(os.fsdecode(os.fsencode(folder) + b"/not\xffutf8.txt")).write_text("x"),
        lambda: (folder / "masks" / "stale.masks.safetensors.txt").parent.mkdir(),
        lambda: (folder / "sub" / "model.safetensors").parent.mkdir(),
    )  # fmt: skip
    for make in random.sample(strange, random.choice((1, 1, 2, 3))):
        with contextlib.suppress(OSError):  # two that do not go together
            make()


def _config(place: Place) -> Work:
    """A checkpoint whose config.json is wrong."""
    random, folder = place.random, place.take("model")
    _change_json_file(random, folder / random.choice(("config.json",) * 4 + ("generation_config.json",)))
    if random.random() < 0.4:
        return _mask_or_permute(place, folder, "out")
    return _magnitude_or_perplexity(place, folder)


def _magnitude_or_perplexity(place: Place, folder: Path) -> list[str]:
    if place.random.random() < 0.6:
        given = [
            "prune",
            str(folder),
            "--pattern",
            "2:4",
            "--method",
            "magnitude",
            "--out",
            f"{place.tree}/out",
        ]
        given += ["--dtype", "bfloat16"] if place.random.random() < 0.3 else []
        return [*given, "--backend", "torch", "--no-picture", "--quiet"]
    place.take("tokens.safetensors", "tokens.safetensors")
    tokens = str(place.tree / "tokens.safetensors")
    return ["eval-ppl", str(folder), "--text", tokens, "--window", "16", "--quiet"]


def _weights(place: Place) -> Work:
    """A model whose weights are wrong, for what loads them into modules."""
    folder = place.take("model")
    _change_file(place.random, folder / "model.safetensors")
    return _magnitude_or_perplexity(place, folder)


def _resume(place: Place) -> Work:
    """Finished layers of a run that was stopped."""
    random = place.random
    place.take("model")
    place.take("tokens.safetensors", "tokens.safetensors")
    unfinished = place.take("unfinished", ".out.unfinished")
    place.may_change.append(".out.unfinished")
    layers = sorted((unfinished / "layers").iterdir())
    layer = random.choice(layers)
    match random.randrange(8):
        case 0 | 1 | 2:
            _change_file(random, layer)
        case 3:
            _change_json_file(random, unfinished / "run.json")
        case 4:
            header, body = _header(layer)
            report = change_json(random, json.loads(header["__metadata__"]["report"]), random.choice((1, 2)))
            header["__metadata__"]["report"] = json.dumps(report)
            if random.random() < 0.2:
                header["__metadata__"]["report"] = change_text(random, b'{"a":1,"b":2}').decode("latin-1")
            _write(layer, header, body)
        case 5:
            shutil.copy(random.choice(layers), layer.with_name(random.choice(layers).name + "x"))
            shutil.copy(layers[0], layers[1]) if random.random() < 0.7 else None
        case 6:
            shutil.rmtree(unfinished / "layers")
            change = random.choice(
                (lambda p: p.write_text("x"), lambda p: p.symlink_to("nowhere"), Path.mkdir)
            )
            change(unfinished / "layers")
        case 7:
            shutil.rmtree(unfinished)
            made: tuple[Callable[[], object], ...] = (
                lambda: unfinished.write_text("x"),
                lambda: unfinished.symlink_to("in"),
                lambda: unfinished.symlink_to("nowhere"),
                lambda: (unfinished.mkdir(), (unfinished / "notes.txt").write_text("mine")),
                lambda: os.mkfifo(unfinished),
            )
            random.choice(made)()
    return _prune(place.tree)


def _header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _write(path: Path, header: object, body: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def _masks(place: Place) -> Work:
    """Earlier masks, for ``prune`` to keep to or for Python to apply."""
    random = place.random
    path = place.take("masks.safetensors", "masks.safetensors")
    match random.randrange(4):
        case 0 | 1:
            _change_file(random, path)
        case _:
            header, body = _header(path)
            metadata = header["__metadata__"]
            if random.random() < 0.7:
                shapes = change_json(random, json.loads(metadata["shapes"]), random.choice((1, 1, 3)))
                metadata["shapes"] = json.dumps(shapes)
            else:
                key = random.choice(list(metadata))
                metadata[key] = str(random.choice((*NAMES, "2", "{}", "[]", "null", "NaN", "[" * 2000)))
                if random.random() < 0.3:
                    del metadata[key]
            text = json.dumps(header).encode("utf-8", "surrogatepass")
            path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    if random.random() < 0.5:
        place.take("model")
        given = ["prune", f"{place.tree}/in", "--pattern", "2:4", "--method", "magnitude", "--no-picture"]
        given += ["--out", f"{place.tree}/out", "--initial-masks", str(path)]
        return [*given, "--backend", "torch", "--quiet"]

    def apply() -> None:
        from nmsolve import load_masks
        from nmsolve.prune import FixedMasks

        model = tiny_models.make("llama")
        FixedMasks(model, load_masks(path))

    return apply


def _tokens(place: Place) -> Work:
    """What a model is calibrated on or evaluated with: tokens, text, the tokenizer."""
    random, folder = place.random, place.take("model")
    if random.random() < 0.4:
        file = place.take("tokens.safetensors", "tokens.safetensors")
        _change_file(random, file)
    else:
        file = place.take("text.txt", "text.txt")
        if random.random() < 0.3:
            file.write_bytes(change_bytes(random, file.read_bytes()))
        else:
            names = ("tokenizer.json",) * 3 + ("tokenizer_config.json",)
            _change_json_file(random, folder / random.choice(names))
    if random.random() < 0.5:
        return ["eval-ppl", str(folder), "--text", str(file), "--window", "16", "--quiet"]
    given = ["prune", str(folder), "--out", f"{place.tree}/out", "--calibration", str(file), *WANDA]
    return [*given, "--backend", "torch", "--quiet"]


def _orders(place: Place) -> Work:
    """Orders of channels that are loaded and applied."""
    path = place.take("orders.safetensors", "orders.safetensors")
    _change_file(place.random, path)

    def apply() -> None:
        from nmsolve.permute import apply_permutations, load_permutations

        apply_permutations(tiny_models.make("llama"), load_permutations(path))

    return apply


def _launch(place: Place) -> Work:
    """A launch table that the environment asks for."""
    from nmsolve.backends.triton import launch_table

    path = place.take("launch.json", "launch.json")
    _change_json_file(place.random, path)
    return lambda: launch_table.load(path)


KINDS: dict[str, tuple[float, Callable[[Place], Work]]] = {
    "file": (0.27, _file),
    "index": (0.19, _index),
    "config": (0.13, _config),
    "weights": (0.06, _weights),
    "resume": (0.09, _resume),
    "masks": (0.1, _masks),
    "tokens": (0.08, _tokens),
    "orders": (0.04, _orders),
    "launch": (0.04, _launch),
}
"""Share of the cases, and what makes the input wrong and says what is done with it."""


def plan(count: int, first: int = 0) -> list[tuple[str, int]]:
    """``count`` cases, a kind and a seed each."""
    return [
        (kind, first + seed)
        for kind, (share, _) in KINDS.items()
        for seed in range(max(2, round(share * count)))
    ]


# --- what has to hold ---------------------------------------------------------------------------------------


def check(kind: str, seed: int, bases: Bases, tree: Path, *, apart: bool = False) -> tuple[int, str]:
    """Runs a case in the empty folder ``tree`` and returns its exit code and what it said on stderr.

    Raises
    ------
    AssertionError
        If something does not hold; the message says how to run the case alone.
    """
    place = Place(tree, bases, Random(f"{kind} {seed}"))
    work = KINDS[kind][1](place)
    before = _contents(tree)
    written, out, err, code, trouble = _apart(work, tree) if apart else _here(work)
    after = _contents(tree)
    try:
        assert not trouble, trouble
        assert code in (0, 1, 2), f"exit code {code}"
        _check_said(code, out, err)
        for path, what in before.items():
            if not _is_ours(path, place):
                assert after.get(path) == what, f"the input {path!r} changed"
        new = [path for path in after if path not in before]
        for path in new:
            allowed = _is_ours(path, place) or _is_said_to_be_finished(path, err)
            assert path.partition("/")[0].startswith("out") or allowed, f"{path!r} was written"
            assert code == 0 or allowed, f"{path!r} was left"
        for path in written:
            assert path.startswith((f"{tree}/out", f"{tree}/.out")), f"{path!r} was opened to be written"
        if code == 0:
            _check_written(tree, new)
    except AssertionError as error:
        done = " ".join(map(str, work)) if isinstance(work, list | tuple) else work.__qualname__
        raise AssertionError(
            f"{error}\n{done}\nexit code {code}, said:\n{out[-1500:]}{err[-3000:]}\n"
            f"alone: python tests/support/fuzzed_files.py {kind} {seed}"
        ) from None
    return code, err


def _is_ours(path: str, place: Place) -> bool:
    return path.partition("/")[0] in place.may_change


def _is_said_to_be_finished(path: str, err: str) -> bool:
    """Whether a run that ended in the middle says that the same command goes on from this path's folder."""
    folder = path.partition("/")[0]
    return folder.startswith(".out.unfinished") and f"/{folder}: the same command goes on" in err


def _check_said(code: int, out: str, err: str) -> None:
    lines = err.splitlines()
    assert all(line.isprintable() for line in [*out.splitlines(), *lines]), "control characters"
    errors = [line for line in lines if line.startswith("nmsolve: error: ")]
    others = [line for line in lines if line not in errors and not line.startswith("nmsolve: warning: ")]
    assert len(errors) == (code != 0), "not one line of error"
    assert not others, "lines of others"
    assert not errors or lines[-1] == errors[0], "the error is not the last line"
    assert not errors or len(errors[0]) < 3000, "a line without end"
    internal = ("Error: ", "Exception: ", "Traceback")
    assert not errors or not any(
        errors[0].startswith("nmsolve: error: " + name + word)
        for name in ("", "Runtime", "Value", "Type", "Key", "Attribute", "Index", "Recursion", "Assertion",
                     "Overflow", "ZeroDivision", "Memory", "Safetensor", "Unicode", "UnicodeDecode",
                     "UnicodeEncode", "UnboundLocal", "StopIteration", "JSONDecode", "Struct", "OS")
        for word in internal
    ), "an error of the program, not of the input"  # fmt: skip


def _check_written(tree: Path, new: list[str]) -> None:
    """The weights that came out can be read, and have the names of those that went in."""
    for path in new:
        if path.endswith(".safetensors"):
            with safe_open(tree / path, framework="pt") as file:
                names = set(file.keys())
            source = tree / ("in" + path.removeprefix("out"))
            if source.is_file():
                with safe_open(source, framework="pt") as file:
                    assert names == set(file.keys())


def _contents(tree: Path) -> dict[str, tuple[object, ...]]:
    """Every path below a folder with what is there, links not followed."""
    found: dict[str, tuple[object, ...]] = {}
    for folder, folders, files in os.walk(tree):
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            mode = os.lstat(path).st_mode
            if stat.S_ISREG(mode):
                what: object = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            else:
                what = os.readlink(path) if stat.S_ISLNK(mode) else None
            found[os.path.relpath(path, tree)] = mode, what
    return found


def _here(work: Work) -> tuple[list[str], str, str, int, str]:
    """Runs a case in this process, with limits: paths opened to be written, stdout, stderr, exit code."""
    out, err = io.StringIO(), io.StringIO()
    trouble, code = "", -1
    torch.manual_seed(0)
    with (
        _limits(),
        _watched() as written,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("default")
        try:
            code = main(list(work)) if isinstance(work, list | tuple) else _as_command(work)
        except SystemExit as exited:
            code = int(exited.code or 0)
        except BaseException:
            trouble = traceback.format_exc()
    return written, out.getvalue(), err.getvalue(), code, trouble


def _as_command(work: Any) -> int:
    """What a call of the library is on the command line."""
    command = Command("x", "", "", "", lambda parser: None, lambda args: work() and None)
    from nmsolve.cli.command import Parser

    parser = Parser()
    parser.add_argument("--traceback", action="store_true")
    return run(command, parser, parser.parse_args([]))


def _apart(work: Work, tree: Path) -> tuple[list[str], str, str, int, str]:
    """Runs a command as users do, from another folder."""
    assert isinstance(work, list | tuple)
    done = subprocess.run(
        [sys.executable, "-m", "nmsolve.cli", *work],
        cwd=tree, capture_output=True, text=True, timeout=SECONDS, errors="backslashreplace",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY * 8, MEMORY * 8)),
    )  # fmt: skip
    return [], done.stdout, done.stderr, done.returncode, ""


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Memory and time are bounded; what hangs, ends the process and says where."""

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        faulthandler.cancel_dump_traceback_later()


_WATCHING: list[list[str]] = []
_HARMLESS = ("/dev/null", "/proc/", "/dev/shm/")


@contextlib.contextmanager
def _watched() -> Iterator[list[str]]:
    """Paths that this process opens to be written, makes, moves or removes meanwhile."""
    if not _WATCHING:
        sys.addaudithook(_audit)
    paths: list[str] = []
    _WATCHING.append(paths)
    try:
        yield paths
    finally:
        _WATCHING[:] = [[]]


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        path, _, flags = arguments
        if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        found = [path]
    elif event in ("os.rename", "os.link", "os.symlink"):
        found = [arguments[0], arguments[1]] if event == "os.rename" else [arguments[1]]
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree"):
        found = [arguments[0]]
    else:
        return
    for path in found:
        if isinstance(path, int) or (event in ("os.remove", "os.rmdir") and arguments[1] != -1):
            continue  # below a folder that is open: rmtree, which was told of
        name = os.path.abspath(os.fsdecode(path))
        if not name.startswith(_HARMLESS) and "__pycache__" not in name:
            _WATCHING[-1].append(name)


# --- the command line ---------------------------------------------------------------------------------------


def _main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", nargs="?", choices=KINDS)
    parser.add_argument("seed", nargs="?", type=int)
    parser.add_argument("--all", type=int, metavar="COUNT", help="so many cases of all kinds, or of KIND")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--verbose", action="store_true", help="what each said")
    parser.add_argument("--apart", action="store_true", help="each in a process of its own")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = [(args.kind, args.seed)]
    if args.all:
        cases = plan(args.all, args.first)
        if args.kind:
            cases = [(args.kind, args.first + seed) for seed in range(args.all)]
    failed = 0
    codes: dict[tuple[str, int], int] = {}
    with tempfile.TemporaryDirectory() as temporary:
        bases = make_bases(Path(temporary) / "bases")
        for kind, seed in cases:
            tree = Path(temporary) / "tree"
            tree.mkdir()
            try:
                code, said = check(kind, seed, bases, tree, apart=args.apart)
                if args.verbose:
                    print(f"{kind} {seed}: {code} {said.rstrip()}", flush=True)
                codes[kind, code] = codes.get((kind, code), 0) + 1
            except AssertionError as error:
                failed += 1
                print(f"--- {kind} {seed}: {error}", flush=True)
            shutil.rmtree(tree)
    print(f"{len(cases)} cases, {failed} failed; exit codes: {codes}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(_main())
