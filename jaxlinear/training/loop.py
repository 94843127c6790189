"""A training run, from a config to its last checkpoint, in one loop."""

import contextlib
import dataclasses
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
from jaxlinear.parallel import distributed, feeding
from jaxlinear.parallel import mesh as meshes
from jaxlinear.training import heldout, trained_data
from jaxlinear.training import state as states
from jaxlinear.training import workdir as workdirs
from jaxlinear.training.heldout import Evaluation
from jaxlinear.training.init_from import Initial
from jaxlinear.training.job import Job
from jaxlinear.training.meter import Meter
from jaxlinear.training.metrics import MetricsWriter
from jaxlinear.training.preemption import Preempted, Stop
from jaxlinear.training.progress import Progress
from jaxlinear.training.step import Batch, Metrics, make_train_step
from jaxlinear.training.watchdog import Watchdog

_LOG = logging.getLogger(__name__)


def train(config: config_dict.ConfigDict, workdir: str | os.PathLike) -> int:
    """Trains until ``training.steps``, resuming from the newest checkpoint in ``workdir`` if there is one.

    Returns ``FINISHED``, or ``PREEMPTED`` if SIGTERM came and the run saved itself. A run killed in any other way
    and started again follows the uninterrupted run: exactly on CPU, and elsewhere as exactly as the compiler's programs
    repeat themselves (docs/checkpoints.md).
    """
    distributed.check_same_program()
    distributed.check_agreement("the config", config.to_json_best_effort(sort_keys=True))
    distributed.check_agreement("the work directory", str(workdir))
    with distributed.together():
        job = Job.build(config)
        workdirs.check(workdir, job.config)
        trained_data.check(workdir, job.texts)
        if config.training.initial_from and not workdirs.saved_steps(workdir):
            Initial.find(job)  # so that nothing is written if it does not fit
        data = job.data_text() + trained_data.text(job.texts)
    distributed.check_agreement("the data", data)
    with workdirs.alone(workdir):
        directory = Path(workdir)
        with distributed.together():
            # Again, now that no other run has the directory.
            workdirs.check(directory, job.config)
            trained_data.check(directory, job.texts)
            trained_data.keep(directory, job.texts)
        with Stop() as stop, Watchdog(job.config.training.patience_minutes) as watchdog:
            return _train(job, directory, stop, watchdog)


def _train(job: Job, directory: Path, stop: Stop, watchdog: Watchdog) -> int:
    checkpoints = Checkpoints(directory, job.config)
    try:
        state, first, initial = _restore_or_create(job, checkpoints)
        with distributed.together():  # it reads what was logged, which may be damaged
            writer = MetricsWriter(directory, step=first, tensorboard=job.config.logging.tensorboard)
        with (
            contextlib.closing(writer),
            contextlib.closing(Progress(step=first, steps=job.config.training.steps)) as progress,
        ):
            run = _Run(job, directory, checkpoints, writer, progress, stop, watchdog)
            status = run.go_on(state, first, initial)
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
    step = checkpoints.newest_anywhere()
    structs = states.structs(job.architecture, job.optimizer, job.mesh)
    if step is None:
        state = states.initialise(job.architecture, job.optimizer, job.config.training.seed, job.mesh)
        if not job.config.training.initial_from:
            return state, 0, None
        initial = _agreed_initial(job)
        return initial.put_into(state, structs), 0, initial
    with distributed.together():
        meta = checkpoints.meta(step)
        saved = configs.from_json(json.dumps(meta["config"]))
        try:
            workdirs.check_same_run(checkpoints.directory.parent, saved, job.config)
        except UserError as error:  # the directory's own config is this run's
            raise UserError(f"the checkpoint of step {step} was copied from another run: {error}") from error
    first = meta["next_batch"]
    _LOG.info("resuming from step %d in %s", first, checkpoints.directory)
    return states.from_trees(checkpoints.restore(states.to_trees(structs), step)), first, None


def _agreed_initial(job: Job) -> Initial:
    """Chooses the same checkpoint on all processes: another may be written to that directory meanwhile."""
    with distributed.together():
        initial = Initial.find(job)
    distributed.check_agreement("the checkpoint of training.initial_from", str(initial.step))
    return initial


@dataclasses.dataclass(frozen=True)
class _Run:
    """A job, with what it writes to and what may end it."""

    job: Job
    directory: Path
    checkpoints: Checkpoints
    writer: MetricsWriter
    progress: Progress
    stop: Stop
    watchdog: Watchdog

    def go_on(self, state: states.TrainState, first: int, initial: Initial | None) -> int:
        """Trains from the state after ``first`` steps to the last step."""
        config, steps = self.job.config, self.job.config.training.steps
        with distributed.together():  # only the first process needs to see what was logged
            owed = first > 0 and distributed.is_first() and heldout.is_owed(config, self.directory, first)
        owed = distributed.as_the_first(owed)
        if first >= steps and not owed:
            _LOG.info("the run is at step %d of %d: nothing to do", first, steps)
            return FINISHED
        workdirs.prepare(self.directory, config)
        evaluations = _Evaluations(self)
        workdirs.note_start(
            self.directory,
            first,
            config,
            self.job.mesh,
            heldout_text=evaluations.text if config.evaluation.every_steps else "",
            owed=owed,
            initial=None if initial is None else str(initial),
        )
        if owed:
            values = evaluations.make(first, state.parameters)
            if values is None:
                _LOG.info(
                    "SIGTERM: step %d of %d is still to be evaluated; the same command resumes from there", first, steps
                )
                return PREEMPTED
            self.writer.sync()
            self.checkpoints.evaluated(first, values["heldout_loss"], evaluations.text)
        if first >= steps:
            return FINISHED
        return _Steps(self, evaluations, state, first).take()


class _Evaluations:
    """The evaluations of a run, each logged when it is complete."""

    def __init__(self, run: _Run):
        self._run = run
        self._evaluation = Evaluation(run.job, self._between)
        self._compiled = False

    def _between(self) -> None:
        self._run.watchdog.at("a batch of an evaluation")
        self._run.stop.check()

    def make(self, step: int, parameters: dict[str, Any]) -> dict[str, float] | None:
        """Evaluates the parameters after ``step`` steps; None if SIGTERM ends this."""
        if not self._compiled:  # the first evaluation compiles
            self._run.watchdog.rest()
        self._compiled = True
        try:
            values = self._evaluation(parameters)
        except Preempted:
            return None
        self._run.writer.write(step, values)
        self._run.progress.evaluated(step, values)
        return values

    @property
    def text(self) -> str:
        """Identifies what the loss is measured on."""
        return self._evaluation.text


class _Steps:
    """The steps of a run, from the state after ``first`` of them. While the devices take a step, the host reads the metrics
    of the step before and the batch of the next."""

    def __init__(self, run: _Run, evaluations: _Evaluations, state: states.TrainState, first: int):
        self._run, self._evaluations, self._state, self._first = run, evaluations, state, first
        self._sharding = meshes.batch_sharding(run.job.mesh)
        self._batch = self._placed(first)
        self._step_fn = self._compile()
        self._meter = Meter(run.job, run.writer, run.progress, first)
        self._trace = _Trace(run.job.config, first, run.directory)
        self._unread: tuple[int, Metrics] | None = None  # a step and its metrics

    def _placed(self, step: int) -> Batch:
        job = self._run.job
        return feeding.place(job.batches[step], self._sharding, job.config.training.batch_size)

    def _compile(self) -> jax.stages.Compiled:
        job = self._run.job
        step_fn = make_train_step(job.config, job.architecture, job.optimizer, job.mesh)
        begin = time.perf_counter()
        compiled = step_fn.lower(self._state, self._batch).compile()
        _LOG.info("compiled the step in %.1f s", time.perf_counter() - begin)
        return compiled

    def take(self) -> int:
        """Takes all steps, or as many as there are before SIGTERM comes."""
        config, steps = self._run.job.config, self._run.job.config.training.steps
        for done in range(self._first + 1, steps + 1):
            self._begin_step(done)
            stop = self._run.stop.came()
            last = done == steps or stop
            if not last:
                self._read_batch(done)
            evaluating = heldout.is_due(config, done)
            saving = done % config.checkpoint.every_steps == 0 or last
            owed = False
            if evaluating or saving:
                owed = self._evaluate_and_save(done, evaluating, saving)
            if last or owed:
                self._trace.close()
            if owed or (stop and done < steps):
                self._run.checkpoints.wait()
                _LOG.info("SIGTERM: saved at step %d of %d; the same command resumes from there", done, steps)
                return PREEMPTED
        return FINISHED

    def _begin_step(self, done: int) -> None:
        """Starts step ``done``, counted from 1, and reads the metrics of the step before."""
        self._trace.before(done, self._state)
        self._run.watchdog.at(f"step {done}")
        self._run.checkpoints.check()
        self._state, metrics = self._step_fn(self._state, self._batch)
        self._read_metrics()
        self._unread = (done, metrics)

    def _read_metrics(self) -> None:
        """Reads the metrics of the newest step, unless they have been: this waits for the devices."""
        if self._unread is not None:
            self._meter.read(*self._unread)
            self._unread = None
            self._run.watchdog.start()

    def _read_batch(self, done: int) -> None:
        """Reads the batch of the step after ``done`` steps."""
        self._run.watchdog.at(f"the reading of the batch of step {done + 1}")
        with self._meter.waiting():
            self._batch = self._placed(done)

    def _evaluate_and_save(self, done: int, evaluating: bool, saving: bool) -> bool:
        """Returns whether SIGTERM ended the evaluation. There may be no time for it: the state is saved at once, and the
        evaluation made when the run goes on."""
        self._run.watchdog.at(f"step {done}")
        self._read_metrics()
        with self._meter.paused():
            values = None
            if evaluating:
                values = self._evaluations.make(done, self._state.parameters)
                self._run.watchdog.start()
            owed = evaluating and values is None
            if saving or owed:
                self._save(done, values)
        return owed

    def _save(self, done: int, values: dict[str, float] | None) -> None:
        self._run.watchdog.at(f"the saving of step {done}")
        self._run.writer.sync()
        heldout_loss, heldout_text = None, ""
        if values is not None:
            heldout_loss, heldout_text = values["heldout_loss"], self._evaluations.text
        self._run.checkpoints.save(
            done,
            states.to_trees(self._state),
            next_batch=done,
            heldout_loss=heldout_loss,
            heldout_text=heldout_text,
        )


class _Trace:
    """A profiler trace of the steps that ``logging.profile_step`` and ``profile_steps`` name, except the first step after a
    start, which is unlike the others. With several processes the first one takes it: all run the same program, and two on
    one host would write the same file."""

    def __init__(self, config: config_dict.ConfigDict, first: int, directory: Path):
        begin, self._steps = config.logging.profile_step, config.logging.profile_steps
        # A run that resumes after these steps already has their trace, and would take another after each preemption.
        wanted = begin and begin + self._steps > first + 1 and distributed.is_first()
        self._begin = max(begin, first + 2) if wanted else None
        self._directory = str(directory / "profile")
        self._running = False

    def before(self, step: int, state: Any) -> None:
        """Call this before each step with the result of the one before: a trace covers what the devices do meanwhile, and
        they may still be working on that step."""
        if self._begin is None or step not in (self._begin, self._begin + self._steps):
            return
        jax.block_until_ready(state)
        if step == self._begin:
            jax.profiler.start_trace(self._directory)
            self._running = True
        else:
            self.close()

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
