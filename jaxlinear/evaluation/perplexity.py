"""Loss on the held-out split: by row length, up to several times the training length, and by position."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlinear import data
from jaxlinear.errors import UserError
from jaxlinear.evaluation.options import Options
from jaxlinear.evaluation.run import Run
from jaxlinear.parallel import feeding, sharding
from jaxlinear.parallel import mesh as meshes
from jaxlinear.training import trained_data
from jaxlinear.training.heldout import bits_per_byte
from jaxlinear.training.job import heldout_path
from jaxlinear.training.step import make_loss_step

LENGTHS = (1, 2, 4, 8)  # multiples of the training length, where the dataset supports them


def prepare(run: Run, spec: str, options: Options) -> Callable[[], dict[str, Any]]:
    """A function that measures the losses of a run on a held-out split. The spec has no options."""
    if spec != "perplexity":
        raise UserError(f"{spec!r}: perplexity takes no options after a colon; use --lengths, --batches and --data")
    lengths, batches, batch_tokens = options.lengths, options.batches, options.batch_tokens
    if batches < 0 or batch_tokens < 0:
        raise UserError(f"batches={batches} and batch_tokens={batch_tokens} must not be negative")
    path = _dataset(run, options.data)
    manifest = _read_manifest(run, path)
    split = manifest.splits["heldout"]
    training = run.config.training
    batch_tokens = run.batch_tokens(batch_tokens)

    plans, left_out = [], []
    for multiple in LENGTHS if lengths is None else lengths:
        length = multiple * training.sequence_length
        try:
            plans.append((multiple, _plan(run, path, length, split.tokens - 1, batch_tokens)))
        except UserError as error:
            if lengths is not None:
                raise UserError(f"length {multiple} x {training.sequence_length}: {error}") from error
            left_out.append({"multiple": multiple, "length": length, "reason": str(error)})
    if not plans:
        raise UserError(left_out[0]["reason"] if left_out else "the list of lengths is empty; give at least one")

    # Of every length the same text, so that their losses differ by the length alone.
    longest = max(plan["sequence_length"] for _, plan in plans)
    targets = split.tokens - 1
    if batches:  # as many rows as on one device: plans round them up to what more devices can share
        targets = min(targets, batches * _rows(batch_tokens, longest) * longest)

    def measure() -> dict[str, Any]:
        loss_step = run.program("loss", lambda: make_loss_step(run.config, run.architecture, run.mesh))
        return {
            "dataset": str(path),
            "source": manifest.source,
            "documents": split.documents,
            "tokens": split.tokens,
            "bytes": split.bytes,
            "gzip_bits_per_byte": None if split.gzip_bytes is None else 8 * split.gzip_bytes / split.bytes,
            "xz_bits_per_byte": None if split.xz_bytes is None else 8 * split.xz_bytes / split.bytes,
            "segment_documents": run.config.data.segment_documents,
            "lengths": [
                {"multiple": multiple, "whole_split": targets == split.tokens - 1}
                | _measure(run, loss_step, plan, targets, split.tokens / split.bytes)
                for multiple, plan in plans
            ],
            "left_out": left_out,
        }

    return measure


def context(segment_ids: np.ndarray, *, segment_documents: bool) -> np.ndarray:
    """How many earlier tokens of its row the model sees at each token, ``[B, T]``: those of the same document, or all
    if documents are not segmented."""
    index = np.broadcast_to(np.arange(segment_ids.shape[1]), segment_ids.shape)
    if not segment_documents:
        return index
    starts = np.diff(segment_ids, axis=1, prepend=-1) != 0
    return index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)


def bucket(position: np.ndarray) -> np.ndarray:
    """0 for position 0, then one for each power of two: 1 for 1, 2 for 2-3, 3 for 4-7, ..."""
    return np.frexp(position)[1]


def _dataset(run: Run, path: str | None) -> Path:
    if path:
        return Path(path)
    if not run.config.data.path and not run.config.data.heldout_path:
        if run.config.data.task:
            raise UserError(
                f"the run in {run.workdir} was trained on {run.config.data.task}, not on text; evaluate it with "
                f"--tasks={run.config.data.task.split(':')[0]}"
            )
        raise UserError(f"the run in {run.workdir} has no dataset; give one with --data")
    return Path(heldout_path(run.config))


def _read_manifest(run: Run, path: Path) -> data.Manifest:
    """The manifest, if its tokenizer is the one that the model was trained with."""
    manifest = data.read_manifest(path)
    if "heldout" not in manifest.splits or manifest.splits["heldout"].tokens < 2:
        raise UserError(f"{path} has no held-out text; prepare it with a larger --heldout_fraction")
    if manifest.vocab_size > run.config.model.vocab_size:
        raise UserError(
            f"{path} has a vocabulary of {manifest.vocab_size} tokens, the model in {run.workdir} only "
            f"{run.config.model.vocab_size}; prepare the dataset with --tokenizer=... of the run"
        )
    trained_data.check_tokenizer(run.workdir, path, manifest)
    trained_data.warn_of_split(run.workdir, path, manifest)
    return manifest


def _rows(batch_tokens: int, length: int) -> int:
    """Rows of ``length`` in a batch of about ``batch_tokens``."""
    return max(batch_tokens // length, 1)


def _plan(run: Run, path: Path, length: int, targets: int, batch_tokens: int) -> dict[str, Any]:
    """Arguments of ``heldout_batches`` for all rows of ``length``; refuses a length that cannot work."""
    if length < 1:
        raise UserError("the multiple of the training length must be at least 1")
    if length > targets:
        raise UserError(f"it is {length} tokens, but the held-out split of {path} has only {targets} targets")
    shards, groups = (sharding.parts_on(run.mesh.shape, axis) for axis in ("time", "batch"))
    if length % shards:
        raise UserError(f"it is {length} tokens, which mesh.sequence={shards} does not divide")
    rows = min(_rows(batch_tokens, length), math.ceil(targets / length))
    rows = math.ceil(rows / groups) * groups
    plan: dict[str, Any] = {"path": path, "batch_size": rows, "sequence_length": length}
    data.heldout_batches(**plan)  # checks the length against the block length; reads nothing yet
    return plan


def _measure(
    run: Run, loss_step: Callable, plan: dict[str, Any], targets: int, tokens_per_byte: float
) -> dict[str, Any]:
    """The losses of the split's first ``targets`` targets."""
    length, in_batch = plan["sequence_length"], plan["batch_size"] * plan["sequence_length"]
    batches = math.ceil(targets / in_batch)
    place = meshes.batch_sharding(run.mesh)
    totals = np.zeros(int(bucket(np.asarray(length - 1))) + 1)
    counts = np.zeros(len(totals), np.int64)

    def losses() -> Iterator[tuple[np.ndarray, jax.Array]]:
        for batch in data.heldout_batches(**plan, limit=batches):
            nll, _ = loss_step(run.parameters, feeding.place(batch, place, plan["batch_size"]))
            yield batch["segment_ids"], nll

    begin = time.perf_counter()
    for i, (segment_ids, nll) in enumerate(feeding.one_behind(losses())):
        where = (segment_ids > 0) & (i * in_batch + np.arange(in_batch).reshape(segment_ids.shape) < targets)
        buckets = bucket(context(segment_ids, segment_documents=run.config.data.segment_documents))[where]
        totals += np.bincount(buckets, np.asarray(nll, np.float64)[where], len(totals))
        counts += np.bincount(buckets, minlength=len(totals))
    seconds = time.perf_counter() - begin

    loss = float(totals.sum() / counts.sum())
    if not math.isfinite(loss):
        raise UserError(
            f"the loss of {run.workdir} at step {run.step} and length {length} is {loss}: the model's own values are "
            "not finite; try an earlier checkpoint (--step)"
        )
    return {
        "length": length,
        "batch_size": plan["batch_size"],
        "batches": batches,
        "tokens": int(counts.sum()),
        "loss": loss,
        "perplexity": float(np.exp(loss)),
        "bits_per_byte": bits_per_byte(loss, tokens_per_byte),
        "by_position": [
            {
                "first": (1 << i) >> 1,
                "last": min((1 << i) - 1, length - 1),
                "tokens": int(count),
                "loss": float(total / count) if count else None,
            }
            for i, (total, count) in enumerate(zip(totals, counts, strict=True))
        ],
        "seconds": seconds,
    }


def scalars(report: dict[str, Any]) -> dict[str, float]:
    """The numbers plotted over a run's steps."""
    return {
        f"{name}, length {row['length']}": row[name] for row in report["lengths"] for name in ("loss", "bits_per_byte")
    }


def table(report: dict[str, Any]) -> str:
    """A report of ``evaluate`` as readable text."""
    lengths = report["lengths"]
    lines = [
        f"held-out split of {report['dataset']} ({report['source']}): {report['documents']:,} documents, "
        f"{report['tokens']:,} tokens, {report['bytes']:,} bytes"
    ]
    if report["gzip_bits_per_byte"] is not None and report["xz_bits_per_byte"] is not None:
        gzip, xz = report["gzip_bits_per_byte"], report["xz_bits_per_byte"]
        lines.append(f"the same text under gzip -9: {gzip:.3f}, under xz -9: {xz:.3f} bits per byte")
    lines += ["", f"{'length':>8} {'':>4} {'tokens':>12} {'loss':>8} {'perplexity':>11} {'bits per byte':>13}"]
    for row in lengths:
        lines.append(
            f"{row['length']:>8} {'x' + str(row['multiple']):>4} {row['tokens']:>12,} {row['loss']:>8.4f} "
            f"{row['perplexity']:>11.2f} {row['bits_per_byte']:>13.4f}" + ("" if row["whole_split"] else "  (a part)")
        )
    lines += [
        f"{row['length']:>8} {'x' + str(row['multiple']):>4} left out: {row['reason']}" for row in report["left_out"]
    ]

    seen = "of the document" if report["segment_documents"] else "of the row"
    lines += ["", f"loss by position: the tokens {seen} that the model has seen"]
    lines.append(f"{'position':>16}" + "".join(f" {row['length']:>9}" for row in lengths))
    longest = max((row["by_position"] for row in lengths), key=len)
    for i, named in enumerate(longest):
        span = f"{named['first']}" if named["first"] == named["last"] else f"{named['first']}-{named['last']}"
        losses = [row["by_position"][i]["loss"] if i < len(row["by_position"]) else None for row in lengths]
        lines.append(f"{span:>16}" + "".join(f" {'' if loss is None else f'{loss:.4f}':>9}" for loss in losses))
    return "\n".join(lines)
