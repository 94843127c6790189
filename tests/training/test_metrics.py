"""The lines of metrics.jsonl and starts.jsonl, also of a resumed run; rates, and the end of a run that diverged."""

import contextlib
import errno
import os
import resource
import struct
import subprocess
import sys
import types

import jax.numpy as jnp
import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from jaxlinear.errors import Diverged, UserError
from jaxlinear.models import flops
from jaxlinear.training import metrics
from jaxlinear.training import workdir as workdirs
from jaxlinear.training.job import Job
from jaxlinear.training.meter import Meter
from jaxlinear.training.metrics import MetricsWriter
from jaxlinear.training.tensorboard import TensorBoard
from tests.training import tiny

VALUES = dict.fromkeys(("loss", "gradient_norm", "parameter_norm", "learning_rate", "skips", "skips_in_a_row"), 1.5)


def writer(workdir, step, **options):
    return MetricsWriter(workdir, step=step, **({"tensorboard": False} | options))


def test_lines_of_steps_that_will_be_taken_again_are_dropped(tmp_path):
    assert metrics.read(tmp_path) == []
    first = writer(tmp_path, 0)
    for step in range(1, 6):
        first.write(step, {"loss": 1 / step})
        first.sync()
    first.close()
    with (tmp_path / metrics.FILE).open("a") as file:
        file.write('{"step": 6, "lo')
    assert [line["step"] for line in metrics.read(tmp_path)] == [1, 2, 3, 4, 5]
    second = writer(tmp_path, 3)
    second.write(4, {"loss": 0.1 + 0.2, "heldout_loss": float("nan")})
    second.close()
    lines = (tmp_path / metrics.FILE).read_text().splitlines()
    assert lines[:3] == [f'{{"step": {step}, "loss": {1 / step}}}' for step in (1, 2, 3)]
    assert lines[3:] == ['{"step": 4, "loss": 0.30000000000000004, "heldout_loss": NaN}']
    assert [path.name for path in tmp_path.iterdir()] == [metrics.FILE]


def test_a_damaged_line_is_named(tmp_path):
    """A loss of power may leave one, and a scheduler would restart the run again and again. Nothing is written."""
    for name, reading in ((metrics.FILE, metrics.read), (workdirs.STARTS, workdirs.read_starts)):
        file = tmp_path / name
        file.write_bytes(b'{"step": 1}\n{"step": 2, "\0\0\0\n{"step": 3}\n')
        with pytest.raises(UserError, match=rf"^line 2 of {file} is damaged \(.*\); remove that line$"):
            reading(tmp_path)
    before = tiny.files(tmp_path)
    with pytest.raises(UserError, match=r"line 2 of .* is damaged"):
        writer(tmp_path, 1)
    assert tiny.files(tmp_path) == before


def test_import_is_light():
    """Programs that write no curves do not import the package that does, which takes as long as all others together."""
    modules = "jaxlinear.evaluation.following, jaxlinear.sweeps.manager, jaxlinear.training.loop"
    program = f"import sys, {modules}; print(sorted({{'tensorboardX', 'torch'}} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True, cwd=tiny.REPOSITORY) == "[]\n"


def test_a_start_after_a_line_that_was_cut_short_has_a_line_of_its_own(tmp_path):
    config, mesh = tiny.config(), tiny.mesh()
    workdirs.note_start(tmp_path, 0, config, mesh)
    with (tmp_path / workdirs.STARTS).open("a") as file:
        file.write('{"step": 3, "ti')
    assert [line["step"] for line in workdirs.read_starts(tmp_path)] == [0]
    workdirs.note_start(tmp_path, 5, config, mesh)
    assert [line["step"] for line in workdirs.read_starts(tmp_path)] == [0, 5]
    assert [path.name for path in tmp_path.iterdir()] == [workdirs.STARTS]


A, B = {"step": 0, "heldout_text": "a"}, {"step": 20, "heldout_text": "b", "evaluation_owed": True}


@pytest.mark.parametrize(
    "starts, changes",
    [
        # A start takes the later ones before it out of the run's history. Those without evaluations say nothing.
        ([(0, "a"), (5, None), (10, "b"), (20, "b"), (30, "c"), (25, "a"), (40, "a")], [10, 25]),
        ([(0, "a"), (5, None), (10, "b")], [10]),
        ([(0, "a"), (5, None)], []),
        # An owed evaluation is of the text of the start that makes it: the loss of step 20, which had none before, is of
        # "b". Only the second line of a run that was stopped again counts.
        ([A, B], [19]),
        ([A, B | {"heldout_text": "c"}, B], [19]),
        ([A, B | {"step": 21}, B], [19]),
    ],
)
def test_where_held_out_losses_are_of_other_text(starts, changes):
    line = lambda step, text: {"step": step} | ({"heldout_text": text} if text else {})  # noqa: E731
    assert workdirs.heldout_changes([line(*one) if isinstance(one, tuple) else one for one in starts]) == changes


def test_held_out_losses_of_other_text_are_warned_of(tmp_path, caplog):
    for step, text, said in ((0, "a", False), (1, "b", True), (2, "b", False)):
        caplog.clear()
        workdirs.note_start(tmp_path, step, tiny.config(), tiny.mesh(), heldout_text=text)
        assert ("held-out losses from here on are of other text" in caplog.text) == said
    assert workdirs.heldout_changes(workdirs.read_starts(tmp_path)) == [1]


def curve(directory, name="loss"):
    """``{step: value}`` as TensorBoard reads the event files: in the order of their names, without what a start purges."""
    points = {}
    for path in sorted(directory.glob("events.out.tfevents.*")):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            body = content[12 : 12 + length]
            for part, at in ((content[:8], 8), (body, 12 + length)):
                assert struct.unpack("<I", content[at : at + 4])[0] == masked_crc32c(part)
            event, content = event_pb2.Event.FromString(body), content[16 + length :]
            if event.session_log.status == event_pb2.SessionLog.START:
                points = {step: value for step, value in points.items() if step < event.step}
            points.update((event.step, value.simple_value) for value in event.summary.value if value.tag == name)
    return points


def test_a_killed_run_leaves_tensorboard_what_it_had_saved(tmp_path):
    """A killed run closes no files. The steps after the one that the next run resumes from are purged."""
    killed = writer(tmp_path, 0, tensorboard=True)
    for step in (1, 2, 3, 4):
        killed.write(step, {"loss": float(step), "note": "no number"})
        killed.sync()
        assert curve(tmp_path)[step] == step
    assert not any(b"note" in events.read_bytes() for events in tmp_path.glob("events.out.tfevents.*"))
    again = writer(tmp_path, 2, tensorboard=True)
    assert curve(tmp_path) == {1: 1.0, 2: 2.0}
    again.write(3, {"loss": 30.0})
    assert curve(tmp_path) == {1: 1.0, 2: 2.0, 3: 30.0}
    again.close(), killed.close()


def test_event_files_follow_each_other_whatever_the_clock_says(tmp_path, monkeypatch):
    for second in (2e9, 2e9, 1e9):  # two within one second, and a clock that was set back
        monkeypatch.setattr("jaxlinear.training.tensorboard.time.time", lambda second=second: second)
        board = TensorBoard(tmp_path, purge_step=1)
        board.write(1, {"loss": second})
        board.close()
    assert len(list(tmp_path.iterdir())) == 3
    assert curve(tmp_path) == {1: 1e9}, "the last one counts"


def test_a_full_disk_is_an_error_of_the_point_that_has_no_room(tmp_path):
    """Writing raises it; it is not kept in a thread that the run then waits for."""
    board = TensorBoard(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            for step in range(1, 1000):
                board.write(step, {"loss": 1.0})
        with contextlib.suppress(OSError):
            board.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert 1 < step < 100


@pytest.fixture
def meter(tiny_config, monkeypatch):
    """A meter that begins at step 4, a clock to set, what the meter writes, and its job: 16 rows per step, 8 at a time."""
    config = tiny_config.copy_and_resolve_references()
    config.training.steps, config.logging.every_steps, config.training.max_skips = 9, 2, 3
    config.training.batch_size, config.training.microbatches = 16, 2
    clock, lines = types.SimpleNamespace(now=100.0), []
    monkeypatch.setattr("jaxlinear.training.meter.time.perf_counter", lambda: clock.now)
    monkeypatch.setattr("jaxlinear.costs.hardware.peak_flops", lambda device: 1e9)
    writer = types.SimpleNamespace(write=lambda step, line: lines.append((step, line)))
    progress = types.SimpleNamespace(at=lambda *_, **__: None)
    job = Job.build(config)
    return Meter(job, writer, progress, 4), clock, lines, job


def read(meter, step, **changes):
    meter.read(step, {name: jnp.float32(value) for name, value in (VALUES | changes).items()})


def test_rates(meter):
    meter, clock, lines, job = meter
    clock.now += 1
    read(meter, 5)
    assert not lines  # not due

    for waited in (0.5, 1.0):
        with meter.waiting():
            clock.now += waited
    with meter.paused():
        clock.now += 1000
    clock.now += 1.5
    read(meter, 6, skips=2.0)
    step, line = lines.pop()
    assert step == 6 and line["loss"] == 1.5 and line["tokens"] == 6 * 16 * 32
    assert (line["skips"], type(line["skips"])) == (2, int)
    assert line["step_seconds"] == pytest.approx(2.0) and line["tokens_per_second"] == pytest.approx(8 * 32)
    assert line["data_wait_fraction"] == pytest.approx(1.5 / 4)
    per_token = flops.training_flops_per_token(job.architecture.config, 32)
    assert line["mfu"] == pytest.approx(8 * 32 * per_token / (8 * 1e9))  # on 8 devices

    clock.now += 6
    read(meter, 9)  # the last step, though not a multiple of 2
    step, line = lines.pop()
    assert step == 9 and line["step_seconds"] == pytest.approx(2.0) and line["data_wait_fraction"] == 0


def test_where_the_peak_is_not_known_there_is_no_mfu(meter, monkeypatch, caplog):
    _, clock, lines, job = meter
    monkeypatch.setattr("jaxlinear.costs.hardware.peak_flops", lambda device: None)
    of_run = {"write": lambda step, line: lines.append(line), "at": lambda *_, **__: None}
    unknown = Meter(job, types.SimpleNamespace(**of_run), types.SimpleNamespace(**of_run), 4)
    assert "are unknown: mfu will be 0" in caplog.text
    clock.now += 1
    read(unknown, 6)
    assert lines.pop()["mfu"] == 0


def test_too_many_skips_in_a_row(meter):
    meter, clock, lines, _ = meter
    clock.now += 1
    read(meter, 6, skips_in_a_row=2.0)
    with pytest.raises(Diverged, match=r"^3 steps in a row were skipped, the last of them step 7 with a gradient norm"):
        read(meter, 7, skips_in_a_row=3.0, gradient_norm=8.0)
    assert len(lines) == 1
