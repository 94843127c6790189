"""The files in a folder whose text is to be prepared, each exactly once."""

import collections
import logging
import os
import pathlib
from collections.abc import Hashable

from jaxlinear.data.compressed import stripped_suffix
from jaxlinear.data.manifest import MANIFEST, SPLITS
from jaxlinear.data.tokenizer import INFO_FILE
from jaxlinear.errors import UserError

_LOG = logging.getLogger(__name__)


def files_of_folder(folder: pathlib.Path, suffixes: tuple[str, ...]) -> list[pathlib.Path]:
    """Links are followed. A file with several names is read once, under its first name in a sorted walk, so the order in
    which the disk lists names does not matter; this also ends loops of links. Prepared datasets are skipped: they hold no
    text."""
    files, others = [], collections.Counter[str]()
    again: list[str] = []
    datasets: list[pathlib.Path] = []
    seen: dict[Hashable, pathlib.Path] = {os.path.realpath(folder): folder}

    def is_new(path: pathlib.Path, identity: Hashable) -> bool:
        return seen.setdefault(identity, path) is path

    for directory, subdirectories, names in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        here = pathlib.Path(directory)
        if {MANIFEST, INFO_FILE} <= set(names) and set(SPLITS) <= set(subdirectories):
            datasets.append(here)
            subdirectories.clear()
            continue
        shown = sorted(name for name in subdirectories if not name.startswith("."))
        subdirectories[:] = [name for name in shown if is_new(here / name, os.path.realpath(here / name))]
        for name in sorted(names):
            if name.startswith("."):
                continue
            file = here / name
            # A name without a suffix may have been a folder.
            if not file.exists() and stripped_suffix(file) in ("", *suffixes):
                raise UserError(f"{file} is a link to {os.readlink(file)}, which does not exist; fix or remove it")
            if stripped_suffix(file) in suffixes:
                if not file.is_file():  # reading a pipe would wait for its writer
                    raise UserError(f"{file} is a pipe, a socket or a device, not a file; remove it")
                identity = _identity(file)
                if is_new(file, identity):
                    files.append(file)
                else:
                    again.append(f"{file} is {seen[identity]}")
            else:
                others[stripped_suffix(file) or name] += 1
    if folder in datasets:
        raise UserError(f"{folder} is a prepared dataset, which has no text; name the source it was made from")
    if not files:
        there = f"; it has {', '.join(name for name, _ in others.most_common(5))}" if others else " and no other files"
        raise UserError(f"{folder} has no file with a suffix of {', '.join(suffixes)}{there} (--suffixes chooses them)")
    if others:  # such as .jsonl.xz beside .jsonl.gz: the user may think that both are read
        there = ", ".join(f"{count} {name}" for name, count in others.most_common(5))
        more = ", ..." if len(others) > 5 else ""
        _LOG.info("%s: reading %d files, leaving out %s%s (--suffixes chooses them)", folder, len(files), there, more)
    if again:
        more = ", ..." if len(again) > 3 else ""
        _LOG.info(
            "%s: leaving out %d duplicate names of the same files: %s%s", folder, len(again), ", ".join(again[:3]), more
        )
    if datasets:
        _LOG.info("%s: leaving out the prepared datasets in it: %s", folder, ", ".join(map(str, datasets)))
    return sorted(files, key=lambda file: file.as_posix())


def _identity(file: pathlib.Path) -> Hashable:
    """The same value for all names of a file. The inode number is used only for files with several hard links, since not
    every network file system has inode numbers."""
    status = file.stat()
    if status.st_nlink > 1 and status.st_ino:
        return status.st_dev, status.st_ino
    return os.path.realpath(file)


def _refuse_folder(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be read ({error.strerror}), and its text would be left out") from error
