"""Tokens per second that the training loader delivers in one thread, compared with a plain read of as many tokens.

    python benchmarks/data_loader.py [--batch_tokens=65536] [--json=FILE]

The dataset is synthetic: Zipf-distributed tokens in documents of about 800 and blocks of 2048. The reference is a
memory-mapped flat uint16 file, from which random windows are copied and widened to int32 (nanoGPT's loader): it has no
checksums, no document boundaries and no epochs, and its windows overlap.
"""

import json
import pathlib
import tempfile
import time
from collections.abc import Callable

import common
import numpy as np
from absl import flags

from jaxlinear import cli
from jaxlinear.data import Manifest, TrainBatches
from jaxlinear.data.blocks import SplitWriter, token_dtype
from jaxlinear.data.manifest import FORMAT_VERSION, Records, Split, TokenizerInfo

_BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", 65536, "Tokens per batch.")
common.define_json()

_BLOCK_LENGTH, _VOCAB_SIZE, _DOCUMENT_LENGTH = 2048, 4096, 800
_TOKENS, _BATCHES, _REPEATS = 20_000_000, 100, 5


def main() -> None:
    batch_tokens = _BATCH_TOKENS.value
    with tempfile.TemporaryDirectory() as directory:
        first, second = pathlib.Path(directory, "first"), pathlib.Path(directory, "second")
        stream = _write_dataset(first, _TOKENS, seed=0)
        _write_dataset(second, _TOKENS // 4, seed=1)
        stream.tofile(flat := pathlib.Path(directory, "flat.bin"))
        result: dict[str, float] = {}
        for length in (512, 2048, 8192):
            batch_size = max(batch_tokens // length, 1)
            batches = TrainBatches(first, batch_size=batch_size, sequence_length=length, seed=0)
            result[f"sequence_length_{length}"] = _rate(batches.__getitem__, batch_size * length)
        batch_size = max(batch_tokens // _BLOCK_LENGTH, 1)
        mixture = TrainBatches({first: 0.7, second: 0.3}, batch_size=batch_size, sequence_length=_BLOCK_LENGTH, seed=0)
        result["mixture_of_2_sequence_length_2048"] = _rate(mixture.__getitem__, batch_size * _BLOCK_LENGTH)
        windows = _windows(flat, batch_size, _BLOCK_LENGTH)
        result["reference_memory_map_sequence_length_2048"] = _rate(windows, batch_size * _BLOCK_LENGTH)
    report = {"unit": "tokens per second", "batch_tokens": batch_tokens, **result}
    print(json.dumps(report, indent=2))
    common.write(report)


def _rate(read: Callable[[int], object], tokens: int) -> float:
    """The median over a few runs, after reading one batch to open the files."""
    read(0)
    rates = []
    for repeat in range(_REPEATS):
        start = time.perf_counter()
        for step in range(repeat * _BATCHES, (repeat + 1) * _BATCHES):
            read(step)
        rates.append(_BATCHES * tokens / (time.perf_counter() - start))
    return round(float(np.median(rates)))


def _windows(file: pathlib.Path, batch_size: int, length: int) -> Callable[[int], object]:
    tokens = np.memmap(file, np.uint16, mode="r")

    def read(step: int) -> dict[str, np.ndarray]:
        starts = np.random.default_rng(step).integers(len(tokens) - length - 1, size=batch_size)
        return {
            "tokens": np.stack([tokens[i : i + length].astype(np.int32) for i in starts]),
            "targets": np.stack([tokens[i + 1 : i + 1 + length].astype(np.int32) for i in starts]),
        }

    return read


def _write_dataset(directory: pathlib.Path, num_tokens: int, seed: int) -> np.ndarray:
    """Writes a dataset without text and returns its tokens [N]."""
    directory.mkdir()
    random = np.random.default_rng(seed)
    dtype = token_dtype(_VOCAB_SIZE)
    writer = SplitWriter(directory, "train", block_length=_BLOCK_LENGTH, dtype=dtype, document_token=0)
    tokens = (random.zipf(1.2, num_tokens) % (_VOCAB_SIZE - 1) + 1).astype(dtype)
    ends = np.cumsum(random.geometric(1 / _DOCUMENT_LENGTH, 2 * num_tokens // _DOCUMENT_LENGTH))
    for document in np.split(tokens, ends[ends < num_tokens]):
        writer.add(document, len(document))
    split: Split = writer.finish()
    Manifest(
        format_version=FORMAT_VERSION,
        block_length=_BLOCK_LENGTH,
        vocab_size=_VOCAB_SIZE,
        dtype=dtype,
        tokenizer=TokenizerInfo("synthetic", None, "0" * 64),
        document_token=0,
        source="synthetic",
        seed=seed,
        heldout_fraction=0.5,
        records=Records(split.documents, 0, 0),
        splits={"train": split},
    ).write(directory)
    return tokens


if __name__ == "__main__":
    cli.run(main)
