"""What ptxas reports about kernels compiled for a GPU that is not present."""

import importlib.util
import re
import subprocess
from pathlib import Path


def dumped_to(directory: Path) -> dict[str, str]:
    """Options of ``compile`` that write the kernels to ``directory``, for ``registers``; JAX 0.11 does so only if asked."""
    return {"xla_dump_to": str(directory), "xla_dump_emitter_re": "ptx"}


def registers(directory: Path, name: str) -> dict[str, int]:
    """Registers per thread of each dumped kernel whose name begins with ``name``. Asserts that none spills."""
    ptxas = Path(importlib.util.find_spec("nvidia").submodule_search_locations[0]) / "cu13" / "bin" / "ptxas"
    used = {}
    for ptx in directory.glob("*.ptx"):
        text = ptx.read_text()
        if f".entry {name}" not in text:
            continue
        architecture = re.search(r"^\.target (\w+)", text, re.M)[1]
        command = [ptxas, "-v", f"-arch={architecture}", ptx, "-o", directory / "out"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        pattern = rf"Compiling entry function '({name}\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
        for kernel, spilled, count in re.findall(pattern, said, re.S):
            used[kernel] = int(count)
            assert int(spilled) == 0, f"{kernel} spills {spilled} bytes"
    return used
