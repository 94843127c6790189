"""Kernels compiled for an NVIDIA GPU that is not here, run on the CPU instruction by instruction from their PTX.

What interpret mode cannot see is seen here: what the compiler made of a kernel, its layouts, its barriers and its copies.
The threads of many blocks go in step, as lanes of NumPy arrays; where they part, those that are behind go first. Semantics
are those of NVIDIA's "Parallel Thread Execution ISA". What would be a fault or a race on a GPU raises ``Fault``. Not seen:
how long anything takes, the errors of approximate instructions, and what blocks do to each other but for writing the same.
"""


class Fault(Exception):
    """An access that a GPU would refuse, or whose result depends on which warp is faster."""
