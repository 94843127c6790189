"""The manifest of a prepared dataset: what the directory contains, and checks that it is really there."""

import dataclasses
import json
import os
import pathlib

from jaxlinear.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "heldout")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file. ``file`` is relative to the dataset's directory; ``size`` is its length in bytes."""

    file: str
    records: int
    size: int


@dataclasses.dataclass(frozen=True)
class Split:
    """One split: a stream of ``tokens`` tokens, cut into ``blocks`` blocks.

    ``bytes`` counts the UTF-8 bytes of the text; ``gzip_bytes`` and ``xz_bytes`` are the sizes of the whole text of
    the split under ``gzip -9`` and ``xz -9`` (only for held-out text, None where ``note`` says why).
    """

    documents: int
    tokens: int
    bytes: int
    blocks: int
    shards: tuple[Shard, ...]
    gzip_bytes: int | None = None
    xz_bytes: int | None = None
    note: str | None = None


@dataclasses.dataclass(frozen=True)
class TokenizerInfo:
    """Which tokenizer wrote the tokens. ``sha256`` covers its kind, its file and its document token."""

    kind: str
    file: str | None
    sha256: str


@dataclasses.dataclass(frozen=True)
class Records:
    """Numbers of source records: all that were read, the broken ones and the empty ones (both left out)."""

    read: int
    broken: int
    empty: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything the loader must know before it opens a shard."""

    format_version: int
    block_length: int
    vocab_size: int
    dtype: str
    tokenizer: TokenizerInfo
    document_token: int
    source: str
    seed: int
    heldout_fraction: float
    records: Records
    splits: dict[str, Split]

    def write(self, directory: str | os.PathLike[str]) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        pathlib.Path(directory, MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Reads and checks the manifest of the dataset in directory ``path``. Its shards must exist at full size."""
    directory = pathlib.Path(path)
    file = directory / MANIFEST
    if not directory.is_dir():
        raise UserError(f"no dataset at {directory}: the directory does not exist (launch/prepare_data.py makes one)")
    if not file.is_file():
        raise UserError(f"{directory} is not a prepared dataset: it has no {MANIFEST}")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        if (version := fields["format_version"]) != FORMAT_VERSION:
            raise UserError(
                f"{file} has format version {version}, but this program reads {FORMAT_VERSION}; prepare the dataset again"
            )
        splits = {
            name: Split(**split | {"shards": tuple(Shard(**shard) for shard in split["shards"])})
            for name, split in fields["splits"].items()
        }
        of_types = {"tokenizer": TokenizerInfo(**fields["tokenizer"]), "records": Records(**fields["records"])}
        manifest = Manifest(**fields | of_types | {"splits": splits})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged: {error or type(error).__name__}; prepare the dataset again") from error
    for split in manifest.splits.values():
        _check_shards(directory, split)
    return manifest


def _check_shards(directory: pathlib.Path, split: Split) -> None:
    for shard in split.shards:
        file = directory / shard.file
        if not file.is_file():
            raise UserError(f"the dataset in {directory} is incomplete: shard {shard.file} is missing")
        if (size := file.stat().st_size) != shard.size:
            raise UserError(f"shard {file} is damaged: {size} bytes instead of {shard.size}; prepare the dataset again")
    if (records := sum(shard.records for shard in split.shards)) != split.blocks:
        raise UserError(f"{directory / MANIFEST} is damaged: its shards hold {records} blocks, not {split.blocks}")
