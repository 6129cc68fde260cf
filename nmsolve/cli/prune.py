"""The commands ``nmsolve prune`` and ``nmsolve eval-ppl``: transformers models on disk, pruned and evaluated.

torch and transformers are imported when there is work for them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmsolve.backends.devices import chosen_device
from nmsolve.checkpoint.format import INDEX_NAME, PICTURE_NAME, REPORT_NAME, SUFFIX, open_checkpoint
from nmsolve.errors import NMSolveError
from nmsolve.files import Interrupts, Staging, check_outside, check_replaceable
from nmsolve.pattern import NMPattern

if TYPE_CHECKING:
    from nmsolve.prune.model import PruneResult

__all__ = ["add_commands"]

OK, FAILED, INTERRUPTED = 0, 1, 130

PRUNE_HELP = """\
Prunes the linear layers of a transformers model to N:M, layer by layer, each calibrated on what the
already pruned layers before it put out.

MODEL is a checkpoint folder with safetensors weights. OUT gets a folder that transformers loads, with the
masks (masks/), nmsolve_report.json and nmsolve_report.png in it.
"""

PRUNE_EPILOG = """\
examples:
  nmsolve prune SmolLM2 --pattern 16:32 --transposable --calibration text.txt --out SmolLM2-16of32
      ALPS with optimal transposable masks

  nmsolve prune SmolLM2 --pattern 2:4 --pattern 'mlp.*=8:16' --pattern 'layers.0.*=dense' \\
      --method wanda --calibration text.txt --out sparse
      ordinary N:M by layer: the last pattern whose glob matches decides

  nmsolve eval-ppl SmolLM2-16of32 --text test.txt --window 512

A run that was interrupted or killed goes on where it was when the same command is given again: finished
layers are kept in a hidden folder beside OUT, which is removed at the end.

exit codes:
  0    done
  1    the work failed; finished layers are kept
  2    an argument or the input is wrong; nothing was begun
  130  interrupted (SIGINT, SIGTERM, SIGHUP); the same command goes on
"""

EVAL_HELP = """\
Perplexity of a causal language model on a text: exp of the mean negative log-likelihood of every token but
the first of each window. Windows do not overlap.
"""

EVAL_EPILOG = """\
examples:
  nmsolve eval-ppl SmolLM2 --text test.txt
  nmsolve eval-ppl SmolLM2-16of32 --text test.txt --window 512 --windows 16 --json
"""

AddCommand = Callable[[str, str, str, str], argparse.ArgumentParser]


def add_commands(add: AddCommand) -> None:
    """Adds both commands; ``add(name, help, description, epilog)`` returns the parser of a new one."""
    prune = add("prune", "prune a transformers model with calibration data", PRUNE_HELP, PRUNE_EPILOG)
    prune.set_defaults(run=_prune)
    prune.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint folder")
    prune.add_argument(
        "--pattern",
        metavar="[GLOB=]N:M",
        action="append",
        required=True,
        help="keep N of M, in all layers or in those that match; GLOB=dense leaves layers alone; repeatable",
    )
    prune.add_argument("--out", metavar="OUT", type=Path, required=True, help="folder to write")
    prune.add_argument("--transposable", action="store_true", help="N:M along rows and along columns")
    prune.add_argument(
        "--method",
        choices=("alps", "sparsegpt", "wanda", "ria", "magnitude"),
        default="alps",
        help="default: alps, the most accurate and the slowest; magnitude needs no calibration",
    )
    prune.add_argument(
        "--mask-method",
        choices=("exact", "tsenor", "greedy"),
        help="with --transposable: exact is optimal (default); tsenor and greedy approximate",
    )
    prune.add_argument(
        "--calibration",
        metavar="FILE",
        type=Path,
        help="text in UTF-8, or tokens (or images) in a .safetensors file with one tensor",
    )
    prune.add_argument("--samples", type=int, default=128, help="calibration sequences (default 128)")
    prune.add_argument(
        "--sequence-length", type=int, help="tokens in each (default: what the model takes, 2048 at most)"
    )
    prune.add_argument("--batch-size", type=int, default=1, help="sequences in a forward pass (default 1)")
    prune.add_argument("--seed", type=int, default=0, help="seed of the draw of sequences (default 0)")
    prune.add_argument(
        "--sequential",
        choices=("layer", "block", "off"),
        default="layer",
        help="what is pruned before a layer's inputs are measured: the layers before it (default), the "
        "blocks before it, or nothing",
    )
    prune.add_argument(
        "--initial-masks", metavar="PATH", type=Path, help="earlier masks: what they prune stays pruned"
    )
    prune.add_argument(
        "--dense", metavar="GLOB", action="append", default=[], help="leave these layers dense; repeatable"
    )
    prune.add_argument(
        "--iterations", type=int, help="of ALPS at most (default 300; fewer are faster and less accurate)"
    )
    prune.add_argument("--damping", type=float, help="of the Hessian, in mean diagonals (default 0.01)")
    prune.add_argument("--no-picture", action="store_true", help="write no nmsolve_report.png")
    prune.add_argument("--overwrite", action="store_true", help="replace OUT if nmsolve wrote it")
    prune.add_argument("--quiet", action="store_true", help="no progress bar and no summary")

    evaluate = add("eval-ppl", "perplexity of a language model", EVAL_HELP, EVAL_EPILOG)
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint folder")
    evaluate.add_argument(
        "--text", metavar="FILE", type=Path, required=True, help="text, or tokens in a .safetensors file"
    )
    evaluate.add_argument(
        "--window", type=int, help="tokens in a window (default: what the model takes, 2048 at most)"
    )
    evaluate.add_argument("--windows", type=int, help="use only the first so many windows")
    evaluate.add_argument("--batch-size", type=int, default=1, help="windows in a forward pass (default 1)")
    evaluate.add_argument("--json", action="store_true", help="machine-readable")
    evaluate.add_argument("--quiet", action="store_true", help="no progress bar")

    for command in (prune, evaluate):
        command.add_argument(
            "--device", metavar="DEVICE", help="cpu, cuda or cuda:1 (default: cuda if there is one)"
        )
        command.add_argument(
            "--dtype",
            choices=("float32", "bfloat16", "float16"),
            help="of the model while it runs and of what is saved (default: the checkpoint's)",
        )
    prune.add_argument(
        "--backend",
        choices=("auto", "triton", "cpu", "torch"),
        default="auto",
        help="of the mask solver (default auto)",
    )


def _prune(args: argparse.Namespace) -> int:
    patterns = _patterns(args.pattern)
    if args.mask_method is not None and not args.transposable:
        raise NMSolveError(f"--mask-method: {args.mask_method!r} needs --transposable")
    for option, value in (("--iterations", args.iterations), ("--damping", args.damping)):
        if value is not None and args.method not in (
            "alps",
            *(["sparsegpt"] if option == "--damping" else []),
        ):
            raise NMSolveError(f"{option}: method {args.method!r} has none")
    if args.calibration is None and args.method != "magnitude":
        raise NMSolveError(f"--calibration: needed for --method {args.method}")
    if args.calibration is not None and not args.calibration.is_file():
        raise NMSolveError(f"--calibration: {args.calibration} is not a file")
    out = _check_out(args.out, args.model, args.overwrite)
    device = chosen_device(args.device)
    if not args.no_picture:
        from nmsolve.prune.report import need_matplotlib

        need_matplotlib()
    model = _load_model(args.model, args.dtype)
    is_text = args.calibration is not None and args.calibration.suffix != SUFFIX
    tokenizer = _load_tokenizer(args.model, needed=is_text)

    from nmsolve.prune.model import prune_model

    resume = out.with_name(f".{out.name}.unfinished")
    options: dict[str, Any] = {
        name: value
        for name, value in (("iterations", args.iterations), ("damping", args.damping))
        if value is not None
    }
    try:
        with Interrupts() as interrupts, Staging(out) as staging:
            result = prune_model(
                model.to(device),
                args.calibration,
                patterns,
                transposable=args.transposable,
                method=args.method,
                mask_method=args.mask_method or "exact",
                backend=args.backend,
                sequential=args.sequential,
                initial_masks=args.initial_masks,
                dense=args.dense,
                tokenizer=tokenizer,
                samples=args.samples,
                sequence_length=args.sequence_length,
                batch_size=args.batch_size,
                seed=args.seed,
                resume=resume,
                progress=False if args.quiet else None,
                check=interrupts.check,
                **options,
            )
            result.save(model, staging.path, tokenizer=tokenizer, picture=not args.no_picture)
            _copy_extras(args.model, staging.path)
            interrupts.hold()
            staging.publish_folder(replace=args.overwrite)
    except KeyboardInterrupt:
        kept = f"finished layers are in {resume}; " if resume.exists() else ""
        print(f"nmsolve: interrupted; {kept}the same command goes on", file=sys.stderr)
        return INTERRUPTED
    except (NMSolveError, OSError) as error:
        if not resume.exists():
            raise
        what = getattr(error, "strerror", None) or error
        print(f"nmsolve: error: {what}; finished layers are in {resume}", file=sys.stderr)
        return FAILED
    shutil.rmtree(resume, ignore_errors=True)
    if not args.quiet:
        _print_summary(result, args.out)
    return OK


def _copy_extras(source: Path, out: Path) -> None:
    """Copies what else a checkpoint folder holds: licence, image processor, model card."""
    for path in open_checkpoint(source).extras:
        target = out / path
        ours = path.name in (INDEX_NAME, REPORT_NAME, PICTURE_NAME)
        if not ours and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, target)


def _evaluate(args: argparse.Namespace) -> int:
    if not args.text.is_file():
        raise NMSolveError(f"--text: {args.text} is not a file")
    device = chosen_device(args.device)
    model = _load_model(args.model, args.dtype)
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise NMSolveError(f"{args.model}: {type(model).__name__} is no causal language model")
    tokenizer = _load_tokenizer(args.model, needed=args.text.suffix != SUFFIX)

    from nmsolve.prune.calibration import read_tokens
    from nmsolve.prune.perplexity import perplexity

    found = perplexity(
        model.to(device),
        read_tokens(args.text, tokenizer),
        window=args.window,
        windows=args.windows,
        batch_size=args.batch_size,
        progress=False if args.quiet else None,
    )
    if args.json:
        print(json.dumps(found._asdict()))
    else:
        print(f"perplexity {found.perplexity:.4f} ({found.windows} windows of {found.window} tokens)")
    return OK


def _patterns(given: list[str]) -> dict[str, NMPattern | None]:
    found: dict[str, NMPattern | None] = {}
    for text in given:
        glob, _, pattern = text.rpartition("=")
        glob = glob or "*"
        found.pop(glob, None)  # the last one decides, and its place is last
        try:
            found[glob] = None if pattern == "dense" else NMPattern.parse(pattern)
        except NMSolveError as error:
            raise NMSolveError(f"--pattern: {error}") from None
    return found


def _check_out(out: Path, model: Path, overwrite: bool) -> Path:
    """The resolved output folder, once it is certain that it can be written."""
    target = check_outside(out, model)
    check_replaceable(out, overwrite, target / REPORT_NAME)
    return target


def _load_model(folder: Path, dtype: str | None) -> Any:
    """The model of a checkpoint folder, as the class that its config names; no code of it is run."""
    if importlib.util.find_spec("transformers") is None:
        raise NMSolveError("transformers is not installed: pip install 'nmsolve[hf]'")
    if not (folder / "config.json").is_file():
        raise NMSolveError(f"{folder}: expected a checkpoint folder with a config.json")
    open_checkpoint(folder)
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **_LOCAL)
    except (OSError, KeyError, ValueError) as error:
        raise NMSolveError(f"{folder}: the configuration cannot be loaded: {error}") from None
    named = config.architectures
    if not named:
        raise NMSolveError(f"{folder}: expected a config.json that names its architecture, found none")
    kind = getattr(transformers, named[0], None)
    if kind is None:
        raise NMSolveError(f"{folder}: transformers {transformers.__version__} has no {named[0]}")
    try:
        model, found = kind.from_pretrained(
            folder,
            use_safetensors=True,
            dtype="auto" if dtype is None else getattr(torch, dtype),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **_LOCAL,
        )
    except (OSError, KeyError, ValueError) as error:
        raise NMSolveError(f"{folder}: the model cannot be loaded: {error}") from None
    _check_loaded(folder, named[0], found)
    return model


# Neither the network nor code that comes with a checkpoint.
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def _check_loaded(folder: Path, kind: str, found: dict[str, Any]) -> None:
    """Weights that the folder lacks would be random numbers; those that the model lacks are left behind."""
    mismatched = sorted(found["mismatched_keys"])
    if mismatched:
        # transformers 4 gives names, later ones (name, shape in the folder, shape in the model).
        name, *shapes = (mismatched[0],) if isinstance(mismatched[0], str) else mismatched[0]
        detail = " against ".join(str(tuple(shape)) for shape in shapes)
        raise NMSolveError(
            f"{folder}: {name} has another shape than in {kind}" + (f": {detail}" if detail else "")
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise NMSolveError(
            f"{folder}: {kind} needs {missing[0]}, which is not there ({len(missing)} missing)"
        )
    unused = sorted(found["unexpected_keys"])
    if unused:
        print(
            f"nmsolve: warning: {len(unused)} tensors in {folder} are no part of {kind}: {unused[0]}"
            + (", ..." if len(unused) > 1 else ""),
            file=sys.stderr,
        )


def _load_tokenizer(folder: Path, needed: bool) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, **_LOCAL)
    except (OSError, ValueError, KeyError) as error:
        if needed:
            raise NMSolveError(f"{folder}: no tokenizer to read text with: {error}") from None
        return None


def _print_summary(result: PruneResult, out: Path) -> None:
    totals, settings = result.report.totals(), result.report.settings
    kind = f"transposable by {settings['mask_method']}" if settings["transposable"] else "ordinary"
    print(f"{settings['method']}, {settings['pattern']} {kind}: {totals['layers']} layers")
    share, retained = totals["kept"] / totals["weights"], totals["mean_retained"]
    print(f"{share:.2%} of {totals['weights']:,} weights kept, {retained:.2%} of the score (mean)")
    dense = totals["parameters"] - totals["weights"]
    print(f"{dense:,} of the model's {totals['parameters']:,} parameters are in no pruned layer")
    if totals["mean_relative_error"] is not None:
        tokens = max(layer.tokens for layer in result.report.layers)
        print(f"calibrated on {tokens:,} tokens")
        print(f"mean relative reconstruction error {totals['mean_relative_error']:.4f}")
    print(f"certificate: no mask keeps more than {totals['gap']:.1e} (relative) above these")
    peak = result.report.memory["peak"] / 2**30
    print(f"wrote {out} in {totals['seconds']:.1f} s, peak memory {peak:.2f} GiB")
