"""Reading safetensors files and checkpoint folders, and writing them as streams."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from checkpoints import METADATA, llama, save_sharded
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nmsolve import NMSolveError
from nmsolve.checkpoint import mask_checkpoint
from nmsolve.checkpoint.format import encode_header, open_checkpoint, read_shard
from nmsolve.checkpoint.streams import StreamWriter, read_into
from nmsolve.errors import WorkFailed


@pytest.fixture
def file(tmp_path: Path) -> Path:
    state = llama() | {
        "f32": torch.randn(3, 4),
        "f16": torch.randn(5).half(),
        "f8": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False, True]),
        "count": torch.tensor(7),
        "none": torch.empty(0, 4),
    }
    save_file(state, tmp_path / "model.safetensors", metadata=METADATA)
    return tmp_path / "model.safetensors"


def test_the_header_says_what_the_library_says(file):
    shard = read_shard(file)
    assert shard.metadata == METADATA
    assert shard.nbytes == file.stat().st_size
    with safe_open(file, framework="pt") as reader:
        assert {entry.name for entry in shard.entries} == set(reader.keys())
        for entry in shard.entries:
            assert list(entry.shape) == reader.get_slice(entry.name).get_shape()
            assert entry.dtype == reader.get_slice(entry.name).get_dtype()
    starts = [entry.start for entry in shard.entries]
    assert starts == sorted(starts)
    assert starts[0] == len(shard.header)


def test_a_copied_stream_is_the_same_file(file, tmp_path):
    shard = read_shard(file)
    data = sum(entry.nbytes for entry in shard.entries)
    with file.open("rb") as source, StreamWriter(tmp_path / "copy", shard.header, data) as out:
        for entry in shard.entries:
            assert sum(out.copy(source, entry)) == entry.nbytes
    assert (tmp_path / "copy").read_bytes() == file.read_bytes()


def test_a_new_stream_is_read_by_the_library(tmp_path):
    tensors = {"a": torch.randn(3, 5), 'ü\n"': torch.arange(7, dtype=torch.uint8), "empty": torch.empty(0)}
    dtypes = {torch.float32: "F32", torch.uint8: "U8"}
    header = encode_header(
        [
            (name, dtypes[t.dtype], tuple(t.shape), t.numel() * t.element_size())
            for name, t in tensors.items()
        ],
        METADATA,
    )
    assert len(header) % 8 == 0
    with StreamWriter(tmp_path / "new.safetensors", header, 67) as out:
        for tensor in tensors.values():
            out.write(tensor.view(torch.uint8).numpy().data)
    loaded = load_file(tmp_path / "new.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert read_shard(tmp_path / "new.safetensors").metadata == METADATA


def test_a_name_cannot_come_twice():
    with pytest.raises(NMSolveError, match="each name once"):
        encode_header([("a", "U8", (1,), 1), ("a", "U8", (1,), 1)])
    with pytest.raises(NMSolveError, match="each name once"):
        encode_header([("__metadata__", "U8", (1,), 1)])


@pytest.mark.parametrize("count", [9, 11])
def test_a_stream_that_is_not_complete_is_an_error(tmp_path, count):
    with (
        pytest.raises(WorkFailed, match=f"x: {8 + count} bytes came where 18 were expected: the input"),
        StreamWriter(tmp_path / "x", b"12345678", 10) as out,
    ):
        out.write(b"x" * count)


def test_short_writes_and_reads_are_continued(tmp_path, monkeypatch):
    class Slow:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data[:3])

        def readinto(self, data):
            return self.file.readinto(data[:3])

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

    with StreamWriter(tmp_path / "x", b"", 10) as out:
        out._file = Slow(out._file)
        out.write(b"0123456789")
    assert (tmp_path / "x").read_bytes() == b"0123456789"
    buffer = bytearray(8)
    with (tmp_path / "x").open("rb") as source:
        read_into(Slow(source), 2, memoryview(buffer))
        assert buffer == b"23456789"
        with pytest.raises(OSError, match="ended 6 bytes early"):
            read_into(source, 8, memoryview(buffer))


def test_it_never_writes_over_a_file(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(FileExistsError):
        StreamWriter(tmp_path / "x", b"", 0)
    assert (tmp_path / "x").read_text() == "mine"


def damaged(kind: str, whole: bytes) -> bytes:
    length = struct.unpack("<Q", whole[:8])[0]
    return {
        "empty": b"",
        "short": whole[:100],
        "cut": whole[:-1],
        "longer": whole + b"\0",
        "text": b"hello world, this is not a safetensors file",
        "json": whole[:8] + b"[" + whole[9:],
        "huge header": struct.pack("<Q", 2**62) + whole[8:],
        "overlap": whole[:8]
        + whole[8 : 8 + length].replace(b'"data_offsets":[0,', b'"data_offsets":[8,')
        + whole[8 + length :],
    }[kind]


@pytest.mark.parametrize(
    "kind", ["empty", "short", "cut", "longer", "text", "json", "huge header", "overlap"]
)
def test_a_damaged_file_is_refused(file, kind):
    file.write_bytes(damaged(kind, file.read_bytes()))
    with pytest.raises(NMSolveError, match=r"model\.safetensors: expected a \.safetensors file"):
        read_shard(file)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.PTH", "renamed.safetensors"])
def test_pickles_are_never_opened(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(NMSolveError, match=r"expected a \.safetensors file") as caught:
        open_checkpoint(tmp_path / name)
    if name != "renamed.safetensors":
        assert "pickle" in str(caught.value)
        with pytest.raises(NMSolveError, match=r"expected \.safetensors weights, got only pickles"):
            open_checkpoint(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_a_sharded_folder(tmp_path):
    state = llama()
    weight_map = save_sharded(tmp_path / "m", state, 3)
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"dense")
    (tmp_path / "m" / "consolidated.safetensors").write_bytes(b"dense")
    (tmp_path / "m" / ".cache").mkdir()
    (tmp_path / "m" / ".cache" / "x").write_text("x")
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.is_folder
    assert {entry.name: shard.path.name for shard, entry in checkpoint.entries()} == weight_map
    assert [str(path) for path in checkpoint.extras] == [
        "config.json",
        "model.safetensors.index.json",
        "tokenizer/vocab.txt",
    ]
    assert [str(path) for path in checkpoint.left_out] == ["consolidated.safetensors", "pytorch_model.bin"]


def test_a_folder_of_links(tmp_path):
    """The cache of the Hugging Face hub holds links into a folder of blobs."""
    save_sharded(tmp_path / "blobs", llama())
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        if path.is_file():
            (tmp_path / "snapshot" / path.name).symlink_to(os.path.relpath(path, tmp_path / "snapshot"))
    checkpoint = open_checkpoint(tmp_path / "snapshot")
    assert len(checkpoint.shards) == 2
    assert [str(path) for path in checkpoint.extras] == ["config.json", "model.safetensors.index.json"]


@pytest.mark.parametrize("others", [[], ["adapter_model.safetensors"]])
def test_a_folder_with_one_file(tmp_path, others):
    for name in ["model.safetensors", *others]:
        save_file({"w": torch.ones(4, 4)}, tmp_path / name)
    assert [shard.path.name for shard in open_checkpoint(tmp_path).shards] == ["model.safetensors"]


def test_folders_that_are_no_checkpoint(tmp_path):
    with pytest.raises(NMSolveError, match="no such file or folder"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(NMSolveError, match=r"expected \.safetensors weights, found none"):
        open_checkpoint(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"w": torch.ones(4, 4)}, tmp_path / name)
    with pytest.raises(NMSolveError, match="got 2 files without an index"):
        open_checkpoint(tmp_path)


INDEXES = {
    "not JSON": ("{", "expected JSON with a 'weight_map'"),
    "no map": ("{}", "expected JSON with a 'weight_map'"),
    "a list": ("[]", "expected JSON with a 'weight_map'"),
    "empty": ('{"weight_map": {}}', "got an empty 'weight_map'"),
    "outside": ('{"weight_map": {"w": "../x.safetensors"}}', r"in this folder, got '\.\./x\.safetensors'"),
    "pickle": ('{"weight_map": {"w": "pytorch_model.bin"}}', "expected names of .safetensors files"),
    "numbers": ('{"weight_map": {"w": 3}}', "expected names of .safetensors files"),
    "missing": ('{"weight_map": {"w": "x.safetensors"}}', r"x\.safetensors"),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_a_bad_index_is_refused(tmp_path, kind):
    save_sharded(tmp_path / "m", llama())
    text, message = INDEXES[kind]
    (tmp_path / "m" / "model.safetensors.index.json").write_text(text)
    with pytest.raises(NMSolveError, match=message):
        open_checkpoint(tmp_path / "m")


def test_an_index_must_agree_with_the_shards(tmp_path):
    folder = tmp_path / "m"
    weight_map = save_sharded(folder, llama())
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map | {"more": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(NMSolveError, match="expected tensor 'more' in model-00001-of-00002"):
        open_checkpoint(folder)
    index.write_text(json.dumps({"weight_map": weight_map}))
    save_file(
        load_file(folder / "model-00001-of-00002.safetensors"), folder / "model-00002-of-00002.safetensors"
    )
    with pytest.raises(NMSolveError, match=r"does not hold it|is also in"):
        open_checkpoint(folder)


# --- what torch.distributed.checkpoint writes ---------------------------------------------------------------


def save_by_dcp(state: dict[str, torch.Tensor], folder: Path, **options: bool) -> None:
    from torch.distributed import checkpoint

    names = dict(zip(state, [1, *[2] * (len(state) - 1)], strict=True))
    writer = checkpoint.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=names, **options)
    checkpoint.save(state, storage_writer=writer, no_dist=True)


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_that_dcp_has_joined_is_read(tmp_path):
    state = llama()
    save_by_dcp(state, tmp_path / "joined", save_distributed=True, enable_consolidation=True)
    save_by_dcp(state, tmp_path / "plain")
    save_sharded(tmp_path / "usual", state)
    mask_checkpoint(tmp_path / "usual", tmp_path / "usual-out", "4:8", transposable=True)
    expected = weights(tmp_path / "usual-out")
    for name in ("joined", "plain"):
        mask_checkpoint(tmp_path / name, tmp_path / f"{name}-out", "4:8", transposable=True)
        found = weights(tmp_path / f"{name}-out")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], weight) for key, weight in expected.items())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}


@pytest.mark.filterwarnings("ignore")
def test_the_parts_of_a_rank_are_refused(tmp_path):
    save_by_dcp(llama(), tmp_path / "parts", save_distributed=True)
    files = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(files) == 2
    for path in (tmp_path / "parts", files[0]):
        with pytest.raises(
            NMSolveError, match=r"shard-00001-.*expected whole tensors, got the parts of one rank"
        ):
            open_checkpoint(path)


@pytest.mark.parametrize(
    ("places", "refused"),
    [
        ('{"a": {"saved_offsets": [0, 0]}}', False),
        ('{"a": {"saved_offsets": [0, 0]}, "b": {"saved_offsets": [0, 8]}}', True),
        ("no JSON", False),
        ('[{"saved_offsets": [1]}]', False),
        ('{"a": 3, "b": {"saved_offsets": "1"}, "c": {}}', False),
    ],
)
def test_where_tensors_begin_tells_parts(places, refused, tmp_path):
    save_file({"a": torch.ones(8, 8)}, tmp_path / "x.safetensors", {"DCP_SHARDING_INFO": places})
    if refused:
        with pytest.raises(NMSolveError, match="got the parts of one rank"):
            read_shard(tmp_path / "x.safetensors")
    else:
        assert len(read_shard(tmp_path / "x.safetensors").entries) == 1
