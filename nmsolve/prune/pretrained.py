"""transformers models in checkpoint folders: loading them to be pruned, and what a pruned one takes along."""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from pathlib import Path
from typing import Any

from nmsolve.checkpoint.format import INDEX_NAME, PICTURE_NAME, REPORT_NAME, open_checkpoint
from nmsolve.errors import NMSolveError, NMSolveWarning, one_line

__all__ = ["copy_other_files", "load_model", "load_tokenizer"]

# Neither the network nor code that comes with a checkpoint.
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def load_model(folder: Path, dtype: str | None = None) -> Any:
    """The model of a checkpoint folder, as the class that its config names; no code of it is run.

    Parameters
    ----------
    folder : Path
        With a config.json and safetensors weights.
    dtype : str, optional
        torch's name of the dtype of the weights; by default the checkpoint's.

    Raises
    ------
    NMSolveError
        If transformers is not installed, or the folder holds no model that it can load whole.
    """
    if importlib.util.find_spec("transformers") is None:
        raise NMSolveError("transformers is not installed: pip install 'nmsolve[hf]'")
    if not (folder / "config.json").is_file():
        raise NMSolveError(f"{folder}: expected a checkpoint folder with a config.json")
    open_checkpoint(folder)
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **_LOCAL)
    except (OSError, KeyError, ValueError) as error:
        raise NMSolveError(f"{folder}: the configuration cannot be loaded: {one_line(error)}") from None
    named = config.architectures
    if not named:
        raise NMSolveError(f"{folder}: expected a config.json that names its architecture, found none")
    kind = getattr(transformers, named[0], None)
    if kind is None:
        raise NMSolveError(f"{folder}: transformers {transformers.__version__} has no {named[0]}")
    try:
        model, found = kind.from_pretrained(
            folder,
            use_safetensors=True,
            dtype="auto" if dtype is None else getattr(torch, dtype),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **_LOCAL,
        )
    except (OSError, KeyError, ValueError) as error:
        raise NMSolveError(f"{folder}: the model cannot be loaded: {one_line(error)}") from None
    _check_loaded(folder, named[0], found)
    return model


def _check_loaded(folder: Path, kind: str, found: dict[str, Any]) -> None:
    """Weights that the folder lacks would be random numbers; those that the model lacks are left behind."""
    mismatched = sorted(found["mismatched_keys"])
    if mismatched:
        # transformers 4 gives names, later ones (name, shape in the folder, shape in the model).
        name, *shapes = (mismatched[0],) if isinstance(mismatched[0], str) else mismatched[0]
        detail = " against ".join(str(tuple(shape)) for shape in shapes)
        raise NMSolveError(
            f"{folder}: {name} has another shape than in {kind}" + (f": {detail}" if detail else "")
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise NMSolveError(
            f"{folder}: {kind} needs {missing[0]}, which is not there ({len(missing)} missing)"
        )
    unused = sorted(found["unexpected_keys"])
    if unused:
        warnings.warn(
            f"{len(unused)} {'tensor' if len(unused) == 1 else 'tensors'} in {folder} "
            f"{'is' if len(unused) == 1 else 'are'} no part of {kind}: {unused[0]}"
            + (", ..." if len(unused) > 1 else ""),
            NMSolveWarning,
            stacklevel=3,
        )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder.

    Raises
    ------
    NMSolveError
        If there is none, or it cannot be loaded.
    """
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, **_LOCAL)
    except (OSError, ValueError, KeyError) as error:
        raise NMSolveError(f"{folder}: no tokenizer to read text with: {one_line(error)}") from None


def copy_other_files(source: Path, out: Path) -> None:
    """Copies what else a checkpoint folder holds, such as licence, image processor and model card."""
    for path in open_checkpoint(source).extras:
        target = out / path
        ours = path.name in (INDEX_NAME, REPORT_NAME, PICTURE_NAME)
        if not ours and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, target)
