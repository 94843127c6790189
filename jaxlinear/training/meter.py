"""Turns the device's metrics into log lines, and wall-clock time into rates."""

import contextlib
import logging
import math
import time
from collections.abc import Iterator

import jax

from jaxlinear.costs import hardware
from jaxlinear.errors import Diverged
from jaxlinear.models import flops
from jaxlinear.training.job import Job
from jaxlinear.training.metrics import MetricsWriter
from jaxlinear.training.progress import Progress

_LOG = logging.getLogger(__name__)


class Meter:
    """Reads the metrics of steps as they finish. Rates are over the time since the last line, excluding pauses."""

    def __init__(self, job: Job, writer: MetricsWriter, progress: Progress, first: int):
        config = job.config
        self._config, self._writer, self._progress = config, writer, progress
        self._tokens_per_step = config.training.batch_size * config.training.sequence_length
        self._flops = flops.training_flops_per_token(job.architecture.config, config.training.sequence_length)
        device = job.mesh.devices.flat[0]
        peak = hardware.peak_flops(device)
        if peak is None:
            _LOG.warning("the peak FLOPs of %s are unknown: mfu will be 0", device.device_kind)
        self._peak = (peak or math.inf) * job.mesh.size
        self._read_step = first
        self._waited = 0.0
        self._begin = time.perf_counter()

    def read(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Waits for the metrics after ``step`` steps; logs them if they are due."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if values["skips_in_a_row"] >= self._config.training.max_skips:
            raise Diverged(
                f"{self._config.training.max_skips} steps in a row were skipped, the last of them step {step} with a "
                f"gradient norm of {values['gradient_norm']:.3g}: the run diverged, or training.spike_multiple is too "
                "low; the same command with a lower optimizer.learning_rate, or a higher training.spike_multiple, "
                "resumes from the newest checkpoint (remove those that are too late)"
            )
        if step % self._config.logging.every_steps and step != self._config.training.steps:
            return
        now = time.perf_counter()
        steps, elapsed = step - self._read_step, now - self._begin
        rate = steps * self._tokens_per_step / elapsed
        line = {
            "loss": values.pop("loss"),
            "tokens": step * self._tokens_per_step,
            **{name: int(value) if name.startswith("skips") else value for name, value in values.items()},
            "tokens_per_second": rate,
            "mfu": rate * self._flops / self._peak,
            "step_seconds": elapsed / steps,
            "data_wait_fraction": self._waited / elapsed,
        }
        self._writer.write(step, line)
        self._progress.at(step, **{name: line[name] for name in ("loss", "tokens_per_second", "step_seconds")})
        self._read_step, self._waited, self._begin = step, 0.0, now

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in this context counts as waiting for data."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in this context does not count."""
        begin = time.perf_counter()
        yield
        self._begin += time.perf_counter() - begin
