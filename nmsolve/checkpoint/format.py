"""What a safetensors checkpoint holds, from its headers: one file, or a folder of shards with an index.

A safetensors file is ``length`` (8 bytes, little-endian), a JSON header of ``length`` bytes, then the
tensors' bytes without holes. The header gives every tensor's dtype, shape and place, so a file can be written
from front to back without any tensor but the current one in memory, which the safetensors library's own
``save_file`` does not offer (:mod:`nmsolve.checkpoint.streams`). Format:
https://huggingface.co/docs/safetensors.

Nothing here imports torch, and nothing ever unpickles.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmsolve.checkpoint.parts import check_whole, is_part
from nmsolve.checkpoint.streams import COPY_BYTES, StreamWriter
from nmsolve.errors import NMSolveError
from nmsolve.files import is_regular, read_json

__all__ = [
    "Checkpoint",
    "Entry",
    "Shard",
    "encode_header",
    "open_checkpoint",
    "output_names",
    "read_shard",
]

SUFFIX = ".safetensors"
INDEX_SUFFIX = f"{SUFFIX}.index.json"
INDEX_NAME = f"model{INDEX_SUFFIX}"

# What ``nmsolve mask`` and ``nmsolve prune`` write beside the weights.
REPORT_NAME = "nmsolve_report.json"
PICTURE_NAME = "nmsolve_report.png"
MASKS_SUFFIX = ".masks.safetensors"
MASKS_FOLDER = "masks"

# What ``nmsolve permute`` writes: beside a file's weights, or in a folder where loaders do not look for any.
ORDERS_SUFFIX = ".permutations.safetensors"
ORDERS_FOLDER = "permutations"
ORDERS_NAME = f"orders{SUFFIX}"

# Formats that hold weights in another form. Pickles can run code when read and are never opened; a dense copy
# of the model in any of them would be a trap beside masked weights, so it is not copied either.
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
OTHER_FORMATS = frozenset({".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".ot", ".tflite"})

# What pickles of a whole model are called; others (voices, speakers, states of training) are none of it.
_WHOLE_MODELS = ("pytorch_model", "model", "consolidated", "diffusion_pytorch_model", "adapter_model")

_HEADER_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file; ``start`` and ``stop`` are byte positions in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.stop - self.start


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its header as it stands on disk and its tensors in the order of their bytes."""

    path: Path
    header: bytes
    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(entry.nbytes for entry in self.entries)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to be read.

    Attributes
    ----------
    root : Path
        The file, or the folder.
    shards : tuple of Shard
        The weights. A file has one shard.
    extras : tuple of Path
        Files of a folder to be copied as they are, relative to ``root``: configuration, tokenizer, index, the
        modules that sentence-transformers keeps beside the model. No report and no masks of nmsolve.
    left_out : tuple of Path
        Files of a folder that hold the weights in another form, relative to ``root``: they would stay dense.
    """

    root: Path
    shards: tuple[Shard, ...]
    extras: tuple[Path, ...] = ()
    left_out: tuple[Path, ...] = ()

    @property
    def is_folder(self) -> bool:
        return self.root.is_dir()

    def entries(self) -> Iterator[tuple[Shard, Entry]]:
        """Every tensor with its shard, in the order in which they are written."""
        for shard in self.shards:
            for entry in shard.entries:
                yield shard, entry

    def copy_extras(self, folder: Path, step: Callable[[str], None] | None = None) -> None:
        """Copies the extras into ``folder``, but those that are there; ``step`` gets the name of each.

        Modes follow the umask; what can be run stays so.
        """
        for path in self.extras:
            source, target = self.root / path, folder / path
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                stat = source.stat()
                mode = 0o666 | (stat.st_mode & 0o111)
                with source.open("rb") as reader, StreamWriter(target, b"", stat.st_size, mode) as writer:
                    while piece := reader.read(COPY_BYTES):
                        writer.write(piece)
            if step is not None:
                step(path.as_posix())


def read_shard(path: Path) -> Shard:
    """The header of a safetensors file, checked by the safetensors library before it is believed.

    Raises
    ------
    NMSolveError
        If the file cannot be read or is not safetensors, or holds parts of tensors.
    """
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise NMSolveError(
            f"{path}: expected a {SUFFIX} file, got a pickle, which can run code when it is opened; "
            "save the weights as safetensors first"
        )
    if suffix in OTHER_FORMATS:
        raise NMSolveError(
            f"{path}: expected a {SUFFIX} file, got {suffix}; start from the safetensors weights that it was "
            "made from"
        )
    if not is_regular(path):
        raise NMSolveError(f"{path}: expected a {SUFFIX} file, got {_instead(path)}")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            prefix = file.read(_HEADER_LENGTH.size)
            text = file.read(_HEADER_LENGTH.unpack(prefix)[0])
    except SafetensorError as error:
        raise NMSolveError(
            f"{path}: expected a {SUFFIX} file, got one that does not parse: {error}"
        ) from None
    except OSError as error:
        raise NMSolveError(f"{path}: cannot be read: {error.strerror or error}") from None
    fields: dict[str, Any] = json.loads(text)
    metadata = fields.pop("__metadata__", None) or {}
    check_whole(path, metadata)
    base = len(prefix) + len(text)
    entries = [
        Entry(name, field["dtype"], tuple(field["shape"]), *(base + x for x in field["data_offsets"]))
        for name, field in fields.items()
    ]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    return Shard(path, prefix + text, tuple(entries), metadata)


def _instead(path: Path) -> str:
    """What there is where no regular file is."""
    if not os.path.lexists(path):
        return "none: there is no such file"
    return "a folder" if os.path.isdir(path) else "no regular file"


def open_checkpoint(root: Path) -> Checkpoint:
    """Reads every header below ``root``, a .safetensors file or a Hugging Face checkpoint folder.

    Raises
    ------
    NMSolveError
        If there is no such file, a shard is missing or damaged, or the folder has no safetensors weights, or
        such as cannot be masked: quantised ones, those of an adapter, or of several models.
    """
    if not os.path.exists(root):  # False for a name that is too long, too
        raise NMSolveError(
            f"{root}: no such file or folder; models are read from this machine only, so one of the Hugging "
            "Face Hub has to be downloaded first: hf download NAME --local-dir FOLDER"
        )
    if not root.is_dir():
        checkpoint = Checkpoint(root, (read_shard(root),))
        _check_kind(checkpoint)
        return checkpoint
    names, index_path, index = _shard_names(root)
    shards = tuple(read_shard(root / name) for name in names)
    if index is not None:
        _check_index(index_path, index, shards)
    _check_unique(shards)
    extras: list[Path] = []
    left_out: list[Path] = []
    parts = _parts(root)
    for path in _files_below(root):
        if path.as_posix() in names or _is_ours(path):
            continue
        _check_out_of_the_way(root, path)
        (left_out if _is_other_copy(path, parts) else extras).append(path)
    checkpoint = Checkpoint(root, shards, tuple(extras), tuple(left_out))
    _check_kind(checkpoint)
    return checkpoint


def _is_ours(path: Path) -> bool:
    """Whether an earlier run of nmsolve left it, about the weights as they were then."""
    if path.parent == Path():
        return path.name in (REPORT_NAME, PICTURE_NAME)
    return path.parent == Path(MASKS_FOLDER) and path.name.endswith(MASKS_SUFFIX)


def _check_out_of_the_way(root: Path, path: Path) -> None:
    """Raises if a file of the input lies where an output has a folder, or the other way round."""
    for folder in (MASKS_FOLDER, ORDERS_FOLDER):
        if path == Path(folder):
            raise NMSolveError(f"{root}: the file {path} is in the way: {folder} get a folder of this name")
    for parent in path.parents:
        in_folder = parent.parent == Path(MASKS_FOLDER) and parent.name.endswith(MASKS_SUFFIX)
        if in_folder or parent in (Path(REPORT_NAME), Path(PICTURE_NAME), Path(ORDERS_FOLDER, ORDERS_NAME)):
            raise NMSolveError(f"{root}: the folder {parent} is in the way: a file gets this name")


def _parts(root: Path) -> set[Path]:
    """Folders of modules that follow the model: sentence-transformers' modules.json lists them."""
    try:
        listed = read_json(root / "modules.json")
        return {Path(module["path"]) for module in listed if module["path"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _is_other_copy(path: Path, parts: set[Path]) -> bool:
    """Whether a file holds the weights of the model in another form."""
    if not parts.isdisjoint(path.parents):
        return False
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        return path.name.startswith(_WHOLE_MODELS)
    return suffix == SUFFIX or suffix in OTHER_FORMATS


def _shard_names(root: Path) -> tuple[list[str], Path, dict[str, str] | None]:
    """The weight files of a folder, and the index with its map from tensor to file if there is one."""
    present = sorted(path.name for path in root.glob(f"*{SUFFIX}"))
    indexes = sorted(root.glob(f"*{INDEX_SUFFIX}"))
    index_path = root / INDEX_NAME
    if index_path not in indexes and len(indexes) == 1 and "model.safetensors" not in present:
        index_path = indexes[0]
    if index_path in indexes:
        try:
            weight_map = read_json(index_path)["weight_map"]
            names = sorted(set(weight_map.values()))
        except (OSError, ValueError) as error:
            problem = getattr(error, "strerror", None) or error
            raise NMSolveError(f"{index_path}: expected JSON with a 'weight_map': {problem}") from None
        except (KeyError, TypeError, AttributeError):
            raise NMSolveError(
                f"{index_path}: expected JSON with a 'weight_map' from tensors to names of {SUFFIX} files"
            ) from None
        for name in names:
            if not isinstance(name, str) or name != Path(name).name or not name.endswith(SUFFIX):
                raise NMSolveError(
                    f"{index_path}: expected names of {SUFFIX} files in this folder, got {name!r}"
                )
        if not names:
            raise NMSolveError(f"{index_path}: expected at least one tensor, got an empty 'weight_map'")
        if "model.safetensors" in present and "model.safetensors" not in names:
            raise NMSolveError(
                f"{root}: expected one model, got model.safetensors and another in the files of "
                f"{index_path.name}; give a folder with one of them"
            )
        return names, index_path, weight_map
    if "model.safetensors" in present:
        return ["model.safetensors"], index_path, None
    if len(present) == 1:
        return present, index_path, None
    if present:
        if is_part(present[0]):  # its own message says more
            read_shard(root / present[0])
        raise NMSolveError(
            f"{root}: expected {INDEX_NAME}, model.safetensors or a single {SUFFIX} file, "
            f"got {len(present)} files without an index ({', '.join(present[:3])}, ...); give one of "
            "them, or a folder with one model"
        )
    if (root / "model_index.json").is_file():
        inside = sorted(path.parent.name for path in root.glob(f"*/*{SUFFIX}"))
        raise NMSolveError(
            f"{root}: expected one model, got a pipeline of several; give the folder of one of them"
            + (f": {', '.join(dict.fromkeys(inside))}" if inside else "")
        )
    for path in sorted(root.iterdir()):
        if path.suffix.lower() in PICKLES:
            raise NMSolveError(
                f"{root}: expected {SUFFIX} weights, got only pickles ({path.name}), which can run code "
                "when they are opened; save the model as safetensors first"
            )
        if path.suffix.lower() in OTHER_FORMATS:
            raise NMSolveError(
                f"{root}: expected {SUFFIX} weights, got only {path.name}; start from the safetensors "
                "weights that it was made from"
            )
    raise NMSolveError(f"{root}: expected {SUFFIX} weights, found none in this folder")


# --- weights that cannot be masked --------------------------------------------------------------------------

# Ends of the names of tensors that only quantised checkpoints have: GPTQ, AWQ, bitsandbytes, fp8, torchao.
_QUANTISED = (
    ".qweight",
    ".qzeros",
    ".SCB",
    ".quant_map",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_packed",
)
_ADAPTERS = (".lora_A.", ".lora_B.", ".lora_embedding_A", ".lora_embedding_B", ".lora_magnitude_vector")


def _check_kind(checkpoint: Checkpoint) -> None:
    """Raises if the weights are quantised, or an adapter's: a mask of either prunes nothing."""
    method = _quantisation(checkpoint.root)
    for _, entry in checkpoint.entries():
        if any(part in entry.name for part in _ADAPTERS):
            raise NMSolveError(
                f"{checkpoint.root}: expected the weights of a model, got those of an adapter "
                f"({entry.name}); merge it first: in peft, model.merge_and_unload().save_pretrained(...)"
            )
        if method is None and (
            entry.name.endswith(_QUANTISED)
            or (entry.name.endswith(".weight") and entry.dtype.startswith("F8_") and len(entry.shape) > 1)
        ):
            method = entry.name
    if method is not None:
        raise NMSolveError(
            f"{checkpoint.root}: the weights are quantised ({method}); start from the checkpoint before "
            "quantisation, and quantise what comes out"
        )


def _quantisation(root: Path) -> str | None:
    """The method that a folder's config.json names, if it is quantised."""
    try:
        config = read_json(root / "config.json")
        found = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config")
        return str(found.get("quant_method", "quantization_config")) if found else None
    except (OSError, ValueError, AttributeError):
        return None


def _check_index(path: Path, weight_map: Mapping[str, str], shards: Iterable[Shard]) -> None:
    held = {(entry.name, shard.path.name) for shard in shards for entry in shard.entries}
    for name, file in weight_map.items():
        if (name, file) not in held:
            raise NMSolveError(f"{path}: expected tensor {name!r} in {file}, but that file does not hold it")


def _check_unique(shards: Iterable[Shard]) -> None:
    seen: dict[str, str] = {}
    for shard in shards:
        for entry in shard.entries:
            if entry.name in seen:
                raise NMSolveError(f"{shard.path}: tensor {entry.name!r} is also in {seen[entry.name]}")
            seen[entry.name] = shard.path.name


def _files_below(root: Path) -> Iterator[Path]:
    """Regular files (links followed) below ``root`` in sorted order, hidden ones left aside."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path.relative_to(root)


def output_names(out: Path) -> tuple[str, str, str]:
    """Names of the report, the masks and the weights for a single-file output, the weights last."""
    stem = out.name.removesuffix(SUFFIX)
    return f"{stem}.report.json", f"{stem}{MASKS_SUFFIX}", out.name


def encode_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The first bytes of a safetensors file whose tensors follow in the order given.

    Parameters
    ----------
    tensors : iterable of (name, dtype, shape, nbytes)
        dtype in safetensors' spelling: ``"F32"``, ``"BF16"``, ``"U8"``.
    metadata : mapping of str to str, optional

    Returns
    -------
    bytes
        Length, JSON header, and spaces up to a multiple of 8 bytes.
    """
    fields: dict[str, object] = {}
    if metadata:
        fields["__metadata__"] = dict(metadata)
    start = 0
    for name, dtype, shape, nbytes in tensors:
        if name in fields or name == "__metadata__":
            raise NMSolveError(f"tensor name: expected each name once and none '__metadata__', got {name!r}")
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + nbytes]}
        start += nbytes
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _HEADER_LENGTH.pack(len(text)) + text
