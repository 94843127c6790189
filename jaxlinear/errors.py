"""What a run ends with in one line: the input is wrong (``UserError``), or the work cannot go on now (``RunError``).

Any other exception is a defect of the program, and keeps its traceback (``jaxlinear.cli``).
"""


class UserError(Exception):
    """Bad input or an impossible request. Its message is one line: what is wrong, why, and the nearest thing that works.

    Programs in ``launch/`` print the message on stderr and exit with status ``BAD_INPUT``, without a traceback.
    """


class EveryProcessError(UserError):
    """Bad input of which every process of a run has learned, so that all of them end."""


class RunError(Exception):
    """The work cannot go on now, and another start may mend it. Programs print its one line on stderr and exit with status
    ``FAILED``, as they do with a traceback; schedulers start a run again after it.
    """


class Diverged(RunError):
    """The work cannot go on, and the same command would come to the same end: status ``BAD_INPUT``."""
