"""Masks of many weights by name, none of them unpacked before it is asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from nmsolve.checkpoint.mask_files import pack_mask, unpack_mask

__all__ = ["ChosenMasks", "PackedMasks"]


class PackedMasks(Mapping[str, Tensor]):
    """Masks by the name of their weight, held as bits and unpacked when they are asked for."""

    def __init__(self) -> None:
        self._packed: dict[str, tuple[Tensor, torch.Size]] = {}

    def add(self, name: str, mask: Tensor) -> None:
        self._packed[name] = pack_mask(mask), mask.shape

    def __getitem__(self, name: str) -> Tensor:
        return unpack_mask(*self._packed[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)


class ChosenMasks(Mapping[str, Tensor]):
    """Some of the masks of a mapping."""

    def __init__(self, masks: Mapping[str, Tensor], names: Collection[str]) -> None:
        self._masks, self._names = masks, dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
