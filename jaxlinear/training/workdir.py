"""A run's directory: its config, and what may change when the run resumes."""

import contextlib
import datetime
import errno
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import config_dict

from jaxlinear import __version__, atomic, config_checks, locks
from jaxlinear import config as configs
from jaxlinear.checkpoint import DIRECTORY
from jaxlinear.errors import UserError
from jaxlinear.parallel import distributed
from jaxlinear.training import metrics

_LOG = logging.getLogger(__name__)

CONFIG = "config.json"
STARTS = "starts.jsonl"
_NO_RENAMES = (errno.ENOSYS, errno.ENOTSUP, errno.EMFILE)  # errors that gcsfuse has given for buckets without folders

# A run that resumes with other values of these goes on as another run would have, which is logged and noted. All but the
# last may get it past a divergence.
_BEHAVIOUR = (
    "optimizer.learning_rate",
    "optimizer.muon_learning_rate",
    "optimizer.clip_norm",
    "training.spike_multiple",
    "parallel.gradient_dtype",
)
# A run may resume with other values of these; a change of any other key would make it another run.
_MAY_CHANGE = {
    "mesh",
    "parallel.exchange",
    "parallel.attention",
    "checkpoint",
    "evaluation",
    "logging",
    "data.path",  # the dataset may have moved; its manifest shows whether it is the same one (trained_data)
    "data.heldout_path",
    "training.steps",
    "training.max_skips",
    "training.patience_minutes",
    "model.remat",
    "model.kernels",
    *_BEHAVIOUR,
}


def read_config(workdir: str | os.PathLike) -> config_dict.ConfigDict:
    """The resolved config with which a run was started."""
    path = Path(workdir) / CONFIG
    if not path.is_file():
        raise UserError(f"{workdir} is not the work directory of a run: it has no {CONFIG}")
    try:
        return configs.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def saved_steps(workdir: str | os.PathLike) -> list[int]:
    """The steps of the completed checkpoints, without opening them."""
    return [int(path.name) for path in (Path(workdir) / DIRECTORY).glob("*") if path.name.isdigit()]


def check(workdir: str | os.PathLike, config: config_dict.ConfigDict) -> None:
    """Raises ``UserError`` unless the directory has no run, or the one that ``config`` describes."""
    directory = Path(workdir)
    if os.path.lexists(directory) and not directory.is_dir():
        raise UserError(f"{workdir} is not a directory; give the run a --workdir of its own")
    if (directory / DIRECTORY / "0").exists():  # a run saves from step 1 on
        raise UserError(
            f"{workdir} holds imported weights, without the state of an optimiser; give the new run a --workdir of "
            f"its own, and --config.training.initial_from={workdir} to start from them"
        )
    if (directory / CONFIG).exists():
        come_to = max(saved_steps(directory), default=0)
        check_same_run(directory, read_config(directory), config, goes_on=come_to < config.training.steps)
        if come_to > config.training.steps:
            raise UserError(
                f"{workdir} holds a run with a checkpoint of step {come_to}, but training.steps is "
                f"{config.training.steps}: a run cannot be shortened; give the new run a --workdir of its own"
            )
    elif steps := saved_steps(directory):
        raise UserError(
            f"{workdir} has checkpoints but no {CONFIG}, which identifies the run; restore it "
            f'({DIRECTORY}/{max(steps)}/meta/metadata has it under "config"), or give the new run a --workdir of its '
            "own"
        )


@contextlib.contextmanager
def alone(workdir: str | os.PathLike) -> Iterator[None]:
    """Makes the directory, which all processes share. In this context, no other run has it."""
    directory = Path(workdir)
    atomic.make_directory(directory)
    distributed.check_shared("the work directory", directory)
    with contextlib.ExitStack() as stack:
        with distributed.together():
            _check_renames(directory)
            if distributed.is_first():
                stack.enter_context(locks.of_run(directory))
        yield


def prepare(workdir: str | os.PathLike, config: config_dict.ConfigDict) -> None:
    """Makes the directory if it does not exist and, after all checks, writes the config. Call this only if the run has
    something to do: a config with which a finished run is started again is not one that it ran with."""
    with distributed.together():
        check(workdir, config)
    directory = Path(workdir)
    atomic.make_directory(directory)
    if (directory / CONFIG).exists():
        before, after = _behaviour(read_config(directory)), _behaviour(config)
        for key, value in after.items():
            if before[key] != value:
                _LOG.warning("the run continues with %s=%r; it was %r", key, value, before[key])
    if distributed.is_first():
        atomic.write_text(directory / CONFIG, configs.to_json(config))


def _check_renames(directory: Path) -> None:
    """Raises ``UserError`` if folders cannot be renamed, as a checkpoint's is when it is complete."""
    if not distributed.is_first():
        return
    with tempfile.TemporaryDirectory(prefix=".renames_", dir=directory) as made:
        before = Path(made) / "a"
        before.mkdir()
        (before / "file").touch()
        try:
            before.rename(Path(made) / "b")
        except OSError as error:
            if error.errno not in _NO_RENAMES:
                raise
            raise UserError(
                f"folders cannot be renamed in {directory} ({error.strerror}), which checkpoints need when they are "
                "complete; on Google Cloud Storage, mount a bucket with a hierarchical namespace"
            ) from error


def _behaviour(config: config_dict.ConfigDict) -> dict[str, Any]:
    return {key: config[key.split(".")[0]][key.split(".")[1]] for key in _BEHAVIOUR}


def note_start(
    directory: Path,
    step: int,
    config: config_dict.ConfigDict,
    mesh: jax.sharding.Mesh,
    *,
    heldout_text: str = "",
    owed: bool = False,
    initial: str | None = None,
) -> None:
    """Adds a line to ``starts.jsonl``: the step from which the run goes on, when, with what and on what; what identifies
    the text of its held-out losses, if it has any, and whether that of this very step is owed; and, if its initial weights
    are not new, the checkpoint that they are from."""
    if not distributed.is_first():
        return
    before = [line["heldout_text"] for line in read_starts(directory) if "heldout_text" in line]
    if heldout_text and before and before[-1] != heldout_text:
        _LOG.warning(
            "held-out losses from here on are of other text, or of more or less of it, than those before: they cannot be "
            "compared"
        )
    device = mesh.devices.flat[0]
    line = {
        "step": step,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "platform": device.platform,
        "device": device.device_kind,
        "devices": mesh.size,
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape),
        "python": platform.python_version(),
        "jaxlinear": __version__,
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        **_behaviour(config),
        **({"heldout_text": heldout_text} if heldout_text else {}),
        **({"evaluation_owed": True} if owed else {}),
        **({} if initial is None else {"initial": initial}),
    }
    lines = [*_whole_lines(directory), json.dumps(line)]
    atomic.write_text(directory / STARTS, "".join(f"{known}\n" for known in lines))


def read_starts(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of ``starts.jsonl``; none for runs started before that file existed. A truncated last line is left out."""
    return metrics.json_lines(Path(workdir) / STARTS)


def heldout_changes(starts: Sequence[Mapping[str, Any]]) -> list[int]:
    """The steps after which the held-out losses of a run with these starts are of other text than before."""
    texts: list[tuple[int, str]] = []
    for line in starts:
        last = line["step"] - line.get("evaluation_owed", False)  # the last step of which a loss was known before it
        texts = [known for known in texts if known[0] < last]  # the others are no longer in its history
        if "heldout_text" in line:
            texts.append((last, line["heldout_text"]))
    return [step for (_, before), (step, text) in itertools.pairwise(texts) if before != text]


def _whole_lines(directory: Path) -> list[str]:
    path = directory / STARTS
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []


def check_same_run(
    workdir: Path,
    old: config_dict.ConfigDict,
    new: config_dict.ConfigDict,
    *,
    goes_on: bool = True,
    compared: Collection[str] = (),
) -> None:
    """Raises ``UserError`` for the first key that would make the run in ``workdir`` another run. If the run does not go on,
    that includes the keys that may get a run past a divergence: its results would be taken for those of the new value. The
    keys of ``compared``, which a run on its own may change, are refused too: its losses are compared with those of other
    runs. Keys that neither config reads make no difference."""
    may_change = _MAY_CHANGE if goes_on else _MAY_CHANGE.difference(_BEHAVIOUR)
    unread = {key for key, _ in config_checks.unread(old)} & {key for key, _ in config_checks.unread(new)}
    for key in configs.KEYS:
        section, name = key.split(".")
        if old[section][name] == new[section][name] or key in unread:
            continue
        if (section in may_change or key in may_change) and key not in compared:
            continue
        kind = "a checkpoint of another model" if section == "model" else "another run"
        advice = "" if saved_steps(workdir) else "; or remove the directory: it has no checkpoint"
        raise UserError(
            f"{workdir} holds {kind}: {key} is {old[section][name]!r} there and {new[section][name]!r} in this config; "
            f"give the new run a --workdir of its own{advice}"
        )
