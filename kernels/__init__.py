"""Every Triton kernel of nmsolve. Installed as ``nmsolve.kernels``.

Python that is started in the repository's root finds this folder when something asks for PyPI's package
``kernels``, as transformers does. It then gets that package, or is told of a version too old for any use.
"""

if __name__ == "kernels":
    import importlib.util
    import sys
    from importlib.machinery import PathFinder
    from pathlib import Path

    _root = Path(__file__).resolve().parents[1]
    _elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != _root]
    _spec = PathFinder.find_spec(__name__, _elsewhere)
    if _spec is not None and _spec.origin is not None and _spec.loader is not None:
        sys.modules[__name__] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[__name__])
    else:
        __version__ = "0"
