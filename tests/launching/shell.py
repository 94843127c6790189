"""Shell programs that take the place of those that a script calls."""


def stand_in(file, *lines):
    """Writes a shell program in place of another; returns its path."""
    file.write_text("\n".join(("#!/bin/bash", *lines, "")))
    file.chmod(0o755)
    return str(file)
