"""Sinkhorn with its gradient against PyTorch loops of two forms and POT: writes bench/results/sinkhorn.csv.

Forward and backward of a batch, timed in turn, and the memory that is held between them: the tensors that
autograd saves, beside the logits. The gradients are compared first, with the log-domain loop's in float64.
Ours and the two loops take turns, and then POT and the reference do: who comes after a thousand calls of POT
finds cold caches and a full garbage collector, which for a small plan is most of the time.

"PermLLM's form" exponentiates once and then divides (bench/peers/permllm_sinkhorn.py): far less work than the
loop in the log domain, for logits that ``exp`` can take.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import common
import torch
from peers.permllm_sinkhorn import permllm_sinkhorn
from peers.pot_sinkhorn import pot_batch, pot_one_by_one
from peers.sinkhorn_loop import sinkhorn_loop
from torch import Tensor

import nmsolve

# Rows and columns, batch, iterations: the small ones are what one layer of PermLLM gives. POT and the
# reference run on those that are for all.
SHAPES = ((16, 256, 20), (64, 64, 20), (128, 16, 20), (512, 1, 20))
SMALL = tuple((m, batch, 5) for batch in (1, 9, 64) for m in (16, 32, 64, 128))
FOR_ALL = (*SHAPES, (16, 1, 5), (16, 9, 5), (64, 1, 5), (64, 9, 5), (128, 9, 5))
TEMPERATURE = 0.1
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LOG_DOMAIN = "PyTorch loop, log domain"
PERMLLM = "PyTorch loop, PermLLM's form"
SIDE_BY_SIDE = ("nmsolve, cpu", LOG_DOMAIN, PERMLLM)


def held_bytes(function: Callable[[Tensor], Tensor], logits: Tensor) -> int:
    """Bytes of the different storages that autograd saves, the logits' own left out."""
    storages: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        plan = function(logits)
    storages.pop(logits.untyped_storage().data_ptr(), None)
    del plan
    return sum(storages.values())


def call(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


def in_turn(
    calls: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]
) -> dict[str, common.Seconds]:
    """The times of ours and the loops, interleaved, and then those of the others."""
    found: dict[str, common.Seconds] = {}
    for together in (True, False):
        group = {name: call for name, call in calls.items() if (name in SIDE_BY_SIDE) is together}
        found |= common.interleaved(group, repeats, clock=clock)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--repeats", type=int, default=5, help="40 times as many of the small batches, 8 of 64 blocks (5)"
    )
    parser.add_argument("--out", type=Path, default=common.RESULTS / "sinkhorn.csv")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: the work of this process, on a machine that is busy",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = CLOCKS[arguments.clock]
    rows = []
    for m, batch, iterations in (*SHAPES, *SMALL):
        small = (m, batch, iterations) in SMALL
        repeats = arguments.repeats * ((40 if batch < 64 else 8) if small else 1)
        logits = torch.randn(batch, m, m, generator=torch.Generator().manual_seed(m))
        weight = torch.randn(batch, m, m, generator=torch.Generator().manual_seed(m + 1))
        contenders: dict[str, Callable[..., Tensor]] = {
            f"nmsolve, {name}": partial(nmsolve.sinkhorn, backend=name) for name in ("cpu", "torch")
        }
        contenders[LOG_DOMAIN] = sinkhorn_loop
        contenders[PERMLLM] = permllm_sinkhorn
        contenders["POT, batch"] = pot_batch
        contenders["POT, one by one"] = pot_one_by_one
        contenders = {
            name: lambda x, f=function, n=iterations: f(x, TEMPERATURE, n)  # type: ignore[misc]
            for name, function in contenders.items()
            if (m, batch, iterations) in FOR_ALL or name in SIDE_BY_SIDE
        }

        def both(function: Callable[[Tensor], Tensor], x: Tensor, pull: Tensor = weight) -> Tensor:
            source = x.detach().requires_grad_(True)
            (function(source) * pull).sum().backward()
            assert source.grad is not None
            return source.grad

        exact = both(contenders[LOG_DOMAIN], logits.double())
        errors = {
            name: float((both(function, logits) - exact).abs().max() / exact.abs().max())
            for name, function in contenders.items()
        }
        assert max(errors.values()) < 1e-4, errors
        source = logits.clone().requires_grad_(True)
        taken, forward, kept = (
            in_turn(
                {name: partial(run, function, x) for name, function in contenders.items()}, repeats, clock
            )
            for run, x in ((both, logits), (call, logits), (call, source))
        )
        for name, function in contenders.items():
            rows.append(
                {
                    "m": m,
                    "batch": batch,
                    "iterations": iterations,
                    "temperature": TEMPERATURE,
                    "method": name,
                    "threads": arguments.threads,
                    "clock": arguments.clock,
                    "forward_ms": 1e3 * forward[name].median,
                    "kept_ms": 1e3 * kept[name].median,
                    "both_ms": 1e3 * taken[name].median,
                    "both_ms_least": 1e3 * taken[name].least,
                    "both_ms_most": 1e3 * taken[name].most,
                    "loop_over_this": taken[LOG_DOMAIN].median / taken[name].median,
                    "held_bytes": held_bytes(function, source),
                    "gradient_error": errors[name],
                    "repeats": repeats,
                }
            )
            print(f"{batch} x {m}², {iterations}: {name} {rows[-1]['both_ms']:.4g} ms")
    common.write_csv(arguments.out, rows, "POT")


if __name__ == "__main__":
    main()
