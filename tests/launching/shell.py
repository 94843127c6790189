"""Programs of shell in place of those that a script calls."""


def stand_in(file, *lines):
    """A program of shell in place of another; its path."""
    file.write_text("\n".join(("#!/bin/bash", *lines, "")))
    file.chmod(0o755)
    return str(file)
