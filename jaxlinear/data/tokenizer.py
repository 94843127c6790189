"""Tokenizers: a trained byte-level BPE, an existing ``tokenizer.json`` or SentencePiece model, or plain bytes.

Text is only ever text: no string in a document becomes a special token. The only special token used is the document
token, which packing writes before every document.
"""

import abc
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxlinear import atomic
from jaxlinear.errors import UserError

DOCUMENT_TOKEN = "<|endoftext|>"
# Names under which existing tokenizers have a token for the boundary between documents, in order of preference.
_KNOWN_DOCUMENT_TOKENS = (DOCUMENT_TOKEN, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<s>", "<bos>", "<|bos|>")
INFO_FILE = "tokenizer_info.json"
# Pieces have a bounded length: a base64 blob or a script without spaces would else be one "word" of a million characters.
_PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}{1,48}|\p{N}{1,3}| ?[^\s\p{L}\p{N}]{1,24}[\r\n]{0,8}|\s{1,64}(?!\S)|\s{1,64}"


class Tokenizer(abc.ABC):
    """Text to token ids and back. ``document_token`` is an id below ``vocab_size`` that no text encodes to.

    A model that was trained elsewhere may end its texts with other tokens than the one it begins them with: ``end_tokens``.
    """

    kind: str
    file: str | None  # the tokenizer's own file inside a saved directory
    vocab_size: int
    document_token: int
    document_token_name: str
    end_tokens: tuple[int, ...] = ()
    _content: bytes = b""  # of the file

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The tokens that end a text: the document token and ``end_tokens``."""
        return self.document_token, *(token for token in self.end_tokens if token != self.document_token)

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of every text, each [T]."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids. Document tokens are left out; bytes that are not UTF-8 become U+FFFD."""

    def encode(self, text: str) -> np.ndarray:
        """Token ids ``[T]`` of a text."""
        return self.encode_batch([text])[0]

    @property
    def sha256(self) -> str:
        """Two tokenizers with the same one give the same ids to all documents."""
        header = f"{self.kind}\n{self.document_token_name}\n{self.document_token}\n".encode()
        return hashlib.sha256(header + self._content).hexdigest()

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the files that ``load_tokenizer`` reads. Once the last of them exists, all are complete."""
        if self.file is not None:
            pathlib.Path(directory, self.file).write_bytes(self._content)
        info: dict[str, Any] = {"kind": self.kind, "file": self.file, "document_token": self.document_token_name}
        info |= {"end_tokens": list(self.end_tokens)} if self.end_tokens else {}
        atomic.write_text(pathlib.Path(directory, INFO_FILE), json.dumps(info, indent=2) + "\n")

    def _check_document_token(self) -> None:
        if self.document_token in self.encode(self.document_token_name):
            raise UserError(
                f"the tokenizer turns the text {self.document_token_name!r} into its document token, so a document "
                "could forge a boundary; name another token with --document_token"
            )


class BytesTokenizer(Tokenizer):
    """256 bytes and the document token."""

    kind, file, vocab_size, document_token, document_token_name = "bytes", None, 257, 256, DOCUMENT_TOKEN

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint16) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class JsonTokenizer(Tokenizer):
    """A tokenizer of the ``tokenizers`` package, from the content of a ``tokenizer.json``."""

    kind, file = "tokenizers", "tokenizer.json"

    def __init__(self, content: bytes, document_token: str | None = None, *, origin: str = "tokenizer.json"):
        import tokenizers

        self._content = content
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # for a malformed file the package raises Exception itself
            raise UserError(f"{origin} is not a tokenizer.json of the tokenizers package: {error}") from error
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.document_token_name = _choose_document_token(vocabulary, document_token)
        self.document_token = vocabulary[self.document_token_name]
        for name, token in vocabulary.items():
            if token == self.document_token and name != self.document_token_name:
                # Whatever ids the file gives them, the package numbers added tokens from the vocabulary size upwards.
                raise UserError(
                    f"{origin}: its tokens {self.document_token_name!r} and {name!r} have the same id {token}, which "
                    "happens to added tokens if the vocabulary's ids have gaps, so a document could forge a boundary; "
                    "name another token with --document_token"
                )
        self.vocab_size = max(vocabulary.values()) + 1
        # Special tokens are not matched in text; some files list theirs as an ordinary added token.
        self._tokenizer.add_special_tokens([self.document_token_name])
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if getattr(self._tokenizer.model, "dropout", None):  # leaves out merges at random
            self._tokenizer.model.dropout = None
        self._check_document_token()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=True)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, from the content of its ``.model`` file."""

    kind, file = "sentencepiece", "tokenizer.model"

    def __init__(self, content: bytes, document_token: str | None = None, *, origin: str = "tokenizer.model"):
        try:
            import sentencepiece
        except ImportError as error:
            raise UserError(
                "a SentencePiece model needs the sentencepiece package: pip install jaxlinear[sentencepiece]"
            ) from error
        self._content = content
        try:
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise UserError(f"{origin} is not a SentencePiece model: {error}") from error
        vocabulary = {self._processor.id_to_piece(i): i for i in range(self._processor.get_piece_size())}
        self.document_token_name = _choose_document_token(vocabulary, document_token)
        self.document_token = vocabulary[self.document_token_name]
        self.vocab_size = len(vocabulary)
        self._check_document_token()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids, np.uint32) for ids in self._processor.encode(list(texts), num_threads=1)]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids)
        return self._processor.decode(ids[ids != self.document_token].tolist())


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """A byte-level BPE of at most ``vocab_size`` tokens, document token included; lossless on any text."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise UserError(
            f"a byte-level BPE cannot have {vocab_size} tokens; it must have at least 257, for 256 bytes and the "
            "document token"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[DOCUMENT_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return JsonTokenizer(tokenizer.to_str().encode(), DOCUMENT_TOKEN)


def open_tokenizer(path: str, document_token: str | None = None) -> Tokenizer:
    """An existing tokenizer: "bytes", the path of a ``tokenizer.json`` or of a SentencePiece ``.model``."""
    if path == "bytes":
        return BytesTokenizer()
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(
            f"there is no tokenizer {path!r}: give bpe, bytes, or the path of a tokenizer.json or a .model file"
        )
    if file.suffix == ".model":
        return SentencePieceTokenizer(file.read_bytes(), document_token, origin=path)
    return JsonTokenizer(file.read_bytes(), document_token, origin=path)


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer saved in ``directory``: a prepared dataset, a run, or a directory written by ``Tokenizer.save``."""
    file = pathlib.Path(directory, INFO_FILE)
    if not file.is_file():
        raise UserError(f"there is no tokenizer in {directory}: it has no {INFO_FILE}")
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
        kind, name, document_token = info["kind"], info["file"], info["document_token"]
        end_tokens = tuple(int(token) for token in info.get("end_tokens", ()))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged: {error or type(error).__name__}") from error
    if kind == "bytes":
        return BytesTokenizer()
    content = file.parent / name
    if not content.is_file():
        raise UserError(f"the tokenizer in {directory} is incomplete: {name} is missing")
    make = SentencePieceTokenizer if kind == "sentencepiece" else JsonTokenizer
    tokenizer = make(content.read_bytes(), document_token, origin=str(content))
    tokenizer.end_tokens = end_tokens
    return tokenizer


def _choose_document_token(vocabulary: dict[str, int], wanted: str | None) -> str:
    for name in _KNOWN_DOCUMENT_TOKENS if wanted is None else (wanted,):
        if name in vocabulary:
            return name
    if wanted is not None:
        raise UserError(f"the tokenizer has no token {wanted!r} to separate documents with")
    known = ", ".join(_KNOWN_DOCUMENT_TOKENS)
    raise UserError(f"the tokenizer has none of {known} to separate documents with; name its own with --document_token")
