"""Prepares a dataset: packs text or tokens into indexed blocks of tokens. docs/data.md explains every option.

python launch/prepare_data.py --source=python-stdlib --output=data/stdlib
python launch/prepare_data.py --source=tokens.bin --token_files=uint16 --tokenizer=tokenizer.json --output=data/tokens
"""

import inspect
import os
import time

from absl import flags

from jaxlinear import cli
from jaxlinear.data import Manifest, prepare
from jaxlinear.data.sources import DEFAULT_SUFFIXES, DEFAULT_TEXT_FIELD
from jaxlinear.data.token_files import FORMATS

flags.DEFINE_string("source", None, "python-stdlib, hf:NAME, or the path of a file or folder.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Directory of the dataset to make.", required=True)
flags.DEFINE_string("tokenizer", "bpe", "bpe (trained here), bytes, or a tokenizer.json or .model file.")
flags.DEFINE_integer("vocab_size", None, "Vocabulary size of the trained BPE; 4096 by default.")
flags.DEFINE_integer("train_bytes", None, "Bytes of text to train the BPE on; 16000000 by default.")
flags.DEFINE_string("document_token", None, "Token of an existing tokenizer that precedes each document.")
flags.DEFINE_string(
    "text_field", None, f"Field with the text in JSONL, Parquet and hf: records; {DEFAULT_TEXT_FIELD} by default."
)
flags.DEFINE_list(
    "suffixes",
    None,
    f"Suffixes of the files to take from a folder (.gz or .zst may follow); {','.join(DEFAULT_SUFFIXES)} by default.",
)
flags.DEFINE_string(
    "document_separator",
    None,
    r"Separator of documents in plain-text files (\n is a line end); without it, each file is one document.",
)
flags.DEFINE_string(
    "tokens_field", None, "Field with token ids of --tokenizer in JSONL, Parquet and hf: records, instead of text."
)
flags.DEFINE_enum(
    "token_files",
    None,
    FORMATS,
    "Format of files with token ids of --tokenizer: the dtype of flat files, or a program's format.",
)
flags.DEFINE_boolean("packed_rows", False, "Read the rows of --tokens_field as one stream, cut at document tokens.")
flags.DEFINE_float("heldout_fraction", 0.05, "Fraction of the documents to hold out.")
flags.DEFINE_integer("block_length", 2048, "Tokens per block; training takes its divisors and multiples.")
flags.DEFINE_integer("workers", None, "Processes that encode; one per CPU by default.")
flags.DEFINE_integer("seed", 0, "Seed of the split of the documents.")
flags.DEFINE_float("max_broken_fraction", 0.01, "Fail if a greater fraction of the records is broken.")
flags.DEFINE_boolean("overwrite", False, "Replace an existing dataset.")


def main() -> None:
    cli.stop_by_sigterm()
    started = time.monotonic()
    # Each argument has a flag of its name.
    options = {name: flags.FLAGS[name].value for name in inspect.signature(prepare).parameters}
    options["document_separator"] = _unescaped(options["document_separator"])
    manifest = prepare(**options)
    _print_summary(manifest, time.monotonic() - started)


def _unescaped(separator: str | None) -> str | None:
    """With the escapes that a user can write in a shell replaced by the characters."""
    if separator is None:
        return None
    return separator.replace("\\n", "\n").replace("\\r", "\r").replace("\\t", "\t")


def _print_summary(manifest: Manifest, seconds: float) -> None:
    records = manifest.records
    print(f"{manifest.source}: {records.read} records, {records.broken} broken, {records.empty} empty")
    for name, split in manifest.splits.items():
        print(
            f"{name}: {split.documents} documents, {split.tokens} tokens, {split.bytes} bytes, "
            f"{split.bytes / split.tokens:.2f} bytes per token, {split.blocks} blocks of {manifest.block_length}"
        )
    heldout = manifest.splits["heldout"]
    if heldout.gzip_bytes is None or heldout.xz_bytes is None:
        print(f"heldout: {heldout.note}")
    else:
        print(
            f"heldout: gzip -9 {8 * heldout.gzip_bytes / heldout.bytes:.3f} and xz -9 "
            f"{8 * heldout.xz_bytes / heldout.bytes:.3f} bits per byte"
        )
    print(f"vocabulary: {manifest.vocab_size} tokens ({manifest.tokenizer.kind})")
    print(f"{os.path.abspath(_OUTPUT.value)} made in {seconds:.1f} s")


if __name__ == "__main__":
    cli.run(main)
