"""Flags of XLA for programs that are compiled to run once."""

import importlib.metadata

# The first halves the time to compile small programs for CPUs; the second took a sixth off that of a large one. jaxlib 0.12
# refuses the first, and compiled the drawing of random numbers about as fast without it.
FAST = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    if importlib.metadata.version("jaxlib").startswith("0.10.")
    else ""
)
