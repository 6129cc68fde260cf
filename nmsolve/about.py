"""The version of nmsolve, and those of what it runs on. Needs the standard library alone."""

from __future__ import annotations

__all__ = ["__version__", "versions"]

__version__ = "0.1.0"

PACKAGES = ("torch", "triton", "numba", "numpy", "safetensors")


def versions(*more: str) -> dict[str, str | None]:
    """Versions of Python, of the packages that solve and of ``more``, None for what is not installed.

    Examples
    --------
    >>> sorted(versions())
    ['numba', 'numpy', 'python', 'safetensors', 'torch', 'triton']
    """
    import importlib.metadata  # takes longer than all the rest of nmsolve
    import platform

    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in (*PACKAGES, *more):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found
