"""Errors that end a run with one line: the input is wrong (``UserError``), or the work cannot go on now (``RunError``).

Any other exception is a defect in the program and keeps its traceback (``jaxlinear.cli``).
"""


class UserError(Exception):
    """Bad input or an impossible request. Its message is one line: what is wrong, why, and the nearest thing that works.

    Programs in ``launch/`` print the message on stderr and exit with status ``BAD_INPUT``, without a traceback.
    """


class EveryProcessError(UserError):
    """Bad input that every process of a run has detected, so that all of them end."""


class RunError(Exception):
    """The work cannot go on now, but another start may succeed. Programs print the message as one line on stderr and exit
    with status ``FAILED``, the status of a traceback too; schedulers restart a run that ends so.
    """


class Diverged(RunError):
    """The work cannot go on, and the same command would fail in the same way: status ``BAD_INPUT``."""
