"""Checkpoints of a run, through Orbax: saved while training continues, restored exactly or not at all."""

import collections
import contextlib
import json
import logging
import math
import os
import re
import shutil
import sys
import time
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import config_dict
from orbax.checkpoint import checkpoint_managers as policies

from jaxlinear import atomic, streaming
from jaxlinear import config as configs
from jaxlinear.errors import RunError, UserError
from jaxlinear.parallel import distributed

DIRECTORY = "checkpoints"
_META = "meta"
_TEXT = "heldout_text"
_OVERHEAD_BYTES = 1 << 19  # of a checkpoint beyond its arrays: descriptions, and blocks that are not full
_LOG = logging.getLogger(__name__)
_LOOKS_EVERY = 0.01  # seconds
_OPENINGS = 10  # attempts to open a directory in which a run removes checkpoints
# What Orbax and TensorStore raise for a damaged file; for the damaged contents of an array it is a bare Exception.
_READ_ERRORS = (ValueError, OSError, KeyError, TypeError)
_DISK_FULL = ("RESOURCE_EXHAUSTED", "No space left", "Disk quota exceeded")  # in the messages of a failed write


# Orbax warns about what is intended: opening a run only for reading, and saving without an evaluation. It logs the
# traceback of a write in the background three times before the error is raised here.
_NOT_SHOWN = re.compile(
    r"CheckpointManagerOptions\.read_only=True|Given directory is read only|Requested `tracked_metric`"
    r"|(\[[^\]]*\])* ?(_SignalingThread\.run\(\) raised|Failed to run \d+ Handler Commit|Save Finalize thread .* failed)"
)


class _Shown(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return _NOT_SHOWN.match(record.getMessage()) is None


logging.getLogger("absl").addFilter(_Shown())


class _Manager(ocp.CheckpointManager):
    failure: Exception | None = None  # of a write in the background

    def reached_preemption(self, step: int) -> bool:
        """The run decides itself when it was preempted (``training/preemption.py``). JAX has one counter for all that ask,
        which the number of a step would move far beyond the run's own."""
        del step
        return False

    def _wait_for_checkpointers(self) -> None:
        """Orbax calls this in a thread, and keeps the error until the other processes have written too: they wait for this
        one, ten minutes."""
        try:
            super()._wait_for_checkpointers()
        except Exception as error:
            # Logged as well: this process may be ended before its next step, waiting for another.
            _LOG.error("a checkpoint could not be written: %s", _in_one_line(error))
            self.failure = error
            raise


class Checkpoints:
    """The checkpoints of one run. Each holds named pytrees, their checksums, the resolved config and the data position.

    A checkpoint is written to a temporary directory and renamed once it is complete, so an incomplete one is never seen
    here; its remains are removed at the next save.
    """

    def __init__(self, workdir: str | os.PathLike, config: config_dict.ConfigDict | None = None):
        """Opens the run for reading or, with its config, for writing."""
        self.directory = Path(workdir).absolute() / DIRECTORY
        if config is None and not self.directory.is_dir():
            raise UserError(f"{workdir} has no checkpoints: it is not the work directory of a run")
        self._config = config
        self._failed = False
        self._write = contextlib.ExitStack()  # closed when it has succeeded
        options = ocp.CheckpointManagerOptions(
            read_only=config is None,
            create=config is not None,
            cleanup_tmp_directories=config is not None,
            preservation_policy=None if config is None else _preservation(config),
            save_decision_policy=policies.FixedIntervalPolicy(1),
            # Makes Orbax write the losses beside the trees, so that the best are still known when the run resumes.
            best_fn=None if config is None else _heldout_loss,
            best_mode="min",
        )
        self._manager = _open(self.directory, options)

    def steps(self) -> list[int]:
        """The steps that can be restored, oldest first."""
        return sorted(self._manager.all_steps())

    def newest_anywhere(self) -> int | None:
        """The newest step, the same on all processes of the run, each of which must call this; None if there is none. A
        host that sees an older state of the directory, as may happen on NFS, looks again for a while.

        Raises:
          RunError: some processes still see another newest step than the others.
        """
        none = -1

        def look() -> int:
            self._manager.reload()
            return max(self.steps(), default=none)

        seen = distributed.seen_by_each(look)
        newest = max(seen)
        others = [process for process, step in enumerate(seen) if step != newest]
        if others:
            named = "; ".join(
                f"process {process} sees {'none' if seen[process] == none else f'step {seen[process]}'}"
                for process in others
            )
            raise RunError(
                f"the newest checkpoint in {self.directory} is that of step {newest} for process "
                f"{seen.index(newest)}, but {named}; a run can resume only when all its hosts see the same files: "
                "start the same command again when they do"
            )
        return None if newest == none else newest

    def save(
        self,
        step: int,
        trees: Mapping[str, Any],
        *,
        next_batch: int,
        heldout_loss: float | None = None,
        heldout_text: str = "",
    ) -> None:
        """Starts a save; returns once the arrays have been copied, while the writing continues in the background. The loss
        is compared only with those of the same ``heldout_text``, which identifies the text.

        An error of an earlier save is raised here or in ``check``, ``wait`` or ``close``.
        """
        assert self._config is not None
        self.wait()  # as Orbax would; here, so that the free space is known
        with distributed.together():  # a quota may be used up on one host only
            self._check_space(trees)
        meta = _meta(self._config, next_batch, {name: _checksums(tree) for name, tree in trees.items()})
        items = {name: ocp.args.StandardSave(_by_path(tree)) for name, tree in trees.items()}
        self._write.enter_context(_late_answers_dropped())
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta)),
                metrics=None if heldout_loss is None else _metrics(heldout_loss, heldout_text),
            )

    def evaluated(self, step: int, heldout_loss: float, heldout_text: str) -> None:
        """Notes the held-out loss of a checkpoint that was saved without one, since SIGTERM had ended its evaluation. Each
        process must call this."""
        losses = self.directory / str(step) / "metrics"  # as Orbax writes and reads them
        with distributed.together(), self._writing():  # no process reads them before they are there
            if distributed.is_first() and losses.parent.is_dir() and not losses.exists():
                made = losses.with_name("metrics.partial")
                made.mkdir(exist_ok=True)
                atomic.write_text(made / "metrics", json.dumps(_metrics(heldout_loss, heldout_text)))
                made.rename(losses)
        self._manager.reload()

    def restore(self, structs: Mapping[str, Any], step: int | None = None) -> dict[str, Any]:
        """The trees named in ``structs`` at ``step`` (the newest by default).

        Each is placed like its ``ShapeDtypeStruct``s, on whatever mesh these name, not on the mesh it was saved from.
        """
        step = self._existing(step)
        for name, tree in structs.items():
            self.check_paths(name, _by_path(tree), step)
        items = {name: ocp.args.StandardRestore(_by_path(tree)) for name, tree in structs.items()}
        saved = self._read(step, **items)
        trees = {name: _from_path(saved[name], tree) for name, tree in structs.items()}
        for name, tree in trees.items():
            expected = saved[_META]["checksums"][name]
            for path, checksum in _checksums(tree).items():
                if checksum != expected[path]:
                    raise self._unreadable(step, ValueError(f"{name}: {path} differs from what was saved"))
        return trees

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """What was saved beside the trees: ``config`` and ``next_batch``."""
        step = self._existing(step)
        meta = self._read(step)[_META]
        return {"config": meta["config"], "next_batch": meta["next_batch"]}

    def check_paths(self, name: str, paths: Collection[str], step: int | None = None) -> None:
        """Raises ``UserError`` unless these are the paths of the arrays of one tree. Other paths are not damage: another
        version lays out the arrays of the same model in another way."""
        step = self._existing(step)
        there = self._read(step)[_META]["checksums"].get(name, {})
        if set(there) != set(paths):
            other = min(set(there) ^ set(paths))
            raise UserError(
                f"the checkpoint {self.directory / str(step)} is of another version of jaxlinear: among its {name} is "
                f"{'a' if other in there else 'no'} {other}; read it with the version that wrote it"
            )

    def fingerprint(self, step: int) -> str:
        """Tells the checkpoint from another of the same step, which a run that was set back may save."""
        return self._read(self._existing(step))[_META]["checksum"]

    def stream(self, name: str, step: int | None = None) -> dict[str, streaming.StreamedArray]:
        """The arrays of one tree by path, to be read from disk part by part. Each is compared with its checksum here, so
        the whole tree is read once before anything is returned."""
        step = self._existing(step)
        arrays = {}
        for path, expected in self._read(step)[_META]["checksums"][name].items():
            try:
                arrays[path] = streaming.open_array(self.directory / str(step) / name, path)
                found = _streamed_checksum(arrays[path])
            except _READ_ERRORS as error:
                raise self._unreadable(step, error) from error
            if found != expected:
                raise self._unreadable(step, ValueError(f"{name}: {path} differs from what was saved"))
        return arrays

    def check(self) -> None:
        """Raises the error of a save that was started, if it is known already."""
        with self._writing():
            if self._manager.failure is not None:
                raise self._manager.failure

    def wait(self) -> None:
        """Waits until every save that was started is written, or one of this process's own has failed."""
        while self._manager.is_saving_in_progress():
            self.check()
            time.sleep(_LOOKS_EVERY)
        with self._writing():
            self._manager.wait_until_finished()
        self._write.close()

    def close(self) -> None:
        """Waits, and releases the threads."""
        if not self._failed:
            self.wait()
            self._manager.close()

    def _check_space(self, trees: Mapping[str, Any]) -> None:
        """Refuses before anything is written: a write that runs out of space leaves remains and pages of tracebacks."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(dict(trees))) + _OVERHEAD_BYTES
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise UserError(self._full(f"it needs up to {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free"))

    def _full(self, reason: str) -> str:
        steps = self.steps()
        there = f"the newest complete one is of step {steps[-1]}" if steps else "there is no earlier one"
        return (
            f"no space left on the disk for a checkpoint in {self.directory} ({reason}); {there}; make room and start "
            "the same command again"
        )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns a full-disk error, of this write or an earlier one, into ``UserError``, and removes the remains; turns
        TensorStore's error for another one of the system into ``OSError``."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            self._failed = True
            if not is_disk_full(error):
                if code := re.search(r"os_error_code='(\d+)'", str(error)):
                    raise OSError(int(code[1]), os.strerror(int(code[1])), str(self.directory)) from error
                raise
            for unfinished in self.directory.glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(unfinished, ignore_errors=True)
            raise UserError(self._full("it was used up by other data during the write")) from error

    def _read(self, step: int, **items: Any) -> Any:
        """These items and the metadata beside them, which is checked to be what was written."""
        try:
            with _late_answers_dropped():
                saved = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore(), **items))
            meta = dict(saved[_META])
            if meta.pop("checksum") != _text_checksum(meta):
                raise ValueError("meta: it differs from what was saved")
            return saved
        except Exception as error:
            if type(error) is not Exception and not isinstance(error, _READ_ERRORS):
                raise
            raise self._unreadable(step, error) from error

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.directory} has no completed checkpoint")
        if step is None:
            return steps[-1]
        if step not in steps:
            raise UserError(f"{self.directory} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
        return step

    def _unreadable(self, step: int, error: Exception) -> UserError:
        earlier = [other for other in self.steps() if other < step]
        advice = f"remove it to resume from step {earlier[-1]}" if earlier else "there is no earlier one"
        return UserError(
            f"the checkpoint {self.directory / str(step)} cannot be read ({_in_one_line(error)}); {advice}"
        )


@contextlib.contextmanager
def _late_answers_dropped() -> Iterator[None]:
    """TensorStore answers to an event loop, which Orbax closes at the first array that cannot be read or written. Python
    would print a traceback for each answer after that, so if this context ends in an error, none is printed from then on.
    """
    usual = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            usual(unraisable)

    sys.unraisablehook = hook
    yield
    sys.unraisablehook = usual


def _open(directory: Path, options: ocp.CheckpointManagerOptions) -> _Manager:
    """Opens the checkpoints with Orbax, which lists them and then looks at each. If they are only read, the run may have
    removed one in the meantime. Orbax also reads the losses beside all of them."""
    for opening in range(_OPENINGS):
        try:
            return _Manager(directory, options=options)
        except FileNotFoundError:
            if not options.read_only or opening == _OPENINGS - 1:
                raise
            time.sleep(0.1)
        except ValueError as error:  # reports a damaged JSON file, but not which one
            for file in sorted(directory.glob("*/metrics/metrics")):
                if not _is_json(file):
                    raise UserError(
                        f"the checkpoint {file.parents[1]} cannot be read (its losses in metrics/metrics are damaged: "
                        f"{error}); remove it to make the others readable"
                    ) from error
            raise
    raise AssertionError


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_bytes())
    except ValueError:
        return False
    return True


def save_streamed(
    workdir: str | os.PathLike, config: config_dict.ConfigDict, name: str, arrays: Mapping[str, streaming.StreamedArray]
) -> None:
    """Writes a checkpoint of step 0, which no training saves: one tree of arrays by path, with no more than a part of one
    array in memory at a time. Each array is read twice: for its checksum and to be written."""
    checksums = {path: _streamed_checksum(x) for path, x in arrays.items()}
    directory = Path(workdir).absolute() / DIRECTORY / "0"
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        meta = _meta(config, 0, {name: checksums})
        checkpointer.save(directory, args=ocp.args.Composite(**{_META: ocp.args.JsonSave(meta)}))
    # Saved separately: Orbax writes what is saved together in the background, all at once.
    streaming.save(directory / name, dict(arrays))


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def is_disk_full(error: Exception) -> bool:
    """Whether this is how Orbax, TensorStore or the system reports a full disk."""
    return any(sign in str(error) for sign in _DISK_FULL)


def _preservation(config: config_dict.ConfigDict) -> policies.PreservationPolicy:
    options = config.checkpoint
    kept: list[policies.PreservationPolicy] = [policies.LatestN(options.keep_newest)]
    if options.keep_every_steps:
        kept.append(_Multiples(options.keep_every_steps))
    if options.keep_best:
        kept.append(_Best(options.keep_best))
    return policies.AnyPreservationPolicy(kept)


def _metrics(heldout_loss: float, heldout_text: str) -> dict[str, Any]:
    return {"heldout_loss": heldout_loss, _TEXT: heldout_text}


def _heldout_loss(metrics: Mapping[str, float]) -> float:
    """A loss that is not finite counts as the worst: unchanged, it would leave the others without an order."""
    loss = metrics["heldout_loss"]
    return loss if math.isfinite(loss) else math.inf


class _Best(policies.PreservationPolicy):
    """Keeps the ``number`` checkpoints with the lowest held-out losses, and the newest of equal ones. Each text is ranked
    separately: a run may go on with another, and a loss on one says nothing about a loss on the other."""

    def __init__(self, number: int):
        self._number = number

    def should_preserve(self, checkpoints, *, context):
        of_each = collections.defaultdict(list)
        for checkpoint in checkpoints:
            if checkpoint.metrics is not None:
                found = of_each[checkpoint.metrics.get(_TEXT)]
                found.append((_heldout_loss(checkpoint.metrics), -checkpoint.step))
        best = {-step for found in of_each.values() for _, step in sorted(found)[: self._number]}
        return [checkpoint.step in best for checkpoint in checkpoints]


class _Multiples(policies.PreservationPolicy):
    """Keeps the steps that are multiples of ``interval``, however far apart the saves were."""

    def __init__(self, interval: int):
        self._interval = interval

    def should_preserve(self, checkpoints, *, context):
        return [checkpoint.step % self._interval == 0 for checkpoint in checkpoints]


def _checksums(tree: Any) -> dict[str, int]:
    """The checksum of each array by path. It does not depend on how the array is spread over devices."""
    # One after another: on the CPU, programs with collectives that run side by side can wait for each other for ever.
    return {path: int(_checksum(x)) for path, x in _by_path(tree).items()}


def _streamed_checksum(x: streaming.StreamedArray) -> int:
    """The checksum of the whole array: the sum of those of its pieces, flattened so that few shapes are compiled."""
    total = first = 0
    for _, piece in x.pieces():
        total += int(_checksum(piece.reshape(-1), np.uint32(first % 2**32)))
        first += piece.size
    return total % 2**32


@jax.jit
def _checksum(x: jax.Array, first: int | jax.Array = 0) -> jax.Array:
    """The sum modulo 2**32, over all entries, of a hash of the entry's bits and its place, where x[0, ..., 0] has the place
    ``first``.

    A change to a single entry always shows: the hash (the last step of MurmurHash3) is one-to-one in the bits.
    """
    bits = x.astype(jnp.uint8) if x.dtype == bool else x
    bits = jax.lax.bitcast_convert_type(bits, f"uint{8 * bits.dtype.itemsize}").astype(jnp.uint32)
    place = jnp.full(x.shape, first, jnp.uint32)
    for axis in range(x.ndim):
        stride = jnp.uint32(math.prod(x.shape[axis + 1 :]) % 2**32)
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * stride
    bits += place * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return jnp.sum(bits, dtype=jnp.uint32)


def _meta(
    config: config_dict.ConfigDict, next_batch: int, checksums: Mapping[str, Mapping[str, int]]
) -> dict[str, Any]:
    """The metadata that is saved beside the trees."""
    meta = {"config": json.loads(configs.to_json(config)), "next_batch": next_batch, "checksums": checksums}
    return meta | {"checksum": _text_checksum(meta)}


def _text_checksum(values: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _by_path(tree: Any) -> dict[str, Any]:
    """A flat dict by path, independent of how containers are represented in memory."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _from_path(saved: Mapping[str, Any], structs: Any) -> Any:
    leaves = [saved[_name(path)] for path, _ in jax.tree_util.tree_leaves_with_path(structs)]
    return jax.tree.unflatten(jax.tree.structure(structs), leaves)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
