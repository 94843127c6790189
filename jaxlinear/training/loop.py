"""A training run, from a config to its last checkpoint: one loop."""

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from ml_collections import config_dict

from jaxlinear import data
from jaxlinear.checkpoint import Checkpoints
from jaxlinear.data import tasks
from jaxlinear.errors import RunError
from jaxlinear.parallel import feeding, start
from jaxlinear.parallel import mesh as meshes
from jaxlinear.training import state as states
from jaxlinear.training import trained_data
from jaxlinear.training import workdir as workdirs
from jaxlinear.training.answers import Answers
from jaxlinear.training.job import Job
from jaxlinear.training.meter import Meter
from jaxlinear.training.metrics import MetricsWriter
from jaxlinear.training.step import make_loss_step, make_train_step

_LOG = logging.getLogger(__name__)

FINISHED, PREEMPTED = 0, 75  # exit statuses; 75 is EX_TEMPFAIL: start the same command again


def train(config: config_dict.ConfigDict, workdir: str | os.PathLike) -> int:
    """Trains until ``training.steps``, going on from the newest checkpoint in ``workdir`` if there is one.

    Returns ``FINISHED``, or ``PREEMPTED`` if SIGTERM came and the run saved itself. Killed in any other way and started
    again, it follows the uninterrupted run exactly.
    """
    start.check_agreement("the config", config.to_json_best_effort(sort_keys=True))
    start.check_agreement("the work directory", str(workdir))
    with start.together():
        job = Job.build(config)
        workdirs.check(workdir, job.config)
        trained_data.check(workdir, job.datasets)
        directory = workdirs.prepare(workdir, job.config)
        trained_data.keep(directory, job.datasets)
    start.check_agreement("the data", job.data_text())
    with _Stop() as stop:
        return _train(job, directory, stop)


def _train(job: Job, directory: Path, stop: "_Stop") -> int:
    checkpoints = Checkpoints(directory, job.config)
    try:
        state, first = _restore_or_create(job, checkpoints)
        writer = MetricsWriter(
            directory, step=first, steps=job.config.training.steps, tensorboard=job.config.logging.tensorboard
        )
        try:
            status = _run(job, state, first, directory, checkpoints, writer, stop)
        finally:
            writer.close()
    except BaseException as error:
        # Another process may be gone, and what is being written would wait for it.
        if jax.process_count() == 1 or isinstance(error, RunError):
            checkpoints.close()
        raise
    checkpoints.close()
    return status


def _restore_or_create(job: Job, checkpoints: Checkpoints) -> tuple[states.TrainState, int]:
    if not checkpoints.steps():
        return states.initialise(job.architecture, job.optimizer, job.config.training.seed, job.mesh), 0
    first = checkpoints.meta()["next_batch"]
    _LOG.info("going on from step %d in %s", first, checkpoints.directory)
    structs = states.structs(job.architecture, job.optimizer, job.mesh)
    return states.from_trees(checkpoints.restore(states.to_trees(structs))), first


def _run(
    job: Job,
    state: states.TrainState,
    first: int,
    directory: Path,
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    preempted: "_Stop",
) -> int:
    config, steps = job.config, job.config.training.steps
    sharding = meshes.batch_sharding(job.mesh)
    if first >= steps:
        _LOG.info("the run is at step %d of %d: nothing to do", first, steps)
        return FINISHED
    workdirs.note_start(directory, first, config, job.mesh)

    step_fn = make_train_step(config, job.architecture, job.optimizer, job.mesh)
    evaluation = _Evaluation(job)
    rows = config.training.batch_size
    batch = feeding.place(job.batches[first], sharding, rows)
    begin = time.perf_counter()
    compiled = step_fn.lower(state, batch).compile()
    _LOG.info("compiled the step in %.1f s", time.perf_counter() - begin)

    meter = Meter(job, writer, first)
    pending: tuple[int, Any] | None = None  # the metrics of a step are read after the next one is under way
    trace = _Trace(config, first, directory)
    for step in range(first, steps):
        trace.at(step)
        state, metrics = compiled(state, batch)
        done = step + 1
        if pending is not None:
            meter.read(*pending)
        pending = (done, metrics)

        stop = preempted.after(done)
        last = done == steps or stop
        if not last:
            with meter.waiting():
                batch = feeding.place(job.batches[done], sharding, rows)
        evaluating = config.evaluation.every_steps and (done % config.evaluation.every_steps == 0 or done == steps)
        saving = done % config.checkpoint.every_steps == 0 or last
        if not (evaluating or saving):
            continue

        meter.read(*pending)
        pending = None
        with meter.paused():
            heldout = None
            if evaluating:
                heldout = evaluation(state.parameters)
                writer.write(done, heldout)
            if saving:
                writer.sync()
                checkpoints.save(
                    done,
                    states.to_trees(state),
                    next_batch=done,
                    heldout_loss=heldout["heldout_loss"] if heldout else None,
                )
        if last:
            trace.close()
        if stop and done < steps:
            checkpoints.wait()
            _LOG.info("SIGTERM: saved at step %d of %d; the same command goes on from there", done, steps)
            return PREEMPTED
    return FINISHED


class _Evaluation:
    """What is measured of held-out data while a run trains."""

    def __init__(self, job: Job):
        config = job.config
        self._job, self._loss_step = job, make_loss_step(config, job.architecture, job.mesh)
        tokens = config.training.batch_size * config.training.sequence_length
        self._answers = Answers(config, job.architecture, job.mesh, tokens)
        self._tasks = job.evaluation_tasks() if config.evaluation.every_steps else []

    def __call__(self, parameters: dict[str, Any]) -> dict[str, float]:
        """``heldout_loss`` in nats a token, or an answer of the task that the run is trained on, and beside it bits a byte
        of text, or accuracies; then the accuracy of each difficulty of ``evaluation.tasks``."""
        config, trained = self._job.config, self._job.heldout_tasks()
        if not trained:
            values = self._heldout(parameters)
        else:
            found = self._measure(parameters, trained, config.evaluation.batches * config.training.batch_size)
            values = {f"heldout_{name}": found[name] for name in ("loss", "accuracy", "solved")}
        for task in self._tasks:
            accuracy = self._measure(parameters, [task], config.evaluation.examples)["accuracy"]
            values[f"{tasks.text(task)}/accuracy"] = accuracy
        return values

    def _measure(self, parameters: dict[str, Any], asked: Sequence[tasks.Task], examples: int) -> dict[str, Any]:
        return self._answers.measure(parameters, asked, examples=examples, seed=self._job.config.training.seed)

    def _heldout(self, parameters: dict[str, Any]) -> dict[str, float]:
        job = self._job
        sharding = meshes.batch_sharding(job.mesh)
        total, count = 0.0, 0
        for batch in job.heldout_batches():
            nll, targets = self._loss_step(parameters, feeding.place(batch, sharding, job.config.training.batch_size))
            total += float(nll.sum())
            count += int(targets.sum())
        split = data.read_manifest(job.heldout_path).splits["heldout"]
        loss = total / count
        return {"heldout_loss": loss, "heldout_bits_per_byte": loss / math.log(2) * split.tokens / split.bytes}


class _Stop:
    """Whether SIGTERM came, within the block. Processes that train together stop after the same step, whichever of them it
    came to: JAX then handles the signal and agrees on the step. Signals come to the main thread alone; a run in another
    does not hear of them."""

    def __init__(self) -> None:
        self._came = False
        self._listens = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "_Stop":
        if self._listens:
            self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._before)

    def _handle(self, *_: Any) -> None:
        self._came = True

    def after(self, step: int) -> bool:
        """To be asked after each step."""
        if jax.process_count() == 1:
            return self._came
        return multihost_utils.reached_preemption_sync_point(step)


class _Trace:
    """A profiler trace of the steps that ``logging.profile_step`` and ``profile_steps`` name, not of the first step
    after a start, which is no step like the others."""

    def __init__(self, config: config_dict.ConfigDict, first: int, directory: Path):
        begin = config.logging.profile_step
        self._begin = max(begin, first + 1) if begin else None
        self._steps = config.logging.profile_steps
        self._directory = str(directory / "profile")
        self._running = False

    def at(self, step: int) -> None:
        """To be called before each step."""
        if self._begin is None:
            return
        if step == self._begin:
            jax.profiler.start_trace(self._directory)
            self._running = True
        elif step == self._begin + self._steps:
            self.close()

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
