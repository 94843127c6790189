"""Files that are written whole or not at all: a reader sees the old text or the new one, never part of one. And the
directories for them."""

import os
from pathlib import Path

from jaxlinear.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` as UTF-8: first to ``NAME.tmp`` beside the file, which then replaces the file in one step.

    Raises:
      OSError: for instance because the disk is full; the file is then unchanged.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def make_directory(directory: Path) -> None:
    """Makes it and its parents, if it does not exist.

    Raises:
      UserError: its file system holds no directories of users, such as /proc, which calls the new one not found.
      OSError: for instance because the disk is full or read-only.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} cannot be made: its file system takes no new directories") from error
