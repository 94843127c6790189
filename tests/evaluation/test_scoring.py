"""evaluation/scoring.py: each score equals that of the continuation by itself, from all logits of an unpadded row."""

import types

import jax
import numpy as np
import pytest

from jaxlinear import config as configs
from jaxlinear import evaluation
from jaxlinear.errors import UserError
from jaxlinear.evaluation import scoring
from jaxlinear.evaluation.scoring import Scorer
from jaxlinear.models import load
from jaxlinear.models.parameters import describe
from tests.training import tiny

SHARED = tuple(range(40, 63))


@pytest.fixture(scope="module")
def run(tiny_run):
    return evaluation.open_run(tiny_run, 2, ["data=2", "tensor=2", "fsdp=2"])


@pytest.fixture(scope="module")
def log_p(tiny_run):
    """``log_p(tokens)``: ``[T, vocab]`` float64 for a single row, padded to one compiled length."""
    model = load(tiny_run, 2)
    forward = jax.jit(lambda tokens: model(tokens)[0])

    def rows(tokens):
        padded = np.zeros((1, 96), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(forward(padded), np.float64)[0, : len(tokens)]
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    return rows


def alone(log_p, context, continuation):
    found = log_p([*context, *continuation])[len(context) - 1 : -1]
    at = np.arange(len(continuation))
    return found[at, list(continuation)].sum(), bool((found.argmax(-1) == continuation).all())


def test_scores_are_those_of_each_by_itself(run, log_p, monkeypatch):
    """Contexts of many lengths, some shared; continuations of one token and of more, some of them greedy."""
    random = np.random.default_rng(0)
    pairs = [(SHARED, tuple(random.integers(0, 256, n).tolist())) for n in (1, 2, 3, 5, 9)]
    pairs += [((7, *SHARED), (3,)), ((5,), (1, 2, 3)), (SHARED, pairs[0][1])]
    pairs += [(tuple(random.integers(0, 256, n).tolist()), (9, 8)) for n in (15, 16, 17, 24, 25, 40)]
    greedy = [int(log_p(SHARED)[-1].argmax())]
    greedy.append(int(log_p([*SHARED, *greedy])[-1].argmax()))
    pairs += [(SHARED, tuple(greedy)), (SHARED, (*greedy, (greedy[0] + 1) % 256))]
    read, scorer = [], Scorer(run, 128)
    prefix = scorer._prefix
    monkeypatch.setattr(scorer, "_prefix", lambda *given: read.append(int((given[2] > 0).sum())) or prefix(*given))
    scores = scorer.score(pairs)
    assert len(scores) == len(pairs)
    for (context, continuation), (score, is_greedy) in zip(pairs, scores, strict=True):
        expected, expected_greedy = alone(log_p, context, continuation)
        np.testing.assert_allclose(score, expected, rtol=1e-4, err_msg=f"{len(context)} + {len(continuation)}")
        assert is_greedy == expected_greedy
    assert [is_greedy for _, is_greedy in scores[-2:]] == [True, False]
    assert sum(read) == sum(len(context) for context in {context for context, _ in pairs})  # each context is read once


def test_greedy_decoding_takes_the_tokenizers_tokens(run, log_p):
    """The model has more, one of which may be the likeliest. They still have a part of the probability."""
    found = log_p(SHARED)[-1]
    best = int(found.argmax())
    pairs = [(SHARED, (int(found[:best].argmax()),)), (SHARED, (best,))]
    assert [greedy for _, greedy in Scorer(run, 128).score(pairs)] == [False, True]
    scores = Scorer(run, 128, vocab_size=best).score(pairs)
    assert [greedy for _, greedy in scores] == [True, False]
    np.testing.assert_allclose([score for score, _ in scores], [found[pair[1][0]] for pair in pairs], rtol=1e-4)


def test_whole_documents(run, log_p, monkeypatch):
    """In one batch: documents longer than a chunk, exactly one chunk long, and shorter, one of them a single token with
    nothing to predict."""
    monkeypatch.setattr(scoring, "_CHUNK", 32)
    random = np.random.default_rng(1)
    documents = [tuple(random.integers(0, 256, n).tolist()) for n in (1, 2, 20, 32, 33, 34, 65, 90)]
    scores = Scorer(run, 512).whole(documents)
    assert scores[0] == 0
    for document, score in zip(documents[1:], scores[1:], strict=True):
        np.testing.assert_allclose(score, alone(log_p, document[:1], document[1:])[0], rtol=1e-4)


def test_lengths_that_are_compiled():
    lengths = {1: 16, 16: 16, 17: 24, 24: 24, 25: 32, 32: 32, 33: 48, 48: 48, 49: 64, 65: 96}
    assert {n: scoring._padded(n) for n in lengths} == lengths
    rows = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 6, 7: 8, 9: 12, 13: 16}
    assert {n: scoring._rounded(n) for n in rows} == rows


@pytest.mark.parametrize("pattern", [("attention", "attention"), ("gla", "attention", "gla")], ids="+".join)
def test_padding_beyond_what_attention_remembers(pattern):
    """The text fits; its padding does not."""
    random = np.random.default_rng(0)
    context, document = (tuple(random.integers(0, tiny.VOCABULARY, n).tolist()) for n in (22, 30))
    pairs = [(context, document[:9]), (context, document[:8]), (context[:5], document[:27])]

    def scorer(remembered):
        config = tiny.config(model__pattern=pattern, model__num_layers=len(pattern), model__context=remembered)
        architecture = describe(configs.model_config(config))
        parts = {"mesh": tiny.mesh(), "architecture": architecture, "config": config}
        parameters = jax.device_put(tiny.parameters(architecture))
        return Scorer(types.SimpleNamespace(**parts, parameters=parameters, program=lambda name, make: make()), 4096)

    short, long = scorer(32), scorer(64)
    np.testing.assert_allclose([x for x, _ in short.score(pairs)], [x for x, _ in long.score(pairs)], rtol=1e-5)
    np.testing.assert_allclose(short.whole([document]), long.whole([document]), rtol=1e-5)


def test_refusals(tiny_run, run, monkeypatch):
    with pytest.raises(UserError, match="not the time of each row; leave --mesh=sequence out"):
        Scorer(evaluation.open_run(tiny_run, 2, ["sequence=2"]), 128)
    scorer = Scorer(run, 128)
    scores = scorer._continuations
    monkeypatch.setattr(scorer, "_continuations", lambda *given: (scores(*given)[0] * np.nan, given[-2][:, 0]))
    with pytest.raises(UserError, match=r"the scores of 2 of 2 texts are not finite: the model's own values are not"):
        scorer.score([(SHARED, (1, 2)), (SHARED, (2, 3))])
    monkeypatch.setattr(scorer, "_context", 30)
    with pytest.raises(UserError, match=r"a text of 31 tokens is longer than model.context=30"):
        scorer.score([(SHARED, tuple(range(8)))])
