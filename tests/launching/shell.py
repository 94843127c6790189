"""Shell stand-ins for the programs that a script calls, and what the script for TPU VMs sends to its hosts."""

import subprocess


def stand_in(file, *lines):
    """Writes a shell program that replaces another; returns its path."""
    file.write_text("\n".join(("#!/bin/bash", *lines, "")))
    file.chmod(0o755)
    return str(file)


def sent(script, function):
    """What the script for TPU VMs tells each host to do, which its function ``setup`` or ``train`` prints."""
    script = script.partition("\nqueued()")[0]
    return subprocess.run(["bash", "-c", f"{script}\n{function}"], capture_output=True, text=True, check=True).stdout
