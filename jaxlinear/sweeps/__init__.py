"""Sweeps: many runs of ``launch/train.py``, planned together, started by submitit, and finished even if some are killed.

A sweep's directory: ``sweep.json`` (the plan), ``runs/NAME/`` (each run's own directory), ``jobs/NAME/`` (its config, its
log, its attempts and its lock) and ``jobs/submitit/``.
"""
