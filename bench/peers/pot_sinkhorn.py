"""Sinkhorn plans by POT, Python Optimal Transport, through its PyTorch backend, left to autograd.

Flamary et al.: POT: Python Optimal Transport, Journal of Machine Learning Research 22(78), 2021. Both
functions make a given number of iterations in the log domain, rows first, and never stop early: what
``nmsolve.sinkhorn`` computes.
"""

from __future__ import annotations

import ot
import torch
from ot.batch import bregman_log_projection_batch
from torch import Tensor


def pot_batch(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """Plans with line sums 1 of ``(B, M, M)`` logits, all at once."""
    ones = torch.ones_like(logits[:, 0])
    done = bregman_log_projection_batch(
        logits / temperature, ones, ones, max_iter=iterations, tol=-1.0, grad="autodiff"
    )
    return done["T"]


def pot_one_by_one(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """The same, one matrix after another; this function of POT does columns first, hence ``.T``."""
    ones = torch.ones_like(logits[0, 0])
    plans = [
        ot.bregman.sinkhorn_log(
            ones, ones, -block.T, temperature, numItermax=iterations, stopThr=-1.0, warn=False
        ).T
        for block in logits
    ]
    return torch.stack(plans)
