"""A training run, from a config to its last checkpoint: one loop."""

import dataclasses
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import NamedSharding
from ml_collections import config_dict

from jaxlinear import config as configs
from jaxlinear import data
from jaxlinear.checkpoint import Checkpoints
from jaxlinear.errors import RunError, UserError
from jaxlinear.models import parameters
from jaxlinear.parallel import mesh as meshes
from jaxlinear.scaling import flops, hardware
from jaxlinear.training import state as states
from jaxlinear.training import workdir as workdirs
from jaxlinear.training.metrics import MetricsWriter
from jaxlinear.training.optimizer import make_optimizer
from jaxlinear.training.step import make_loss_step, make_train_step

FINISHED, PREEMPTED = 0, 75  # exit statuses; 75 is EX_TEMPFAIL: start the same command again


def train(config: config_dict.ConfigDict, workdir: str | os.PathLike) -> int:
    """Trains until ``training.steps``, going on from the newest checkpoint in ``workdir`` if there is one.

    Returns ``FINISHED``, or ``PREEMPTED`` if SIGTERM came and the run saved itself. Killed in any other way and started
    again, it follows the uninterrupted run exactly.
    """
    job = Job.build(config)
    directory = workdirs.prepare(workdir, job.config)
    interrupted = _on_sigterm()
    checkpoints = Checkpoints(directory, job.config)
    try:
        state, first = _restore_or_create(job, checkpoints)
        writer = MetricsWriter(
            directory, step=first, steps=job.config.training.steps, tensorboard=job.config.logging.tensorboard
        )
        try:
            return _run(job, state, first, directory, checkpoints, writer, interrupted)
        finally:
            writer.close()
    finally:
        checkpoints.close()


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything of a run that its config fixes: nothing here depends on the step."""

    config: config_dict.ConfigDict
    architecture: parameters.Architecture
    mesh: jax.sharding.Mesh
    optimizer: Any
    batches: data.TrainBatches

    @classmethod
    def build(cls, config: config_dict.ConfigDict) -> "Job":
        """Checks the config against the devices and the data; writes nothing. ``UserError`` says what does not fit."""
        config = configs.resolve(config)
        mesh = meshes.make_mesh(config.mesh)
        _check_mesh(config, mesh)
        batches = open_batches(config, mesh)
        config = with_vocabulary(config, batches.vocab_size)
        architecture = parameters.describe(configs.model_config(config))
        return cls(config, architecture, mesh, make_optimizer(config, architecture), batches)


def open_batches(config: config_dict.ConfigDict, mesh: jax.sharding.Mesh) -> data.TrainBatches:
    """The training batches of this process: its rows of every global batch."""
    if not config.data.path:
        raise UserError("data.path is not set; launch/prepare_data.py makes a dataset")
    training = config.training
    return data.TrainBatches(
        mixture(config.data.path),
        batch_size=training.batch_size,
        sequence_length=training.sequence_length,
        seed=training.seed,
        rows=local_rows(meshes.batch_sharding(mesh), (training.batch_size, training.sequence_length)),
    )


def mixture(path: str) -> dict[str, float]:
    """``DIR`` or ``DIR=WEIGHT,DIR=WEIGHT`` as weights by directory."""
    weights = {}
    for part in path.split(","):
        name, _, weight = part.partition("=")
        try:
            weights[name.strip()] = float(weight) if weight else 1.0
        except ValueError:
            raise UserError(f"data.path: {weight!r} is not a weight; write DIR=WEIGHT,DIR=WEIGHT") from None
    return weights


def with_vocabulary(config: config_dict.ConfigDict, vocab_size: int) -> config_dict.ConfigDict:
    """The config with ``model.vocab_size`` set for a tokeniser of ``vocab_size``, or a refusal."""
    config = config.copy_and_resolve_references()
    if config.model.vocab_size is None:
        config.model.vocab_size = math.ceil(vocab_size / 128) * 128
    if config.model.vocab_size < vocab_size:
        raise UserError(
            f"the tokeniser of {config.data.path} has {vocab_size} tokens, more than model.vocab_size="
            f"{config.model.vocab_size}; leave model.vocab_size unset to follow the data"
        )
    return config


def local_rows(sharding: NamedSharding, shape: tuple[int, int]) -> tuple[int, int]:
    """The rows [start, stop) of ``[B, T]`` that lie on this process's devices."""
    slices = [index[0] for index in sharding.addressable_devices_indices_map(shape).values()]
    starts, stops = [s.start or 0 for s in slices], [shape[0] if s.stop is None else s.stop for s in slices]
    return min(starts), max(stops)


def place(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """This process's rows as its part of the global batch on the mesh."""
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def evaluate(job: Job, loss_step, params: dict[str, Any]) -> dict[str, float]:
    """Held-out loss in nats a token, and in bits a byte of text."""
    config = job.config
    path = config.data.heldout_path or next(iter(mixture(config.data.path)))
    sharding = meshes.batch_sharding(job.mesh)
    shape = (config.training.batch_size, config.training.sequence_length)
    batches = data.heldout_batches(
        Path(path),
        batch_size=shape[0],
        sequence_length=shape[1],
        rows=local_rows(sharding, shape),
        limit=config.evaluation.batches or None,
    )
    total, count = 0.0, 0
    for batch in batches:
        nll, targets = loss_step(params, place(batch, sharding))
        total += float(nll.sum())
        count += int(targets.sum())
    split = data.read_manifest(path).splits["heldout"]
    loss = total / count
    return {"heldout_loss": loss, "heldout_bits_per_byte": loss / math.log(2) * split.tokens / split.bytes}


def _check_mesh(config: config_dict.ConfigDict, mesh: jax.sharding.Mesh) -> None:
    rows = config.training.batch_size // config.training.microbatches
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise UserError(
            f"training.batch_size={config.training.batch_size} in {config.training.microbatches} microbatches is "
            f"{rows} rows, which the mesh (data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}) does not divide; "
            f"the nearest batch size that works is "
            f"{max(1, round(rows / parts)) * parts * config.training.microbatches}"
        )
    for axis in ("sequence", "expert"):
        if mesh.shape[axis] > 1:
            raise UserError(f"mesh.{axis}={mesh.shape[axis]}: no layer of this release is split over {axis}; set it to 1")


def _restore_or_create(job: Job, checkpoints: Checkpoints) -> tuple[states.TrainState, int]:
    if not checkpoints.steps():
        return states.initialise(job.architecture, job.optimizer, job.config.training.seed, job.mesh), 0
    first = checkpoints.meta()["next_batch"]
    logging.info("going on from step %d in %s", first, checkpoints.directory)
    structs = states.structs(job.architecture, job.optimizer, job.mesh)
    return states.from_trees(checkpoints.restore(states.to_trees(structs))), first


def _run(
    job: Job,
    state: states.TrainState,
    first: int,
    directory: Path,
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    interrupted: list[bool],
) -> int:
    config, steps = job.config, job.config.training.steps
    sharding = meshes.batch_sharding(job.mesh)
    if first >= steps:
        logging.info("the run is at step %d of %d: nothing to do", first, steps)
        return FINISHED

    step_fn = make_train_step(config, job.architecture, job.optimizer, job.mesh)
    loss_step = make_loss_step(config, job.architecture, job.mesh)
    batch = place(job.batches[first], sharding)
    begin = time.perf_counter()
    compiled = step_fn.lower(state, batch).compile()
    logging.info("compiled the step in %.1f s", time.perf_counter() - begin)

    meter = _Meter(job, writer, first)
    pending: tuple[int, Any] | None = None  # the metrics of a step are read after the next one is under way
    for step in range(first, steps):
        _profile(config, step, first, directory)
        state, metrics = compiled(state, batch)
        done = step + 1
        if pending is not None:
            meter.read(*pending)
        pending = (done, metrics)

        stop = interrupted[0]
        last = done == steps or stop
        if not last:
            batch = meter.timed(lambda index=done: place(job.batches[index], sharding))
        evaluating = config.evaluation.every_steps and (done % config.evaluation.every_steps == 0 or done == steps)
        saving = done % config.checkpoint.every_steps == 0 or last
        if not (evaluating or saving):
            continue

        meter.read(*pending)
        pending = None
        with meter.paused():
            heldout = None
            if evaluating:
                heldout = evaluate(job, loss_step, state.parameters)
                writer.write(done, heldout)
            if saving:
                writer.sync()
                checkpoints.save(
                    done,
                    states.to_trees(state),
                    next_batch=done,
                    heldout_loss=heldout["heldout_loss"] if heldout else None,
                )
        if stop and done < steps:
            checkpoints.wait()
            logging.info("SIGTERM: saved at step %d of %d; the same command goes on from there", done, steps)
            return PREEMPTED
    return FINISHED


class _Meter:
    """Turns the device's metrics into lines of the log, and wall-clock time into rates."""

    def __init__(self, job: Job, writer: MetricsWriter, first: int):
        config = job.config
        self._config, self._writer = config, writer
        self._tokens_per_step = config.training.batch_size * config.training.sequence_length
        self._flops = flops.training_flops_per_token(job.architecture.config, config.training.sequence_length)
        device = job.mesh.devices.flat[0]
        peak = hardware.peak_flops(device)
        if peak is None:
            logging.warning("the peak of %s is not known: mfu will be 0", device.device_kind)
        self._peak = (peak or math.inf) * job.mesh.size
        self._read_step = first
        self._waited = 0.0
        self._begin = time.perf_counter()

    def read(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Waits for the metrics after ``step`` steps; logs them if they are due."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if values["skips_in_a_row"] >= self._config.training.max_skips:
            raise RunError(
                f"{self._config.training.max_skips} steps in a row were skipped, the last of them step {step} with a "
                f"gradient norm of {values['gradient_norm']:.3g}: the run diverged; go on from an earlier checkpoint "
                "with a lower optimizer.learning_rate, or raise training.spike_multiple"
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
        self._writer.progress(step, {"loss": f"{line['loss']:.3f}", "tok/s": f"{rate:,.0f}"})
        self._read_step, self._waited, self._begin = step, 0.0, now

    def timed(self, fetch):
        """Calls ``fetch`` and counts its time as waiting for data."""
        begin = time.perf_counter()
        result = fetch()
        self._waited += time.perf_counter() - begin
        return result

    def paused(self) -> "_Pause":
        """A context whose time does not count."""
        return _Pause(self)


class _Pause:
    def __init__(self, meter: _Meter):
        self._meter = meter

    def __enter__(self):
        self._start = time.perf_counter()

    def __exit__(self, *_):
        self._meter._begin += time.perf_counter() - self._start


def _on_sigterm() -> list[bool]:
    """A cell that turns true when SIGTERM comes."""
    cell = [False]

    def handle(*_: Any) -> None:
        cell[0] = True

    signal.signal(signal.SIGTERM, handle)
    return cell


def _profile(config: config_dict.ConfigDict, step: int, first: int, directory: Path) -> None:
    begin = config.logging.profile_step
    if not begin:
        return
    if step == max(begin, first + 1):
        jax.profiler.start_trace(str(directory / "profile"))
    elif step == max(begin, first + 1) + config.logging.profile_steps:
        jax.profiler.stop_trace()
