"""Sources of token ids that another program made with a tokenizer available here: making documents of them and checking
them.

Ids are checked one by one. `Agreement` checks that they are this tokenizer's, by the text it decodes from them.
"""

import collections
import dataclasses
import logging
from collections.abc import Iterable, Iterator

import numpy as np

from jaxlinear.data.records import Record
from jaxlinear.data.tokenizer import Tokenizer
from jaxlinear.errors import UserError

_LOG = logging.getLogger(__name__)
_WITHOUT_A_BORDER = 1 << 28  # tokens of a stream without a document token, after which none is expected
_SAMPLE = 100  # documents whose text is encoded again
_OF_EACH = 1 << 16  # ids from the beginning of each: a document may have a billion bytes
_IN_A_ROW = 4  # consecutive tokens that are looked up in the re-encoded ids
_FACTORS = np.random.default_rng(0).integers(1 << 62, 1 << 63, _IN_A_ROW, np.uint64)
_HALF, _MOST = 0.5, 0.9


@dataclasses.dataclass(frozen=True)
class Ids:
    """The valid ids: those below ``vocab_size``, of which ``document_token`` separates documents."""

    vocab_size: int
    document_token: int
    name: str  # of the document token

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Ids":
        """The ids of a tokenizer."""
        return cls(tokenizer.vocab_size, tokenizer.document_token, tokenizer.document_token_name)

    def wrong(self, ids: np.ndarray) -> str | None:
        """Why ``ids`` cannot be the tokenizer's; None if they can."""
        if ids.size and ids.dtype.kind not in "iu":
            return f"{ids.dtype}, but ids must be integers"
        if ids.ndim != 1 and ids.size:
            return f"ids in {ids.ndim} dimensions, but they must be one list"
        beyond = np.flatnonzero((ids < 0) | (ids >= self.vocab_size))
        if not len(beyond):
            return None
        at = beyond[0]
        return (
            f"the id {ids[at]} at position {at} does not belong to the tokenizer, whose ids are 0 to "
            f"{self.vocab_size - 1}"
        )

    def record(self, origin: str, values: object, field: str) -> Record:
        """The record for the field of one row."""
        if not isinstance(values, list | np.ndarray):
            return Record(origin, None, f"field {field!r} is not a list of ids but {type(values).__name__}")
        if isinstance(values, list):
            # NumPy turns True into 1 and 2.0 into a float, and makes an object of a number beyond 64 bits.
            strange = next((value for value in values if type(value) is not int), None)
            if strange is not None:
                return Record(origin, None, f"field {field!r} has {strange!r}, but ids must be integers")
            values = np.asarray(values)
        if wrong := self.wrong(values):
            return Record(origin, None, f"field {field!r}: {wrong}")
        return Record(origin, None, ids=values.astype(np.uint32))

    def documents(self, records: Iterable[Record]) -> Iterator[Record]:
        """For records of one document each: removes the document tokens at either end."""
        for record in records:
            if record.ids is None:
                yield record
                continue
            inside = np.flatnonzero(record.ids != self.document_token)
            ids = record.ids[inside[0] : inside[-1] + 1] if len(inside) else record.ids[:0]
            if len(ids) > len(inside):
                error = (
                    f"the document token {self.name!r} ({self.document_token}) is inside it; --packed_rows cuts there"
                )
                yield Record(record.origin, None, error)
            else:
                yield dataclasses.replace(record, ids=ids)

    def documents_of_each(self, records: Iterable[Record]) -> Iterator[Record]:
        """For records of one or more documents, with document tokens between them and possibly at either end."""
        for record in records:
            if record.ids is None:
                yield record
                continue
            parts = np.split(record.ids, np.flatnonzero(record.ids == self.document_token))
            parts = [part[part != self.document_token] for part in parts]
            whole = [part for part in parts if len(part)] or [record.ids[:0]]
            yield from (dataclasses.replace(record, ids=part) for part in whole)

    def split(self, description: str, records: Iterable[Record]) -> Iterator[Record]:
        """The documents of a stream whose records are its parts, split at the document tokens. A broken record ends a
        document, and a new one begins after it."""
        parts: list[np.ndarray] = []
        origin, waiting, borders = "", 0, 0

        def whole() -> Iterator[Record]:
            if waiting:
                yield Record(origin, None, ids=np.concatenate(parts))

        for record in records:
            if record.ids is None:
                yield from whole()
                parts, waiting = [], 0
                yield record
                continue
            begin = 0
            for end in np.flatnonzero(record.ids == self.document_token).tolist():
                origin = origin if waiting else record.origin
                parts.append(record.ids[begin:end])
                waiting += end - begin
                yield from whole()
                parts, waiting, borders, begin = [], 0, borders + 1, end + 1
            origin = origin if waiting else record.origin
            parts.append(record.ids[begin:])
            waiting += len(record.ids) - begin
            if waiting > _WITHOUT_A_BORDER:
                self._refuse(f"{waiting} tokens in a row of {description}")
        if waiting and not borders:
            self._refuse(description)
        yield from whole()

    def _refuse(self, where: str) -> None:
        raise UserError(
            f"the document token {self.name!r} ({self.document_token}) is nowhere in {where}, so no document ends "
            "there; --document_token names the one between documents"
        )


class Agreement:
    """Whether ids come from the tokenizer they are said to come from. If another tokenizer made them, decoding and encoding
    them again gives other ids; a document truncated within a word or a character differs in only a few places."""

    def __init__(self, description: str, tokenizer: Tokenizer):
        self._description, self._tokenizer = description, tokenizer
        self._seen = self._runs = self._alike = 0
        self._first, self._last = collections.Counter[int](), collections.Counter[int]()
        self._no_text: dict[int, bool] = {}

    def see(self, ids: np.ndarray, text: str) -> None:
        """Compares a document's ids ``[T]`` with those of its text. Raises ``UserError`` once enough of them differ."""
        if self._seen == _SAMPLE:
            return
        self._seen += 1
        self._first[int(ids[0])] += 1
        self._last[int(ids[-1])] += 1
        if len(ids) > _OF_EACH:
            ids = ids[:_OF_EACH]
            text = self._tokenizer.decode(ids)
        theirs, again = self._of_text(ids), self._of_text(self._tokenizer.encode(text))
        if length := min(_IN_A_ROW, len(theirs), len(again)):
            runs = _runs(theirs, length)
            self._runs += len(runs)
            self._alike += int(np.isin(runs, _runs(again, length)).sum())
        if self._seen == _SAMPLE:
            self._judge()

    def _is_no_text(self, token: int) -> bool:
        if token not in self._no_text:
            self._no_text[token] = self._tokenizer.decode([token]) == ""
        return self._no_text[token]

    def _of_text(self, ids: np.ndarray) -> np.ndarray:
        return np.array([token for token in ids.tolist() if not self._is_no_text(token)], np.int64)

    def finish(self) -> None:
        """Judges by the documents seen, for a source with fewer documents than the sample size."""
        if 0 < self._seen < _SAMPLE:
            self._judge()

    def _judge(self) -> None:
        part = self._alike / max(self._runs, 1)
        first = f"the first {self._seen} documents of {self._description}"
        said = f"{part:.0%} of the ids of {first} match the tokenizer's encoding of their text"
        if part < _HALF:
            raise UserError(f"only {said}: another tokenizer made them; give that one as --tokenizer")
        if part < _MOST:
            _LOG.warning("only %s: was it another tokenizer that made them?", said)
        for end, tokens in (("begin", self._first), ("end", self._last)):
            token, times = tokens.most_common(1)[0]
            if times > self._seen / 2 and self._is_no_text(token):
                _LOG.warning(
                    "%d of the first %d documents of %s %s with the token %d, which decodes to no text and is kept; "
                    "--document_token names the one between documents",
                    *(times, self._seen, self._description, end, token),
                )


def _runs(ids: np.ndarray, length: int) -> np.ndarray:
    """A hash of each run of ``length`` ids. The probability that two runs collide is below 2^-60."""
    count, wide = len(ids) - length + 1, ids.astype(np.uint64)
    return np.sum([wide[i : i + count] * _FACTORS[i] for i in range(length)], axis=0)
