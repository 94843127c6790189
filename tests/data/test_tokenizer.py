"""Every kind of tokenizer: lossless, the same after saving and loading, and blind to special tokens in text."""

import io
import json
import pathlib
import sys

import numpy as np
import pytest
import sentencepiece
import tokenizers

from jaxlinear.data.tokenizer import BytesTokenizer, Tokenizer, load_tokenizer, open_tokenizer, train_bpe
from jaxlinear.errors import UserError

TEXTS = [
    "def f(x):\n\treturn  x + 1\r\n" * 20,
    "  leading and trailing spaces  \n\n\n   ",
    "Žluťoučký kůň 数学 🙂 \u200b e\u0301 \ufeff",
    "a literal <|endoftext|> and </s> in the text",
    "NUL \x00 and control \x1b[0m characters",
    "x" * 300 + " " * 300 + "=" * 100 + "1234567890" * 10,
]


def train_sentencepiece(path):
    """A small lossless model: no normalisation, and bytes for unknown characters."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog", "def f(x): return x + 1"] * 20),
        model_writer=model,
        **dict(vocab_size=330, model_type="bpe", byte_fallback=True, normalization_rule_name="identity"),
        **dict(add_dummy_prefix=False, remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2),
    )
    path.write_bytes(model.getvalue())


@pytest.fixture(scope="module", params=["bpe", "bytes", "json", "sentencepiece"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    if request.param == "bpe":
        return train_bpe(TEXTS, 400)
    train_bpe(TEXTS[:2], 300).save(directory)
    train_sentencepiece(directory / "tiny.model")
    files = {"json": "tokenizer.json", "sentencepiece": "tiny.model"}
    return open_tokenizer(str(directory / files[request.param]) if request.param in files else request.param)


def edited(directory, change) -> str:
    """The saved tokenizer.json with its fields changed."""
    file = pathlib.Path(directory, "tokenizer.json")
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))
    return str(file)


def test_round_trip(tokenizer, tmp_path):
    """Also after saving and loading, and for a document token in the text or around it."""
    # SentencePiece has no piece for NUL and reads U+2581, its own sign for a space, as a space.
    texts = [text.replace("\0", "") for text in TEXTS] if tokenizer.kind == "sentencepiece" else TEXTS
    encoded = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert all(ids.max() < tokenizer.vocab_size for ids in encoded)
    np.testing.assert_array_equal(tokenizer.encode(texts[0]), encoded[0])
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for name in ("sha256", "vocab_size", "document_token"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    np.testing.assert_array_equal(loaded.encode(texts[1]), encoded[1])
    for name in ("<|endoftext|>", "</s>", "<s>", tokenizer.document_token_name):
        ids = tokenizer.encode(f"a{name}b")
        assert tokenizer.document_token not in ids
        assert tokenizer.decode([tokenizer.document_token, *ids, tokenizer.document_token]) == f"a{name}b"


def test_kinds_and_sizes():
    bpe = train_bpe(TEXTS, 300)
    assert bpe.sha256 == train_bpe(TEXTS, 300).sha256 != train_bpe(TEXTS[:2], 300).sha256
    assert (bpe.vocab_size, bpe.document_token, bpe.document_token_name) == (300, 0, "<|endoftext|>")
    assert (BytesTokenizer().vocab_size, BytesTokenizer().document_token) == (257, 256)
    assert BytesTokenizer().encode("aé").tolist() == [97, 195, 169]
    assert BytesTokenizer().decode([97, 195]) == "a\ufffd"


def test_which_document_token(tmp_path):
    """It is part of the hash. Some files list it as an ordinary token, which is looked for in text."""
    file = json_tokenizer(tmp_path, ["<|endoftext|>", "</s>"], special=False)
    first, other = open_tokenizer(file), open_tokenizer(file, "</s>")
    assert (first.document_token_name, other.document_token_name) == ("<|endoftext|>", "</s>")
    assert other.document_token == first.document_token + 1 and other.sha256 != first.sha256
    assert other.document_token not in other.encode("a</s>b")


def test_ids_may_have_gaps(tmp_path):
    """A model then needs room for the largest id, not for the number of ids."""

    def change(fields):
        vocabulary = fields["model"]["vocab"]
        vocabulary[max(vocabulary, key=vocabulary.get)] = 70_000

    train_bpe(TEXTS, 300).save(tmp_path)
    tokenizer = open_tokenizer(edited(tmp_path, change))
    assert tokenizer.vocab_size == 70_001
    assert [tokenizer.decode(tokenizer.encode(text)) for text in TEXTS] == TEXTS


def test_a_document_token_that_is_a_byte_too_is_refused(tmp_path):
    """Here the package numbers added tokens from 257 onwards, whatever the file says, and 257 is the id of a byte."""

    def change(fields):
        vocabulary = fields["model"]["vocab"]
        vocabulary[max(vocabulary, key=vocabulary.get)] = 257
        fields["added_tokens"].append({**fields["added_tokens"][0], "id": 300, "content": "<doc>"})

    train_bpe(TEXTS, 257).save(tmp_path)
    file = edited(tmp_path, change)
    with pytest.raises(UserError, match="have the same id 257"):
        open_tokenizer(file, "<doc>")
    assert open_tokenizer(file, "<|endoftext|>").document_token == 0


def test_what_others_files_ask_for_beside_the_tokens_is_not_done(tmp_path):
    """Texts are not truncated or padded, and nothing is put before or after them: the packing does that."""
    file = json_tokenizer(tmp_path, ["<s>", "</s>"])
    plain = open_tokenizer(file, "</s>")
    begin = open_tokenizer(file, "<s>").document_token

    def change(fields):
        fields["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        fields["padding"] = {
            **{"strategy": {"Fixed": 500}, "direction": "Right", "pad_to_multiple_of": None},
            **{"pad_id": begin, "pad_type_id": 0, "pad_token": "<s>"},
        }
        fields["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [begin], "tokens": ["<s>"]}},
        }

    whole = tokenizers.Tokenizer.from_file(edited(tmp_path, change)).encode("a text").ids
    assert len(whole) == 500 and whole[0] == begin and len(plain.encode("a text")) == 6  # as the file asks
    tokenizer = open_tokenizer(file, "</s>")
    for text in ("a text", *TEXTS):
        np.testing.assert_array_equal(tokenizer.encode(text), plain.encode(text))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_byte_pair_encoding_with_dropout_gives_the_same_tokens_each_time(tmp_path):
    """Those of all merges, in a dataset as in what is read from it."""
    plain = train_bpe(TEXTS, 300)
    plain.save(tmp_path)
    file = edited(tmp_path, lambda fields: fields["model"].update(dropout=0.5))
    assert tokenizers.Tokenizer.from_file(file).model.dropout == 0.5
    for tokenizer in (open_tokenizer(file), load_tokenizer(tmp_path)):
        for text in TEXTS:
            np.testing.assert_array_equal(tokenizer.encode(text), plain.encode(text))


def json_tokenizer(directory, names, special=True) -> str:
    """A byte-level BPE with the given added tokens and no other."""

    def change(fields):
        template = fields["added_tokens"][0]
        vocabulary = fields["model"]["vocab"]
        fields["model"]["vocab"] = {key: id - 1 for key, id in vocabulary.items() if key != template["content"]}
        fields["added_tokens"] = [
            {**template, "id": 256 + i, "content": name, "special": special} for i, name in enumerate(names)
        ]

    train_bpe(TEXTS, 257).save(directory)
    return edited(directory, change)


@pytest.mark.parametrize(
    "name, content, document_token, key",
    [
        ("absent.json", None, None, "no tokenizer"),
        ("a.json", b'{"model": 1}', None, r"not a tokenizer\.json"),
        ("a.model", b"junk" * 100, None, "not a SentencePiece"),
        ("tokenizer.json", ["<pad>"], None, r"<\|endoftext\|>, .* --document_token"),
        ("tokenizer.json", ["<pad>"], "<end>", "no token '<end>'"),
        ("tiny.model", train_sentencepiece, "a", "turns the text 'a' into"),  # a token too, but text produces it
    ],
)
def test_bad_tokenizers_are_refused(tmp_path, name, content, document_token, key):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif isinstance(content, list):
        json_tokenizer(tmp_path, content)
    elif content:
        content(tmp_path / name)
    with pytest.raises(UserError, match=key):
        open_tokenizer(str(tmp_path / name), document_token)


def test_damaged_saves_are_refused(tmp_path):
    def refused(key):
        with pytest.raises(UserError, match=key):
            load_tokenizer(tmp_path)

    refused(r"no tokenizer_info\.json")
    train_bpe(TEXTS, 257).save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    refused("incomplete")
    (tmp_path / "tokenizer_info.json").write_text("{}")
    refused(r"tokenizer_info\.json is damaged")


def test_sentencepiece_absent_names_the_extra(tmp_path, monkeypatch):
    train_sentencepiece(tmp_path / "tiny.model")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"pip install jaxlinear\[sentencepiece\]"):
        open_tokenizer(str(tmp_path / "tiny.model"))
