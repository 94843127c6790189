"""The lines of metrics.jsonl and starts.jsonl, when a run goes on too; rates and the end of a run that diverged."""

import types

import jax.numpy as jnp
import pytest

from jaxlinear.errors import Diverged
from jaxlinear.scaling import flops
from jaxlinear.training import metrics
from jaxlinear.training import workdir as workdirs
from jaxlinear.training.job import Job
from jaxlinear.training.meter import Meter
from jaxlinear.training.metrics import MetricsWriter
from tests.training import tiny

VALUES = dict.fromkeys(("loss", "gradient_norm", "parameter_norm", "learning_rate", "skips", "skips_in_a_row"), 1.5)


def writer(workdir, step, **options):
    return MetricsWriter(workdir, step=step, steps=10, **({"tensorboard": False} | options))


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


def test_a_start_after_a_line_that_was_cut_short_has_a_line_of_its_own(tmp_path):
    config, mesh = tiny.config(), tiny.mesh()
    workdirs.note_start(tmp_path, 0, config, mesh)
    with (tmp_path / workdirs.STARTS).open("a") as file:
        file.write('{"step": 3, "ti')
    assert [line["step"] for line in workdirs.read_starts(tmp_path)] == [0]
    workdirs.note_start(tmp_path, 5, config, mesh)
    assert [line["step"] for line in workdirs.read_starts(tmp_path)] == [0, 5]
    assert [path.name for path in tmp_path.iterdir()] == [workdirs.STARTS]


def test_tensorboard_events(tmp_path):
    one = writer(tmp_path, 0, tensorboard=True)
    one.write(1, {"loss": 2.0, "note": "no number"})
    one.close()
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"loss" in events.read_bytes() and b"note" not in events.read_bytes()


@pytest.fixture
def meter(tiny_config, monkeypatch):
    """A meter that begins at step 4, what it writes, and a clock to be set."""
    config = tiny_config.copy_and_resolve_references()
    config.training.steps, config.logging.every_steps, config.training.max_skips = 9, 2, 3
    clock, lines = types.SimpleNamespace(now=100.0), []
    monkeypatch.setattr("jaxlinear.training.meter.time.perf_counter", lambda: clock.now)
    monkeypatch.setattr("jaxlinear.scaling.hardware.peak_flops", lambda device: 1e9)
    fake = types.SimpleNamespace(write=lambda step, line: lines.append((step, line)), progress=lambda *_: None)
    job = Job.build(config)
    return Meter(job, fake, 4), clock, lines, job


def read(meter, step, **changes):
    meter.read(step, {name: jnp.float32(value) for name, value in (VALUES | changes).items()})


def test_rates(meter):
    meter, clock, lines, job = meter
    clock.now += 1
    read(meter, 5)
    assert not lines  # not due

    with meter.waiting():
        clock.now += 0.5
    with meter.paused():
        clock.now += 1000
    clock.now += 0.5
    read(meter, 6, skips=2.0)
    step, line = lines.pop()
    assert step == 6 and line["loss"] == 1.5 and line["tokens"] == 6 * 8 * 32
    assert (line["skips"], type(line["skips"])) == (2, int)
    assert line["step_seconds"] == pytest.approx(1.0) and line["tokens_per_second"] == pytest.approx(8 * 32)
    assert line["data_wait_fraction"] == pytest.approx(0.25)
    per_token = flops.training_flops_per_token(job.architecture.config, 32)
    assert line["mfu"] == pytest.approx(8 * 32 * per_token / (8 * 1e9))  # on 8 devices

    clock.now += 6
    read(meter, 9)  # the last step, though 2 does not divide it
    step, line = lines.pop()
    assert step == 9 and line["step_seconds"] == pytest.approx(2.0) and line["data_wait_fraction"] == 0


def test_too_many_skips_in_a_row(meter):
    meter, clock, lines, _ = meter
    clock.now += 1
    read(meter, 6, skips_in_a_row=2.0)
    with pytest.raises(
        Diverged, match=r"^3 steps in a row were skipped, the last of them step 7 with a gradient norm of 8"
    ):
        read(meter, 7, skips_in_a_row=3.0, gradient_norm=8.0)
    assert len(lines) == 1
