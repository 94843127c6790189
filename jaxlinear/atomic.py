"""Files that are written whole or not at all: a reader sees the old text or the new one, never part of one."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` as UTF-8: first to ``NAME.tmp`` beside the file, which then replaces the file in one step.

    Raises:
      OSError: for instance because the disk is full; the file is then unchanged.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
