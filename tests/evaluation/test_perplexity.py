"""evaluation/perplexity.py: the losses equal those of the model's logits, by length and by position."""

import dataclasses
import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxlinear import evaluation
from jaxlinear.data import heldout_batches, read_manifest
from jaxlinear.errors import UserError
from jaxlinear.evaluation import perplexity
from jaxlinear.evaluation.run import open_run
from jaxlinear.models import load
from jaxlinear.parallel import mesh as meshes
from tests.training import tiny


@pytest.fixture(scope="module")
def report(tiny_run):
    return evaluation.evaluate(tiny_run, step=1, lengths=[1, 4], batches=10_000)  # all that there are


def measured(run, **options):
    return evaluation.evaluate_run(run, ["perplexity"], evaluation.Options(**options))["perplexity"]["lengths"]


def counts(row):
    return [bucket["tokens"] for bucket in row["by_position"]]


def changed(run, section, **values):
    config = run.config.copy_and_resolve_references()
    config[section].update(values)
    return dataclasses.replace(run, config=config)


def _direct(run, dataset, length):
    """``(nll, context)`` of every target, from logits and NumPy in float64."""
    model, losses, seen = load(run, 1), [], []
    forward = jax.jit(lambda tokens, segment_ids: model(tokens, segment_ids)[0])
    for batch in heldout_batches(dataset, batch_size=8, sequence_length=length):
        logits = np.asarray(forward(batch["tokens"], batch["segment_ids"]), np.float64)
        peak = logits.max(-1, keepdims=True)
        log_p = logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))
        nll = -np.take_along_axis(log_p, batch["targets"][..., None], axis=-1)[..., 0]
        for row_nll, ids in zip(nll, batch["segment_ids"], strict=True):
            for t in np.flatnonzero(ids > 0):
                losses.append(row_nll[t])
                seen.append(int((ids[:t] == ids[t]).sum()))
    return np.array(losses), np.array(seen)


@pytest.mark.parametrize("which", [0, 1])
def test_losses_are_those_of_the_logits(report, tiny_run, tiny_dataset, which):
    row = report["perplexity"]["lengths"][which]
    assert (row["multiple"], row["length"], row["whole_split"]) == [(1, 32, True), (4, 128, True)][which]
    losses, seen = _direct(tiny_run, tiny_dataset, row["length"])
    split = read_manifest(tiny_dataset).splits["heldout"]
    assert row["tokens"] == len(losses) == split.tokens - 1
    np.testing.assert_allclose(row["loss"], losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(row["perplexity"], math.exp(losses.mean()), rtol=1e-5)
    bits = losses.mean() / math.log(2) * split.tokens / split.bytes
    np.testing.assert_allclose(row["bits_per_byte"], bits, rtol=1e-5)

    spans = [(entry["first"], entry["last"]) for entry in row["by_position"]]
    assert spans[:4] == [(0, 0), (1, 1), (2, 3), (4, 7)] and spans[-1][1] == row["length"] - 1
    for entry in row["by_position"]:
        inside = (seen >= entry["first"]) & (seen <= entry["last"])
        assert entry["tokens"] == inside.sum()
        if entry["tokens"]:
            np.testing.assert_allclose(entry["loss"], losses[inside].mean(), rtol=1e-5)
    assert sum(entry["tokens"] for entry in row["by_position"]) == row["tokens"]


def test_the_report_names_the_run(report, tiny_run, tiny_dataset):
    json.dumps(report, allow_nan=False)
    assert (report["step"], report["model"]["width"], report["training"]["sequence_length"]) == (1, 32, 32)
    result, split = report["perplexity"], read_manifest(tiny_dataset).splits["heldout"]
    assert result["gzip_bits_per_byte"] == 8 * split.gzip_bytes / split.bytes
    assert result["xz_bits_per_byte"] == 8 * split.xz_bytes / split.bytes
    text = evaluation.table(report)
    for part in (str(tiny_run), "step 1 of 2", f"{split.tokens:,} tokens", "gzip -9", "64-127", "x4"):
        assert part in text


def test_a_model_that_is_not_finite_is_refused(tiny_run):
    """With the exit status of an error that would recur, as for the harness."""
    run = open_run(tiny_run, 1)
    run = dataclasses.replace(run, parameters=jax.tree.map(lambda x: x * np.float32(np.nan), run.parameters))
    measure = perplexity.prepare(run, "perplexity", evaluation.Options(lengths=(1,), batches=1))
    with pytest.raises(UserError, match=r"at step 1 and length 32 is nan: the model's own values are not finite"):
        measure()


def test_context_and_buckets():
    ids = np.array([[1, 1, 2, 2, 2, 3, 0, 0], [1] * 8])
    expected = [[0, 1, 0, 1, 2, 0, 0, 1], list(range(8))]
    assert perplexity.context(ids, segment_documents=True).tolist() == expected
    assert perplexity.context(ids, segment_documents=False).tolist() == [list(range(8))] * 2
    buckets = perplexity.bucket(np.array([0, 1, 2, 3, 4, 7, 8, 1023, 1024])).tolist()
    assert buckets == [0, 1, 2, 2, 3, 3, 4, 10, 11]


def test_default_lengths_are_left_out_where_the_split_is_shorter(tiny_run, tmp_path):
    """For a held-out split of some 100 tokens in blocks of 64, lengths 32 and 64 are used."""
    path = str(tiny.prepared(tmp_path / "data", [f"a document, the {i}th" for i in range(100)]))
    targets = read_manifest(path).splits["heldout"].tokens - 1
    assert 64 <= targets < 256
    result = evaluation.evaluate(tiny_run, data=path, batches=1)["perplexity"]
    taken, left_out = ([row["length"] for row in result[name]] for name in ("lengths", "left_out"))
    assert taken == [length for length in (32, 64, 128, 256) if length <= targets]
    assert taken + left_out == [32, 64, 128, 256]
    assert f"has only {targets} targets" in result["left_out"][-1]["reason"]
    with pytest.raises(UserError, match=r"length 8 x 32: it is 256 tokens, but the held-out split"):
        evaluation.evaluate(tiny_run, data=path, lengths=[1, 8])


def test_a_part_of_the_split(tiny_run):
    (result,) = measured(open_run(tiny_run), lengths=(1,), batches=1, batch_tokens=64)
    assert (result["batch_size"], result["batches"], result["whole_split"]) == (8, 1, False)  # a row a device, at least
    assert result["tokens"] == 64  # of which two rows are asked for


@pytest.mark.parametrize("asked", [{"batches": 2, "batch_tokens": 128}, {"batches": 3, "batch_tokens": 160}])
def test_a_part_is_the_same_text_on_any_number_of_devices(tiny_run, asked):
    """Which have to share the rows of a batch: 1 and 3 devices, and a length whose rows are longer than a batch."""
    found = []
    for devices in (1, 3):
        mesh = meshes.make_mesh(dict.fromkeys(meshes.AXES, 1) | {"data": devices}, jax.devices()[:devices])
        run = dataclasses.replace(open_run(tiny_run), mesh=mesh).at(2)
        found.append(measured(run, lengths=(1, 4), **asked))
    for one, three in zip(*found, strict=True):
        assert one["tokens"] == three["tokens"] == asked["batches"] * 128
        assert one["loss"] == pytest.approx(three["loss"], rel=1e-6)
        assert counts(one) == counts(three)
    assert [row["batch_size"] for lengths in found for row in lengths][1::2] == [1, 3]


def test_parts_of_all_lengths_are_of_the_same_text(tiny_run):
    """A row of the longer length has more tokens than a batch is asked to have."""
    short, long = measured(open_run(tiny_run), lengths=(1, 4), batches=8, batch_tokens=64)
    assert short["tokens"] == long["tokens"] == 8 * 4 * 32 and (short["batches"], long["batches"]) == (4, 1)
    assert not short["whole_split"] and not long["whole_split"]
    # 40 rows of the shorter length in a batch have more tokens than 8 of the longer, and the rest does not count.
    again, last = measured(open_run(tiny_run), lengths=(1, 4), batches=1, batch_tokens=1100)
    assert (again["batch_size"], again["tokens"], last["tokens"]) == (40, short["tokens"], short["tokens"])
    assert again["loss"] == pytest.approx(short["loss"], rel=1e-6) and last["loss"] == pytest.approx(long["loss"])
    assert counts(again) == counts(short) and sum(counts(again)) == again["tokens"] and not again["whole_split"]


def test_where_documents_are_not_segmented_the_row_is_what_was_seen(tiny_run):
    run = changed(open_run(tiny_run), "data", segment_documents=False)
    (found,) = measured(run, lengths=(1,), batches=1)
    assert counts(found) == [8 * count for count in (1, 1, 2, 4, 8, 16)]


def test_a_batch_is_a_microbatch_of_training(tiny_run):
    """The run had the memory for it."""
    run = changed(open_run(tiny_run), "training", batch_size=64, microbatches=4)
    assert (run.batch_tokens(0), run.batch_tokens(100)) == (16 * 32, 100)
    (found,) = measured(run, lengths=(1,), batches=1)
    assert found["batch_size"] == 16


def test_program(tiny_run, report, tmp_path):
    flags = [f"--workdir={tiny_run}", "--step=1", "--lengths=1", f"--json={tmp_path / 'report.json'}"]
    command = [sys.executable, "launch/evaluate.py", *flags]
    done = subprocess.run(command, cwd=tiny.REPOSITORY, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    written = json.loads((tmp_path / "report.json").read_text())
    assert done.stdout == evaluation.table(written) + "\n"
    expected = json.loads(json.dumps(report))
    del expected["perplexity"]["lengths"][1:]
    for made in (written, expected):
        del made["perplexity"]["lengths"][0]["seconds"]
    assert written == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tasks=perplexity,speed", "there is no task 'speed'; the tasks are perplexity"),
        ("--step=7", "has no checkpoint of step 7; it has 1, 2"),
        ("--lengths=3", "length 3 x 32: sequence_length 96 neither divides the block length 64"),
        ("--lengths=²", "--lengths: '²' is not a whole number"),
        ("--examples=4", "--examples is for induction, listops, mqar, parity, passkey"),
        ("--tasks=mqar --lengths=1", "--lengths is for perplexity, and --tasks=mqar has none"),
        ("--tasks=parity,mqar --batches=1", "--batches is for perplexity, and --tasks=parity"),
        ("--tasks=mqar --data=x", "--data is for passkey, perplexity, and --tasks=mqar has"),
    ],
)
def test_program_refuses(start, tiny_run, arguments, message):
    done = start("evaluate", f"--workdir={tiny_run}", *arguments.split())
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and message in done.stderr, done.stderr
