"""The command ``nmsolve permute``: a checkpoint with its channels in a better order, computing the same.

torch is imported when there is work for it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmsolve.checkpoint.format import REPORT_NAME, SUFFIX, Checkpoint, StreamWriter, open_checkpoint
from nmsolve.checkpoint.selection import DTYPES
from nmsolve.errors import NMSolveError
from nmsolve.files import Interrupts, Staging, check_outside, check_replaceable
from nmsolve.pattern import NMPattern

if TYPE_CHECKING:
    from torch import Tensor

    from nmsolve.permute.couplings import Coupling

__all__ = ["add_commands"]

OK = 0

# Beside a file's weights; in a folder of its own where loaders do not look for weights.
ORDERS_SUFFIX = ".permutations.safetensors"
ORDERS_FOLDER = "permutations"

HELP = """\
Reorders the channels inside the blocks of a transformer so that an N:M mask keeps more magnitude. The model
computes what it did before: every order is folded into the layers that write the channels (down_proj's into
up_proj and gate_proj, o_proj's into v_proj inside each head, and so on). Orders that would need a gather at
run time are left alone.
"""

EPILOG = f"""\
examples:
  nmsolve permute Llama-3.2-1B --pattern 2:4 --out Llama-3.2-1B-ordered
      then: nmsolve mask Llama-3.2-1B-ordered --pattern 2:4 --out sparse

  nmsolve permute Llama-3.2-1B --pattern 4:8 --transposable --include '*.mlp.*' --dry-run
      which channels would be reordered, and why others would not

The orders are kept in {ORDERS_FOLDER}/orders{SUFFIX} (of a file: NAME{ORDERS_SUFFIX});
nmsolve.permute.load_permutations reads them. OUT appears whole or not at all.
"""

AddCommand = Callable[[str, str, str, str], argparse.ArgumentParser]


def add_commands(add: AddCommand) -> None:
    """Adds the command; ``add(name, help, description, epilog)`` returns the parser of a new one."""
    parser = add("permute", "reorder channels so that a mask keeps more", HELP, EPILOG)
    parser.set_defaults(run=_permute)
    parser.add_argument("input", metavar="IN", type=Path, help="a .safetensors file or a checkpoint folder")
    parser.add_argument("--pattern", metavar="N:M", required=True, help="the masks to come, for example 2:4")
    parser.add_argument("--out", metavar="OUT", type=Path, help="file (for a file) or folder (for a folder)")
    parser.add_argument("--transposable", action="store_true", help="for transposable masks")
    parser.add_argument("--passes", type=int, default=3, help="passes of the search over all slots (3)")
    parser.add_argument(
        "--include", metavar="GLOB", action="append", default=[], help="only these couplings; may be repeated"
    )
    parser.add_argument("--heads", type=int, help="attention heads, if no config.json says it")
    parser.add_argument("--key-value-heads", type=int, help="key/value heads, if no config.json says it")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if nmsolve wrote it")
    parser.add_argument("--dry-run", action="store_true", help="list the couplings and write nothing")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no summary")


def _permute(args: argparse.Namespace) -> int:
    pattern = NMPattern.parse(args.pattern)
    if args.passes < 1:
        raise NMSolveError(f"--passes: expected at least 1, got {args.passes}")
    if args.out is None and not args.dry_run:
        raise NMSolveError("--out: expected a path to write to (only --dry-run needs none)")
    checkpoint = open_checkpoint(args.input)
    chosen, others = _choose(checkpoint, args)
    if args.dry_run:
        for coupling in chosen:
            sites = ", ".join(site.tensor for site in coupling.producers)
            print(f"reorder  {coupling.name}  {coupling.heads} x {coupling.size} channels, with {sites}")
        for coupling, reason in others:
            print(f"keep     {coupling.name}  {reason}")
        return OK
    if not chosen:
        raise NMSolveError(f"{args.input}: no channels whose order can be folded")
    out = _check_out(args.out, checkpoint, args.overwrite)
    with Interrupts() as interrupts, Staging(out) as staging:
        rows, orders = _search(checkpoint, chosen, pattern, args, interrupts)
        _write(checkpoint, chosen, orders, out, staging.path, interrupts)
        report = {"input": str(args.input), "pattern": str(pattern), "transposable": args.transposable}
        text = json.dumps({**report, "passes": args.passes, "couplings": rows}, indent=2) + "\n"
        if checkpoint.is_folder:
            (staging.path / REPORT_NAME).write_text(text, encoding="utf-8")
        interrupts.hold()
        if checkpoint.is_folder:
            staging.publish_folder(replace=args.overwrite)
        else:
            names = [f"{out.name.removesuffix(SUFFIX)}{ORDERS_SUFFIX}", out.name]
            staging.publish_files(names, replace=args.overwrite)
    if not args.quiet:
        before, after, total = (sum(row[key] for row in rows) for key in ("before", "after", "score"))
        kind = "transposable " if args.transposable else ""
        print(f"{len(rows)} couplings reordered; {kind}{pattern} masks of these weights keep")
        print(
            f"{before / total:.2%} of the magnitude in the old order and {after / total:.2%} in the new one"
        )
        print(f"wrote {out}")
    return OK


def _choose(
    checkpoint: Checkpoint, args: argparse.Namespace
) -> tuple[list[Coupling], list[tuple[Coupling, str]]]:
    """The couplings to reorder, and the others with the reason."""
    from nmsolve.permute.couplings import named_couplings

    config: dict[str, Any] = {}
    if checkpoint.is_folder and (checkpoint.root / "config.json").is_file():
        config = json.loads((checkpoint.root / "config.json").read_bytes())
    if args.heads is not None:
        config |= {"num_attention_heads": args.heads, "num_key_value_heads": args.key_value_heads}
    entries = {entry.name: entry for _, entry in checkpoint.entries()}
    couplings = named_couplings({name: entry.shape for name, entry in entries.items()}, config)
    for glob in args.include:
        if not any(fnmatchcase(coupling.name, glob) for coupling in couplings):
            raise NMSolveError(f"--include: {glob!r} matches none of the {len(couplings)} couplings")
    chosen, others = [], []
    for coupling in couplings:
        sites = (*coupling.consumers, *coupling.producers)
        unknown = [s.tensor for s in sites if entries[s.tensor].dtype not in DTYPES]
        if args.include and not any(fnmatchcase(coupling.name, glob) for glob in args.include):
            others.append((coupling, "matches no --include"))
        elif not coupling.folds:
            others.append((coupling, coupling.reason))
        elif unknown:
            others.append((coupling, f"{unknown[0]} has dtype {entries[unknown[0]].dtype}"))
        else:
            chosen.append(coupling)
    return chosen, others


def _search(
    checkpoint: Checkpoint,
    chosen: list[Coupling],
    pattern: NMPattern,
    args: argparse.Namespace,
    interrupts: Interrupts,
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Magnitude that masks keep before and after, and the order of every coupling."""
    import torch
    from tqdm import tqdm

    from nmsolve.permute.heuristics import retained_score, ria_permutation
    from nmsolve.permute.transposable import transposable_permutation

    rows: list[dict[str, Any]] = []
    orders: dict[str, Tensor] = {}
    for coupling in tqdm(chosen, unit="coupling", disable=True if args.quiet else None):
        interrupts.check()
        sites = [*coupling.consumers]
        if args.transposable:  # the masks of the producers feel the order of their rows as well
            sites += [site for site in coupling.producers if site.tensor.endswith(".weight")]
        weights = {site.tensor: _read(checkpoint, site.tensor).float().abs() for site in sites}
        scores = coupling.scores(weights, sites)
        if args.transposable:
            found = transposable_permutation(scores, pattern.n, pattern.m, rows=False, passes=args.passes)
            order, before, after = found.columns, found.before.sum(), found.after.sum()
        else:
            order = ria_permutation(scores, pattern.n, pattern.m, passes=args.passes)
            before = retained_score(scores, pattern.n, pattern.m).sum()
            after = retained_score(scores, pattern.n, pattern.m, order).sum()
            if after < before:
                order, after = torch.arange(coupling.size).expand(coupling.shape).contiguous(), before
        orders[coupling.name] = order
        kept = {"before": float(before), "after": float(after), "score": float(scores.double().sum())}
        rows.append({"name": coupling.name, "heads": coupling.heads, "channels": coupling.size, **kept})
    return rows, orders


def _write(
    checkpoint: Checkpoint,
    chosen: list[Coupling],
    orders: dict[str, Tensor],
    out: Path,
    folder: Path,
    interrupts: Interrupts,
) -> None:
    """The checkpoint with its tensors reordered, and the orders, into ``folder``."""
    import torch

    from nmsolve.permute.apply import fold_site, save_permutations

    moves: dict[str, list[tuple[Coupling, Any]]] = {}
    for coupling in chosen:
        for site in (*coupling.consumers, *coupling.producers):
            moves.setdefault(site.tensor, []).append((coupling, site))
    for shard in checkpoint.shards:
        path = folder / (shard.path.name if checkpoint.is_folder else out.name)
        size = sum(entry.nbytes for entry in shard.entries)
        with shard.path.open("rb") as source, StreamWriter(path, shard.header, size) as writer:
            for entry in shard.entries:
                interrupts.check()
                if entry.name not in moves:
                    for _ in writer.copy(source, entry):
                        interrupts.check()
                    continue
                tensor = _read(checkpoint, entry.name).clone()
                for coupling, site in moves[entry.name]:
                    fold_site(tensor, coupling, orders[coupling.name], site)
                writer.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    if checkpoint.is_folder:
        for name in checkpoint.extras:
            if name != Path(REPORT_NAME):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(checkpoint.root / name, folder / name)
        (folder / ORDERS_FOLDER).mkdir(exist_ok=True)
        save_permutations(folder / ORDERS_FOLDER / f"orders{SUFFIX}", orders)
    else:
        save_permutations(folder / f"{out.name.removesuffix(SUFFIX)}{ORDERS_SUFFIX}", orders)


def _read(checkpoint: Checkpoint, name: str) -> Tensor:
    from safetensors import safe_open

    shard = next(shard for shard, entry in checkpoint.entries() if entry.name == name)
    with safe_open(shard.path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _check_out(out: Path, checkpoint: Checkpoint, overwrite: bool) -> Path:
    """The resolved output path, once it is certain that nothing else stands or falls with it."""
    target = check_outside(out, checkpoint.root)
    if not checkpoint.is_folder and target.suffix != SUFFIX:
        raise NMSolveError(f"--out: expected a name that ends in {SUFFIX}, as the input is a file, got {out}")
    orders = target.with_name(f"{target.name.removesuffix(SUFFIX)}{ORDERS_SUFFIX}")
    check_replaceable(out, overwrite, target / ORDERS_FOLDER if checkpoint.is_folder else orders)
    return target
