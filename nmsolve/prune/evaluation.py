"""Perplexity of a language model on a text."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor, nn

from nmsolve.errors import NMSolveError, counted
from nmsolve.prune.arguments import sequence_length_of
from nmsolve.prune.calibration import Tokens, windows_of
from nmsolve.prune.walk import quiet_model

__all__ = ["Perplexity", "perplexity"]


class Perplexity(NamedTuple):
    """``perplexity`` over ``windows`` windows of ``window`` tokens each, the first of them BOS or not.

    ``losses`` has each window's mean negative log-likelihood, in nats: what a spread is estimated from, and
    what two models are compared by on the same windows.
    """

    perplexity: float
    windows: int
    window: int
    bos: bool = False
    losses: tuple[float, ...] = ()


def perplexity(
    model: nn.Module,
    tokens: Tensor,
    *,
    window: int | None = None,
    windows: int | None = None,
    batch_size: int = 1,
    progress: bool | None = None,
    bos: int | None = None,
) -> Perplexity:
    r"""``exp`` of the mean negative log-likelihood that a causal model gives to tokens.

    The tokens are cut into windows that do not overlap; in each, every token but the first is predicted from
    those before it. This is how the perplexities of SparseGPT, Wanda and ALPS are measured.

    Parameters
    ----------
    model : nn.Module
        A transformers model for causal language modelling, or anything that maps tokens ``(B, T)`` to logits
        ``(B, T, vocabulary)``.
    tokens : Tensor
        ``(T,)`` integers; what does not fill a window at the end is left out.
    window : int, optional
        Tokens in a window, at least 2. By default as many as the model takes, 2048 at most.
    windows : int, optional
        Use only the first so many.
    batch_size : int
        Windows in one forward pass.
    progress : bool, optional
        Whether to show a progress bar; by default on a terminal.
    bos : int, optional
        The token that each window begins with, before those of the text; by default there is none.

    Raises
    ------
    NMSolveError
        If an argument is not as described, the tokens do not fill one window, the model does not take a
        window, or its logits are NaN.

    Examples
    --------
    >>> class Uniform(torch.nn.Module):
    ...     def forward(self, tokens):
    ...         return torch.zeros(*tokens.shape, 32)
    >>> round(perplexity(Uniform(), torch.arange(10), window=5).perplexity, 3)
    32.0
    """
    from tqdm import trange

    if not isinstance(tokens, Tensor) or tokens.ndim != 1 or tokens.is_floating_point():
        raise NMSolveError("tokens: expected a tensor (T,) of integers")
    window = sequence_length_of(model, window)
    for name, value, least in (("window", window, 2), ("windows", windows, 1), ("batch_size", batch_size, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise NMSolveError(f"{name}: expected an integer of at least {least}, got {value!r}")
    if bos is not None and (isinstance(bos, bool) or not isinstance(bos, int)):
        raise NMSolveError(f"bos: expected the id of a token, got {bos!r}")
    cut = windows_of(Tokens(tokens, bos), window).long()
    count = len(cut)
    if count == 0:
        raise NMSolveError(f"tokens: {counted(len(tokens), 'token')} do not fill one window of {window}")
    if windows is not None:
        if windows > count:
            raise NMSolveError(
                f"windows: {windows} asked for, but {counted(len(tokens), 'token')} fill only {count}"
            )
        count = windows
    device = next((parameter.device for parameter in model.parameters()), tokens.device)
    losses = []
    disable = None if progress is None else not progress
    with quiet_model(model):
        for start in trange(0, count, batch_size, unit="batch", disable=disable):
            part = cut[start : start + batch_size].to(device)
            output = _call(model, part)
            logits = output if isinstance(output, Tensor) else output.logits
            for row, targets in zip(logits[:, :-1], part[:, 1:], strict=True):
                losses.append(float(nn.functional.cross_entropy(row.float(), targets, reduction="sum")))
    mean = sum(losses) / (count * (window - 1))
    if math.isnan(mean):
        raise NMSolveError("model: expected finite logits, got NaN")
    return Perplexity(
        math.exp(mean) if mean < 700 else math.inf,
        count,
        window,
        bos is not None,
        tuple(loss / (window - 1) for loss in losses),
    )


def _call(model: nn.Module, tokens: Tensor) -> Any:
    try:
        return model(tokens)
    except Exception as error:
        raise NMSolveError(
            f"window: the model cannot be called on windows of {counted(tokens.shape[1], 'token')}: "
            f"{type(error).__name__}: {error}"
        ) from error
