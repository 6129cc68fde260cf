"""The ways to learn orders, by name. Without torch, so that a command can check what it was given."""

from __future__ import annotations

from typing import Literal

from nmsolve.errors import NMSolveError

__all__ = ["LEARNING_STRATEGIES", "LearningStrategy", "check_learning"]

LearningStrategy = Literal["permllm", "cost-matrix", "frank-wolfe"]

LEARNING_STRATEGIES = ("permllm", "cost-matrix", "frank-wolfe")


def check_learning(strategy: str, transposable: bool, name: str = "strategy") -> None:
    """
    Raises
    ------
    NMSolveError
        If there is no such strategy, or it does not learn for these masks.
    """
    if strategy not in LEARNING_STRATEGIES:
        raise NMSolveError(f"{name}: expected one of {', '.join(LEARNING_STRATEGIES)}, got {strategy!r}")
    if strategy == "frank-wolfe" and transposable:
        raise NMSolveError(f"transposable: {strategy!r} learns orders for ordinary masks")
