"""Calibration inputs: text, tokens or any iterable, turned into batches that a model can be called with."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nmsolve.checkpoint.format import read_shard
from nmsolve.checkpoint.selection import DTYPES
from nmsolve.errors import NMSolveError, NMSolveWarning, counted, one_line

__all__ = [
    "Batch",
    "Tokens",
    "call_model",
    "describe_batch",
    "fingerprint",
    "make_batches",
    "measures",
    "read_tokens",
    "real_positions",
    "windows_of",
]

# safetensors' spelling of what tokens may be stored in.
_INTEGERS = frozenset({"I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8"})

# A tensor, the positional arguments of the model, or its keyword arguments.
Batch = Tensor | tuple[Any, ...] | Mapping[str, Any]


class Tokenizer(Protocol):
    """What is needed of a tokenizer: transformers' all have it."""

    def __call__(self, text: str) -> Mapping[str, Any]: ...


class Tokens(NamedTuple):
    """Tokens ``(T,)`` (or ``(S, T)``, one sequence a row) int64, and what each window of them begins with:
    the id of the BOS token, or None.
    """

    ids: Tensor
    bos: int | None = None


def read_tokens(path: str | os.PathLike[str], tokenizer: Tokenizer | None, bos: bool | None = None) -> Tokens:
    """The tokens of a UTF-8 text file, or the only tensor of a .safetensors file.

    Parameters
    ----------
    path : path
    tokenizer : callable, optional
        For text.
    bos : bool, optional
        Whether windows of a text begin with the tokenizer's BOS token. By default they do if the tokenizer
        puts it before a text: models that are trained so are far worse without.

    Raises
    ------
    NMSolveError
        If the file cannot be read, is text and there is no tokenizer, or BOS is asked for and there is none.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            tensors = list(_load_safetensors(path).values())
            if len(tensors) != 1:
                raise NMSolveError(f"{path}: expected one tensor of tokens, got {len(tensors)}")
            if bos:
                raise NMSolveError(f"bos: expected text, got tokens in {path}: put the BOS token into them")
            return Tokens(tensors[0])
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise NMSolveError(f"{path}: expected a text file in UTF-8: {error}") from None
    if tokenizer is None:
        raise NMSolveError(f"tokenizer: needed to read the text of {path}")
    try:
        ids = torch.as_tensor(tokenizer(text)["input_ids"], dtype=torch.int64).reshape(-1)
    except Exception as error:  # whatever a broken tokenizer makes of a text
        problem = f"{type(error).__name__}: {one_line(error)}"
        raise NMSolveError(f"{path}: the tokenizer cannot read the text: {problem}") from None
    _check_words(path, text, ids, tokenizer)
    return _with_start(ids, tokenizer, bos)


def _check_words(path: Path, text: str, ids: Tensor, tokenizer: Tokenizer) -> None:
    """Warns of a tokenizer that knows hardly a word of the text: it may belong to another model."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    lost = 0 if unknown is None else int((ids == unknown).sum())
    if text.strip() and len(ids) == 0:
        raise NMSolveError(f"{path}: the tokenizer turns {counted(len(text), 'character')} into no tokens")
    if 2 * lost > len(ids):
        warnings.warn(
            f"{path}: {lost:,} of {counted(len(ids), 'token')} are unknown to the tokenizer: it may be "
            "broken, or another model's",
            NMSolveWarning,
            stacklevel=4,
        )


def _with_start(ids: Tensor, tokenizer: Tokenizer, bos: bool | None) -> Tokens:
    start: int | None = getattr(tokenizer, "bos_token_id", None)
    if bos and start is None:
        raise NMSolveError("bos: the tokenizer has no BOS token")
    if start is None:
        return Tokens(ids)
    put = len(ids) > 0 and int(ids[0]) == start
    return Tokens(ids[1:] if put else ids, start if (put if bos is None else bos) else None)


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    for entry in read_shard(path).entries:
        if entry.dtype not in _INTEGERS and entry.dtype not in DTYPES:
            raise NMSolveError(f"{path}: expected tokens (integers), or data (floats), got {entry.dtype}")
    return {
        name: tensor if tensor.is_floating_point() else tensor.long()
        for name, tensor in load_file(path).items()
    }


def make_batches(
    calibration: object,
    *,
    tokenizer: Tokenizer | None = None,
    samples: int = 128,
    sequence_length: int = 2048,
    batch_size: int = 1,
    seed: int = 0,
    bos: bool | None = None,
) -> list[Batch]:
    """Batches for calibration, in a list because each is used several times.

    Parameters
    ----------
    calibration : path, Tensor or iterable
        A text file (or .safetensors file of tokens) is read; token tensors ``(T,)`` are cut into windows of
        ``sequence_length``, of which ``samples`` are drawn without overlap; token tensors ``(S, T)`` are
        taken as they are, row by row, the first ``samples``; floating-point tensors are split along their
        first dimension. The items of any other iterable are batches already, and may differ in length:
        tensors, tuples of positional arguments or mappings of keyword arguments.
    tokenizer : callable, optional
        For text: ``tokenizer(text)["input_ids"]``.
    samples, sequence_length, batch_size, seed : int
        How many windows, of how many tokens, how many in a batch, and the seed of the draw.
    bos : bool, optional
        Whether each window of a text begins with the tokenizer's BOS token, counted in its length; by
        default as the tokenizer does it.

    Warns
    -----
    NMSolveWarning
        If tokens fill fewer windows than ``samples``, or the tokenizer knows hardly a word.

    Raises
    ------
    NMSolveError
        If there is nothing to calibrate on, tokens do not fill one window, or it is of none of these kinds.
    """
    for name, value in (
        ("samples", samples),
        ("sequence_length", sequence_length),
        ("batch_size", batch_size),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise NMSolveError(f"{name}: expected an integer of at least 1, got {value!r}")
    if not isinstance(seed, int):
        raise NMSolveError(f"seed: expected an integer, got {seed!r}")
    if isinstance(calibration, str | os.PathLike):
        calibration = read_tokens(calibration, tokenizer, bos)
    elif bos:
        raise NMSolveError("bos: expected a text file to calibrate on, got data: put the BOS token into it")
    if isinstance(calibration, Tensor):
        calibration = Tokens(calibration)
    if isinstance(calibration, Tokens):
        return _split(calibration, samples, sequence_length, batch_size, seed)
    if isinstance(calibration, Mapping) or not isinstance(calibration, Iterable):
        raise NMSolveError(
            "calibration: expected a path, a tensor or an iterable of batches, "
            f"got {type(calibration).__name__}"
        )
    batches: list[Batch] = []
    for item in calibration:
        numbers = isinstance(item, tuple | list) and all(isinstance(x, int | float) for x in item)
        if numbers or not isinstance(item, Tensor | Mapping | tuple | list):
            got = f"a {type(item).__name__}{' of numbers' if numbers else ''}"
            raise NMSolveError(
                f"calibration: expected batches that are tensors, tuples or mappings of them, got {got}"
            )
        batches.append(tuple(item) if isinstance(item, list) else item)
    if not batches:
        raise NMSolveError("calibration: expected at least one batch, got none")
    return batches


def _split(tokens: Tokens, samples: int, length: int, batch_size: int, seed: int) -> list[Batch]:
    data = tokens.ids
    if data.numel() == 0:
        raise NMSolveError(f"calibration: expected data, got an empty tensor of shape {tuple(data.shape)}")
    if not data.is_floating_point():
        if data.ndim not in (1, 2):
            raise NMSolveError(f"calibration: expected tokens (T,) or (S, T), got shape {tuple(data.shape)}")
        if data.ndim == 1:
            windows = windows_of(tokens, length)
            if len(windows) == 0:
                raise NMSolveError(
                    f"calibration: {counted(len(data), 'token')} do not fill one sequence of {length:,}; "
                    "give more text, or a smaller sequence_length"
                )
            if len(windows) < samples:
                warnings.warn(
                    f"calibration: {counted(len(data), 'token')} give {counted(len(windows), 'sequence')} of "
                    f"{length:,}, {samples:,} were asked for",
                    NMSolveWarning,
                    stacklevel=4,
                )
            order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
            data = windows[order[:samples].sort().values]
        data = data.long()
    return list(data[:samples].split(batch_size))


def windows_of(tokens: Tokens, length: int) -> Tensor:
    """``(windows, length)``: tokens ``(T,)`` cut without overlap, each with its BOS; the rest is left out."""
    ids, bos = tokens
    step = length if bos is None else length - 1
    if step < 1:
        raise NMSolveError(f"sequence_length: expected at least 2 with a BOS token, got {length}")
    cut = ids[: len(ids) // step * step].view(-1, step)
    return cut if bos is None else torch.cat([cut.new_full((len(cut), 1), bos), cut], dim=1)


def measures(batches: Iterable[Batch]) -> dict[str, int]:
    """How many samples there are, and of tokens their length and number, as far as batches tell."""
    tensors = [batch for batch in batches if isinstance(batch, Tensor)]
    if not tensors:
        return {}
    found = {"samples": sum(len(batch) for batch in tensors)}
    if not any(batch.is_floating_point() for batch in tensors) and all(b.ndim == 2 for b in tensors):
        found["sequence_length"] = max(batch.shape[1] for batch in tensors)
        found["tokens"] = sum(batch.numel() for batch in tensors)
    return found


def call_model(model: nn.Module, batch: Batch) -> Any:
    """``model(batch)``, with the batch on the model's device."""
    here = (parameter.device for parameter in model.parameters() if not parameter.is_meta)
    device = next(here, torch.device("cpu"))

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return model(**{name: moved(value) for name, value in batch.items()})
    if isinstance(batch, tuple):
        return model(*(moved(value) for value in batch))
    return model(moved(batch))


def real_positions(model: nn.Module, batch: Batch) -> Tensor | None:
    """Which of the positions ``(B, T)`` of a batch are no padding, bool; None where all count.

    A batch tells by its ``attention_mask``. That of an encoder-decoder model belongs to one of its two sides
    only, so that there all positions count.
    """
    given = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    two_sided = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if not isinstance(given, Tensor) or given.ndim != 2 or two_sided or bool((given != 0).all()):
        return None
    return given != 0


def describe_batch(value: object) -> str:
    """The types and shapes in a batch, in a line."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {describe_batch(part)}" for name, part in value.items()) + "}"
    if isinstance(value, tuple):
        return "(" + ", ".join(describe_batch(part) for part in value) + ")"
    return type(value).__name__


def fingerprint(batches: Iterable[Batch]) -> str:
    """A hash of the batches' contents."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            for name in sorted(value):
                digest.update(name.encode())
                add(value[name])
        elif isinstance(value, tuple | list):
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    for batch in batches:
        add(batch)
    return digest.hexdigest()[:16]
