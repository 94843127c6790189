"""Every kind of tokenizer: lossless, the same after saving and loading, and blind to special tokens in text."""

import io
import json
import pathlib

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
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


@pytest.fixture(scope="module", params=["bpe", "bytes", "json", "sentencepiece"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    match request.param:
        case "bpe":
            return train_bpe(TEXTS, 400)
        case "bytes":
            return open_tokenizer("bytes")
        case "json":
            train_bpe(TEXTS[:2], 300).save(directory)
            return open_tokenizer(str(directory / "tokenizer.json"))
        case _:
            train_sentencepiece(directory / "tiny.model")
            return open_tokenizer(str(directory / "tiny.model"))


def test_round_trip(tokenizer):
    # SentencePiece has no piece for NUL and reads U+2581, its own sign for a space, as a space.
    texts = [text.replace("\0", "") for text in TEXTS] if tokenizer.kind == "sentencepiece" else TEXTS
    encoded = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert all(ids.max() < tokenizer.vocab_size for ids in encoded)
    np.testing.assert_array_equal(tokenizer.encode(texts[0]), encoded[0])


def test_no_text_becomes_the_document_token(tokenizer):
    for name in ("<|endoftext|>", "</s>", "<s>", tokenizer.document_token_name):
        ids = tokenizer.encode(f"a{name}b")
        assert tokenizer.document_token not in ids
        assert tokenizer.decode(ids) == f"a{name}b"


def test_document_tokens_decode_to_nothing(tokenizer):
    ids = np.concatenate([[tokenizer.document_token], tokenizer.encode("one"), [tokenizer.document_token]])
    assert tokenizer.decode(ids) == "one"


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.sha256, loaded.vocab_size, loaded.document_token) == (
        tokenizer.sha256,
        tokenizer.vocab_size,
        tokenizer.document_token,
    )
    np.testing.assert_array_equal(loaded.encode(TEXTS[1]), tokenizer.encode(TEXTS[1]))


def test_kinds_and_sizes():
    bpe = train_bpe(TEXTS, 300)
    assert (bpe.vocab_size, bpe.document_token, bpe.document_token_name) == (300, 0, "<|endoftext|>")
    assert (BytesTokenizer().vocab_size, BytesTokenizer().document_token) == (257, 256)
    assert BytesTokenizer().encode("aé").tolist() == [97, 195, 169]
    assert BytesTokenizer().decode([97, 195]) == "a\ufffd"


def test_training_is_deterministic_and_texts_matter():
    assert train_bpe(TEXTS, 350).sha256 == train_bpe(TEXTS, 350).sha256
    assert train_bpe(TEXTS, 350).sha256 != train_bpe(TEXTS[:2], 350).sha256


def test_document_token_is_part_of_the_hash(tmp_path):
    file = _json_tokenizer(tmp_path, ["<|endoftext|>", "</s>"])
    assert open_tokenizer(file).document_token_name == "<|endoftext|>"
    other = open_tokenizer(file, "</s>")
    assert other.document_token == open_tokenizer(file).document_token + 1
    assert other.sha256 != open_tokenizer(file).sha256


def test_an_ordinary_added_token_is_made_special(tmp_path):
    """Some files list the document token as one that is looked for in text."""
    file = _json_tokenizer(tmp_path, ["</s>"], special=False)
    tokenizer = open_tokenizer(file)
    assert tokenizer.document_token_name == "</s>"
    assert tokenizer.document_token not in tokenizer.encode("a</s>b")


def test_ids_may_have_gaps(tmp_path):
    """A model then needs room for the largest id, not for the number of ids."""
    train_bpe(TEXTS, 300).save(tmp_path)
    fields = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = fields["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 70_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    tokenizer = open_tokenizer(str(tmp_path / "tokenizer.json"))
    assert tokenizer.vocab_size == 70_001
    assert [tokenizer.decode(tokenizer.encode(text)) for text in TEXTS] == TEXTS


def test_a_document_token_that_is_a_byte_too_is_refused(tmp_path):
    """Here the package numbers added tokens from 257 onwards, whatever the file says, and 257 is the id of a byte."""
    train_bpe(TEXTS, 257).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    fields = json.loads(file.read_text())
    vocabulary = fields["model"]["vocab"]
    byte = max(vocabulary, key=vocabulary.get)
    vocabulary[byte] = 257
    fields["added_tokens"].append({**fields["added_tokens"][0], "id": 300, "content": "<doc>"})
    file.write_text(json.dumps(fields))
    with pytest.raises(
        UserError, match=f"its tokens '<doc>' and '{byte}' have the same id 257,.*name another token with"
    ):
        open_tokenizer(str(file), "<doc>")
    assert open_tokenizer(str(file), "<|endoftext|>").document_token == 0


def test_what_others_files_ask_for_beside_the_tokens_is_not_done(tmp_path):
    """Texts are not truncated or padded, and nothing is put before or after them: the packing does that."""
    file = pathlib.Path(_json_tokenizer(tmp_path, ["<s>", "</s>"]))
    plain = open_tokenizer(str(file), "</s>")
    begin = open_tokenizer(str(file), "<s>").document_token
    fields = json.loads(file.read_text())
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
    file.write_text(json.dumps(fields))
    whole = tokenizers.Tokenizer.from_file(str(file)).encode("a text").ids
    assert len(whole) == 500 and whole[0] == begin and len(plain.encode("a text")) == 6  # as the file asks
    tokenizer = open_tokenizer(str(file), "</s>")
    for text in ("a text", *TEXTS):
        np.testing.assert_array_equal(tokenizer.encode(text), plain.encode(text))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_byte_pair_encoding_with_dropout_gives_the_same_tokens_each_time(tmp_path):
    """Those of all merges, in a dataset as in what is read from it."""
    plain = train_bpe(TEXTS, 300)
    plain.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    fields = json.loads(file.read_text())
    fields["model"]["dropout"] = 0.5
    file.write_text(json.dumps(fields))
    assert tokenizers.Tokenizer.from_file(str(file)).model.dropout == 0.5
    for tokenizer in (open_tokenizer(str(file)), load_tokenizer(tmp_path)):
        for text in TEXTS:
            np.testing.assert_array_equal(tokenizer.encode(text), plain.encode(text))


def _json_tokenizer(directory, names, special=True) -> str:
    """A byte-level BPE with the given added tokens and no other."""
    train_bpe(TEXTS, 257).save(directory)
    fields = json.loads((directory / "tokenizer.json").read_text())
    template = fields["added_tokens"][0]
    del fields["model"]["vocab"][template["content"]]
    fields["model"]["vocab"] = {name: token - 1 for name, token in fields["model"]["vocab"].items()}
    fields["added_tokens"] = [
        {**template, "id": 256 + i, "content": name, "special": special} for i, name in enumerate(names)
    ]
    (directory / "tokenizer.json").write_text(json.dumps(fields))
    return str(directory / "tokenizer.json")


def test_bad_tokenizers_are_refused(tmp_path):
    with pytest.raises(
        UserError, match="cannot have 256 tokens; it must have at least 257, for 256 bytes and the document token"
    ):
        train_bpe(TEXTS, 256)
    with pytest.raises(UserError, match=r"no tokenizer 'absent.json': give bpe, bytes, or the path"):
        open_tokenizer("absent.json")
    (tmp_path / "bad.json").write_text('{"model": 1}')
    with pytest.raises(UserError, match=r"bad\.json is not a tokenizer\.json of the tokenizers package"):
        open_tokenizer(str(tmp_path / "bad.json"))
    (tmp_path / "bad.model").write_bytes(b"junk" * 100)
    with pytest.raises(UserError, match=r"bad\.model is not a SentencePiece model"):
        open_tokenizer(str(tmp_path / "bad.model"))
    file = _json_tokenizer(tmp_path, ["<pad>"])
    with pytest.raises(UserError, match=r"has none of <\|endoftext\|>, .* name its own with --document_token"):
        open_tokenizer(file)
    with pytest.raises(UserError, match="has no token '<end>' to separate documents with"):
        open_tokenizer(file, "<end>")
    # A letter is a token too, but text produces it.
    with pytest.raises(UserError, match="turns the text 'a' into its document token"):
        _refuse_plain_letter(tmp_path)


def _refuse_plain_letter(directory):
    train_sentencepiece(directory / "tiny.model")
    open_tokenizer(str(directory / "tiny.model"), "a")


def test_damaged_saves_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer in .*: it has no tokenizer_info\.json"):
        load_tokenizer(tmp_path)
    train_bpe(TEXTS, 257).save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"is incomplete: tokenizer\.json is missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_info.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer_info\.json is damaged"):
        load_tokenizer(tmp_path)


def test_sentencepiece_absent_names_the_extra(tmp_path, monkeypatch):
    train_sentencepiece(tmp_path / "tiny.model")
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"pip install jaxlinear\[sentencepiece\]"):
        open_tokenizer(str(tmp_path / "tiny.model"))
