"""Compiling ahead of time, in as many processes as there are cores.

Each runs small calls, whose kernels go to Triton's cache. The compiler may take a process down, so a pool
that breaks is made anew with what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, TimeoutError, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from gpu_day.setting import Setting

Work = Callable[[Setting, Any], None]


def _attempt(work: Work, setting: Setting, job: Any) -> str:
    """What went wrong; empty if nothing did."""
    try:
        work(setting, job)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:2000]
    return ""


def compile_ahead(setting: Setting, work: Work, jobs: Sequence[Any], seconds: float) -> dict[int, str]:
    """``work(setting, job)`` for each job, by its number: what went wrong, empty if nothing did.

    ``work`` is a module's function, jobs can be pickled. What was not done in time is missing. A rehearsal
    does nothing: it compiles when it runs.
    """
    found: dict[int, str] = {}
    if not setting.processes:
        return found
    end = setting.left - seconds
    for _ in range(3):
        todo = [k for k in range(len(jobs)) if k not in found]
        if not todo or setting.left <= end:
            break
        pool = ProcessPoolExecutor(min(setting.processes, len(todo)), mp_context=get_context("spawn"))
        try:
            futures = {pool.submit(_attempt, work, setting, jobs[k]): k for k in todo}
            for future in as_completed(futures, timeout=max(0.1, setting.left - end)):
                found[futures[future]] = future.result()
            break
        except BrokenProcessPool:
            print("a process that compiled died; the others' work goes on")
        except TimeoutError:
            break
        finally:
            processes = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.kill()
    return found
