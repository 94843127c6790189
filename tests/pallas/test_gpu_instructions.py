"""``benchmarks/gpu_instructions.py``: what it counts, for kernels whose products and bytes are known."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("optimised")

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "gpu_instructions.py"


def run(*options, length=64, width=64):
    """What the program printed and how it ended."""
    sizes = f"--length={length}", f"--key={width}", f"--value={width}"
    return subprocess.run([sys.executable, str(PROGRAM), *sizes, *options], capture_output=True, text=True)


def counted(path, *options, **sizes):
    """What it counts for linear attention."""
    done = run("--operations=linear_attention", f"--json={path}", *options, **sizes)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


def test_linear_attention_of_one_chunk(tmp_path):
    """64 tokens and channels: k v^T for the state; q k^T, A v and q S for the outputs. Bytes at 13.87 per cycle."""
    found = counted(tmp_path / "rows.json", "--decays=none")
    rows = {row["kernel"].removeprefix("linear_attention_"): row for row in found["kernels"]}
    gradients = {f"gradient_{name}" for name in ("states", "values", "keys")}
    assert set(rows) == {"forward_states", "forward_outputs"} | gradients
    forward = [rows[f"forward_{name}"] for name in ("states", "outputs")]
    assert [row["matrix"] for row in forward] == [128, 3 * 128]
    narrow, wide = 64 * 64 * 2, 64 * 64 * 4  # k, v and the states before chunks; the states before and after all
    moved = [3 * narrow + 2 * wide, 5 * narrow]
    assert [row["memory"] for row in forward] == [round(x / 13.868) for x in moved]
    assert all(0 < row["issue"] == round(row["instructions"] / 4) for row in rows.values())
    whole = found["passes"][0]
    assert whole["pass"] == "linear_attention, none, forward"
    assert whole["memory"] == whole["larger"] == sum(row["memory"] for row in forward)


def test_beside_the_kernels_of_another_library(tmp_path):
    """A program in another Python counts them; here a stand-in prints given counts."""
    python = tmp_path / "python"
    row = {"kernel": "theirs", "instructions": 400, "issue": 100, "matrix": 10, "memory": 30}
    told = {"rows": [{"direction": direction, **row} for direction in ("forward", "gradient", "gradient")]}
    python.write_text(f"#!/bin/sh\necho $2 $3 > {tmp_path}/asked\necho '{json.dumps(told)}'\n")
    python.chmod(0o755)
    found = counted(tmp_path / "rows.json", "--decays=scalar", f"--against={python}", width=16)
    assert (tmp_path / "asked").read_text() == "linear_attention_scalar --shape=1x64x1x16\n"
    ours = [x["larger"] for x in found["passes"]]
    assert [(x["pass"], x["larger"], x["times"]) for x in found["compared"]] == [
        ("linear_attention, scalar, forward", 100, round(100 / ours[0], 2)),
        ("linear_attention, scalar, gradient", 200, round(200 / ours[1], 2)),
    ]


def test_a_python_that_is_not_there_or_fails_is_named(tmp_path):
    python = tmp_path / "python"
    options = "--operations=linear_attention", "--decays=none", f"--against={python}"
    done = run(*options, length=32, width=16)
    assert done.returncode != 0 and done.stderr.endswith(f"--against={python} is not a Python\n")
    python.write_text("#!/bin/sh\necho no such kernel >&2\nexit 3\n")
    python.chmod(0o755)
    done = run(*options, length=32, width=16)
    assert done.returncode != 0 and "no such kernel\n" in done.stderr and "ended with status 3" in done.stderr


@pytest.mark.parametrize(
    "option, said",
    [("--decays=constant", "of channel, none, scalar"), ("--shared", "--shared is of --operations=linear_attention")],
)
def test_what_it_does_not_count_is_refused(option, said):
    done = run(option)
    assert done.returncode != 0 and said in done.stderr + done.stdout


def test_shared_keys(tmp_path):
    """They are read once, and their gradients written once, for both heads together."""
    found = counted(tmp_path / "rows.json", "--decays=none", "--shared", "--heads=2")
    rows = {row["kernel"]: row["memory"] for row in found["kernels"]}
    one = 64 * 64 * 2 / 13.868  # tokens of a head; q and k are half as many for each
    assert abs(rows["linear_attention_forward_outputs"] - 4 * one) <= 1
    assert abs(rows["linear_attention_gradient_keys"] - 6 * one) <= 1
