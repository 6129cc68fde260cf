"""Masks packed to bits, and the files that hold them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nmsolve import NMPattern, NMSolveError, load_masks, nm_mask, save_masks
from nmsolve.checkpoint.mask_files import BitStream, pack_mask, unpack_mask


def random_mask(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


SHAPES = [(), (0,), (1,), (7,), (8,), (9,), (3, 5), (16, 16), (0, 4), (2, 3, 3, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_packing_and_back(shape):
    mask = random_mask(*shape)
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == (-(-mask.numel() // 8),)
    assert torch.equal(unpack_mask(packed, shape), mask)


def test_the_bits_lie_as_documented():
    mask = random_mask(5, 7)
    packed = pack_mask(mask)
    for k, keep in enumerate(mask.flatten().tolist()):
        assert (int(packed[k // 8]) >> (k % 8)) & 1 == keep
    assert int(packed[-1]) >> (35 % 8) == 0


def test_masks_with_any_strides_are_packed_in_row_major_order():
    mask = random_mask(6, 10)
    assert torch.equal(pack_mask(mask.T), pack_mask(mask.T.contiguous()))
    assert torch.equal(unpack_mask(pack_mask(mask[:, ::3]), (6, 4)), mask[:, ::3])


def test_packed_is_writable_memory_of_its_own():
    mask = random_mask(16)
    unpacked = unpack_mask(pack_mask(mask), (16,))
    unpacked.logical_not_()
    assert torch.equal(unpacked, ~mask)


@pytest.mark.parametrize("sizes", [[1] * 20, [3, 5, 8, 0, 7, 100, 1], [16, 16], [], [7]])
def test_a_mask_in_pieces_packs_like_a_whole_one(sizes):
    mask = random_mask(sum(sizes))
    stream = BitStream()
    data = b"".join(bytes(stream.push(piece)) for piece in mask.split(sizes)) + bytes(stream.finish())
    assert data == bytes(pack_mask(mask).numpy())


def test_save_and_load(tmp_path):
    masks = {f"layer.{k}.ä": random_mask(*shape, seed=k) for k, shape in enumerate(SHAPES)}
    save_masks(tmp_path / "x.masks.safetensors", masks, "8:16")
    loaded = load_masks(tmp_path / "x.masks.safetensors")
    assert list(loaded) == list(masks)
    for name, mask in masks.items():
        assert torch.equal(loaded[name], mask)
    assert [path.name for path in tmp_path.iterdir()] == ["x.masks.safetensors"]


def test_the_file_is_ordinary_safetensors_that_describes_itself(tmp_path):
    path = tmp_path / "x.masks.safetensors"
    mask = nm_mask(torch.rand(6, 10), 2, 4, backend="torch")
    save_masks(path, {"w": mask}, NMPattern(2, 4), transposable=False)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "nmsolve-masks"
    assert metadata["format_version"] == "1"
    assert metadata["pattern"] == "2:4"
    assert metadata["transposable"] == "false"
    assert json.loads(metadata["shapes"]) == {"w": [6, 10]}
    bits = np.unpackbits(load_file(path)["w"].numpy(), count=60, bitorder="little")
    assert torch.equal(torch.from_numpy(bits).bool().view(6, 10), mask)


def test_it_takes_one_bit_per_weight(tmp_path):
    path = tmp_path / "x.masks.safetensors"
    save_masks(path, {"w": random_mask(1000, 1000)}, "8:16")
    assert path.stat().st_size < 1000 * 1000 / 8 + 500


def test_load_some(tmp_path):
    path = tmp_path / "x.masks.safetensors"
    save_masks(path, {"a": random_mask(4), "b": random_mask(5)}, "2:4")
    assert list(load_masks(path, ["b"])) == ["b"]
    assert load_masks(path, []) == {}
    with pytest.raises(NMSolveError, match=r"names: no mask for 'c'.*1 missing"):
        load_masks(path, ["a", "c"])


def test_load_a_folder(tmp_path):
    with pytest.raises(NMSolveError, match=r"expected \*\.masks\.safetensors"):
        load_masks(tmp_path)
    (tmp_path / "masks").mkdir()
    save_masks(tmp_path / "masks" / "1.masks.safetensors", {"a": random_mask(4)}, "2:4")
    save_masks(tmp_path / "masks" / "2.masks.safetensors", {"b": random_mask(4)}, "2:4")
    assert set(load_masks(tmp_path)) == set(load_masks(tmp_path / "masks")) == {"a", "b"}


def test_saving_replaces_a_file_at_once_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.masks.safetensors"
    save_masks(path, {"a": random_mask(64)}, "2:4")
    before = path.read_bytes()

    def full(mask):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("nmsolve.checkpoint.mask_files.pack_mask", full)
        with pytest.raises(OSError, match="No space left"):
            save_masks(path, {"b": random_mask(64)}, "2:4")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    save_masks(path, {"b": random_mask(64)}, "2:4")
    assert list(load_masks(path)) == ["b"]


def test_errors_name_the_argument(tmp_path):
    with pytest.raises(NMSolveError, match=r"mask: expected a bool tensor .* got a tensor of torch\.float32"):
        pack_mask(torch.ones(4))
    with pytest.raises(NMSolveError, match=r"masks\['w'\]: expected a bool tensor .* got list"):
        save_masks(tmp_path / "x", {"w": [True]}, "2:4")
    with pytest.raises(NMSolveError, match="pattern: expected 'N:M'"):
        save_masks(tmp_path / "x", {"w": random_mask(4)}, "2/4")
    with pytest.raises(
        NMSolveError, match=r"packed: expected \(2,\) uint8 for a mask of shape \(3, 3\), got"
    ):
        unpack_mask(torch.zeros(3, dtype=torch.uint8), (3, 3))
    with pytest.raises(NMSolveError, match="packed: expected"):
        unpack_mask(torch.zeros(2), (3, 3))
    save_file({"w": torch.zeros(2, dtype=torch.uint8)}, tmp_path / "weights.safetensors")
    with pytest.raises(NMSolveError, match="expected a mask file"):
        load_masks(tmp_path / "weights.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["weights.safetensors"]
