"""launch/train.py in its own processes, killed or told to stop, and restarted until they are done."""

import json
import random
import signal
import time

from jaxlinear.checkpoint import DIRECTORY, Checkpoints
from jaxlinear.training.metrics import FILE
from tests.training import tiny

KILLS = 3
STEPS = 20  # of tiny.ARGUMENTS, with a checkpoint at every step, so that one is nearly always being written
PATIENCE = 240


def last_step(workdir):
    """The newest step in metrics.jsonl, whose last line may be incomplete."""
    file = workdir / FILE
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def wait(process, condition):
    """Waits until ``condition()``; the process must keep running."""
    begin = time.monotonic()
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() - begin < PATIENCE
        time.sleep(0.002)


def unfinished(workdir):
    return [path.name for path in (workdir / DIRECTORY).glob("*orbax-checkpoint-tmp*")]


def same_end(workdir, expected):
    """Asserts that the losses, as text, and the checkpoint are the same."""
    assert tiny.losses(workdir) == tiny.losses(expected)
    metas = [Checkpoints(path).meta() for path in (workdir, expected)]
    assert [meta["next_batch"] for meta in metas] == [STEPS, STEPS]
    structs = tiny.saved_structs(workdir)
    tiny.assert_equal(Checkpoints(workdir).restore(structs), Checkpoints(expected).restore(structs))


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


def test_killed_at_any_moment_it_ends_the_same(launch, uninterrupted, tmp_path):
    """Kills at moments from a fixed seed; every other one as soon as a checkpoint is being written. After the step that the
    test waits for, the run itself waits, so that it is not done before it is killed."""
    workdir, moments = tmp_path / "run", random.Random(0)
    begun, torn = [], []
    for kill in range(KILLS):
        goal = last_step(workdir) + moments.randint(1, 3)
        assert goal + 1 < STEPS
        stops = TEARS.replace("STEP", str(goal)) if kill % 2 else tiny.STOPS.replace("STEP", str(goal + 3))
        process = launch(workdir, before=stops)
        begun.append(max(Checkpoints(workdir).steps(), default=0) if kill else 0)
        wait(process, lambda goal=goal: last_step(workdir) >= goal)
        if kill % 2:
            wait(process, lambda: unfinished(workdir))
        else:
            time.sleep(moments.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=PATIENCE) == -signal.SIGKILL, "it was done before it could be killed"
        process.communicate()
        torn.append(unfinished(workdir))
    assert any(torn), "no kill came while a checkpoint was being written"
    assert begun[-1] > begun[1], f"the run did not advance: {begun}"
    process = launch(workdir)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert not unfinished(workdir)
    same_end(workdir, uninterrupted)


def test_sigterm_saves_and_the_same_command_goes_on(launch, uninterrupted, tmp_path):
    """The only checkpoint is the one that SIGTERM asks for."""
    workdir, rarely = tmp_path / "run", "--config.checkpoint.every_steps=1000"
    process = launch(workdir, rarely, "--config.training.steps=1000000")
    wait(process, lambda: last_step(workdir) >= 3)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, errors
    assert "the same command resumes from there" in errors
    saved = Checkpoints(workdir).steps()
    assert saved == [last_step(workdir)] and saved[0] >= 3

    again = launch(workdir, rarely, f"--config.training.steps={saved[0] + 2}")
    _, errors = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, errors
    losses, expected = tiny.losses(workdir), tiny.losses(uninterrupted)
    assert list(losses) == list(range(1, saved[0] + 3))
    assert [losses[step] for step in range(1, 4)] == [expected[step] for step in range(1, 4)]
    assert all(losses[step] == expected[step] for step in expected if step in losses)
