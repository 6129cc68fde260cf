"""Files that hold parts of tensors, as torch.distributed.checkpoint leaves them, one for each rank."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nmsolve.errors import NMSolveError

__all__ = ["check_whole", "is_part"]

_KEY = "DCP_SHARDING_INFO"


def is_part(name: str) -> bool:
    """Whether a file is named as those with the parts of a rank are."""
    return name.startswith("shard-")


def check_whole(path: Path, metadata: Mapping[str, str]) -> None:
    """Raises if a safetensors file with these metadata has parts of tensors, which its header does not tell.

    ``HuggingFaceStorageWriter`` writes where each tensor begins in the whole one. Whole tensors begin at 0,
    and so do the parts of the first rank: these are known by the file's name.
    """
    places = metadata.get(_KEY)
    if places is not None and (is_part(path.name) or any(map(any, _offsets(places)))):
        raise NMSolveError(
            f"{path}: expected whole tensors, got the parts of one rank of torch.distributed.checkpoint; "
            "join them with HuggingFaceStorageWriter(..., save_distributed=True, enable_consolidation=True) "
            "or consolidate_safetensors_files"
        )


def _offsets(text: str) -> list[list[int]]:
    """Where each tensor of the file begins, as far as the text says so."""
    try:
        places: Any = json.loads(text)
    except (ValueError, RecursionError):
        return []
    rows = places.values() if isinstance(places, dict) else []
    found = [row.get("saved_offsets") for row in rows if isinstance(row, dict)]
    return [offsets for offsets in found if isinstance(offsets, list)]
