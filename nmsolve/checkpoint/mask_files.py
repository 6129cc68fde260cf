"""Masks packed to bits: one bit per weight, in safetensors files that say shape and pattern.

A mask is flattened in row-major order; entry ``k`` is bit ``k % 8`` (least significant first) of byte
``k // 8``, as ``numpy.packbits(..., bitorder="little")`` does. The last byte is filled with zeros. In the
file each mask is a 1-D ``U8`` tensor under the name of its weight, and the metadata hold

=================  ==================================================================
``format``         ``"nmsolve-masks"``
``format_version`` ``"1"``
``pattern``        ``"8:16"``: 8 kept of 16
``transposable``   ``"true"`` or ``"false"``
``shapes``         JSON: ``{"model.layers.0.mlp.up_proj.weight": [1536, 576], ...}``
=================  ==================================================================
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nmsolve.checkpoint.format import (
    MASKS_FOLDER,
    MASKS_SUFFIX,
    Shard,
    encode_header,
    read_shard,
)
from nmsolve.checkpoint.streams import StreamWriter, read_into
from nmsolve.errors import NMSolveError
from nmsolve.pattern import NMPattern, PatternLike

__all__ = ["load_masks", "pack_mask", "save_masks", "unpack_mask"]

FORMAT = "nmsolve-masks"
FORMAT_VERSION = "1"


def packed_size(size: int) -> int:
    """Bytes that ``size`` mask entries take."""
    return (size + 7) // 8


def pack_mask(mask: Tensor) -> Tensor:
    """Packs a mask to one bit per entry.

    Parameters
    ----------
    mask : Tensor
        bool, any shape, any device; True = keep.

    Returns
    -------
    Tensor
        ``(ceil(mask.numel() / 8),)`` uint8 on the CPU.

    Examples
    --------
    >>> pack_mask(torch.tensor([[True, False, False], [True, True, False]]))
    tensor([25], dtype=torch.uint8)
    """
    _check_mask("mask", mask)
    bits = mask.detach().cpu().reshape(-1).numpy()
    return torch.from_numpy(np.packbits(bits, bitorder="little"))


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask that :func:`pack_mask` packed.

    Parameters
    ----------
    packed : Tensor
        ``(ceil(prod(shape) / 8),)`` uint8.
    shape : sequence of int
        Shape of the mask.

    Returns
    -------
    Tensor
        ``shape`` bool on the CPU, True = keep.

    Raises
    ------
    NMSolveError
        If ``packed`` has another dtype or length.
    """
    size = math.prod(shape)
    expected = (packed_size(size),)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != expected:
        raise NMSolveError(
            f"packed: expected {expected} uint8 for a mask of shape {tuple(shape)}, "
            f"got {tuple(packed.shape)} {packed.dtype}"
        )
    bits = np.unpackbits(packed.detach().cpu().numpy(), count=size, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_)).reshape(tuple(shape))


def save_masks(
    path: str | os.PathLike[str],
    masks: Mapping[str, Tensor],
    pattern: PatternLike,
    *,
    transposable: bool = True,
) -> None:
    """Saves masks packed to bits. An existing file is replaced at once or not at all.

    Parameters
    ----------
    path : path
        File to write; the usual name is ``<checkpoint>.masks.safetensors``.
    masks : mapping of str to Tensor
        The name of each weight and its mask: bool, any shape, True = keep.
    pattern : NMPattern, str or (int, int)
        What the masks keep, such as ``"8:16"``. Recorded, not checked: see :func:`nmsolve.check_mask`.
    transposable : bool
        Whether the pattern holds along columns as well. Recorded, not checked.

    Examples
    --------
    >>> save_masks("model.masks.safetensors", {"fc.weight": mask}, "2:4")  # doctest: +SKIP
    >>> torch.equal(load_masks("model.masks.safetensors")["fc.weight"], mask)  # doctest: +SKIP
    True
    """
    path = Path(path)
    for name, mask in masks.items():
        _check_mask(f"masks[{name!r}]", mask)
    shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with masks_writer(temporary, shapes, pattern, transposable) as out:
            for mask in masks.values():
                out.write(pack_mask(mask).numpy().data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_masks(path: str | os.PathLike[str], names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Masks that :func:`save_masks` or ``nmsolve mask`` wrote.

    Parameters
    ----------
    path : path
        A ``.masks.safetensors`` file, or the folder that ``nmsolve mask`` wrote for a checkpoint folder.
    names : iterable of str, optional
        Load only these weights' masks.

    Returns
    -------
    dict of str to Tensor
        bool masks in the shape of their weights, on the CPU, True = keep.

    Raises
    ------
    NMSolveError
        If the file is no mask file, or has no mask of a given name.

    Examples
    --------
    >>> masks = load_masks("pruned-model")                                    # doctest: +SKIP
    >>> for name, parameter in model.named_parameters():                      # doctest: +SKIP
    ...     if name in masks:
    ...         parameter.data.mul_(masks[name].to(parameter.device))
    """
    wanted = None if names is None else set(names)
    masks: dict[str, Tensor] = {}
    for file in _mask_files(Path(path)):
        shard = read_shard(file)
        shapes = _shapes(shard)
        with file.open("rb") as source:
            for entry in shard.entries:
                if wanted is None or entry.name in wanted:
                    packed = torch.empty(entry.nbytes, dtype=torch.uint8)
                    read_into(source, entry.start, packed.numpy().data)
                    masks[entry.name] = unpack_mask(packed, shapes[entry.name])
    missing = sorted((wanted or set()) - masks.keys())
    if missing:
        raise NMSolveError(f"names: no mask for {missing[0]!r} in {path} ({len(missing)} missing in all)")
    return masks


def masks_header(
    shapes: Mapping[str, Sequence[int]], pattern: PatternLike, transposable: bool
) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file of masks, and how many the packed mask of each weight takes, in order."""
    sizes = {name: packed_size(math.prod(shape)) for name, shape in shapes.items()}
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "pattern": str(NMPattern.of(pattern)),
        "transposable": "true" if transposable else "false",
        "shapes": json.dumps({name: list(shape) for name, shape in shapes.items()}, ensure_ascii=False),
    }
    return encode_header(((name, "U8", (size,), size) for name, size in sizes.items()), metadata), sizes


def masks_writer(
    path: Path, shapes: Mapping[str, Sequence[int]], pattern: PatternLike, transposable: bool
) -> StreamWriter:
    """A writer that expects the packed masks of ``shapes`` in order."""
    header, sizes = masks_header(shapes, pattern, transposable)
    return StreamWriter(path, header, sum(sizes.values()))


class BitStream:
    """Packs one mask that arrives in pieces, whose sizes need not be multiples of 8."""

    def __init__(self) -> None:
        self._rest = np.empty(0, dtype=np.bool_)

    def push(self, piece: Tensor) -> memoryview:
        """The whole bytes that ``piece`` (bool, CPU, row-major) completes."""
        bits = piece.reshape(-1).numpy()
        if self._rest.size:
            bits = np.concatenate([self._rest, bits])
        whole = bits.size - bits.size % 8
        self._rest = bits[whole:].copy()
        return np.packbits(bits[:whole], bitorder="little").data

    def finish(self) -> memoryview:
        """The last byte, if one was begun."""
        return np.packbits(self._rest, bitorder="little").data


def _check_mask(name: str, mask: object) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = f"a tensor of {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise NMSolveError(f"{name}: expected a bool tensor (True = keep), got {got}")


def _mask_files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    inner = path / MASKS_FOLDER
    files = sorted((inner if inner.is_dir() else path).glob(f"*{MASKS_SUFFIX}"))
    if not files:
        raise NMSolveError(
            f"{path}: expected *{MASKS_SUFFIX} files in this folder or its '{MASKS_FOLDER}' folder"
        )
    yield from files


def _shapes(shard: Shard) -> dict[str, list[int]]:
    found = shard.metadata.get("format"), shard.metadata.get("format_version")
    if found != (FORMAT, FORMAT_VERSION):
        raise NMSolveError(
            f"{shard.path}: expected a mask file (format {FORMAT!r}, version {FORMAT_VERSION}), "
            f"got format {found[0]!r}, version {found[1]}"
        )
    try:
        shapes = json.loads(shard.metadata["shapes"])
    except (KeyError, ValueError, RecursionError):
        shapes = None
    if not isinstance(shapes, dict):
        raise NMSolveError(f"{shard.path}: expected a mask file whose metadata say the shapes of its masks")
    for entry in shard.entries:
        shape = shapes.get(entry.name)
        sizes: list[Any] = shape if isinstance(shape, list) else ["none"]
        whole = all(type(size) is int and size >= 0 for size in sizes)
        if not whole or entry.dtype != "U8" or entry.shape != (packed_size(math.prod(sizes)),):
            raise NMSolveError(
                f"{shard.path}: {entry.name}: expected the packed bits of a mask of the metadata's shape, "
                f"got {entry.dtype} {list(entry.shape)} for shape {str(shape)[:80]}"
            )
    return shapes
