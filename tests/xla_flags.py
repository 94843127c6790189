"""Flags of XLA for programs that are compiled to run once."""

import importlib.metadata

# Halves the time to compile for CPUs. jaxlib 0.12 refuses the flag, and is as fast without it.
FAST = "--xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else ""
