"""launch/prepare_data.py: the summary of a good run; one line and status 2 for a bad one."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxlinear.data import load_tokenizer, read_manifest

REPOSITORY = pathlib.Path(__file__).parents[2]
PATIENCE = 240
PROGRAM = [sys.executable, str(REPOSITORY / "launch/prepare_data.py")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}


@pytest.fixture
def run(start):
    return lambda *arguments: start("prepare_data", *arguments)


@pytest.fixture
def source(tmp_path):
    text = "\n".join(f"line number {i} has {i * i} in it" for i in range(2000))
    (tmp_path / "a.txt").write_text(text)
    return tmp_path / "a.txt"


def test_summary(run, tmp_path, source):
    data = tmp_path / "made" / "data"
    options = ["--vocab_size=300", r"--document_separator=\n", "--heldout_fraction=0.1", "--workers=2"]
    done = run(f"--source={source}", f"--output={data}", *options)
    assert (done.returncode, done.stderr) == (0, "")
    manifest = read_manifest(data)
    train, heldout = manifest.splits["train"], manifest.splits["heldout"]
    lines = done.stdout.splitlines()
    assert lines[0] == f"{source}: 2000 records, 0 broken, 0 empty"
    assert lines[1] == (
        f"train: {train.documents} documents, {train.tokens} tokens, {train.bytes} bytes, "
        f"{train.bytes / train.tokens:.2f} bytes per token, {train.blocks} blocks of 2048"
    )
    assert lines[2].startswith(f"heldout: {heldout.documents} documents, {heldout.tokens} tokens, ")
    gzip_rate, xz_rate = 8 * heldout.gzip_bytes / heldout.bytes, 8 * heldout.xz_bytes / heldout.bytes
    assert lines[3] == f"heldout: gzip -9 {gzip_rate:.3f} and xz -9 {xz_rate:.3f} bits per byte"
    assert 0.5 < xz_rate < 4
    assert lines[4] == "vocabulary: 300 tokens (tokenizers)"
    assert re.fullmatch(rf"{re.escape(str(data))} made in \d+\.\d s", lines[5]) and len(lines) == 6
    assert load_tokenizer(data).vocab_size == 300


@pytest.mark.parametrize("packed", [False, True])
def test_tokens_instead_of_text(run, tmp_path, packed):
    """With each of the command's three options."""
    rows = [list(f"line number {i} has {i * i} in it".encode()) for i in range(200)]
    if packed:
        content = "".join(json.dumps({"ids": [*row, 256]}) + "\n" for row in rows)
        (tmp_path / "ids.jsonl").write_text(content)
        arguments = [f"--source={tmp_path / 'ids.jsonl'}", "--tokens_field=ids", "--packed_rows"]
    else:
        np.concatenate([[256, *row] for row in rows]).astype("<i4").tofile(tmp_path / "ids.bin")
        arguments = [f"--source={tmp_path / 'ids.bin'}", "--token_files=int32"]
    done = run(*arguments, f"--output={tmp_path / 'data'}", "--tokenizer=bytes", "--heldout_fraction=0.1")
    assert (done.returncode, done.stderr) == (0, "")
    splits = read_manifest(tmp_path / "data").splits
    assert done.stdout.splitlines()[0] == f"{arguments[0].removeprefix('--source=')}: 200 records, 0 broken, 0 empty"
    assert sum(split.documents for split in splits.values()) == 200
    assert sum(split.bytes for split in splits.values()) == sum(map(len, rows))


@pytest.mark.parametrize(
    "arguments, key",
    [
        (["--source=nowhere"], "no source 'nowhere'"),
        (["--source=SOURCE", "--vocab_size=ten"], "flag --vocab_size=ten"),
        (["--source=SOURCE", "--document_separator="], "document_separator must not be empty"),
        ([], "--source is missing"),
        (["--source=SOURCE", "--token_files=uint8"], "flag --token_files=uint8"),
        (["--source=SOURCE", "--output=/dev/full/a/b"], "a part of the path is not a directory"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, tmp_path, source, arguments, key):
    arguments = [argument.replace("SOURCE", str(source)) for argument in arguments]
    done = run(f"--output={tmp_path / 'data'}", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("prepare_data.py: ") and key in done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""
    assert os.listdir(tmp_path) == ["a.txt"]


def goes_on(process):
    """A process that has ended may still be listed: process 1 of a container does not always reap it."""
    try:
        stat = pathlib.Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_its_end_is_that_of_its_workers(run, tmp_path, number):
    """The command is killed while reading. SIGTERM leaves nothing; the next run removes what SIGKILL leaves."""
    source = tmp_path / "source.jsonl"
    os.mkfifo(source)
    command = [*PROGRAM, f"--source={source}", f"--output={tmp_path / 'data'}", "--tokenizer=bytes", "--workers=2"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    with source.open("w") as pipe:
        line = json.dumps({"text": "x" * 100_000}) + "\n"
        pipe.write(40 * line)  # more than a batch for each worker
        pipe.flush()
        begin = time.monotonic()
        while len(workers := children.read_text().split()) < 3:  # and what multiprocessing starts beside them
            assert process.poll() is None and time.monotonic() - begin < PATIENCE, process.poll()
            time.sleep(0.05)
        process.send_signal(number)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == (143 if number == signal.SIGTERM else -number)
    begin = time.monotonic()
    while any(map(goes_on, workers)):
        assert time.monotonic() - begin < PATIENCE, "the workers go on"
        time.sleep(0.05)
    source.unlink()
    left = list(tmp_path.iterdir())
    if number == signal.SIGTERM:
        assert left == []
        return
    assert len(left) == 1 and left[0].name.startswith(".data.partial-") and (left[0] / "train").is_dir()
    source.write_text("".join(json.dumps({"text": f"line {i} of text"}) + "\n" for i in range(100)))
    done = run(f"--source={source}", f"--output={tmp_path / 'data'}", "--tokenizer=bytes", "--heldout_fraction=0.3")
    assert (done.returncode, done.stderr) == (0, f"removed {left[0]}, left by a run that was killed\n")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "data", source]
