"""The errors that nmsolve raises on purpose."""

__all__ = ["BackendError", "NMSolveError"]


class NMSolveError(ValueError):
    """An argument is not what a function takes.

    The message names the argument, what was expected and what came. It is raised before any work is
    done and before anything is written.
    """


class BackendError(NMSolveError):
    """The backend that was asked for cannot run this tensor on this machine; the message says why."""
