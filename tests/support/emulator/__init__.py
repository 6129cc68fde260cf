"""An emulator of PTX in NumPy: what Triton compiles for NVIDIA GPUs, executed on the CPU, with checks.

A basic block of PTX becomes a Python function of NumPy calls over the threads of many CTAs at once. Threads
stand at the start of a block; the block that comes first in an order that keeps loops together runs next, for
all threads that stand there.

All fatal: a load or store outside of the launch's tensors, or misaligned; two threads that touch a byte of
global memory of which one changes the value; the same in shared memory without a barrier between; shared or
local memory read before it is written; a shuffle or reduction of a warp that is not all there; a barrier that
not all threads of a CTA reach; an instruction, or a modifier of one, that is not known.

==================  ==========================================================
``parse``           text of a kernel: instructions in basic blocks
``contract``        products and sums rounded once, as the assembler may do
``flow``            the order in which blocks are executed
``translate``       a basic block as a function of NumPy calls
``arithmetic``      what the instructions compute
``memory``          global, shared and local memory, and their checks
``machine``         the threads of some CTAs: registers, shuffles, barriers
``launch``          a grid, and what is counted
``driver``          in place of a GPU: Triton's launches come here
==================  ==========================================================
"""

from emulator.arithmetic import Noise
from emulator.driver import LAUNCHES, SETTINGS, TARGETS, install
from emulator.launch import KnownError, Launch, Settings
from emulator.machine import Kernel
from emulator.memory import Fault
from emulator.parse import PtxError

__all__ = [
    "LAUNCHES",
    "SETTINGS",
    "TARGETS",
    "Fault",
    "Kernel",
    "KnownError",
    "Launch",
    "Noise",
    "PtxError",
    "Settings",
    "install",
]
