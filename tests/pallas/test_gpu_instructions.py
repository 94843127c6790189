"""``benchmarks/gpu_instructions.py``: what it counts, for kernels whose products and bytes are known."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("optimised")

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "gpu_instructions.py"


def test_linear_attention_of_one_chunk(tmp_path):
    """64 tokens and channels: k v^T for the state; q k^T, A v and q S for the outputs. Bytes at 13.87 per cycle."""
    path = tmp_path / "rows.json"
    sizes = "--length=64", "--key=64", "--value=64"
    command = [sys.executable, str(PROGRAM), "--operations=linear_attention", "--decays=none", *sizes, f"--json={path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    rows = {row["kernel"].removeprefix("linear_attention_"): row for row in found["kernels"]}
    assert set(rows) == {
        *("forward_states", "forward_outputs", "gradient_states", "gradient_values", "gradient_keys"),
    }
    assert [rows[f"forward_{name}"]["matrix"] for name in ("states", "outputs")] == [128, 3 * 128]
    narrow, wide = 64 * 64 * 2, 64 * 64 * 4  # k, v and the states before chunks; the states before and after all
    moved = [3 * narrow + 2 * wide, 5 * narrow]
    assert [rows[f"forward_{name}"]["memory"] for name in ("states", "outputs")] == [round(x / 13.868) for x in moved]
    assert all(0 < row["issue"] == round(row["instructions"] / 4) for row in rows.values())
    forward = found["passes"][0]
    assert forward["pass"] == "linear_attention, none, forward"
    assert (
        forward["memory"]
        == forward["larger"]
        == sum(rows[f"forward_{name}"]["memory"] for name in ("states", "outputs"))
    )


def test_beside_the_kernels_of_another_library(tmp_path):
    """A program in another Python counts them; here a stand-in prints given counts."""
    python, path = tmp_path / "python", tmp_path / "rows.json"
    row = {"kernel": "theirs", "instructions": 400, "issue": 100, "matrix": 10, "memory": 30}
    told = {"rows": [{"direction": direction, **row} for direction in ("forward", "gradient", "gradient")]}
    python.write_text(f"#!/bin/sh\necho $2 $3 > {tmp_path}/asked\necho '{json.dumps(told)}'\n")
    python.chmod(0o755)
    sizes = "--length=64", "--key=16", "--value=16"
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--operations=linear_attention", "--decays=scalar", *sizes]
        + [f"--against={python}", f"--json={path}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "asked").read_text() == "linear_attention_scalar --shape=1x64x1x16\n"
    found = json.loads(path.read_text())
    ours = [x["larger"] for x in found["passes"]]
    assert [(x["pass"], x["larger"], x["times"]) for x in found["compared"]] == [
        ("linear_attention, scalar, forward", 100, round(100 / ours[0], 2)),
        ("linear_attention, scalar, gradient", 200, round(200 / ours[1], 2)),
    ]


def test_a_python_that_is_not_there_or_fails_is_named(tmp_path):
    python, sizes = tmp_path / "python", ("--length=32", "--key=16", "--value=16")
    command = [sys.executable, str(PROGRAM), "--operations=linear_attention", "--decays=none", *sizes]
    done = subprocess.run([*command, f"--against={python}"], capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.endswith(f"--against={python} is not a Python\n")
    python.write_text("#!/bin/sh\necho no such kernel >&2\nexit 3\n")
    python.chmod(0o755)
    done = subprocess.run([*command, f"--against={python}"], capture_output=True, text=True)
    assert done.returncode != 0 and "no such kernel\n" in done.stderr and "ended with status 3" in done.stderr


def test_what_it_does_not_count_is_refused():
    done = subprocess.run([sys.executable, str(PROGRAM), "--decays=constant"], capture_output=True, text=True)
    assert done.returncode != 0 and "of channel, none, scalar" in done.stderr + done.stdout
    done = subprocess.run([sys.executable, str(PROGRAM), "--shared"], capture_output=True, text=True)
    assert done.returncode != 0 and "--shared is of --operations=linear_attention" in done.stderr + done.stdout


def test_shared_keys(tmp_path):
    """They are read once, and their gradients written once, for both heads together."""
    path = tmp_path / "rows.json"
    command = [sys.executable, str(PROGRAM), "--operations=linear_attention", "--decays=none", "--shared", "--heads=2"]
    done = subprocess.run(
        [*command, "--length=64", "--key=64", "--value=64", f"--json={path}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = {row["kernel"]: row["memory"] for row in json.loads(path.read_text())["kernels"]}
    one = 64 * 64 * 2 / 13.868  # tokens of a head; q and k are half as many for each
    assert abs(rows["linear_attention_forward_outputs"] - 4 * one) <= 1
    assert abs(rows["linear_attention_gradient_keys"] - 6 * one) <= 1
