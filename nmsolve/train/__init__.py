"""Training under N:M masks that follow the weights: exact, transposable, refreshed every few steps.

The names below are loaded from their modules when they are first used, as those of nmsolve itself are.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nmsolve.train.masked_modules import finish_model
    from nmsolve.train.metrics import LayerMetrics, SparseMetrics
    from nmsolve.train.training import SparseTraining

__all__ = ["LayerMetrics", "SparseMetrics", "SparseTraining", "finish_model"]

_MODULES = {
    "nmsolve.train.masked_modules": ("finish_model",),
    "nmsolve.train.metrics": ("LayerMetrics", "SparseMetrics"),
    "nmsolve.train.training": ("SparseTraining",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
