"""The command ``nmsolve prune``: a transformers model on disk, pruned with calibration data."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from nmsolve.cli import options
from nmsolve.cli.command import Command, exit_codes, warnings_told
from nmsolve.errors import counted, printable
from nmsolve.files import Interrupts
from nmsolve.pattern import NMPattern
from nmsolve.prune.methods import OFFLOADS, PRUNING_METHODS, SEQUENTIAL
from nmsolve.prune.on_disk import DTYPES, prune_checkpoint
from nmsolve.ranks import Ranks

if TYPE_CHECKING:
    from nmsolve.prune.model import PruneResult
    from nmsolve.prune.report import LayerReport

__all__ = ["COMMAND"]

DESCRIPTION = """\
Prunes the linear layers of a transformers model to N:M, layer by layer, each calibrated on what the
already pruned layers before it put out.

MODEL is a checkpoint folder with safetensors weights. OUT gets a folder that transformers loads, with the
masks (masks/), nmsolve_report.json and nmsolve_report.png in it.
"""

EPILOG = f"""\
examples:
  nmsolve prune SmolLM2 --pattern 16:32 --transposable --calibration text.txt --out SmolLM2-16of32
      ALPS with optimal transposable masks

  nmsolve prune SmolLM2 --pattern 2:4 --pattern 'mlp.*=8:16' --pattern 'layers.0.*=dense' \\
      --method wanda --calibration text.txt --out sparse
      ordinary N:M by layer: the last pattern whose glob matches decides

  nmsolve eval-ppl SmolLM2-16of32 --text test.txt --window 512

  torchrun --nproc-per-node 4 -m nmsolve prune SmolLM2 --pattern 2:4 --calibration text.txt --out sparse
      four processes, each with its share of the calibration and of the layers

A run that was interrupted or killed goes on where it was when the same command is given again: finished
layers are kept in a hidden folder beside OUT, which is removed at the end.

in Python:
  nmsolve.prune.prune_checkpoint("SmolLM2", "sparse", "2:4", method="wanda", calibration="text.txt")

{exit_codes("finished layers are kept", "the same command goes on")}"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint folder")
    parser.add_argument(
        "--pattern",
        metavar="[GLOB=]N:M",
        action="append",
        required=True,
        help="keep N of M, in all layers or in those that match; GLOB=dense leaves layers alone; repeatable",
    )
    options.add_out(parser, "folder to write", required=True)
    options.add_transposable(parser)
    parser.add_argument(
        "--method",
        choices=tuple(PRUNING_METHODS),
        default="alps",
        help="default: alps, the most accurate; frank-wolfe, the most accurate that leaves the kept weights "
        "as they are; magnitude needs no calibration",
    )
    options.add_mask_method(parser, "--mask-method")
    options.add_calibration(parser)
    parser.add_argument(
        "--sequential",
        choices=SEQUENTIAL,
        default="layer",
        help="what is pruned before a layer's inputs are measured: the layers before it (default), the "
        "blocks before it, or nothing",
    )
    parser.add_argument(
        "--initial-masks", metavar="PATH", type=Path, help="earlier masks: what they prune stays pruned"
    )
    options.add_globs(parser, "--dense", "leave these layers dense")
    parser.add_argument(
        "--iterations",
        type=int,
        help="of alps or frank-wolfe at most (default 300 and 40; fewer are faster and less accurate)",
    )
    parser.add_argument("--damping", type=float, help="of the Hessian, in mean diagonals (default 0.01)")
    parser.add_argument(
        "--all-experts",
        action="store_true",
        help="calibrate every expert of a mixture on every token, not only on those that it is sent",
    )
    parser.add_argument(
        "--exact-error",
        action="store_true",
        help="the report's error over all tokens, for wanda, ria and magnitude, too (needs the memory of a "
        "Hessian; by default theirs is that of 512 tokens)",
    )
    parser.add_argument(
        "--offload",
        choices=OFFLOADS,
        help="one block at a time on the device, the rest on the host (cpu) or in the files of MODEL (disk)",
    )
    parser.add_argument("--no-picture", action="store_true", help="write no nmsolve_report.png")
    options.add_overwrite(parser, "replace OUT if nmsolve wrote it")
    options.add_quiet(parser)
    options.add_device(parser)
    options.add_dtype(parser, DTYPES)
    options.add_backend(parser)


def run(args: argparse.Namespace) -> None:
    ranks: Ranks = args.ranks
    patterns = _patterns(args.pattern)
    if ranks.rank == 0:
        options.tell_start(args, "prune", args.model)
    with warnings_told(ranks), Interrupts() as interrupts:
        result = prune_checkpoint(
            args.model,
            args.out,
            patterns,
            calibration=args.calibration,
            transposable=args.transposable,
            method=args.method,
            mask_method=args.mask_method,
            backend=args.backend,
            device=args.device,
            dtype=args.dtype,
            sequential=args.sequential,
            initial_masks=args.initial_masks,
            dense=args.dense,
            samples=args.samples,
            sequence_length=args.sequence_length,
            batch_size=args.batch_size,
            seed=args.seed,
            bos=args.bos,
            iterations=args.iterations,
            damping=args.damping,
            all_experts=args.all_experts,
            exact_error=args.exact_error,
            offload=args.offload,
            picture=not args.no_picture,
            overwrite=args.overwrite,
            ranks=ranks,
            progress=options.progress_of(args),
            interrupts=interrupts,
        )
    if not args.quiet and ranks.rank == 0:
        _print_summary(result, args.out)


def _patterns(given: list[str]) -> dict[str, NMPattern | None]:
    found: dict[str, NMPattern | None] = {}
    for text in given:
        glob, _, pattern = text.rpartition("=")
        glob = glob or "*"
        found.pop(glob, None)  # the last one decides, and its place is last
        found[glob] = None if pattern == "dense" else options.pattern_of(pattern)
    return found


def _print_summary(result: PruneResult, out: Path) -> None:
    report = result.report
    totals, settings = report.totals(), report.settings
    print(printable(f"{report.title()}: {counted(totals['layers'], 'layer')}"))
    share, retained = totals["kept"] / totals["weights"], totals["mean_retained"]
    print(f"{share:.2%} of {totals['weights']:,} weights kept, {retained:.2%} of the score (mean)")
    if totals["zeros_before"] > options.SOME * totals["weights"]:
        print(f"{totals['zeros_before'] / totals['weights']:.2%} of these weights were zero before")
    dense = totals["parameters"] - totals["weights"]
    print(f"{dense:,} of the model's {counted(totals['parameters'], 'parameter')} are in no pruned layer")
    if totals["mean_relative_error"] is not None:
        tokens = _tokens(report.layers)
        bos = ", each sequence begun with BOS" if settings.get("bos") else ""
        print(f"calibrated on {counted(tokens, 'token')}{bos}")
        print(f"mean relative reconstruction error {totals['mean_relative_error']:.4f}")
    print(f"certificate: no mask keeps more than {totals['gap']:.1e} (relative) above these")
    peak = report.memory["peak"] / 2**30
    print(printable(f"wrote {out} in {totals['seconds']:.1f} s, peak memory {peak:.2f} GiB"))


def _tokens(layers: list[LayerReport]) -> int:
    """How many tokens were calibrated on: experts see some of them, and all experts of a stack more."""
    return max(layer.tokens for layer in [x for x in layers if x.expert_tokens is None] or layers)


COMMAND = Command(
    "prune",
    "prune a transformers model with calibration data",
    DESCRIPTION,
    EPILOG,
    add_options,
    run,
    ranks=True,
)
