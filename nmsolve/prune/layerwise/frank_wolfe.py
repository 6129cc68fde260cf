r"""Frank-Wolfe on the mask of a layer whose kept weights stay as they are, then exchanges.

With :math:`G = X^\top X` and :math:`E = (1 - M) \odot W`, what the layer loses is
:math:`f(M) = \sum E \odot E G`, convex in M. SparseFW (arXiv 2510.13713) relaxes ordinary masks M to the
polytope that they span and goes, by Frank-Wolfe, towards the mask that the linearised loss likes best. Here
that mask is the exact solver's answer, so that transposable masks have the same method. Three things differ.

**A penalty that masks do not feel.** The minimum of f over the polytope lies far from any mask, and rounding
it loses most of what was gained. The loss

.. math:: f_\theta(M) = f(M) + \theta \sum_{ij} W_{ij}^2 G_{jj} \, M_{ij} (1 - M_{ij})

is f itself at every mask, and fractions cost the more the larger theta; it grows from 0 to 2 in equal steps.
From theta = 1 on no entry gains by a fraction on its own account.

**Steps of their own.** f is a sum over rows, so every band of M rows (every row, where masks are ordinary)
has its own best step. Where the loss is concave along the way, that is the whole way.

**Exchanges.** The rounded mask is then improved by exact descent: in a group of an ordinary mask an entry is
dropped and another kept; in a block of a transposable mask two rows exchange columns j and k, one drops j and
keeps k, the other the reverse, so that all counts stay. As f is a sum over rows, the best rectangle of a
block takes the best row for (j, k) and the best row for (k, j), found in M^3 operations, and its gain is
exact (for ordinary masks: SparseSwaps, arXiv 2512.10922).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nmsolve.errors import NMSolveError
from nmsolve.ops.validation import describe
from nmsolve.prune.layerwise.problem import Pruned, check_hessian, check_problem
from nmsolve.prune.rule import MaskRule

__all__ = ["frank_wolfe", "layer_error_bound"]

ITERATIONS = 40
PENALTY = 2.0
SWEEPS = 10

# What scores add to the relaxed mask where that leaves a choice.
_TIE = 1e-3
# Exchanges of a block each time a sweep comes by; what one must gain of its band's loss, and a sweep of the
# whole one for another to follow; and the elements of the table of exchanges worked on together.
_VISITS, _LEAST, _LEAST_SWEEP, _CHUNK = 2, 1e-6, 2e-3, 1 << 22


class _Layer(NamedTuple):
    """Weight and Hessian, what is pruned in any case, the rows of a band, columns in runs of ``run``."""

    weight: Tensor
    hessian: Tensor
    lost: Tensor | None
    band: int
    run: int
    rule: MaskRule

    @property
    def energy(self) -> Tensor:
        """``W_ij^2 G_jj``, the loss of an entry on its own: Wanda's scores, squared."""
        return self.weight.square() * self.hessian.diagonal()

    def missing(self, mask: Tensor) -> Tensor:
        """What ``mask`` takes from the weight, of which earlier masks have taken their part."""
        missing = self.weight * (1 - mask)
        return missing if self.lost is None else missing + self.lost

    def bands(self, entries: Tensor) -> Tensor:
        """Sums over the entries of each band of rows."""
        rows = entries.sum(1)
        short = -len(rows) % self.band
        return torch.nn.functional.pad(rows, (0, short)).unflatten(0, (-1, self.band)).sum(1)

    def rows(self, bands: Tensor) -> Tensor:
        """A number of each band, for each of its rows."""
        return bands.repeat_interleave(self.band)[: len(self.weight)].unsqueeze(1)

    def split(self, scores: Tensor) -> Tensor:
        """``(positions, out, in)`` for the mask solver."""
        return scores.unflatten(1, (-1, self.run)).movedim(1, 0)

    def step(self, scores: Tensor) -> Tensor:
        return self.rule.step(self.split(scores)).movedim(0, 1).flatten(1)

    def choose(self, scores: Tensor) -> Tensor:
        return self.rule.choose(self.split(scores)).movedim(0, 1).flatten(1)


@torch.no_grad()
def frank_wolfe(
    weight: Tensor,
    hessian: Tensor,
    rule: MaskRule,
    *,
    iterations: int = ITERATIONS,
    penalty: float = PENALTY,
    sweeps: int = SWEEPS,
    start: Tensor | None = None,
    positions: int = 1,
    allowed: Tensor | None = None,
) -> Pruned:
    """Prunes one layer by Frank-Wolfe and exchanges; the weights that stay do not change.

    Parameters
    ----------
    weight : Tensor
        ``(out, in)``.
    hessian : Tensor
        ``(in, in)``: ``X.T @ X`` over the inputs, in float32 or float64, which the work is done in.
    rule : MaskRule
        Pattern and mask solver. Its tally has the certificate of the rounding: ``retained`` is the share of
        the relaxed mask that the rounded one keeps, 1 where the relaxed mask had no fractions left.
    iterations : int
        At most this many steps, which end earlier at a mask that the linearised loss likes best; 0 leaves the
        exchanges alone.
    penalty : float
        The theta that grows from 0; 0 is Frank-Wolfe on the loss itself.
    sweeps : int
        At most this many sweeps of exchanges; they end when one gains less than 0.2 % of the loss.
    start : Tensor, optional
        bool ``(out, in)``: the mask to start from, such as that of another method. By default the one of
        largest squared Wanda scores, which is the best if inputs are uncorrelated.
    positions : int
        The columns are this many runs of equal length (kernel positions of a convolution, each with all its
        input channels); groups of M do not reach from one run into the next.
    allowed : Tensor, optional
        bool ``(out, in)``: an earlier mask; what is False there is pruned as well.

    Returns
    -------
    Pruned
        Weight in the Hessian's dtype, and mask.

    Raises
    ------
    NMSolveError
        If an argument is not as described.

    Examples
    --------
    >>> inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    >>> weight = torch.ones(8, 8)
    >>> pruned = frank_wolfe(weight, inputs.T @ inputs, MaskRule("2:4"))
    >>> nmsolve.check_mask(pruned.mask, 2, 4)
    >>> bool((pruned.weight[pruned.mask] == 1).all())
    True
    """
    layer = _layer(weight, hessian, rule, positions, allowed)
    _check_count("iterations", iterations)
    _check_count("sweeps", sweeps)
    if isinstance(penalty, bool) or not isinstance(penalty, int | float) or not 0 <= penalty < float("inf"):
        raise NMSolveError(f"penalty: expected a number of at least 0, got {penalty!r}")
    if start is not None and (start.dtype != torch.bool or start.shape != weight.shape):
        raise NMSolveError(
            f"start: expected a bool tensor of shape {tuple(weight.shape)}, got {describe(start)}"
        )
    with torch.autocast(weight.device.type, enabled=False):
        energy = layer.energy
        mask = layer.step(energy) if start is None else start
        relaxed = _descend(layer, mask.to(energy.dtype), iterations, penalty)
        ties = _TIE * energy / energy.max().clamp_min(torch.finfo(energy.dtype).tiny)
        mask = layer.choose(relaxed.clamp_min_(0) + ties)
        _exchange(layer, mask, sweeps)
        if allowed is not None:
            mask = mask & allowed
        return Pruned(weight.to(hessian.dtype) * mask, mask)


@torch.no_grad()
def layer_error_bound(
    weight: Tensor, hessian: Tensor, rule: MaskRule, *, iterations: int = 100, positions: int = 1
) -> float:
    """What every mask of the pattern loses at least, if the weights that stay do not change.

    The loss is convex in the relaxed mask, so that its linearisation anywhere is below it, and the exact
    solver gives the least value of that over all masks; the best one of ``iterations`` is kept for every
    band. Most of what it leaves open is the distance between the polytope and the masks in it.

    Returns
    -------
    float
        A share of ``||X W^T||^2``, as reconstruction errors are.

    Raises
    ------
    NMSolveError
        If an argument is not as described for :func:`frank_wolfe`, or the rule's method is not "exact".

    Examples
    --------
    >>> inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    >>> weight, hessian, rule = torch.ones(8, 8), inputs.T @ inputs, MaskRule("2:4")
    >>> lost = weight - frank_wolfe(weight, hessian, rule).weight
    >>> error = float((inputs @ lost.T).square().sum() / (inputs @ weight.T).square().sum())
    >>> 0 < layer_error_bound(weight, hessian, rule) < error
    True
    """
    if rule.method != "exact":
        raise NMSolveError(f"rule: a bound needs the exact mask method, got {rule.method!r}")
    layer = _layer(weight, hessian, rule, positions, None)
    _check_count("iterations", iterations)
    with torch.autocast(weight.device.type, enabled=False):
        whole = float(((layer.weight @ hessian) * layer.weight).sum())
        mask = layer.step(layer.energy).to(hessian.dtype)
        missing = layer.missing(mask)
        image = missing @ hessian
        best = torch.zeros_like(layer.bands(mask))
        for _ in range(iterations):
            scores = layer.weight * image
            way = layer.step(scores).to(mask.dtype) - mask
            gain = layer.bands(scores * way)
            best = torch.maximum(best, layer.bands(missing * image) - 2 * gain)
            if not bool((gain > 0).any()):
                break
            step = layer.weight * way
            turn = step @ hessian
            size = layer.rows(_step_sizes(gain, layer.bands(step * turn)))
            mask, missing, image = mask + size * way, missing - size * step, image - size * turn
    return float(best.sum(dtype=torch.float64)) / whole if whole else 0.0


def _layer(weight: Tensor, hessian: Tensor, rule: MaskRule, positions: int, allowed: Tensor | None) -> _Layer:
    check_hessian(hessian)
    check_problem(weight, len(hessian), positions, allowed)
    weight = weight.to(hessian.dtype)
    lost = None if allowed is None else weight * ~allowed
    band = rule.pattern.m if rule.transposable else 1
    return _Layer(
        weight if lost is None else weight - lost, hessian, lost, band, len(hessian) // positions, rule
    )


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise NMSolveError(f"{name}: expected an integer of at least 0, got {value!r}")


def _step_sizes(gain: Tensor, curvature: Tensor) -> Tensor:
    """The best steps, of 1 at most, where the loss falls by ``2 gain t - curvature t^2``."""
    inside = (gain / curvature.clamp_min(torch.finfo(gain.dtype).tiny)).clamp(0, 1)
    return torch.where(curvature > 0, inside, (gain > 0).to(gain.dtype))


def _descend(layer: _Layer, mask: Tensor, iterations: int, theta: float) -> Tensor:
    """The relaxed mask after the steps, the penalty growing up to ``theta``."""
    energy = layer.energy
    image = layer.missing(mask) @ layer.hessian
    for k in range(iterations):
        penalty = energy * (theta * k / iterations)
        # Half of what the loss falls by for each unit of an entry.
        scores = layer.weight * image - penalty * (0.5 - mask)
        vertex = layer.step(scores)
        way = vertex.to(mask.dtype) - mask
        if not bool(way.any()):  # more of the penalty would not move it either
            break
        step = layer.weight * way
        turn = step @ layer.hessian
        curvature = layer.bands(step * turn - penalty * way.square())
        size = layer.rows(_step_sizes(layer.bands(scores * way), curvature))
        mask = torch.addcmul(mask, size, way)
        image.sub_(turn.mul_(size))
    return mask


def _exchange(layer: _Layer, mask: Tensor, sweeps: int) -> None:
    """Exchanges in place that lower the loss, until a sweep gains next to nothing."""
    size, m = len(layer.hessian), layer.rule.pattern.m
    groups = [
        slice(a, min(a + m, base + layer.run))
        for base in range(0, size, layer.run)
        for a in range(base, base + layer.run, m)
    ]
    before = torch.inf
    for _ in range(sweeps):
        missing = layer.missing(mask.to(layer.weight.dtype))
        image = missing @ layer.hessian
        losses = layer.bands(missing * image)
        loss = float(losses.sum(dtype=torch.float64))
        if loss >= (1 - _LEAST_SWEEP) * before:
            break
        before = loss
        for columns in groups:
            for _ in range(_VISITS):
                rows, out, back = _best_exchanges(layer, mask, image, columns, -_LEAST * losses)
                if not len(rows):
                    break
                mask[rows, out], mask[rows, back] = False, True
                dropped, kept = layer.weight[rows, out, None], layer.weight[rows, back, None]
                image[rows] += dropped * layer.hessian[out] - kept * layer.hessian[back]


def _best_exchanges(
    layer: _Layer, mask: Tensor, image: Tensor, columns: slice, least: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, the columns they drop and those they keep instead: the best exchange of each block that gains."""
    first, width = columns.start, columns.stop - columns.start
    hessian = layer.hessian[columns, columns]
    bands = max(1, _CHUNK // (layer.band * width * width))
    found = []
    for start in range(0, len(least), bands):
        at = slice(start * layer.band, (start + bands) * layer.band)
        w, g, kept = layer.weight[at, columns], image[at, columns], mask[at, columns]
        alone, slope = w.square() * hessian.diagonal(), 2 * w * g
        # What row i loses more by dropping j (second dimension) and keeping k (third).
        table = (alone + slope).unsqueeze(2) + (alone - slope).unsqueeze(1)
        table.addcmul_(w.unsqueeze(2) * hessian, w.unsqueeze(1), value=-2)
        table.masked_fill_(~(kept.unsqueeze(2) & ~kept.unsqueeze(1)), torch.inf)
        short = -len(table) % layer.band
        table = torch.nn.functional.pad(table, (0, 0, 0, 0, 0, short), value=torch.inf)
        low, row = table.unflatten(0, (-1, layer.band)).min(1)
        rise, pair = (low + low.mT if layer.rule.transposable else low).flatten(1).min(1)
        band = torch.nonzero(rise < least[start : start + bands]).squeeze(1)
        j, k = pair[band] // width, pair[band] % width
        ways = ((j, k), (k, j)) if layer.rule.transposable else ((j, k),)
        top = (band + start) * layer.band
        found += [(row[band, a, b] + top, a + first, b + first) for a, b in ways]
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))  # type: ignore[return-value]
