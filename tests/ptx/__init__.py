"""Runs kernels compiled for an absent NVIDIA GPU on the CPU, instruction by instruction, from their PTX.

This shows what interpret mode cannot: what the compiler made of a kernel, its layouts, its barriers and its copies. The
threads of many blocks run in lockstep, as lanes of NumPy arrays; where they diverge, those that are behind go first.
Semantics are those of NVIDIA's "Parallel Thread Execution ISA". ``Fault`` is raised by an access that a GPU refuses, by use
of memory or registers that a copy or a product may still use, and if two warps use memory with no barrier between. It does
not show how long anything takes, the errors of approximate instructions and of tensor cores, which sum in float32 here, a
missing ``wgmma.fence`` or ``bar.warp.sync``, or shared memory beyond what the kernel asked for, within what it may have.
"""


class Fault(Exception):
    """An access that a GPU would refuse, or whose result depends on which warp is faster."""
