"""transformers models and tokenizers in checkpoint folders: loading them without network and without code."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmsolve.checkpoint.architecture import build, read_config, too_large
from nmsolve.checkpoint.format import Checkpoint, open_checkpoint
from nmsolve.checkpoint.roles import told
from nmsolve.checkpoint.selection import DTYPES
from nmsolve.errors import NMSolveError, NMSolveWarning, counted, one_line
from nmsolve.files import is_regular

if TYPE_CHECKING:
    import torch

    from nmsolve.prune.unloaded import StoredWeights

__all__ = ["load_model", "load_tokenizer", "open_model"]

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
    checkpoint, kind = _kind_of(folder)
    import torch

    try:
        _check_parameters(checkpoint, kind.__name__)
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
    _check_loaded(folder, kind.__name__, found)
    return model


def open_model(folder: Path, dtype: str | None = None) -> tuple[Any, StoredWeights]:
    """The model of a checkpoint folder as :func:`load_model` loads it, but for its weights, and those.

    Its parameters are on the meta device, its buffers are there.

    Raises
    ------
    NMSolveError
        As :func:`load_model`; and if a parameter cannot be read by itself.
    """
    checkpoint, kind = _kind_of(folder)
    import torch
    import transformers

    from nmsolve.prune.unloaded import StoredWeights, built_without_weights

    try:
        config = transformers.AutoConfig.from_pretrained(folder, **_LOCAL)
        wanted = _dtype_of(config, checkpoint) if dtype is None else getattr(torch, dtype)
        with built_without_weights():
            model = kind._from_config(config, dtype=wanted)
        told(model, "tie_weights")
        _keep_wide(model, wanted)
    except NMSolveError:
        raise
    except Exception as error:
        raise NMSolveError(f"{folder}: the model cannot be built: {_told(error)}") from None
    weights = StoredWeights(checkpoint, model)
    computed = "_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected"
    missing = [name for name in weights.lacking if not _is_named(model, computed[0], name)]
    _check_missing(folder, kind.__name__, missing)
    _compute(model, weights.lacking)
    buffers = dict(model.named_buffers())
    for name, value in weights.read([name for name in buffers if name in weights]).items():
        buffers[name].copy_(value)
    unused = [name for name in sorted(weights.unused) if not _is_named(model, computed[1], name)]
    _tell_unused(folder, kind.__name__, unused)
    return model, weights


def _compute(model: Any, names: Sequence[str]) -> None:
    """Has a model compute what is in no file: its buffers, and the parameters of these names."""
    import torch

    for name in names:
        module, _, own = name.rpartition(".")
        parameter = model.get_parameter(name)
        there = torch.empty(parameter.shape, dtype=parameter.dtype)
        model.get_submodule(module)._parameters[own] = torch.nn.Parameter(there, parameter.requires_grad)
    if hasattr(model, "initialize_weights"):  # transformers 4 has made them
        for module in model.modules():
            module._is_hf_initialized = False
        model.initialize_weights()


def _kind_of(folder: Path) -> tuple[Checkpoint, Any]:
    """The checkpoint in a folder, and the class of transformers that its config names."""
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
    return checkpoint, kind


def _dtype_of(config: Any, checkpoint: Checkpoint) -> torch.dtype:
    """What ``dtype="auto"`` is: that of the configuration, or of the first tensor of floats."""
    import torch

    named = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    if isinstance(named, torch.dtype):
        return named
    first = next((DTYPES[x.dtype] for _, x in checkpoint.entries() if x.dtype in DTYPES), "float32")
    found: torch.dtype = getattr(torch, named if isinstance(named, str) else first)
    return found


def _keep_wide(model: Any, dtype: torch.dtype) -> None:
    """Parameters that transformers keeps in float32 for its range are float32."""
    plan = getattr(model, "_get_dtype_plan", None)
    if plan is None:  # transformers 4
        names = {
            *(getattr(model, "_keep_in_fp32_modules", None) or ()),
            *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
        }
        if names and dtype.itemsize < 4:
            raise NMSolveError(
                f"{type(model).__name__}: part of it is kept in float32; leave offload='disk' out"
            )
        return
    globs = plan(dtype)
    if not globs:
        return
    from transformers.core_model_loading import build_glob_alternation

    pattern, globs_by_group, _ = build_glob_alternation(list(globs))
    for name, tensor in model.state_dict(keep_vars=True).items():
        found = pattern.search(name)
        if found is not None and found.lastgroup is not None and tensor.is_floating_point():
            tensor.data = tensor.data.to(globs[globs_by_group[found.lastgroup]])


def _is_named(model: Any, table: str, name: str) -> bool:
    """Whether a table of patterns that a model has names a tensor."""
    return any(re.search(pattern, name) for pattern in getattr(model, table, None) or ())


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
    _check_missing(folder, kind, sorted(found["missing_keys"]))
    _tell_unused(folder, kind, sorted(found["unexpected_keys"]))


def _check_missing(folder: Path, kind: str, missing: Sequence[str]) -> None:
    if missing:
        raise NMSolveError(
            f"{folder}: {kind} needs {missing[0]}, which is not there ({len(missing)} missing)"
        )


def _tell_unused(folder: Path, kind: str, unused: Sequence[str]) -> None:
    if unused:
        warnings.warn(
            f"{counted(len(unused), 'tensor')} in {folder} "
            f"{'is' if len(unused) == 1 else 'are'} no part of {kind}: {unused[0]}"
            + (", ..." if len(unused) > 1 else ""),
            NMSolveWarning,
            stacklevel=4,
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
