"""evaluation/harness.py: a run gives the harness the scores of each choice by itself; tasks come from local files."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.utils import normalize_gen_kwargs

from jaxlinear import evaluation, generation
from jaxlinear.data import load_tokenizer
from jaxlinear.errors import UserError
from jaxlinear.evaluation import Options, harness, perplexity
from jaxlinear.evaluation.scoring import Scorer
from jaxlinear.models import LanguageModel

TASK = """task: words
dataset_path: somewhere/that_is_not_asked
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "{{question}}"
doc_to_target: label
doc_to_choice: "{{choices}}"
metric_list:
  - metric: acc
  - metric: acc_norm
metadata:
  version: 1.0
"""


@pytest.fixture(scope="module")
def run(tiny_run):
    return evaluation.open_run(tiny_run, 2)


@pytest.fixture(scope="module")
def model(run):
    return harness.HarnessModel(run, 512)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A task and its questions."""
    folder = tmp_path_factory.mktemp("harness")
    (folder / "words.yaml").write_text(TASK)
    choices = [" print", " x", " def if"]
    questions = [{"question": f"for x in range({i}):", "choices": choices, "label": i % 3} for i in range(12)]
    (folder / "words.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    return folder / "words.yaml", folder / "words.jsonl", questions


def requests(kind, *arguments):
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def encoded(run, context, continuation):
    """What is scored: the context after the token that begins a document, and the continuation."""
    tokenizer = load_tokenizer(run.workdir)
    context, continuation = (tokenizer.encode(text).tolist() for text in (context, continuation))
    return (tokenizer.document_token, *context), tuple(continuation)


def test_loglikelihood(model, run):
    """Contexts may be empty, shared, or end in a space, which moves to the continuation. Rolling is that of the whole text
    after an empty context."""
    asked = [("for x", " in"), ("for x", " range("), ("", "def"), ("for x ", "in"), ("", "for x in range(3): print(x)")]
    found = model.loglikelihood(requests("loglikelihood", *asked), disable_tqdm=True)
    pairs = [encoded(run, *pair) for pair in [*asked[:3], ("for x", " in"), asked[4]]]
    alone = [Scorer(run, 64).score([pair])[0] for pair in pairs]
    np.testing.assert_allclose([score for score, _ in found], [score for score, _ in alone], rtol=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in alone] and found[0][0] != found[1][0]
    (rolling,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", asked[4][1:]))
    np.testing.assert_allclose(rolling, found[4][0], rtol=1e-5)


@pytest.mark.parametrize("context", ["for x", ""])
def test_a_continuation_without_tokens_is_refused(model, context):
    with pytest.raises(UserError, match=f"the tokenizer leaves nothing of '' after '{context}'"):
        model.loglikelihood(requests("loglikelihood", ("a", "b"), (context, "")), disable_tqdm=True)


def test_generation_ends_where_it_is_told(model, run):
    """The text is that of ``generation.generate``, up to the first of the stops or the given number of tokens."""
    tokenizer, prompts = load_tokenizer(run.workdir), ["for x in", "print("]
    contexts, model_ = [encoded(run, prompt, "")[0] for prompt in prompts], run.architecture.bind(run.parameters)
    ends = {"stop_token": tokenizer.document_token, "vocab_size": tokenizer.vocab_size}
    rows = generation.generate(model_, contexts, max_tokens=24, temperature=0, **ends)
    texts = [tokenizer.decode(np.array(row)) for row in rows]

    def generated(*prompts, **options):
        return model.generate_until(requests("generate_until", *[(prompt, options) for prompt in prompts]))

    assert generated(*prompts, until=["\0"], max_gen_toks=24) == texts and all(len(text) > 1 for text in texts)
    stop = texts[0][3]
    assert generated(prompts[0], until=stop, max_gen_toks=24) == [texts[0][: texts[0].index(stop)]]
    with pytest.raises(UserError, match=r"generation with num_beams is not supported; .*do_sample, max_gen_toks"):
        generated(prompts[0], num_beams=4)


def test_repeats_are_drawn_apart_and_do_not_depend_on_the_batches(run):
    """Two questions, three times each: in batches of one, and all at once."""
    arguments = [(prompt, {"until": ["\0"], "max_gen_toks": 6, "do_sample": True}) for prompt in ("for x in", "print(")]
    asked = requests("generate_until", *(one for one in arguments for _ in range(3)))
    alone, together = (harness.HarnessModel(run, tokens).generate_until(asked) for tokens in (1, 4096))
    assert alone == together
    assert [len(set(alone[:3])), len(set(alone[3:]))] == [3, 3]


def test_few_shapes_of_generation_are_compiled(run, monkeypatch):
    """For batches of any number of questions on 8 devices; and the model is laid out for decoding only once."""
    shapes, laid_out = [], []
    prefill, for_decoding = generation._prefill, LanguageModel.for_decoding

    def counted(self):
        if not self.is_for_decoding:
            laid_out.append(self)
        return for_decoding(self)

    monkeypatch.setattr(generation, "_prefill", lambda *given: shapes.append(given[5].shape) or prefill(*given))
    monkeypatch.setattr(LanguageModel, "for_decoding", counted)
    prompts = ["for x", *["print(x"] * 2, *["return x i"] * 3, *["def x in range"] * 5]
    asked = requests("generate_until", *((prompt, {"until": ["\0"], "max_gen_toks": 2}) for prompt in prompts))
    together = harness.HarnessModel(run, 4096).generate_until(asked)
    assert shapes == [(16, 16)] and len(laid_out) == 1
    assert harness.HarnessModel(run, 46).generate_until(asked) == together
    assert len(shapes) > 3 and set(shapes[1:]) == {(8, 16)}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {"temperature": 0.0}),
        ({"temperature": 0.5}, {"temperature": 0.5}),
        ({"temperature": 0.5, "do_sample": None}, {"temperature": 0.5}),
        ({"temperature": 0.5, "do_sample": False, "top_p": 0.9}, {"temperature": 0.0}),
        ({"do_sample": True, "top_k": None, "top_p": 0.9}, {"temperature": 1.0, "top_p": 0.9}),
        ({"do_sample": True, "temperature": 0.0}, {"temperature": 0.0}),
        ({"do_sample": True, "temperature": "1e-1", "top_k": 4}, {"temperature": 0.1, "top_k": 4}),
    ],
)
def test_what_is_drawn(arguments, expected):
    """Either ``do_sample`` or a temperature by itself decides, as in lm_eval's ``normalize_gen_kwargs``."""
    until, limit, sampling = harness._sampling(arguments | {"until": None, "max_gen_toks": None})
    assert (until, limit, sampling) == ([], 256, generation.Sampling(**{"temperature": 0.0} | expected))
    theirs = normalize_gen_kwargs({name: value for name, value in arguments.items() if value is not None})
    assert theirs["do_sample"] is (sampling.temperature > 0) or arguments.get("temperature") == 0.0


def test_what_cannot_be_drawn():
    for arguments, message in (({"top_k": "many"}, "top_k: 'many' is not a number"), ({"top_p": 0.0}, "top_p is 0.0")):
        with pytest.raises(UserError, match=message):
            harness._sampling({"temperature": 1.0} | arguments)


def test_cut():
    assert harness._truncated("one\ntwo. three", [".", "\n"]) == ("one", True)
    assert harness._truncated("one two", ["\n", ""]) == ("one two", False)


def test_a_task_from_local_files(run, files):
    """The accuracies are those of scoring each choice of each question by itself."""
    task, data, questions = files
    spec, scorer = f"harness:{task}:data={data}:limit=10", Scorer(run, 64)
    report = evaluation.evaluate_run(run, [spec], Options(batch_tokens=512))
    json.dumps(report, allow_nan=False)
    values = report[spec]["tasks"]["words"]
    right, right_norm = [], []
    for question in questions[:10]:
        choices = question["choices"]
        scores = [scorer.score([encoded(run, question["question"], choice)])[0][0] for choice in choices]
        right.append(np.argmax(scores) == question["label"])
        right_norm.append(np.argmax(np.array(scores) / [len(c) for c in choices]) == question["label"])
    assert (values["samples"], values["of"]) == (10, 12)
    assert values["acc"] == pytest.approx(np.mean(right)) and values["acc_norm"] == pytest.approx(np.mean(right_norm))
    text = evaluation.table(report)
    assert f"words: acc {values['acc']:.4f} ± {values['acc_stderr']:.4f}" in text and "10 of 12 questions" in text


def test_standard_errors_of_filtered_answers():
    """lm_eval names them METRIC_stderr,FILTER; each is shown next to its metric and has no curve."""
    results = {"exact_match,none": 0.25, "exact_match_stderr,none": "N/A", "alias": "words"}
    results |= {"exact_match,maj": 0.5, "exact_match_stderr,maj": 0.125}
    values = harness._metrics({"results": {"words": results}, "n-samples": {}}, "words")
    report = {"lm_eval": "0", "tasks": {"words": values}}
    assert harness.scalars(report) == {"exact_match, words": 0.25, "exact_match,maj, words": 0.5}
    assert "words: exact_match 0.2500, exact_match,maj 0.5000 ± 0.1250; " in harness.table(report)


def test_no_question_is_among_its_own_examples(run, files, monkeypatch):
    """Of which there are as many before each question as were asked for."""
    asked = []

    def seen(self, requests, **options):
        asked.extend(request.args[0] for request in requests)
        return [(0.0, False)] * len(requests)

    monkeypatch.setattr(harness.HarnessModel, "loglikelihood", seen)
    spec = f"harness:{files[0]}:data={files[1]}:fewshot=5"
    assert evaluation.evaluate_run(run, [spec], Options())[spec]["tasks"]["words"]["samples"] == 12
    assert len(asked) == 3 * 12
    for context in asked:
        *examples, question = context.split("\n\n")
        assert len(examples) == 5 and not any(example.startswith(question) for example in examples), context


def test_tasks_that_come_with_the_harness_are_found():
    """Without reading all of them; their questions come from a local file."""
    assert harness._find("piqa").name == "piqa.yaml"
    assert "task: boolq" in harness._find("boolq").read_text()
    assert harness._find("no_such_task") is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("harness", "does not name a task; write harness:NAME, such as harness:piqa"),
        ("harness:piqa:shots=2", "there is no option 'shots'; the options are limit, fewshot, data"),
        ("harness:piqa:limit=x", "limit must be a whole number, not 'x'"),
        ("harness:piqa:limit", "'harness:piqa:limit': 'limit' is not an option; write NAME:option=VALUE"),
        ("harness:piqa:limit=9:limit=8", "'harness:piqa:limit=9:limit=8': limit is given twice; leave one out"),
        ("harness:piqa:limit=0", "limit=0 must be at least 1"),
        ("harness:piqa:fewshot=-1", "fewshot=-1 must be at least 0"),
        ("harness:nothing.yaml", "there is no task file nothing.yaml"),
        ("harness:piqa:data=questions.csv", "its name must end in .jsonl, .json, .arrow, .parquet"),
        ("harness:piqa:data=none.jsonl", "data=none.jsonl: the file does not exist"),
        # The question itself does not count as an example; a number that the task's file gives is checked as well.
        ("harness:{words}:data={data}:fewshot=12", "words does not have 12 examples per .* possible is fewshot=11"),
        ("harness:{own}:data={data}", "words does not have 12 examples per .* possible is fewshot=11"),
        # The second reason is the cause.
        ("harness:{words}:data={broken}", "cannot load the task '.*': DatasetGenerationError: .*; for .*Invalid"),
    ],
)
def test_refusals(run, files, spec, message):
    words, data, _ = files
    broken, own = data.with_name("broken.jsonl"), words.with_name("own.yaml")
    broken.write_text("{not JSON\n")
    own.write_text(TASK + "num_fewshot: 12\n")
    with pytest.raises(UserError, match=message):
        evaluation.evaluate_run(run, [spec.format(words=words, data=data, broken=broken, own=own)], Options())


def test_a_task_that_runs_code_and_one_that_cannot_be_downloaded_are_refused(run, files, monkeypatch):
    with pytest.raises(UserError, match="'harness:humaneval': humaneval runs code that the model writes"):
        harness._check("harness:humaneval", {"humaneval": SimpleNamespace(UNSAFE_CODE=True)}, None)

    def offline(**_):
        raise ConnectionError("couldn't reach the hub")

    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", offline)
    with pytest.raises(UserError, match=f"cannot load the task '{files[0]}': ConnectionError: couldn't reach the hub"):
        evaluation.evaluate_run(run, [f"harness:{files[0]}"], Options())


def test_nothing_runs_before_all_tasks_are_checked(run, files, monkeypatch):
    """The last of several is refused before the first is measured; a harness task also for its generation options."""

    def measured(*_):
        raise AssertionError("perplexity was measured")

    task, data, _ = files
    beams, head = (
        task.with_name("beams.yaml"),
        TASK.replace("multiple_choice", "generate_until").split("metric_list")[0],
    )
    beams.write_text(head + "generation_kwargs: {num_beams: 4}\n")
    monkeypatch.setattr(perplexity, "_measure", measured)
    for last, error, message in (
        ("parity:bogus=1", UserError, "parity has no option 'bogus'"),
        ("passkey:length=999999", UserError, "length=999999 must be at most half of the"),
        (f"harness:{task}:data={data}:fewshot=12", UserError, "the largest possible is fewshot=11"),
        (f"harness:{beams}:data={data}", UserError, "generation with num_beams is not supported"),
        ("parity", AssertionError, "perplexity was measured"),
    ):
        with pytest.raises(error, match=message):
            evaluation.evaluate_run(run, ["perplexity", last], Options(lengths=(1,), batches=1))


def test_neither_torch_nor_transformers_is_imported():
    code = "import sys; from jaxlinear.evaluation import harness; print({'torch', 'transformers'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.stdout.strip() == "set()", done.stderr
