"""Turns text or tokens into a prepared dataset: read, split, train the tokenizer, encode, pack, count.

The bytes written depend only on the source and the arguments, not on the number of workers or the time.
"""

import contextlib
import logging
import os
import pathlib
import random
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from tqdm import tqdm

from jaxlinear.data import staging
from jaxlinear.data.blocks import SplitWriter, token_dtype
from jaxlinear.data.encoding import Document, encode_in_order
from jaxlinear.data.manifest import FORMAT_VERSION, MANIFEST, SPLITS, Manifest, Records, Split, TokenizerInfo
from jaxlinear.data.records import Record, Source
from jaxlinear.data.sources import open_source
from jaxlinear.data.splitting import COMPRESSED_TEXT_LIMIT, Splitter, with_compressed_sizes
from jaxlinear.data.token_ids import Agreement, Ids
from jaxlinear.data.token_sources import open_tokens
from jaxlinear.data.tokenizer import (
    INFO_FILE,
    JsonTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    open_tokenizer,
    train_bpe,
)
from jaxlinear.errors import UserError

_LOG = logging.getLogger(__name__)
DEFAULT_VOCAB_SIZE = 4096
DEFAULT_TRAIN_BYTES = 16_000_000
_LOGGED_BROKEN = 5
_LARGEST_SAMPLING = 16  # reads at most about 16 times as much text as the tokenizer is trained on
_MOST = 1 << 24  # tokens of a block or a vocabulary: far more than is useful, but still fits in memory
_OF_A_DATASET = {MANIFEST, *SPLITS, INFO_FILE, JsonTokenizer.file, SentencePieceTokenizer.file}
_PIECE = 1 << 14  # characters of a document that are sampled or skipped together


def prepare(
    source: str,
    output: str | os.PathLike[str],
    *,
    tokenizer: str = "bpe",
    vocab_size: int | None = None,
    train_bytes: int | None = None,
    document_token: str | None = None,
    text_field: str | None = None,
    suffixes: Sequence[str] | None = None,
    document_separator: str | None = None,
    tokens_field: str | None = None,
    token_files: str | None = None,
    packed_rows: bool = False,
    heldout_fraction: float = 0.05,
    block_length: int = 2048,
    workers: int | None = None,
    seed: int = 0,
    max_broken_fraction: float = 0.01,
    overwrite: bool = False,
) -> Manifest:
    """Makes the dataset ``output`` from ``source`` and returns its manifest. Either all of it appears or nothing.

    ``tokenizer`` is "bpe" (of ``vocab_size`` tokens, 4096 by default, trained on ``train_bytes`` of the training text,
    16 MB by default), "bytes", or the path of a tokenizer. ``workers`` processes encode (None: one per CPU). The other
    arguments are explained by the flags of ``launch/prepare_data.py`` and in docs/data.md.
    """
    if not 0 < heldout_fraction < 1:
        raise UserError(f"heldout_fraction must be between 0 and 1, not {heldout_fraction}")
    if not 0 <= max_broken_fraction <= 1:
        raise UserError(f"max_broken_fraction must be between 0 and 1, not {max_broken_fraction}")
    if not 0 <= seed < 1 << 63:
        raise UserError(f"seed must be at least 0 and below 2**63, not {seed}")
    for name, value in (("block_length", block_length), ("workers", workers), ("train_bytes", train_bytes)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    for name, value in (("block_length", block_length), ("vocab_size", vocab_size)):
        if value is not None and value > _MOST:
            raise UserError(f"{name} must be at most {_MOST}, not {value}")
    # The target, if it is a link: everything is written and renamed on one disk, and the link stays.
    output = pathlib.Path(os.path.realpath(output))
    _check_output(output, overwrite)
    existing = _existing_tokenizer(tokenizer, vocab_size, train_bytes, document_token)
    files = None if suffixes is None else tuple(suffixes)
    agreement = None
    if tokens_field is None and token_files is None:
        if packed_rows:
            raise UserError("packed_rows is for rows of tokens (--tokens_field); leave it out")
        documents = open_source(source, text_field=text_field, suffixes=files, separator=document_separator)
    else:
        for option, of_text in (("text_field", text_field), ("document_separator", document_separator)):
            if of_text is not None:
                raise UserError(
                    f"{option} is for text, but tokens_field or token_files says that the source has tokens; leave one out"
                )
        if existing is None:
            raise UserError("a source of tokens needs the existing tokenizer that made them: --tokenizer names it")
        ids = Ids.of(existing)
        documents = open_tokens(
            source, ids, tokens_field=tokens_field, form=token_files, packed_rows=packed_rows, suffixes=files
        )
        agreement = Agreement(source, existing)
    splitter = Splitter(seed, heldout_fraction)
    if existing is None and documents.pipe:
        raise UserError(
            f"{source} is a pipe, which can be read only once, and training a tokenizer reads the text twice: write "
            "it to a file, or give an existing --tokenizer (or bytes)"
        )
    staging.clear(output)
    with staging.directory(output) as partial:
        chosen = existing
        if chosen is None:
            sample = _training_sample(documents, splitter, train_bytes or DEFAULT_TRAIN_BYTES, seed)
            chosen = train_bpe(sample, DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size)
        chosen.save(partial)
        workers = workers or os.cpu_count() or 1
        counts, splits = _write_splits(
            documents, splitter, chosen, agreement, partial, block_length, workers, max_broken_fraction
        )
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            block_length=block_length,
            vocab_size=chosen.vocab_size,
            dtype=token_dtype(chosen.vocab_size),
            tokenizer=TokenizerInfo(chosen.kind, chosen.file, chosen.sha256),
            document_token=chosen.document_token,
            source=documents.description,
            seed=seed,
            heldout_fraction=heldout_fraction,
            records=counts,
            splits=splits,
        )
        manifest.write(partial)
        staging.unlock(partial)
        _check_output(output, overwrite)  # again, since another run may have made it meanwhile
        _replace(partial, output)
    return manifest


def _existing_tokenizer(
    name: str, vocab_size: int | None, train_bytes: int | None, document_token: str | None
) -> Tokenizer | None:
    """The tokenizer ``name``, or None if it has yet to be trained. Refuses options that would have no effect."""
    if name in ("bpe", "bytes") and document_token is not None:
        raise UserError(f"document_token is for an existing tokenizer; {name} has its own")
    if name == "bpe":
        return None
    if vocab_size is not None:
        raise UserError(f"vocab_size is for a trained tokenizer (bpe); {name} has its own size")
    if train_bytes is not None:
        raise UserError(f"train_bytes is for a tokenizer that is trained (bpe); {name} is not")
    return open_tokenizer(name, document_token)


def _check_output(output: pathlib.Path, overwrite: bool) -> None:
    if output.parent.exists() and not output.parent.is_dir():
        raise UserError(f"{output.parent} is a file, not a directory")
    if os.path.ismount(output):  # e.g. a container volume: the data is written beside it and renamed at the end
        raise UserError(f"{output} is a mount point and cannot be replaced; name a directory in it")
    if not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{output} already exists; --overwrite replaces it, or choose another --output")
    if not (output / MANIFEST).is_file():
        raise UserError(f"{output} is not a prepared dataset (it has no {MANIFEST}), so --overwrite leaves it alone")
    if foreign := sorted(set(os.listdir(output)) - _OF_A_DATASET):  # possibly the source itself
        raise UserError(
            f"{output} holds {foreign[0]}, which is not part of a dataset and would be removed by --overwrite; "
            "move it away"
        )


def _replace(partial: pathlib.Path, output: pathlib.Path) -> None:
    """Renames ``partial`` to ``output``. An older dataset there is first moved aside, and deleted last."""
    if not os.path.lexists(output):
        partial.rename(output)
        return
    old = output.parent / f".{output.name}.old-{secrets.token_hex(4)}"
    try:
        output.rename(old)
        partial.rename(output)
    except BaseException:  # including SIGTERM, which may arrive between the two renames
        if not os.path.lexists(output):
            old.rename(output)
        raise
    shutil.rmtree(old)


def _training_sample(documents: Source, splitter: Splitter, train_bytes: int, seed: int) -> Iterator[str]:
    """About ``train_bytes`` of training text, in pieces from all over the source if its size is known."""
    share = max(train_bytes / documents.size, 1 / _LARGEST_SAMPLING) if documents.size else 1.0
    choice = random.Random(seed)
    total = 0
    for record in documents:
        if not record.text or splitter.split(record.text.encode()) != "train":
            continue
        for start in range(0, len(record.text), _PIECE):
            # The first piece is always taken, so that a tiny sample is not empty.
            if choice.random() < share or total == 0:
                piece = record.text[start : start + _PIECE]
                yield piece
                total += len(piece.encode())
            if total >= train_bytes:
                return


def _usable(documents: Iterable[Record], counts: dict[str, int], progress: tqdm) -> Iterator[Document]:
    """The records that are neither broken nor empty. Counts all, and logs the first broken ones and all damaged files."""
    for record in documents:
        counts["read"] += 1
        document = record.text if record.ids is None else record.ids
        if document is None:
            counts["broken"] += 1
            if counts["broken"] <= _LOGGED_BROKEN or record.ends_file:
                _LOG.warning("broken record left out: %s: %s", record.origin, record.error)
            continue
        progress.update(len(document.encode()) if isinstance(document, str) else document.nbytes)
        if len(document):
            yield document
        else:
            counts["empty"] += 1


def _write_splits(
    documents: Source,
    splitter: Splitter,
    tokenizer: Tokenizer,
    agreement: Agreement | None,
    directory: pathlib.Path,
    block_length: int,
    workers: int,
    max_broken_fraction: float,
) -> tuple[Records, dict[str, Split]]:
    dtype = token_dtype(tokenizer.vocab_size)
    writers = {
        name: SplitWriter(
            directory, name, block_length=block_length, dtype=dtype, document_token=tokenizer.document_token
        )
        for name in SPLITS
    }
    counts = dict.fromkeys(("read", "broken", "empty"), 0)
    heldout_text: bytearray | None = bytearray()
    lossy = 0
    with contextlib.ExitStack() as stack:
        for writer in writers.values():
            stack.callback(writer.abandon)
        progress = stack.enter_context(
            tqdm(total=documents.size, desc="encoding", unit="B", unit_scale=True, disable=None)
        )
        usable = _usable(documents, counts, progress)
        encoded = stack.enter_context(contextlib.closing(encode_in_order(usable, tokenizer, directory, workers)))
        for text, tokens in encoded:
            content = text.encode()
            name = splitter.split(content)
            writers[name].add(tokens, len(content))
            if agreement is not None:
                agreement.see(tokens, text)
            else:
                lossy += name == "heldout" and tokenizer.decode(np.asarray(tokens, np.int64)) != text
            if name == "heldout" and heldout_text is not None:
                heldout_text += content
                if len(heldout_text) > COMPRESSED_TEXT_LIMIT:
                    heldout_text = None
        if agreement is not None:
            agreement.finish()
        if counts["broken"] > max_broken_fraction * counts["read"]:
            raise UserError(
                f"{counts['broken']} of {counts['read']} records of {documents.description} are broken, more than "
                f"max_broken_fraction {max_broken_fraction:g} allows; fix the source or raise --max_broken_fraction"
            )
        splits = {name: writer.finish() for name, writer in writers.items()}
    _check_not_empty(documents.description, counts["empty"], splits, splitter, is_text=agreement is None)
    if lossy:
        _LOG.warning(
            "%d of %d held-out documents differ from what their tokens decode to: this tokenizer drops or changes "
            "text, so its bits per byte cannot be compared with those of a lossless tokenizer, of gzip or of xz",
            lossy,
            splits["heldout"].documents,
        )
    splits["heldout"] = with_compressed_sizes(splits["heldout"], heldout_text)
    return Records(**counts), splits


def _check_not_empty(
    description: str, empty: int, splits: dict[str, Split], splitter: Splitter, *, is_text: bool
) -> None:
    documents = sum(split.documents for split in splits.values())
    if not documents:
        what = "text" if is_text else "tokens"
        raise UserError(f"{description} has no {what}: all of its {empty} documents are empty")
    for name, split in splits.items():
        if split.blocks == 0:
            fraction = splitter.nearest_fraction()
            remedy = (
                f"the nearest that works is --heldout_fraction={fraction}"
                if fraction is not None
                else "the splits need two different documents"
                + " (--document_separator cuts a plain-text file into documents)" * is_text
            )
            raise UserError(f"the {name} split would be empty: none of {documents} documents falls into it; {remedy}")
