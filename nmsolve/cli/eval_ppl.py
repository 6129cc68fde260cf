"""The command ``nmsolve eval-ppl``: the perplexity of a language model on disk."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from nmsolve.cli import options
from nmsolve.cli.command import Command, exit_codes, warnings_told
from nmsolve.errors import counted
from nmsolve.prune.on_disk import DTYPES, evaluate_checkpoint

__all__ = ["COMMAND"]

DESCRIPTION = """\
Perplexity of a causal language model on a text: exp of the mean negative log-likelihood of every token but
the first of each window. Windows do not overlap.
"""

EPILOG = f"""\
examples:
  nmsolve eval-ppl SmolLM2 --text test.txt
  nmsolve eval-ppl SmolLM2-16of32 --text test.txt --window 512 --windows 16 --json

in Python:
  nmsolve.prune.evaluate_checkpoint("SmolLM2", "test.txt", window=512).perplexity

{exit_codes()}"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint folder")
    parser.add_argument(
        "--text", metavar="FILE", type=Path, required=True, help="text, or tokens in a .safetensors file"
    )
    parser.add_argument(
        "--window", type=int, help="tokens in a window (default: what the model takes, 2048 at most)"
    )
    parser.add_argument("--windows", type=int, help="use only the first so many windows")
    parser.add_argument("--batch-size", type=int, default=1, help="windows in a forward pass (default 1)")
    options.add_bos(parser, "window of a text")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    options.add_quiet(parser, "no progress bar")
    options.add_device(parser)
    options.add_dtype(parser, DTYPES, "of the model while it runs (default: the checkpoint's)")


def run(args: argparse.Namespace) -> None:
    options.tell_start(args, "eval-ppl", args.model)
    with warnings_told():
        found = evaluate_checkpoint(
            args.model,
            args.text,
            window=args.window,
            windows=args.windows,
            batch_size=args.batch_size,
            bos=args.bos,
            device=args.device,
            dtype=args.dtype,
            progress=options.progress_of(args),
        )
    if args.json:
        print(json.dumps(found._asdict()))
    else:
        windows = f"{counted(found.windows, 'window')} of {counted(found.window, 'token')}"
        bos = ", begun with BOS" if found.bos else ""
        print(f"perplexity {found.perplexity:.4f} ({windows}{bos})")


COMMAND = Command("eval-ppl", "perplexity of a language model", DESCRIPTION, EPILOG, add_options, run)
