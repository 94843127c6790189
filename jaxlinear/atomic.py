"""Files that are written whole or not at all: who reads one meets the old text or the new one, and never a part."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8. What was there stays until all of the text is written beside it, as ``NAME.tmp``, and takes its name.

    Raises:
      OSError: as of a full disk; the file is then as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
