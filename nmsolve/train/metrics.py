"""What a sparse training run can be watched by: flips of masks, and the share of magnitude that they keep."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LayerMetrics", "SparseMetrics"]


@dataclass(frozen=True)
class LayerMetrics:
    """One weight.

    Attributes
    ----------
    name : str
        Of the weight in the model's state dict.
    pattern : str
        ``"2:4"``.
    flip_rate : float or None
        Share of the mask's entries that the last refresh changed, between 0 and 1 (r_t of Hu et al.,
        arXiv 2404.01847). None before the first refresh.
    flip_rate_per_step : float or None
        The same, divided by the number of optimizer steps that the last refresh looked back on.
    kept_share : float
        ``sum |W * S| / sum |W|`` of the weights and the mask as they are now; 1 for weights that are all 0.
    operands : {"dense", "sparse24"}
        What the products of the layer multiply by while there are masks.
    reason : str
        Why they are dense; empty where they are not.
    """

    name: str
    pattern: str
    flip_rate: float | None
    flip_rate_per_step: float | None
    kept_share: float
    operands: str = "dense"
    reason: str = ""


@dataclass(frozen=True)
class SparseMetrics:
    """All weights together, and each of them.

    Attributes
    ----------
    step : int
        Optimizer steps so far.
    phase : {"warm-up", "sparse", "frozen", "dense", "finished"}
    refreshes : int
        How often masks were solved anew, the first ones not counted.
    flip_rate, flip_rate_per_step, kept_share
        As in :class:`LayerMetrics`, over the entries of all weights.
    layers : tuple of LayerMetrics
        In the order of the model's modules.
    """

    step: int
    phase: str
    refreshes: int
    flip_rate: float | None
    flip_rate_per_step: float | None
    kept_share: float
    layers: tuple[LayerMetrics, ...]

    def numbers(self, prefix: str = "sparse/") -> dict[str, float]:
        """The totals by name, for a logger; what is not known yet is left out.

        Examples
        --------
        >>> SparseMetrics(80, "sparse", 2, 0.01, 0.00025, 0.9, ()).numbers()["sparse/flip_rate"]
        0.01
        """
        found = {
            "refreshes": self.refreshes,
            "flip_rate": self.flip_rate,
            "flip_rate_per_step": self.flip_rate_per_step,
            "kept_share": self.kept_share,
        }
        return {prefix + name: float(value) for name, value in found.items() if value is not None}
