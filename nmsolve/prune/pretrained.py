"""transformers models and tokenizers in checkpoint folders: loading them without network and without code."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

from nmsolve.checkpoint.architecture import build, read_config, too_large
from nmsolve.checkpoint.format import Checkpoint, open_checkpoint
from nmsolve.errors import NMSolveError, NMSolveWarning, counted, one_line
from nmsolve.files import is_regular

__all__ = ["load_model", "load_tokenizer"]

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
        raise NMSolveError("transformers is not installed: pip install transformers")
    _check_no_adapter(folder)
    checkpoint = open_checkpoint(folder)
    if not checkpoint.is_folder:
        raise NMSolveError(f"{folder}: expected a checkpoint folder with a config.json, got a file")
    if not is_regular(folder / "config.json"):
        raise NMSolveError(f"{folder}: expected a checkpoint folder with a config.json")
    _check_library(folder)
    _check_size(checkpoint)
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        transformers.AutoConfig.from_pretrained(folder, **_LOCAL)
    except Exception as error:  # whatever a wrong configuration makes of it
        raise NMSolveError(f"{folder}: the configuration cannot be loaded: {_told(error)}") from None
    named = read_config(folder)[0].get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        raise NMSolveError(f"{folder}: expected a config.json that names its architecture, found none")
    kind: Any = getattr(transformers, named[0], None)
    if transformers.PreTrainedModel not in getattr(kind, "__mro__", ()):
        raise NMSolveError(f"{folder}: transformers {transformers.__version__} has no model {named[0]}")
    try:
        _check_parameters(checkpoint, named[0])
        model, found = kind.from_pretrained(
            folder,
            use_safetensors=True,
            dtype="auto" if dtype is None else getattr(torch, dtype),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **_LOCAL,
        )
    except NMSolveError:
        raise
    except Exception as error:
        raise NMSolveError(f"{folder}: the model cannot be loaded: {_told(error)}") from None
    _check_loaded(folder, named[0], found)
    return model


def _check_size(checkpoint: Checkpoint) -> None:
    """Raises if config.json asks for far more blocks than the files can hold: no memory would do."""
    config, _ = read_config(checkpoint.root)
    why = too_large(config, sum(1 for _ in checkpoint.entries()))
    if why:
        raise NMSolveError(f"{checkpoint.root}: the configuration is not that of the weights: {why}")


def _check_parameters(checkpoint: Checkpoint, named: str) -> None:
    """Raises if a model has far more parameters than the files hold, before there is memory for them."""
    try:
        model, _ = build(checkpoint.root, named)
    except Exception:  # loading it will say what is wrong
        return
    wanted = sum(parameter.numel() for parameter in model.parameters())
    held = sum(entry.size for _, entry in checkpoint.entries())
    if wanted > _MORE * held:
        raise NMSolveError(
            f"{checkpoint.root}: the configuration is not that of the weights: {named} would have "
            f"{wanted:,} parameters, the files hold {held:,}"
        )


# Times as many parameters as the files hold: tied weights may be stored once and counted twice.
_MORE = 4


def _told(error: Exception) -> str:
    """What went wrong in another library, with the kind of error where the message may say nothing."""
    said = one_line(error)[:_LONGEST]
    return said if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {said}"


_LONGEST = 1000  # characters of another library's message


def _check_library(folder: Path) -> None:
    config, _ = read_config(folder)
    if "_diffusers_version" in config:
        raise NMSolveError(
            f"{folder}: expected a model of transformers, got one of diffusers; nmsolve mask masks it, and "
            "nmsolve.prune.prune_model prunes it in Python"
        )


def _check_no_adapter(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise NMSolveError(
            f"{folder}: expected a model, got an adapter; merge it first: in peft, "
            "model.merge_and_unload().save_pretrained(...)"
        )


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
            f"{counted(len(unused), 'tensor')} in {folder} "
            f"{'is' if len(unused) == 1 else 'are'} no part of {kind}: {unused[0]}"
            + (", ..." if len(unused) > 1 else ""),
            NMSolveWarning,
            stacklevel=3,
        )


# One of these, or of these suffixes, is there where a checkpoint has a tokenizer; without, transformers makes
# up one that knows no words.
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")
_TOKENIZER_SUFFIXES = (".model", ".tiktoken", ".bpe", ".vocab", ".spm")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder.

    Raises
    ------
    NMSolveError
        If there is none, or it cannot be loaded.
    """
    instead = "or give tokens, one tensor in a .safetensors file, in place of text"
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.name in _TOKENIZER_FILES or path.suffix in _TOKENIZER_SUFFIXES
    ]
    if not files:
        raise NMSolveError(
            f"{folder}: no tokenizer to read text with: there is no tokenizer.json; copy it there, {instead}"
        )
    import transformers

    # Whatever goes wrong in there, a missing package or a file that does not parse, the text cannot be read.
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, **_LOCAL)
    except Exception as error:
        raise NMSolveError(
            f"{files[0]}: the tokenizer cannot be loaded: {type(error).__name__}: "
            f"{one_line(error)[:_LONGEST]}; repair "
            f"it, {instead}"
        ) from None
