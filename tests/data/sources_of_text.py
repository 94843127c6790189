"""Texts to prepare, and the files that preparation wrote."""

import json
import pathlib

import numpy as np

from jaxlinear.data import read_manifest
from jaxlinear.data.blocks import SplitReader, decode_block

WORDS = "def return x + 1\n\t  <|endoftext|> 数学 kůň 🙂 for while \r\n the of and 12345 ( ) : ▁".split(" ")  # noqa: SIM905 (readable as it is)


def make_texts(seed, count, longest=200) -> list[str]:
    random = np.random.default_rng(seed)
    return [f"{i} " + " ".join(random.choice(WORDS, random.integers(0, longest))) for i in range(count)]


def write_jsonl(path, texts) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def files(directory) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in sorted(pathlib.Path(directory).rglob("*")) if p.is_file()
    }


def stream_and_segments(path, split) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [N], number of the document of every token [N]) of a split, from the blocks."""
    manifest = read_manifest(path)
    info, length = manifest.splits[split], manifest.block_length
    stream, starts = np.zeros(info.tokens, np.int32), np.zeros(info.tokens, np.int32)
    for k, record in enumerate(SplitReader(path, info).read(range(info.blocks))):
        valid, tokens, positions = decode_block(record, length, np.dtype(manifest.dtype))
        stream[k * length : k * length + valid] = tokens[:valid]
        starts[k * length + positions] = 1
    return stream, np.cumsum(starts)
