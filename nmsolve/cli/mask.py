"""The command ``nmsolve mask``: masks for a checkpoint on disk."""

from __future__ import annotations

import argparse
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from nmsolve.checkpoint.on_disk import mask_checkpoint, prepare
from nmsolve.checkpoint.roles import DENSE_BY_NAME
from nmsolve.checkpoint.selection import Selection
from nmsolve.cli import options
from nmsolve.cli.command import Command, exit_codes
from nmsolve.errors import NMSolveError, counted, printable
from nmsolve.files import Interrupts
from nmsolve.ranks import Ranks

if TYPE_CHECKING:
    from nmsolve.checkpoint.report import Report

__all__ = ["COMMAND"]

DESCRIPTION = """\
Keeps the N largest of every M weights (by magnitude) and sets the others to zero.

IN is a .safetensors file, or a Hugging Face checkpoint folder, sharded or not. Without --transposable
the groups of M lie along the input dimension of each layer. With it every M x M block keeps N in each row
and N in each column, so that the transposed weight of the backward pass is N:M as well; the mask is the one
that keeps the most magnitude, and the report proves it with an upper bound.
"""

_DENSE = "\n".join(
    textwrap.fill("  ".join(names), 100, initial_indent=f"    {what:<17} ", subsequent_indent=" " * 22)
    for what, names in DENSE_BY_NAME.items()
)

_KEPT = "what is finished is kept"

EPILOG = f"""\
examples:
  nmsolve mask model.safetensors --pattern 2:4 --out sparse.safetensors
      ordinary 2:4; writes sparse.safetensors, sparse.masks.safetensors and sparse.report.json

  nmsolve mask Llama-3.2-1B --pattern 8:16 --transposable --out Llama-3.2-1B-8of16
      optimal transposable masks for a whole folder; writes a folder of the same structure
      with masks/*.masks.safetensors and nmsolve_report.json in it

  nmsolve mask Llama-3.2-1B --pattern 8:16 --include '*.mlp.*' --exclude '*.layers.0.*' --dry-run
      which tensors would be masked, and why the others would not

which tensors:
  By default the weights of linear and convolution layers whose matrices hold at least one M x M block, but
  no embeddings, heads and routers. config.json, in the folder or beside the file, names the architecture
  whose modules say what is what and which axis is the input, if transformers is installed and knows it; no
  code of a checkpoint is run. Without it names decide: every floating-point '*.weight' of two dimensions or
  more, but what ends with one of these parts (^ begins the name):
{_DENSE}
  --dry-run tells which it was, and why, for each tensor.
  --include replaces this choice: whatever it matches is masked, if it has two dimensions or more and its
  input is known. Convolution weights (out, in, kernel...) get a mask for each kernel position; a 3-D weight
  is a stack of matrices, one for each expert, or by its name alone if its last dimension is not smaller
  than its first.

in Python:
  nmsolve.checkpoint.mask_checkpoint("Llama-3.2-1B", "sparse", "8:16", transposable=True)
  masks = nmsolve.load_masks("Llama-3.2-1B-8of16")     # name -> bool tensor, True = keep

many processes, which all see the same files:
  torchrun --nproc-per-node 8 -m nmsolve mask BIG --pattern 8:16 --transposable --out OUT
      8 ranks share the work, each with a GPU if there are as many; on several hosts with torchrun's --nnodes
  nmsolve mask BIG --pattern 8:16 --transposable --out OUT --part 3/16
      without torchrun: the third of 16 parts, in any order, at the same time or not, on one machine or many
  nmsolve mask BIG --pattern 8:16 --transposable --out OUT --merge
      puts all parts in place once they are done

Everything is written beside OUT in a hidden folder and renamed when it is complete. After an error, an
interruption or a kill what is finished stays in .OUT.unfinished-..., and the same command goes on there, as
one process, as parts or with any number of ranks. Memory holds a few slabs of a tensor, whatever the size
of the model.

{exit_codes(_KEPT, _KEPT)}"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="IN", type=Path, help="a .safetensors file or a checkpoint folder")
    parser.add_argument("--pattern", metavar="N:M", required=True, help="keep N of M, for example 8:16")
    options.add_out(parser)
    options.add_transposable(parser)
    options.add_mask_method(parser, "--method")
    options.add_backend(parser)
    options.add_device(parser)
    parser.add_argument(
        "--certificate", choices=("on", "off"), default="on",
        help="off: no bound that proves how good transposable masks are; the same masks, sooner",
    )  # fmt: skip
    options.add_globs(parser, "--include", "mask the tensors that match, instead of the default choice")
    options.add_globs(parser, "--exclude", "leave these dense")
    options.add_globs(parser, "--input-first", "these weights are stored (in, out), where that is not known")
    options.add_globs(parser, "--input-last", "these weights are stored (out, in), where that is not known")
    options.add_overwrite(parser, "replace OUT: a file, or a folder that nmsolve wrote")
    parser.add_argument(
        "--dry-run", action="store_true", help="list what would be masked or not, and write nothing"
    )
    parser.add_argument(
        "--part", metavar="K/OF", help="only the K-th of OF parts, of a job array for one; --merge ends it"
    )
    parser.add_argument("--merge", action="store_true", help="put in place what all parts have finished")
    options.add_quiet(parser)


def run(args: argparse.Namespace) -> None:
    ranks: Ranks = args.ranks
    arguments = {
        "transposable": args.transposable,
        "method": args.method,
        "device": args.device,
        "include": args.include,
        "exclude": args.exclude,
        "input_first": args.input_first,
        "input_last": args.input_last,
        "overwrite": args.overwrite,
    }
    pattern = options.pattern_of(args.pattern)
    if ranks.rank == 0:
        options.tell_start(args, "mask", args.input)
    if args.dry_run:
        ranks.first(lambda: _print_selection(prepare(args.input, args.out, pattern, **arguments).selection))
        return
    out = options.need_out(args.out)
    part = _part_of(args.part)
    with Interrupts() as interrupts:
        report = mask_checkpoint(
            args.input,
            out,
            pattern,
            backend=args.backend,
            certificate=args.certificate == "on",
            part=part,
            merge=args.merge,
            ranks=ranks,
            progress=options.progress_of(args),
            interrupts=interrupts,
            **arguments,
        )
    if args.quiet or ranks.rank > 0:
        return
    if part is None:
        _print_summary(report)
    else:
        masked = counted(len(report.tensors), "tensor")
        print(f"part {part[0]} of {part[1]}: {masked} masked in {report.seconds:.1f} s; when all parts are")
        print("done, the same command with --merge instead of --part puts them in place")


def _part_of(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"([1-9][0-9]{0,8})/([1-9][0-9]{0,8})", text)
    if found is None or int(found[1]) > int(found[2]):
        raise NMSolveError(f"part: expected K/OF with 1 <= K <= OF, for example 3/16, got {text!r}")
    return int(found[1]), int(found[2])


def _print_selection(selection: Selection) -> None:
    rows = [("mask", item.entry, item.why) for item in selection.masked]
    rows += [("keep", entry, reason) for _, entry, reason in selection.skipped]
    width = max(len(printable(entry.name)) for _, entry, _ in rows)
    for verb, entry, note in rows:
        shape = "x".join(map(str, entry.shape)) or "scalar"
        print(f"{verb}  {printable(entry.name):<{width}}  {entry.dtype:<4}  {shape:<14}  {printable(note)}")
    print(f"decided by {printable(selection.chosen_by)}")
    weights = sum(item.entry.size for item in selection.masked)
    print(f"{len(selection.masked)} of {counted(len(rows), 'tensor')} would be masked, {weights:,} weights")


def _print_summary(report: Report) -> None:
    totals, settings = report.totals(), report.settings
    if totals["gap"] is None:
        certificate = "no certificate was asked for"
    else:
        certificate = (
            f"provably within {totals['gap']:.1e} of the optimum" if totals["gap"] else "the optimum"
        )
    kind = str(settings["pattern"])
    if settings["transposable"]:
        kind = f"transposable {kind} by {settings['method']}"
    where = f"{report.tensors[0].backend} backend on {settings['device']}"
    density = totals["kept"] / totals["weights"]
    print(f"{kind}: {counted(totals['tensors_masked'], 'tensor')}, {totals['weights']:,} weights")
    print(f"{density:.2%} of the weights keep {totals['retained']:.2%} of the magnitude; {certificate}")
    if totals["zeros_before"] > options.SOME * totals["weights"]:
        zeros, left = (totals[key] / totals["weights"] for key in ("zeros_before", "nonzero"))
        print(f"{zeros:.2%} of these weights were zero before: {left:.2%} are not zero now")
    skipped = totals["tensors_skipped"]
    print(f"{counted(skipped, 'tensor')} {'stays' if skipped == 1 else 'stay'} dense")
    print(f"wrote {printable(report.output)} in {totals['seconds']:.1f} s ({where})")
    if report.files_left_out:
        print(f"not copied, as they hold other weights: {printable(', '.join(report.files_left_out))}")


COMMAND = Command(
    "mask", "mask the weights of a checkpoint", DESCRIPTION, EPILOG, add_options, run, ranks=True
)
