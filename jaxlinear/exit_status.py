"""The exit statuses of the programs, which schedulers and sweeps act on.

Imports nothing: a program that only waits for a run can interpret its status without importing JAX.
"""

FINISHED = 0
FAILED = 1  # like Python's own status after a traceback: another start may succeed
BAD_INPUT = 2  # the same command would fail in the same way
PREEMPTED = 75  # EX_TEMPFAIL: the run saved itself, or had nothing to save; the same command resumes it
