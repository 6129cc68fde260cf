"""The command ``nmsolve``: masks for checkpoints on disk, and what this machine can run.

torch is imported when there is work for it, so that ``--help`` and a mistyped argument answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from nmsolve.about import __version__, versions
from nmsolve.backends.devices import check_device, chosen_device, devices
from nmsolve.checkpoint.format import REPORT_NAME, SUFFIX, Checkpoint, open_checkpoint, output_names
from nmsolve.checkpoint.selection import DENSE_BY_DEFAULT, Selection, select_tensors
from nmsolve.cli.bench import add_commands as add_bench
from nmsolve.cli.permute import add_commands as add_permute
from nmsolve.cli.prune import add_commands
from nmsolve.errors import NMSolveError
from nmsolve.files import Interrupts, Staging, check_outside, check_replaceable
from nmsolve.pattern import NMPattern

if TYPE_CHECKING:
    from nmsolve.checkpoint.masking import Settings
    from nmsolve.checkpoint.report import Report

__all__ = ["main"]

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

EXIT_CODES = f"""\
exit codes:
  {OK:<3}  done
  {FAILED:<3}  the work failed; nothing was written
  {USAGE:<3}  an argument or the input is wrong; nothing was begun
  {INTERRUPTED:<3}  interrupted (SIGINT, SIGTERM, SIGHUP); nothing was written
"""

MAIN_HELP = """\
Provably optimal N:M and transposable N:M sparsity masks.

  nmsolve mask      mask the weights of a checkpoint
  nmsolve prune     prune a transformers model with calibration data
  nmsolve permute   reorder channels so that a mask keeps more
  nmsolve eval-ppl  perplexity of a language model
  nmsolve bench     time the mask methods on this machine
  nmsolve info      what is installed, and which backends can run here

nmsolve COMMAND --help says more, with examples.
"""

MASK_HELP = """\
Keeps the N largest of every M weights (by magnitude) and sets the others to zero.

IN is a .safetensors file, or a Hugging Face checkpoint folder, sharded or not. Without --transposable
the groups of M lie along the input dimension of each layer. With it every M x M block keeps N in each row
and N in each column, so that the transposed weight of the backward pass is N:M as well; the mask is the one
that keeps the most magnitude, and the report proves it with an upper bound.
"""

MASK_EPILOG = f"""\
examples:
  nmsolve mask model.safetensors --pattern 2:4 --out sparse.safetensors
      ordinary 2:4; writes sparse.safetensors, sparse.masks.safetensors and sparse.report.json

  nmsolve mask Llama-3.2-1B --pattern 8:16 --transposable --out Llama-3.2-1B-8of16
      optimal transposable masks for a whole folder; writes a folder of the same structure
      with masks/*.masks.safetensors and nmsolve_report.json in it

  nmsolve mask Llama-3.2-1B --pattern 8:16 --include '*.mlp.*' --exclude '*.layers.0.*' --dry-run
      which tensors would be masked, and why the others would not

which tensors:
  By default every floating-point '*.weight' of two dimensions or more whose matrices hold at least one
  M x M block, except
{{dense}}
  --include replaces this choice: whatever it matches is masked, if it has two dimensions or more.
  Convolution weights (out, in, kernel...) get a mask for each kernel position; a 3-D weight whose last
  dimension is not smaller than its first is a stack of matrices, one for each expert.

in Python:
  masks = nmsolve.load_masks("Llama-3.2-1B-8of16")     # name -> bool tensor, True = keep

Everything is written beside OUT in a hidden folder and renamed when it is complete. Memory holds a slab of
one tensor at a time, whatever the size of the model.

{EXIT_CODES}"""

INFO_HELP = "Versions, devices, and which backends can run on them (or why they cannot)."

INFO_EPILOG = f"""\
examples:
  nmsolve info
  nmsolve info --json

{EXIT_CODES}"""


class WorkFailed(Exception):
    """The work had begun and could not be finished."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        sys.exit(_fail(f"{message} (see {self.prog} --help)", USAGE))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code; argparse exits by itself for --help and mistakes."""
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
        return code
    except NMSolveError as error:
        return _fail(str(error), USAGE)
    except WorkFailed as error:
        return _fail(str(error), FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was written", INTERRUPTED)
    except Exception as error:
        if args.traceback:
            traceback.print_exc()
        return _fail(_describe(error), FAILED)


def _parser() -> Parser:
    def add(name: str, help_text: str, description: str, epilog: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=help_text,
            description=description,
            epilog=epilog,
            formatter_class=raw,
            allow_abbrev=False,
        )
        command.add_argument(
            "--traceback", action="store_true", help="print the traceback of an unexpected error"
        )
        return command

    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="nmsolve", description=MAIN_HELP, epilog=EXIT_CODES, formatter_class=raw, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"nmsolve {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    dense = "\n".join(f"    {what:<20} {'  '.join(globs)}" for what, globs in DENSE_BY_DEFAULT.items())
    mask = add("mask", "mask the weights of a checkpoint", MASK_HELP, MASK_EPILOG.format(dense=dense))
    mask.set_defaults(run=_mask)
    mask.add_argument("input", metavar="IN", type=Path, help="a .safetensors file or a checkpoint folder")
    mask.add_argument("--pattern", metavar="N:M", required=True, help="keep N of M, for example 8:16")
    mask.add_argument(
        "--out", metavar="OUT", type=Path, help="file (for a file) or folder (for a folder) to write"
    )
    mask.add_argument("--transposable", action="store_true", help="N:M along rows and along columns")
    mask.add_argument(
        "--method",
        choices=("exact", "tsenor", "greedy"),
        help="with --transposable: exact is optimal (default); tsenor and greedy approximate",
    )
    mask.add_argument(
        "--backend",
        choices=("auto", "triton", "cpu", "torch"),
        default="auto",
        help="auto (default) takes triton on a GPU, cpu (Numba) on a CPU if it is installed, else torch",
    )
    mask.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda or cuda:1 (default: cuda if there is one, else cpu)"
    )
    mask.add_argument(
        "--include",
        metavar="GLOB",
        action="append",
        default=[],
        help="mask the tensors that match, instead of the default choice; may be repeated",
    )
    mask.add_argument(
        "--exclude", metavar="GLOB", action="append", default=[], help="leave these dense; may be repeated"
    )
    mask.add_argument(
        "--input-first",
        metavar="GLOB",
        action="append",
        default=[],
        help="these weights are stored (in, out), not (out, in); known already for GPT-2; may be repeated",
    )
    mask.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    mask.add_argument(
        "--dry-run", action="store_true", help="list what would be masked or not, and write nothing"
    )
    mask.add_argument("--quiet", action="store_true", help="no progress bar and no summary")

    add_commands(add)
    add_permute(add)
    add_bench(add)

    info = add("info", "what is installed and what can run", INFO_HELP, INFO_EPILOG)
    info.set_defaults(run=_info)
    info.add_argument("--json", action="store_true", help="machine-readable")
    return parser


def _mask(args: argparse.Namespace) -> int:
    try:
        pattern = NMPattern.parse(args.pattern)
    except NMSolveError as error:
        raise NMSolveError(f"--pattern: {error}") from None
    if args.method is not None and not args.transposable:
        raise NMSolveError(
            f"--method: {args.method!r} needs --transposable; ordinary N:M has only one method"
        )
    check_device(args.device)
    if args.out is None and not args.dry_run:
        raise NMSolveError("--out: expected a path to write to (only --dry-run needs none)")

    checkpoint = open_checkpoint(args.input)
    out = None if args.out is None else _check_out(args.out, checkpoint, args.overwrite)
    selection = select_tensors(
        checkpoint, pattern, include=args.include, exclude=args.exclude, input_first=args.input_first
    )
    if args.dry_run or out is None:
        _print_selection(selection)
        return OK

    from nmsolve.backends.dispatch import select
    from nmsolve.checkpoint.masking import Settings, bytes_needed

    device = chosen_device(args.device)
    settings = Settings(pattern, args.transposable, args.method or "exact", args.backend, device)
    select(settings.backend, device, pattern.m)
    needed, free = bytes_needed(checkpoint, selection), shutil.disk_usage(out.parent).free
    if needed > free:
        raise NMSolveError(f"--out: {needed:,} bytes are needed in {out.parent}, {free:,} are free")

    report = _work(checkpoint, selection, settings, args, out)
    if not args.quiet:
        _print_summary(report, settings)
    return OK


def _work(
    checkpoint: Checkpoint, selection: Selection, settings: Settings, args: argparse.Namespace, out: Path
) -> Report:
    """Masks the checkpoint into a staging folder, then publishes it under the name ``out``."""
    from tqdm import tqdm

    from nmsolve.checkpoint.masking import write_masked
    from nmsolve.checkpoint.report import Report, SkippedTensor

    report = Report(
        input=str(args.input),
        output=str(args.out),
        settings={
            "pattern": str(settings.pattern),
            "transposable": settings.transposable,
            "method": settings.method if settings.transposable else "ordinary",
            "backend": settings.backend,
            "device": settings.device,
            "include": args.include,
            "exclude": args.exclude,
            "input_first": args.input_first,
        },
        skipped=[
            SkippedTensor(entry.name, shard.path.name, entry.shape, entry.dtype, reason)
            for shard, entry, reason in selection.skipped
        ],
        files_left_out=[path.as_posix() for path in checkpoint.left_out],
    )
    total = sum(entry.nbytes for _, entry in checkpoint.entries())
    try:
        with (
            Interrupts() as interrupts,
            Staging(out) as staging,
            tqdm(
                total=total,
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                disable=True if args.quiet else None,
            ) as bar,
        ):

            def progress(done: int, name: str) -> None:
                interrupts.check()
                bar.set_description_str(name, refresh=False)
                bar.update(done)

            write_masked(checkpoint, selection, settings, report, staging.path, out, progress)
            interrupts.hold()
            if checkpoint.is_folder:
                staging.publish_folder(replace=args.overwrite)
            else:
                staging.publish_files(output_names(out), replace=args.overwrite)
    except NMSolveError as error:
        raise WorkFailed(str(error)) from error
    return report


def _check_out(out: Path, checkpoint: Checkpoint, overwrite: bool) -> Path:
    """The resolved output path, once it is certain that nothing else stands or falls with it."""
    source, target = Path(os.path.realpath(checkpoint.root)), check_outside(out, checkpoint.root)
    if checkpoint.is_folder:
        check_replaceable(out, overwrite, target / REPORT_NAME)
        return target
    if target.suffix != SUFFIX:
        raise NMSolveError(f"--out: expected a name that ends in {SUFFIX}, as the input is a file, got {out}")
    for name in output_names(target):
        path = target.with_name(name)
        if path == source:
            raise NMSolveError(f"--out: {out} would replace the input with {name}")
        if path.exists() and not (overwrite and path.is_file()):
            remedy = "--overwrite replaces it" if path.is_file() else "it is not a file"
            raise NMSolveError(f"--out: {path} exists; {remedy}")
    return target


def _print_selection(selection: Selection) -> None:
    rows = [
        ("mask", item.entry, f"{item.layout.kind}{'' if item.layout.input_dim else ', stored (in, out)'}")
        for item in selection.masked
    ]
    rows += [("keep", entry, reason) for _, entry, reason in selection.skipped]
    width = max(len(entry.name) for _, entry, _ in rows)
    for verb, entry, note in rows:
        shape = "x".join(map(str, entry.shape)) or "scalar"
        print(f"{verb}  {entry.name:<{width}}  {entry.dtype:<4}  {shape:<14}  {note}")
    weights = sum(item.entry.size for item in selection.masked)
    print(f"{len(selection.masked)} of {len(rows)} tensors would be masked, {weights:,} weights")


def _print_summary(report: Report, settings: Settings) -> None:
    totals = report.totals()
    certificate = f"provably within {totals['gap']:.1e} of the optimum" if totals["gap"] else "the optimum"
    kind = (
        f"transposable {settings.pattern} by {settings.method}"
        if settings.transposable
        else str(settings.pattern)
    )
    backend = report.tensors[0].backend
    density = totals["kept"] / totals["weights"]
    print(f"{kind}: {totals['tensors_masked']} tensors, {totals['weights']:,} weights")
    print(f"{density:.2%} of the weights keep {totals['retained']:.2%} of the magnitude; {certificate}")
    print(f"{totals['tensors_skipped']} tensors stay dense")
    print(f"wrote {report.output} in {totals['seconds']:.1f} s ({backend} backend on {settings.device})")
    if report.files_left_out:
        print(f"not copied, as they hold other weights: {', '.join(report.files_left_out)}")


def _info(args: argparse.Namespace) -> int:
    found = devices()
    if args.json:
        data = {
            "nmsolve": __version__,
            "versions": versions(),
            "devices": [asdict(device) for device in found],
        }
        print(json.dumps(data, indent=2))
        return OK
    print(f"nmsolve {__version__}")
    for package, version in versions().items():
        print(f"  {package:<12} {version or 'not installed'}")
    for device in found:
        print(f"{device.name}: {device.description}")
        for name, reason in device.backends.items():
            taken = ", and auto takes it" if name == device.auto else ""
            print(f"  {name:<12} {f'cannot run: {reason}' if reason else f'can run{taken}'}")
    return OK


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"


def _fail(message: str, code: int) -> int:
    print(f"nmsolve: error: {' '.join(message.split())}", file=sys.stderr)
    return code
