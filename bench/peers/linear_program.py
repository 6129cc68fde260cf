"""Transposable masks by general solvers of linear programs, several blocks side by side in one program.

The program is ``max <S, A>`` with row and column sums n and ``0 <= S <= 1``; its vertices are the masks.
Alone in a program, a small block is mostly overhead: ``TOGETHER`` of them take the least time.

* HiGHS' dual simplex, through SciPy. Huangfu, Hall: Parallelizing the dual revised simplex method,
  Mathematical Programming Computation 10 (2018).
* PDLP, OR-tools' own, with its default tolerances (1e-6). Applegate, Díaz, Hinder, Lu, Lubin, O'Donoghue,
  Schudy: Practical Large-Scale Linear Programming using Primal-Dual Hybrid Gradient (NeurIPS 2021, arXiv
  2106.04980). A first-order method ends near a vertex; its entries are taken by descending value, at most n
  a line, so that what rounding leaves open shows as short lines.
"""

from __future__ import annotations

import numpy as np
import torch
from ortools.pdlp import solve_log_pb2, solvers_pb2
from ortools.pdlp.python import pdlp
from peers.two_approximation import two_approximation
from scipy.optimize import linprog
from scipy.sparse import csc_matrix, eye_array, kron, vstack

TOGETHER = {"highs": 8, "pdlp": 16}


def line_sums(blocks: int, m: int) -> csc_matrix:
    """``(2 * blocks * m, blocks * m * m)``: the row sums, then the column sums, block after block."""
    ones = np.ones((1, m))
    one = vstack([kron(eye_array(m), ones), kron(ones, eye_array(m))])
    return csc_matrix(kron(eye_array(blocks), one))


def highs(blocks: np.ndarray, n: int) -> np.ndarray:
    """Optimal bool masks of float64 ``(B, m, m)`` scores."""
    masks = [_highs(part, n) for part in _parts(blocks, TOGETHER["highs"])]
    return np.concatenate(masks) if masks else np.zeros(blocks.shape, bool)


def primal_dual(blocks: np.ndarray, n: int) -> np.ndarray:
    """bool masks of float64 ``(B, m, m)`` scores, up to PDLP's tolerance."""
    plans = [_primal_dual(part, n) for part in _parts(blocks, TOGETHER["pdlp"])]
    if not plans:
        return np.zeros(blocks.shape, bool)
    plan = np.concatenate(plans)
    return (two_approximation(torch.from_numpy(plan), n) & torch.from_numpy(plan > 1e-3)).numpy()


def _parts(blocks: np.ndarray, together: int) -> list[np.ndarray]:
    return [blocks[k : k + together] for k in range(0, len(blocks), together)]


def _relative(blocks: np.ndarray) -> np.ndarray:
    """Scores with the largest of each block at 1, as one vector."""
    peak = np.abs(blocks).max((1, 2), keepdims=True)
    return (blocks / np.where(peak > 0, peak, 1.0)).ravel()


def _highs(blocks: np.ndarray, n: int) -> np.ndarray:
    count, m, _ = blocks.shape
    sums = line_sums(count, m)
    result = linprog(
        -_relative(blocks), A_eq=sums, b_eq=np.full(sums.shape[0], n), bounds=(0, 1), method="highs-ds"
    )
    if result.status != 0:
        raise RuntimeError(result.message)
    return result.x.reshape(blocks.shape) > 0.5


def _primal_dual(blocks: np.ndarray, n: int) -> np.ndarray:
    count, m, _ = blocks.shape
    sums = line_sums(count, m)
    program = pdlp.QuadraticProgram()
    program.resize_and_initialize(sums.shape[1], sums.shape[0])
    program.objective_vector = -_relative(blocks)
    program.constraint_matrix = sums
    program.constraint_lower_bounds = np.full(sums.shape[0], float(n))
    program.constraint_upper_bounds = np.full(sums.shape[0], float(n))
    program.variable_lower_bounds = np.zeros(sums.shape[1])
    program.variable_upper_bounds = np.ones(sums.shape[1])
    result = pdlp.primal_dual_hybrid_gradient(program, solvers_pb2.PrimalDualHybridGradientParams())
    reason = solve_log_pb2.TerminationReason.Name(result.solve_log.termination_reason)
    if reason != "TERMINATION_REASON_OPTIMAL":
        raise RuntimeError(f"PDLP ended with {reason}")
    return np.asarray(result.primal_solution).reshape(blocks.shape)
