"""Triton runs in its interpreter, PyTorch with one thread.

PyTorch gets one thread in each test process: the suite runs in several, and on small tensors threads that
wait for each other take longer than the work. Tests of threading set their own number.
"""

from __future__ import annotations

import importlib.util
import os
import re

import plain_checkout
import pytest
import torch
from folder_times import pytest_terminal_summary

__all__ = ["pytest_terminal_summary"]  # a hook


def pytest_configure(config: pytest.Config) -> None:
    """Without ``-m gpu`` kernels are interpreted, on CPU tensors: decided before triton is imported.

    NMSOLVE_GPU_TESTS_ON_INTERPRETER=1 has them interpreted with ``-m gpu``, too (tests/kernels/test_gpu.py);
    NMSOLVE_PTX_SM=90 has them compiled for that target, and what the compiler writes emulated.
    """
    plain_checkout.arrange()
    torch.set_num_threads(1)
    if capability := os.environ.get("NMSOLVE_PTX_SM"):
        os.environ.pop("TRITON_INTERPRET", None)
        import emulator

        emulator.install(int(capability))
        return
    on_gpu = re.search(r"(?<!not )\bgpu\b", config.option.markexpr) is not None
    if not on_gpu or os.environ.get("NMSOLVE_GPU_TESTS_ON_INTERPRETER") == "1":
        os.environ["TRITON_INTERPRET"] = "1"
        if importlib.util.find_spec("triton") is not None:
            from kernel_costs import interpreter

            interpreter.install()
