"""``benchmarks/gpu_kernels.py`` without a GPU: it times what needs no GPU, and refuses to time kernels."""

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "gpu_kernels.py"


def run(*options):
    return subprocess.run([sys.executable, str(PROGRAM), *options], capture_output=True, text=True)


def test_each_direction_of_each_operation_is_timed(tmp_path):
    path = tmp_path / "rows.json"
    sizes = "--shapes=1x64x2x16", "--calls=1", "--rounds=1"
    operations = (
        "delta_rule_scalar",
        "linear_recurrence",
        "selective_scan",
        "gated_rms_norm",
        "sliding_window_attention",
    )
    done = run("--backend=chunked", f"--operations={','.join(operations)}", *sizes, f"--json={path}")
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert [(row["operation"], row["direction"]) for row in rows] == [
        (operation, direction) for operation in operations for direction in ("forward", "both")
    ]
    assert all(row["ms"] > 0 and row["device_ms"] is None for row in rows)


def test_kernels_are_refused_without_a_gpu():
    done = run("--operations=delta_rule")
    assert done.returncode == 2
    assert "there is no GPU to time kernels on; --backend=chunked runs without them" in done.stderr
