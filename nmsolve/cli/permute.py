"""The command ``nmsolve permute``: a checkpoint with its channels in a better order, computing the same."""

from __future__ import annotations

import argparse
from pathlib import Path

from nmsolve.checkpoint.format import SUFFIX
from nmsolve.cli import options
from nmsolve.cli.command import Command, exit_codes
from nmsolve.errors import counted, printable
from nmsolve.files import Interrupts
from nmsolve.permute.on_disk import (
    ORDERS_FOLDER,
    ORDERS_SUFFIX,
    SCORES,
    PermuteReport,
    Prepared,
    permute_checkpoint,
    prepare,
)
from nmsolve.permute.strategies import LEARNING_STRATEGIES
from nmsolve.prune.on_disk import DTYPES

__all__ = ["COMMAND"]

DESCRIPTION = """\
Reorders the channels inside the blocks of a transformer so that an N:M mask keeps more, by magnitude or by
Wanda's scores, or so that the pruned model loses less (--learn). The model computes what it did before: every
order is folded into the layers that write the channels (down_proj's into up_proj and gate_proj, o_proj's into
v_proj inside each head, and so on). Orders that would need a gather at run time are left alone.
"""

EPILOG = f"""\
examples:
  nmsolve permute Llama-3.2-1B --pattern 2:4 --out Llama-3.2-1B-ordered
      then: nmsolve mask Llama-3.2-1B-ordered --pattern 2:4 --out sparse

  nmsolve permute Llama-3.2-1B --pattern 4:8 --transposable --include '*.mlp.*' --dry-run
      which channels would be reordered, and why others would not

  nmsolve permute SmolLM2 --pattern 2:4 --scores wanda --learn frank-wolfe --calibration text.txt \\
      --sequence-length 512 --batch-size 4 --out SmolLM2-ordered
      orders that lower the loss of the model with Wanda's masks; then: nmsolve prune --method wanda

The orders are kept in {ORDERS_FOLDER}/orders{SUFFIX} (of a file: NAME{ORDERS_SUFFIX});
nmsolve.permute.load_permutations reads them. OUT appears whole or not at all.

in Python:
  nmsolve.permute.permute_checkpoint("Llama-3.2-1B", "Llama-3.2-1B-ordered", "2:4")

{exit_codes()}"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="IN", type=Path, help="a .safetensors file or a checkpoint folder")
    parser.add_argument("--pattern", metavar="N:M", required=True, help="the masks to come, for example 2:4")
    options.add_out(parser)
    parser.add_argument("--transposable", action="store_true", help="for transposable masks")
    parser.add_argument("--passes", type=int, help="passes over all slots at most (10; transposable 3)")
    parser.add_argument("--window", type=int, help="channels given to groups together (by the pattern)")
    options.add_globs(parser, "--include", "only these couplings")
    parser.add_argument("--heads", type=int, help="attention heads, if no config.json says it")
    parser.add_argument("--key-value-heads", type=int, help="key/value heads, if no config.json says it")
    parser.add_argument(
        "--scores", choices=SCORES, default="magnitude", help="what the masks will go by (default: magnitude)"
    )
    parser.add_argument(
        "--learn",
        choices=LEARNING_STRATEGIES,
        help="then learn, for the loss of the pruned model, beginning with the orders found",
    )
    parser.add_argument("--steps", type=int, default=50, help="of learning, a batch each (default 50)")
    parser.add_argument("--block-size", type=int, help="channels that learning moves among each other")
    parser.add_argument("--groups", type=int, help="the same as a number of blocks")
    options.add_calibration(parser, "for wanda and learning: ")
    options.add_device(parser)
    options.add_dtype(parser, DTYPES, "that calibration and learning run in (default: the model's)")
    options.add_overwrite(parser, "replace OUT: a file, or a folder that nmsolve wrote")
    parser.add_argument("--dry-run", action="store_true", help="list the couplings and write nothing")
    options.add_quiet(parser)


def run(args: argparse.Namespace) -> None:
    pattern = options.pattern_of(args.pattern)
    options.tell_start(args, "permute", args.input)
    arguments = {
        "passes": args.passes,
        "window": args.window,
        "include": args.include,
        "heads": args.heads,
        "key_value_heads": args.key_value_heads,
        "transposable": args.transposable,
        "scores": args.scores,
        "learn": args.learn,
        "calibration": args.calibration,
        "device": args.device,
        "dtype": args.dtype,
        "overwrite": args.overwrite,
    }
    if args.dry_run:
        _print_couplings(prepare(args.input, args.out, pattern=pattern, **arguments))
        return
    out = options.need_out(args.out)
    with Interrupts() as interrupts:
        report = permute_checkpoint(
            args.input,
            out,
            pattern,
            steps=args.steps,
            block_size=args.block_size,
            groups=args.groups,
            samples=args.samples,
            sequence_length=args.sequence_length,
            batch_size=args.batch_size,
            seed=args.seed,
            bos=args.bos,
            progress=options.progress_of(args),
            interrupts=interrupts,
            **arguments,
        )
    if not args.quiet:
        _print_summary(report)


def _print_couplings(prepared: Prepared) -> None:
    for coupling in prepared.chosen:
        sites = ", ".join(site.tensor for site in coupling.producers)
        shape = f"{coupling.heads} x {coupling.size} channels"
        print(printable(f"reorder  {coupling.name}  {shape}, with {sites}"))
    for coupling, reason in prepared.others:
        print(printable(f"keep     {coupling.name}  {reason}"))


def _print_summary(report: PermuteReport) -> None:
    totals = report.totals()
    before, after = (totals[key] / totals["score"] for key in ("before", "after"))
    kind = "transposable " if report.transposable else ""
    reordered = counted(len(report.couplings), "coupling")
    print(f"{reordered} reordered; {kind}{report.pattern} masks of these weights keep")
    what = "magnitude" if report.scores == "magnitude" else "score"
    print(f"{before:.2%} of the {what} in the old order and {after:.2%} in the new one")
    if report.learning:
        held = [row["held_out"] for row in report.learning]
        print(f"learning: the loss of held-out text fell from {held[0]:.4f} to {min(held):.4f}")
    print(printable(f"wrote {report.output}"))


COMMAND = Command(
    "permute", "reorder channels so that a mask keeps more", DESCRIPTION, EPILOG, add_options, run
)
