"""N:M and transposable N:M masks for torch.ao.pruning."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.ao.pruning import BaseSparsifier

from nmsolve.integrations.weights import weight_mask
from nmsolve.pattern import NMPattern, PatternLike
from nmsolve.prune.arguments import check_in_memory
from nmsolve.prune.layers import Layer, select_layers
from nmsolve.prune.rule import MaskRule

__all__ = ["NMSparsifier"]


class NMSparsifier(BaseSparsifier):
    """Sparsifier that keeps the N:M mask of largest magnitude at every ``step``.

    The arguments are defaults; a layer's entry in the config of ``prepare`` may override each of them.
    Without a config, the layers are those that :func:`nmsolve.prune.prune_model` would prune: linear layers
    (and transformers' Conv1D) and convolutions, but no language-model head, router or shared embedding.

    Parameters
    ----------
    pattern : str, (int, int) or NMPattern
        ``"8:16"`` keeps 8 of 16.
    transposable : bool
        N:M along rows and columns, or along the inputs only.
    method, backend : str
        As in :func:`nmsolve.transposable_mask`.
    regrow : bool
        Whether a later ``step`` chooses among all weights again. Otherwise what is pruned stays pruned, also
        by a mask given in the config.

    Raises
    ------
    NMSolveError
        If an argument is not as described; of a layer's entry, in ``step``.

    Examples
    --------
    >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
    >>> sparsifier = NMSparsifier("4:8")
    >>> sparsifier.prepare(model, config=None)
    >>> sparsifier.step()
    >>> sparsifier.squash_mask()
    >>> nmsolve.check_mask(model[2].weight != 0, 4, 8)
    """

    def __init__(
        self,
        pattern: PatternLike = "2:4",
        *,
        transposable: bool = True,
        method: str = "exact",
        backend: str = "auto",
        regrow: bool = False,
    ) -> None:
        rule = MaskRule(pattern, transposable, method, backend)  # type: ignore[arg-type]
        super().__init__(
            {
                "pattern": str(rule.pattern),
                "transposable": transposable,
                "method": method,
                "backend": backend,
                "regrow": regrow,
            }
        )

    def prepare(self, model: nn.Module, config: Any) -> None:
        """As in the base class; a model that is not there as numbers is refused."""
        check_in_memory(model)
        super().prepare(model, config)

    def make_config_from_model(self, model: nn.Module) -> None:  # type: ignore[override]
        """The config of ``prepare(model, config=None)``."""
        chosen = select_layers(model, {"*": NMPattern.parse(self.defaults["pattern"])})
        self.config = [{"tensor_fqn": layer.weight_name} for layer in chosen.layers]

    def update_mask(  # type: ignore[override]
        self,
        module: nn.Module,
        tensor_name: str,
        pattern: PatternLike,
        transposable: bool,
        method: str,
        backend: str,
        regrow: bool,
        **kwargs: Any,
    ) -> None:
        """Sets the mask of one parameter; ``step`` calls it."""
        parametrization = getattr(module.parametrizations, tensor_name)
        mask: Tensor = parametrization[0].mask
        layer = Layer("", module)
        keep = weight_mask(
            parametrization.original.detach().abs(),
            MaskRule(pattern, transposable, method, backend),  # type: ignore[arg-type]
            groups=layer.groups,
            input_first=layer.input_first,
            # Within a mask that leaves all of them, lines of blocks at the edge may keep fewer.
            allowed=None if regrow or bool(mask.all()) else mask != 0,
        )
        # The tensor itself must stay the same: the sparsifier's state has it too.
        mask.data = keep.to(mask.dtype)
