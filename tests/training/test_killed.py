"""launch/train.py in its own processes, killed and told to stop, and restarted until they are done."""

import random
import signal
import time

import pytest

from jaxlinear.checkpoint import DIRECTORY, Checkpoints
from tests.training import tiny

STEPS = 20  # of tiny.ARGUMENTS, with a checkpoint at every step, so that one is nearly always being written


def unfinished(workdir):
    return [path.name for path in (workdir / DIRECTORY).glob("*orbax-checkpoint-tmp*")]


# Python to run first: the checkpoint of a step is written, but never gets its name.
TEARS = """
import os, time
rename = os.rename
def waits(source, *arguments, **options):
    if os.path.basename(source) == "STEP.orbax-checkpoint-tmp":
        time.sleep(1000)
    return rename(source, *arguments, **options)
os.rename = waits
"""
# Python to run first: each batch takes a while to be read.
SLOW = """
import time

import pytest
from jaxlinear.data import loader
read = loader.TrainBatches.__getitem__
loader.TrainBatches.__getitem__ = lambda self, index: (time.sleep(0.3), read(self, index))[1]
"""


@pytest.mark.slow
def test_killed_or_stopped_at_any_moment_it_ends_the_same(launch, uninterrupted, tmp_path):
    """A kill at a moment from a fixed seed; one as soon as a checkpoint is being written; then SIGTERM, when there is no
    other checkpoint than the one that it asks for. After the step that the test waits for, a run that is killed itself
    waits, so that it is not done before."""
    workdir, moments, begun = tmp_path / "run", random.Random(0), []
    goal = 0
    for torn in (False, True):
        goal = tiny.last_step(workdir) + moments.randint(1, 3)
        process = launch(workdir, before=(TEARS if torn else tiny.STOPS).replace("STEP", str(goal + 3 * (not torn))))
        tiny.wait_for([process], lambda goal=goal: tiny.last_step(workdir) >= goal)
        if torn:
            tiny.wait_for([process], lambda: unfinished(workdir))
        else:
            time.sleep(moments.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=tiny.PATIENCE) == -signal.SIGKILL, "it was done before it could be killed"
        process.communicate()
        begun.append(max(Checkpoints(workdir).steps()))
    assert unfinished(workdir), "no kill came while a checkpoint was being written"

    rarely = "--config.checkpoint.every_steps=1000"
    process = launch(workdir, rarely, before=SLOW)
    tiny.wait_for([process], lambda: tiny.last_step(workdir) >= goal + 2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=tiny.PATIENCE)
    assert process.returncode == 75, errors
    assert "the same command resumes from there" in errors
    begun.append(max(Checkpoints(workdir).steps()))
    assert begun == sorted(set(begun)) and begun[-1] == tiny.last_step(workdir) < STEPS

    process = launch(workdir, rarely)
    _, errors = process.communicate(timeout=tiny.PATIENCE)
    assert process.returncode == 0, errors
    assert not unfinished(workdir)
    assert tiny.losses(workdir) == tiny.losses(uninterrupted)  # as text
    ends = [Checkpoints(path) for path in (workdir, uninterrupted)]
    assert [end.meta()["next_batch"] for end in ends] == [STEPS, STEPS]
    structs = tiny.saved_structs(workdir)
    tiny.assert_equal(*(end.restore(structs) for end in ends))
