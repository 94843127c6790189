"""Texts to prepare, and the files that preparation wrote."""

import json
import pathlib

import numpy as np

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
