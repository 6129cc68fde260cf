"""Which of the calibration batches each process runs."""

from __future__ import annotations

from dataclasses import dataclass

from nmsolve.errors import NMSolveError
from nmsolve.prune.calibration import Batch, fingerprint, measures
from nmsolve.prune.peers import Peers

__all__ = ["Share", "share"]


@dataclass
class Share:
    """The batches that this process runs, of which ``counted`` count, and what there is in all.

    Those ``tried`` are what the walk through the model is planned on.
    """

    mine: list[Batch]
    tried: list[Batch]
    counted: int
    count: int
    measures: dict[str, int]


def share(batches: list[Batch], peers: Peers) -> Share:
    """Deals batches that all ranks have alike; those that differ are each rank's own share.

    All ranks of a sharded model run as many, since they take part in one another's passes: what they lack is
    filled up with a batch that does not count.
    """
    if peers.count == 1:
        return Share(batches, batches, len(batches), len(batches), measures(batches))
    told = peers.gather((fingerprint(batches), len(batches), measures(batches)))
    counts = [count for _, count, _ in told]
    if not all(counts):
        if any(counts):
            raise NMSolveError(f"calibration: rank {counts.index(0)} of {peers.count} has none, others have")
        return Share([], [], 0, 0, {})
    if len({digest for digest, _, _ in told}) == 1:
        mine, total, sums = batches[peers.rank :: peers.count], len(batches), measures(batches)
        if not peers.sharded:
            return Share(mine, batches, len(mine), total, sums)
        most = -(-total // peers.count)
    else:
        mine, total, most = list(batches), sum(counts), max(counts)
        rows = [row for _, _, row in told]
        sums = {name: sum(row[name] for row in rows) for name in rows[0] if all(name in row for row in rows)}
        if "sequence_length" in sums:
            sums["sequence_length"] = max(row["sequence_length"] for row in rows)
    filled = mine + batches[:1] * (most - len(mine))
    return Share(filled, filled, len(mine), total, sums)
