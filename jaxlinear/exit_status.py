"""The statuses that programs end with, which schedulers and sweeps act on.

Imports nothing: a program that only waits for a run need not import JAX to know what its end means.
"""

FINISHED = 0
FAILED = 1  # as Python's own after a traceback: another start may mend it
BAD_INPUT = 2  # the same command would end so again
PREEMPTED = 75  # EX_TEMPFAIL: the run saved itself, or had nothing to save, and the same command goes on
