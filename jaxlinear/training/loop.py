"""A training run, from a config to its last checkpoint, in one loop."""

import contextlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import config_dict

from jaxlinear import config as configs
from jaxlinear.checkpoint import Checkpoints
from jaxlinear.errors import RunError, UserError
from jaxlinear.exit_status import FINISHED, PREEMPTED
from jaxlinear.parallel import feeding, start
from jaxlinear.parallel import mesh as meshes
from jaxlinear.training import heldout, trained_data
from jaxlinear.training import state as states
from jaxlinear.training import workdir as workdirs
from jaxlinear.training.heldout import Evaluation
from jaxlinear.training.initial import Initial
from jaxlinear.training.job import Job
from jaxlinear.training.meter import Meter
from jaxlinear.training.metrics import MetricsWriter
from jaxlinear.training.preemption import Preempted, Stop
from jaxlinear.training.progress import Progress
from jaxlinear.training.step import make_train_step
from jaxlinear.training.watchdog import Watchdog

_LOG = logging.getLogger(__name__)


def train(config: config_dict.ConfigDict, workdir: str | os.PathLike) -> int:
    """Trains until ``training.steps``, resuming from the newest checkpoint in ``workdir`` if there is one.

    Returns ``FINISHED``, or ``PREEMPTED`` if SIGTERM came and the run saved itself. A run killed in any other way
    and started again follows the uninterrupted run: exactly on CPU, and elsewhere as exactly as the compiler's programs
    repeat themselves (docs/checkpoints.md).
    """
    start.check_same_program()
    start.check_agreement("the config", config.to_json_best_effort(sort_keys=True))
    start.check_agreement("the work directory", str(workdir))
    with start.together():
        job = Job.build(config)
        workdirs.check(workdir, job.config)
        trained_data.check(workdir, job.texts)
        if config.training.initial_from and not workdirs.saved_steps(workdir):
            Initial.find(job)  # so that nothing is written if it does not fit
    with workdirs.alone(workdir):
        directory = Path(workdir)
        with start.together():
            workdirs.check(directory, job.config)  # again, now that no other run has the directory
            trained_data.keep(directory, job.texts)
        start.check_agreement("the data", job.data_text())
        with Stop() as stop, Watchdog(job.config.training.patience_minutes) as watchdog:
            return _train(job, directory, stop, watchdog)


def _train(job: Job, directory: Path, stop: Stop, watchdog: Watchdog) -> int:
    checkpoints = Checkpoints(directory, job.config)
    try:
        state, first, initial = _restore_or_create(job, checkpoints)
        with (
            contextlib.closing(
                MetricsWriter(directory, step=first, tensorboard=job.config.logging.tensorboard)
            ) as writer,
            contextlib.closing(Progress(step=first, steps=job.config.training.steps)) as progress,
        ):
            status = _run(job, state, first, initial, directory, checkpoints, writer, progress, stop, watchdog)
    except BaseException as error:
        # If another process is gone, what is being written would wait for it.
        if jax.process_count() == 1 or isinstance(error, RunError):
            checkpoints.close()
        raise
    watchdog.at("the writing of the last checkpoint")
    checkpoints.close()
    return status


def _restore_or_create(job: Job, checkpoints: Checkpoints) -> tuple[states.TrainState, int, Initial | None]:
    """The state, its step, and the source of a run's initial weights if they are not new."""
    step = checkpoints.newest_of_all()
    structs = states.structs(job.architecture, job.optimizer, job.mesh)
    if step is None:
        state = states.initialise(job.architecture, job.optimizer, job.config.training.seed, job.mesh)
        if not job.config.training.initial_from:
            return state, 0, None
        initial = _initial_of_all(job)
        return initial.put_into(state, structs), 0, initial
    with start.together():
        meta = checkpoints.meta(step)
        saved = configs.from_json(json.dumps(meta["config"]))
        try:
            workdirs.check_same_run(checkpoints.directory.parent, saved, job.config)
        except UserError as error:  # the directory's own config is this run's
            raise UserError(f"the checkpoint of step {step} was copied from another run: {error}") from error
    first = meta["next_batch"]
    _LOG.info("going on from step %d in %s", first, checkpoints.directory)
    return states.from_trees(checkpoints.restore(states.to_trees(structs), step)), first, None


def _initial_of_all(job: Job) -> Initial:
    """Chooses the same checkpoint on all processes: another may be written to that directory meanwhile."""
    with start.together():
        initial = Initial.find(job)
    start.check_agreement("the checkpoint of training.initial_from", str(initial.step))
    return initial


def _run(
    job: Job,
    state: states.TrainState,
    first: int,
    initial: Initial | None,
    directory: Path,
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    progress: Progress,
    preemption: Stop,
    watchdog: Watchdog,
) -> int:
    config, steps = job.config, job.config.training.steps
    sharding = meshes.batch_sharding(job.mesh)
    # Only the first process needs to see what was logged.
    owed = first > 0 and start.as_the_first(start.is_first() and heldout.is_owed(config, directory, first))
    if first >= steps and not owed:
        _LOG.info("the run is at step %d of %d: nothing to do", first, steps)
        return FINISHED
    workdirs.prepare(directory, config)
    workdirs.note_start(directory, first, config, job.mesh, None if initial is None else str(initial))

    def between() -> None:
        watchdog.at("a batch of an evaluation")
        preemption.check()

    def evaluate(step: int) -> dict[str, float]:
        values = evaluation(state.parameters)
        writer.write(step, values)
        progress.evaluated(step, values)
        return values

    evaluation, evaluated = Evaluation(job, between), owed  # the first evaluation compiles
    if owed:
        try:
            evaluate(first)
        except Preempted:
            _LOG.info(
                "SIGTERM: step %d of %d is still to be evaluated; the same command goes on from there", first, steps
            )
            return PREEMPTED
        writer.sync()
        owed = False
    if first >= steps:
        return FINISHED

    step_fn = make_train_step(config, job.architecture, job.optimizer, job.mesh)
    rows = config.training.batch_size
    batch = feeding.place(job.batches[first], sharding, rows)
    begin = time.perf_counter()
    compiled = step_fn.lower(state, batch).compile()
    _LOG.info("compiled the step in %.1f s", time.perf_counter() - begin)

    meter = Meter(job, writer, progress, first)
    pending: tuple[int, Any] | None = None  # a step's metrics are read once the next step is under way
    trace = _Trace(config, first, directory)
    for step in range(first, steps):
        trace.at(step, state)
        watchdog.at(f"step {step + 1}")
        state, metrics = compiled(state, batch)
        done = step + 1
        if pending is not None:
            meter.read(*pending)
            watchdog.start()
        pending = (done, metrics)

        stop = preemption.came()
        last = done == steps or stop
        if not last:
            watchdog.at(f"the reading of the batch of step {done + 1}")
            with meter.waiting():
                batch = feeding.place(job.batches[done], sharding, rows)
        evaluating = heldout.is_due(config, done)
        saving = done % config.checkpoint.every_steps == 0 or last
        if not (evaluating or saving):
            continue

        watchdog.at(f"step {done}")
        meter.read(*pending)
        watchdog.start()
        pending = None
        with meter.paused():
            values = None
            if evaluating:
                if not evaluated:
                    watchdog.rest()
                try:
                    values = evaluate(done)
                except Preempted:
                    # There may be no time for this evaluation. It is made when the run goes on.
                    stop = last = saving = owed = True
                evaluated = True
                watchdog.start()
            if saving:
                watchdog.at(f"the saving of step {done}")
                writer.sync()
                checkpoints.save(
                    done,
                    states.to_trees(state),
                    next_batch=done,
                    heldout_loss=None if values is None else values["heldout_loss"],
                    heldout_text=evaluation.text if evaluating else "",
                )
        if last:
            trace.close()
        if stop and (done < steps or owed):
            checkpoints.wait()
            _LOG.info("SIGTERM: saved at step %d of %d; the same command goes on from there", done, steps)
            return PREEMPTED
    return FINISHED


class _Trace:
    """A profiler trace of the steps that ``logging.profile_step`` and ``profile_steps`` name, except the first step after a
    start, which is unlike the others. With several processes the first one takes it: all run the same program, and two on
    one host would write the same file."""

    def __init__(self, config: config_dict.ConfigDict, first: int, directory: Path):
        begin, self._steps = config.logging.profile_step, config.logging.profile_steps
        # A run that resumes after these steps already has their trace, and would take another after each preemption.
        wanted = begin and begin + self._steps > first and start.is_first()
        self._begin = max(begin, first + 1) if wanted else None
        self._directory = str(directory / "profile")
        self._running = False

    def at(self, step: int, before: Any) -> None:
        """Call this before each step with the result of the step before: a trace covers what the devices do meanwhile, and
        they may still be working on that step."""
        if self._begin is None or step not in (self._begin, self._begin + self._steps):
            return
        jax.block_until_ready(before)
        if step == self._begin:
            jax.profiler.start_trace(self._directory)
            self._running = True
        else:
            self.close()

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
