"""Kernels compiled for an NVIDIA GPU that is not here, run on the CPU instruction by instruction from their PTX.

What interpret mode cannot see is seen here: what the compiler made of a kernel, its layouts, its barriers and its copies.
The threads of many blocks go in step, as lanes of NumPy arrays; where they part, those that are behind go first. Semantics
are those of NVIDIA's "Parallel Thread Execution ISA". An access that a GPU refuses, memory or registers that are used while
a copy or a product may still use them, and memory that two warps use with no barrier between raise ``Fault``. Not seen: how
long anything takes, the errors of approximate instructions and of tensor cores, which sum in float32 here, a missing
``wgmma.fence`` or ``bar.warp.sync``, and shared memory beyond what the kernel has asked for, within what it may have.
"""


class Fault(Exception):
    """An access that a GPU would refuse, or whose result depends on which warp is faster."""
