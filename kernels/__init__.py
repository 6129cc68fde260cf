"""Every Triton kernel of nmsolve. Installed as ``nmsolve.kernels``; never importable as ``kernels``."""

if __name__ != "nmsolve.kernels":
    raise ImportError(
        f"this folder is the package nmsolve.kernels and was imported as {__name__!r}: "
        "install nmsolve (pip install -e .) and import nmsolve.kernels"
    )
