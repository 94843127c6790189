"""The data of a run, as its directory records them: the tokenizer, and what distinguishes the datasets from others."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlinear import atomic, data
from jaxlinear.data.loader import SHUFFLE, ExampleTable
from jaxlinear.data.tokenizer import INFO_FILE
from jaxlinear.errors import UserError
from jaxlinear.parallel import distributed
from jaxlinear.training import workdir as workdirs

_LOG = logging.getLogger(__name__)

FILE = "data.json"
_BLOCKS_READ = 16  # of the training split, to notice the same documents in another order


def check(workdir: str | os.PathLike, datasets: Mapping[str, float]) -> None:
    """Raises ``UserError`` if the run in ``workdir`` was started on other data than these weights by directory. A dataset
    may have moved since. For runs started before ``data.json`` existed, only the tokenizer is checked."""
    directory, path = Path(workdir), ",".join(datasets)
    if not datasets:
        return
    if (directory / INFO_FILE).exists():
        tokenizer = data.load_tokenizer(next(iter(datasets)))
        if data.load_tokenizer(directory).sha256 != tokenizer.sha256:
            raise UserError(f"{workdir} holds a run on data of another tokenizer than that of {path}")
    if not (directory / FILE).exists():
        if workdirs.saved_steps(directory):
            _LOG.warning("%s has no %s: cannot check whether it was trained on the text of %s", workdir, FILE, path)
        return
    known = _read(directory)
    difference = _difference(known, _identities(datasets))
    if difference:
        raise UserError(
            f"{workdir} holds a run on other data than {path}: {difference}; give the new run a --workdir of its own"
        )
    if workdirs.saved_steps(directory) and not all("shuffle" in dataset for dataset in known):
        _LOG.warning(
            "the run in %s was started by a version that shuffled examples differently: it continues in another "
            "order, so that some examples of the current epoch are seen twice and some never",
            workdir,
        )


def keep(directory: Path, datasets: Mapping[str, float]) -> None:
    """Writes what ``check`` reads, unless it exists; also the tokenizer, so that text can be read and written without the
    dataset."""
    if not datasets or not distributed.is_first():
        return
    if not (directory / INFO_FILE).exists():
        data.load_tokenizer(next(iter(datasets))).save(directory)
    if not (directory / FILE).exists():
        atomic.write_text(directory / FILE, json.dumps(_identities(datasets), indent=2) + "\n")


def text(datasets: Mapping[str, float]) -> str:
    """What distinguishes the datasets from others, for processes to compare."""
    return json.dumps(_identities(datasets))


def check_tokenizer(workdir: Path, path: str | os.PathLike, manifest: data.Manifest) -> None:
    """Raises ``UserError`` if a dataset's tokenizer is not that of the run. A converted run may have none."""
    if not (workdir / INFO_FILE).is_file():
        return
    if data.load_tokenizer(workdir).sha256 != manifest.tokenizer.sha256:
        raise UserError(
            f"{path} was not prepared with the tokenizer that {workdir} was trained with; prepare it with the "
            f"tokenizer in {workdir}"
        )


def warn_of_split(workdir: Path, path: str | os.PathLike, manifest: data.Manifest) -> None:
    """Logs a warning if documents held out by a dataset may be among those that the run was trained on."""
    for other in other_splits(workdir, path, manifest):
        _LOG.warning("%s", other)


def other_splits(workdir: Path, path: str | os.PathLike, manifest: data.Manifest) -> list[str]:
    """One message for each dataset of the run whose training documents may be held out in this one."""
    if not (workdir / FILE).exists():
        return []
    return [
        f"{path} was split with seed {manifest.seed} and heldout_fraction {manifest.heldout_fraction:g}, and the "
        f"training data of the run in {workdir} with {trained.get('seed')} and {trained.get('heldout_fraction')}: a "
        "document in both may have been trained on; prepare both with the same values"
        for trained in _read(workdir)
        if (trained.get("seed"), trained.get("heldout_fraction")) != (manifest.seed, manifest.heldout_fraction)
    ]


def _read(directory: Path) -> list[dict[str, Any]]:
    try:
        old = json.loads((directory / FILE).read_text(encoding="utf-8"))
        if not (isinstance(old, list) and all(isinstance(dataset, dict) for dataset in old)):
            raise ValueError("it is not a list of datasets")
    except ValueError as error:
        raise UserError(f"{directory / FILE} is damaged: {error}") from error
    return old


def _identities(datasets: Mapping[str, float]) -> list[dict[str, Any]]:
    """In the order of the datasets, on which the order of the examples depends."""
    found = []
    for path, weight in datasets.items():
        manifest = data.read_manifest(path)
        train = manifest.splits["train"]
        found.append(
            {
                "weight": weight,
                "tokenizer": manifest.tokenizer.sha256,
                "seed": manifest.seed,
                "heldout_fraction": manifest.heldout_fraction,
                "block_length": manifest.block_length,
                "documents": train.documents,
                "tokens": train.tokens,
                "bytes": train.bytes,
                "blocks": _hash_of_blocks(path, manifest.block_length),
                "shuffle": SHUFFLE,
            }
        )
    return found


def _hash_of_blocks(path: str, block_length: int) -> str:
    table = ExampleTable(path, "train", block_length)
    places = np.unique(np.linspace(0, table.examples - 1, _BLOCKS_READ, dtype=np.int64))
    return hashlib.sha256(table.read(places)["tokens"].tobytes()).hexdigest()


def _difference(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> str | None:
    if len(old) != len(new):
        return f"{len(old)} datasets there and {len(new)} in this config"
    for before, now in zip(old, new, strict=True):
        for name, value in now.items():
            if name in ("blocks", "shuffle") and name not in before:
                continue  # the run was started before these were written
            if before.get(name) != value:
                return f"{name} is {before.get(name)!r} there and {value!r} in this config"
    return None
