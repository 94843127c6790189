"""data/tasks: every answer is recomputed from the tokens in a different way; (seed, i) determines the example."""

import itertools

import numpy as np
import pytest

from jaxlinear.data import load_tokenizer, tasks
from jaxlinear.data.tasks import list_ops, state_tracking
from jaxlinear.errors import UserError

SPECS = (
    "mqar:length=32:pairs=4:vocab_size=40",
    "mqar:length=64:pairs=8:vocab_size=64:random_filling=true",
    "induction:length=16",
    "selective_copying:length=40:count=6:vocab_size=9",
    "parity:length=20",
    "s5_permutations:length=12",
    "listops:length=48:shortest=12:depth=3:arguments=4",
)


def rows(spec, count=40, split="train", seed=3):
    task = made(spec)
    return task, tasks.TaskBatches([task], batch_size=count, seed=seed, split=split)[0]


def made(spec):
    name, options = tasks.split(spec)
    return tasks.TASKS[name].make(options)


def due(targets):
    return np.flatnonzero(targets >= 0)


@pytest.mark.parametrize("spec", SPECS)
def test_examples_are_of_seed_split_and_index(spec):
    task, whole = rows(spec)
    assert whole["tokens"].shape == (40, task.length) and all(a.dtype == np.int32 for a in whole.values())
    # As other hosts would make them, and as later batches of a smaller size would have them.
    small = [tasks.TaskBatches([task], batch_size=8, seed=3)[step] for step in range(5)]
    for name in whole:
        for some in (range(17), range(17, 40), [3, 4, 39]):
            part = tasks.TaskBatches([task], batch_size=40, seed=3, rows=some)[0]
            np.testing.assert_array_equal(part[name], whole[name][list(some)])
        np.testing.assert_array_equal(np.concatenate([part[name] for part in small]), whole[name])
    for changed in ({"seed": 4}, {"split": "heldout"}):
        assert (rows(spec, **changed)[1]["tokens"] != whole["tokens"]).any(axis=1).mean() > 0.9
    later = tasks.TaskBatches([task], batch_size=40, seed=3)[1]
    assert (later["tokens"] != whole["tokens"]).any(axis=1).mean() > 0.9
    # Tokens and targets are of the vocabulary.
    assert whole["tokens"].min() >= 0 and whole["tokens"].max() < task.vocabulary
    assert whole["targets"].min() >= -1 and whole["targets"].max() < task.vocabulary
    due_in_each = (whole["targets"] >= 0).sum(axis=1)
    assert due_in_each.min() >= 1 and due_in_each.max() == task.max_targets
    assert (whole["segment_ids"] == 1).all() and 0 < task.chance <= 0.5


def test_no_example_is_another_of_the_next_seed_or_of_the_other_split():
    """Not even at another index: with 64 random bits, an example is drawn only once."""
    found = [rows("parity:length=64", seed=seed, split=split) for seed in (3, 4, 5) for split in ("train", "heldout")]
    assert len(np.unique(np.concatenate([batch["tokens"] for _, batch in found]), axis=0)) == 6 * 40


@pytest.mark.parametrize("spec", SPECS[:2])
def test_mqar(spec):
    task, batch = rows(spec)
    assert task.chance == 1 / (task.vocab_size - task.vocab_size // 2)  # among all values: it is not known which occur
    for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
        pairs = dict(zip(tokens[0 : 2 * task.pairs : 2].tolist(), tokens[1 : 2 * task.pairs : 2].tolist(), strict=True))
        assert len(pairs) == len(set(pairs.values())) == task.pairs
        assert all(0 < key < task.vocab_size // 2 <= value for key, value in pairs.items())
        at = due(targets)
        assert sorted(tokens[at].tolist()) == sorted(pairs) and at.min() >= 2 * task.pairs
        assert [pairs[key] for key in tokens[at].tolist()] == targets[at].tolist()
        rest = np.delete(tokens, at)[2 * task.pairs :]
        assert not set(rest.tolist()) & set(pairs)
        assert (rest.max() > 0) == task.random_filling


def share(values, bounds):
    """How often each whole number from ``bounds[0]`` to below ``bounds[1]`` is among the values; all are in this range."""
    values = np.ravel(values)
    assert bounds[0] <= values.min() and values.max() < bounds[1]
    return np.bincount(values - bounds[0], minlength=bounds[1] - bounds[0]) / len(values)


def uniform(values, *bounds):
    """Whether all numbers within the bounds are equally likely, up to five standard deviations."""
    expected = 1 / (bounds[1] - bounds[0])
    return np.max(np.abs(share(values, bounds) - expected)) < 5 * (expected / np.size(values)) ** 0.5


@pytest.mark.parametrize("power", [0.01, 1.0, 2.0])
def test_where_mqar_asks(power):
    """One key in one of five places: number d has weight d ** (power - 1). All keys and values are equally likely."""
    _, batch = rows(f"mqar:length=12:pairs=1:vocab_size=7:power={power}", count=2000)
    weights = np.arange(1, 6) ** (power - 1)
    found = share((np.nonzero(batch["targets"] >= 0)[1] - 2) // 2, (0, 5))
    np.testing.assert_allclose(found, weights / weights.sum(), atol=0.05)
    assert uniform(batch["tokens"][:, 0], 1, 3) and uniform(batch["tokens"][:, 1], 3, 7)


def test_what_is_random_is_of_its_whole_range():
    copying, induction, permutations = (
        rows(spec, count=1000)[1]["tokens"]
        for spec in ("selective_copying:length=9:count=2:vocab_size=6", "induction:length=8:vocab_size=5", SPECS[5])
    )
    assert uniform(copying[copying > 1], 2, 6) and uniform(np.nonzero(copying > 1)[1], 0, 7)
    assert uniform(induction[induction > 0], 1, 5) and uniform(permutations, 0, 120)
    _, batch = rows("listops:length=32:shortest=0:depth=1:arguments=4", count=2000)
    tokens = batch["tokens"]
    assert uniform(tokens[(tokens >= list_ops.OPEN) & (tokens < list_ops.CLOSE)], list_ops.OPEN, list_ops.CLOSE)
    digits = (tokens >= list_ops.DIGITS) & (tokens < list_ops.OPEN)
    assert uniform(tokens[digits], list_ops.DIGITS, list_ops.OPEN) and uniform(np.sum(digits, axis=1), 2, 5)


def test_induction():
    task, batch = rows("induction:length=16", count=200)
    followers = []
    for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
        first, last = np.flatnonzero(tokens == 0)
        assert last == 15 and due(targets).tolist() == [15] and targets[15] == tokens[first + 1] > 0
        followers.append(first)
    assert set(followers) == set(range(14)) and task.vocabulary == 16 and task.chance == 1 / 15


def test_selective_copying():
    task, batch = rows("selective_copying:length=40:count=6:vocab_size=9")
    for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
        assert due(targets).tolist() == list(range(34, 40)) and (tokens[34:] == 1).all()
        assert targets[34:].tolist() == [token for token in tokens[:34].tolist() if token > 0]
        assert targets[34:].min() >= 2  # 1 marks where an answer is due
    assert len({tuple(np.flatnonzero(tokens[:34])) for tokens in batch["tokens"]}) == 40 and task.chance == 1 / 7


def test_parity():
    task, batch = rows("parity:length=20")
    assert task.chance == 1 / 2
    for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
        assert targets.tolist() == [tokens[: t + 1].tolist().count(1) % 2 for t in range(20)]


def test_permutations():
    """The answer, applied to five things, equals the permutations applied one after another."""
    task, batch = rows("s5_permutations:length=12")
    assert task.chance == 1 / 120
    everything = list(itertools.permutations(range(5)))
    assert len(everything) == 120
    for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
        places = list(range(5))  # where each of five things is now
        for token, target in zip(tokens, targets, strict=True):
            places = [everything[token][place] for place in places]
            assert tuple(places) == everything[target]
    assert state_tracking.PERMUTATIONS.shape == (120, 5)


def _value(tokens):
    """The value of a ListOps expression, evaluated by Python."""
    names = {list_ops.OPEN + i: f"{name}((" for i, name in enumerate(("MAX", "MIN", "MED", "SM"))}
    text = "".join(
        names.get(token, ")),") if token in names or token == list_ops.CLOSE else f"{token - list_ops.DIGITS},"
        for token in tokens.tolist()
    )
    functions = {
        "MAX": lambda v: sorted(v)[-1],
        "MIN": lambda v: sorted(v)[0],
        "MED": lambda v: (sorted(v)[(len(v) - 1) // 2] + sorted(v)[len(v) // 2]) // 2,
        "SM": lambda v: sum(v) % 10,
    }
    return eval(text.rstrip(","), functions)


def test_list_ops():
    task, batch = rows("listops:length=48:shortest=12:depth=3:arguments=4", count=100)
    depths = []
    for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
        expression = tokens[tokens != list_ops.PADDING]
        assert 12 <= len(expression) <= 48 and expression[-1] == list_ops.END and due(targets).tolist() == [47]
        assert targets[-1] - list_ops.DIGITS == _value(expression[:-1])
        opens = (expression >= list_ops.OPEN) & (expression < list_ops.CLOSE)
        depths.append(np.max(np.cumsum(opens.astype(int) - (expression == list_ops.CLOSE))))
    assert max(depths) == 3 and task.vocabulary == 17
    assert len(np.unique(batch["targets"][:, -1])) == 10


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_pass_key(tiny_dataset, depth):
    """The number is in the text, at its depth, and is the answer; the text comes from the split."""
    task, batch = rows(f"passkey:length=200:depth={depth}:dataset={tiny_dataset}:split=train", count=6)
    tokenizer = load_tokenizer(tiny_dataset)
    for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
        assert tokens[0] == tokenizer.document_token and tokenizer.document_token not in tokens[1:]
        answer = tokenizer.decode(targets[due(targets)])
        assert len(answer) == 6 and answer[1:].isdigit() and due(targets).tolist() == list(range(194, 200))
        sentence = f"\nThe pass key is{answer}. Remember it.{answer} is the pass key.\n"
        question = f"\nWhat is the pass key? The pass key is{answer[:-1]}"
        before, found, after = tokenizer.decode(tokens[1:]).partition(sentence)
        assert found and after.endswith(question)
        text = before + after.removesuffix(question)
        assert abs(len(before.encode()) - depth * len(text.encode())) <= 1
        assert set(text.replace("(", " ").split()) & {"for", "print", "return", "range", "def"}
    assert task.max_targets == 6 and len({tuple(row) for row in batch["targets"].tolist()}) == 6
    assert task.chance == pytest.approx((1 + 5 * 0.1) / 6, abs=0.01)  # the space before the number, then digits


def test_pass_keys_are_anywhere_in_other_text(tiny_dataset):
    """Any number may be the key, with leading zeros. Without a given depth, the key may be at any depth."""
    tokenizer, text = load_tokenizer(tiny_dataset), "passkey:length=110:digits=1:split=train"
    _, batch = rows(f"{text}:dataset={tiny_dataset}", count=60)
    depths, beginnings = [], set()
    for tokens in batch["tokens"]:
        before, _, after = tokenizer.decode(tokens[1:]).partition("\nThe pass key is ")
        around = before + after[after.index("is the pass key.\n") + 17 : after.index("\nWhat is")]
        depths.append(len(before.encode()) / len(around.encode()))
        beginnings.add(around[:8])
    assert min(depths) < 0.2 and max(depths) > 0.8 and 0.35 < np.mean(depths) < 0.65
    assert len(beginnings) > 40
    _, batch = rows(f"passkey:length=110:digits=2:split=train:dataset={tiny_dataset}", count=80)
    keys = [tokenizer.decode(targets[due(targets)]).strip() for targets in batch["targets"]]
    assert {len(key) for key in keys} == {2} and len({key[0] for key in keys}) == 10
    for key, tokens in zip(keys, batch["tokens"], strict=True):
        assert f"The pass key is {key}. Remember it. {key} is" in tokenizer.decode(tokens[1:])


def test_a_task_as_training_set():
    (task,) = tasks.training_set("mqar:pairs=4:vocab_size=64", tasks.Setting(sequence_length=48))
    assert (task.length, task.pairs, task.vocab_size) == (48, 4, 64)
    assert made(tasks.text(task)) == task


def test_several_difficulties_take_turns():
    setting = tasks.Setting(sequence_length=48, vocab_size=256)
    several = tasks.training_set("mqar:pairs=2+3+6", setting)
    assert [task.pairs for task in several] == [2, 3, 6]
    batches = tasks.TaskBatches(several, batch_size=8, seed=0)
    found = np.concatenate([(batches[step]["targets"] >= 0).sum(axis=1) for step in range(3)])
    assert found.tolist() == [2, 3, 6] * 8
    for i, task in enumerate(several):  # each example is what it would be if all were of its difficulty
        alone = tasks.TaskBatches([task], batch_size=8, seed=0)[1]
        for name, values in batches[1].items():
            np.testing.assert_array_equal(values[(i - 8) % 3 :: 3], alone[name][(i - 8) % 3 :: 3])
    assert tasks.difficulties("mqar:length=48", setting, several) == [several[-1]]
    assert tasks.difficulties("mqar", setting, several)[:3] == list(several)


def test_difficulties():
    small, large = tasks.Setting(64, 512), tasks.Setting(64, 50_000)
    found = tasks.difficulties("mqar", small)
    assert [(task.length, task.pairs, task.vocab_size) for task in found] == [
        (64, 4, 512), (128, 8, 512), (256, 16, 512), (512, 64, 512),
    ]  # fmt: skip
    assert {task.vocab_size for task in tasks.difficulties("mqar", large)} == {8192}
    assert len(tasks.difficulties("mqar:length=64:pairs=8", large)) == 1
    found = tasks.difficulties("mqar:length=64+128:pairs=4+8", large)
    assert [(task.length, task.pairs) for task in found] == [(64, 4), (64, 8), (128, 4), (128, 8)]
    (trained,) = tasks.training_set("mqar:pairs=12:power=0.5", tasks.Setting(64, 512))
    found = tasks.difficulties("mqar", small, [trained])
    assert found[0] == trained and len(found) == 5 and {task.power for task in found} == {0.5}
    (found,) = tasks.difficulties("mqar:length=128", small, [trained])
    assert (found.length, found.pairs, found.power, found.vocab_size) == (128, 12, 0.5, 512)
    for name in set(tasks.TASKS) - {"passkey"}:
        assert len(tasks.difficulties(name, large)) >= 3, name


def test_difficulties_of_the_pass_key_follow_the_run(tiny_dataset):
    setting = tasks.Setting(150, 512, str(tiny_dataset), "train")
    found = tasks.difficulties("passkey", setting)
    assert [task.length for task in found] == [150] * 5 + [300] * 5
    assert [task.depth for task in found[:5]] == [0.0, 0.25, 0.5, 0.75, 1.0]
    found = tasks.difficulties("passkey:length=200", setting)
    assert [(task.length, task.depth) for task in found] == [(200, depth) for depth in (0.0, 0.25, 0.5, 0.75, 1.0)]
    (found,) = tasks.difficulties("passkey:length=200:depth=0.1", setting)
    assert (found.length, found.depth, found.split) == (200, 0.1, "train")


@pytest.mark.parametrize(
    ("spec", "key"),
    [
        ("mqarr", "no task 'mqarr'; the tasks are mqar, "),
        ("mqar:pair=3", "mqar has no option 'pair'; the options are length, vocab_size, pairs"),
        ("mqar:pairs", "'pairs' is not an option"),
        ("mqar:pairs=x", "mqar: pairs=x is not of type int"),
        ("mqar:pairs=17", "mqar: length=64 must be even and at least 68"),
        ("mqar:vocab_size=12", "mqar: vocab_size=12 must be at least 18"),
        ("mqar:random_filling=1", "mqar: random_filling=1 is not of type bool"),
        ("induction:length=2", "induction: length=2 must be at least 3"),
        ("selective_copying:length=20", "selective_copying: length=20 must be at least 32"),
        ("mqar:power=11", "mqar: power=11.0 must be above 0 and at most 10"),
        ("mqar:power=inf", "mqar: power=inf must be above 0 and at most 10"),
        ("listops:shortest=2040", "shortest=2040 must not exceed 2005: fewer than 0.5% .* length=2048"),
        ("listops:length=600:shortest=300:depth=20:arguments=3", "shortest=300 must not exceed 69: fewer"),
        ("listops:shortest=-1", "listops: shortest=-1 must not be negative"),
        ("listops:arguments=101", "listops: arguments=101 must be at least 2 and at most 100"),
        ("listops:length=5:shortest=7:arguments=100", "shortest=7 must not exceed 5: fewer"),
        ("passkey:length=64", "passkey: it needs text"),
        ("passkey:length=64:dataset={dataset}", "length=64 must be at least the 104 tokens"),
        ("passkey:length=5000:dataset={dataset}", r"length=5000 must be at most half of the \d+ tokens in the heldout"),
        ("passkey:length=200:depth=2:dataset={dataset}", "passkey: depth=2.0 must be between 0 and 1"),
    ],
)
def test_refusals(spec, key, tiny_dataset):
    with pytest.raises(UserError, match=key):
        made(spec.format(dataset=tiny_dataset))


@pytest.mark.parametrize(
    ("what", "spec", "setting", "key"),
    [
        (tasks.training_set, "mqar:length=32:pairs=4", (48,), "length=32 differs from training.sequence_length=48"),
        (tasks.difficulties, "mqar:vocab_size=600", (64, 512), "model.vocab_size is 512; set vocab_size"),
        (tasks.difficulties, "mqar:vocab_size=513", (64, 512), "mqar needs 513 tokens"),
        (tasks.difficulties, "s5_permutations", (64, 64), "needs 120 tokens, but model.vocab_size is 64$"),
    ],
)
def test_what_the_run_lacks_is_refused(what, spec, setting, key):
    with pytest.raises(UserError, match=key):
        what(spec, tasks.Setting(*setting))
