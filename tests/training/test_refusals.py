"""Configs, runs and data that do not fit together are refused before anything is written."""

import contextlib
import errno
import json
import logging
import os
import pathlib
import shutil
import sys
import types

import pytest

from jaxlinear import config as configs
from jaxlinear import data, locks
from jaxlinear.errors import RunError, UserError
from jaxlinear.models import mixers
from jaxlinear.training import trained_data
from jaxlinear.training import workdir as workdirs
from jaxlinear.training.job import Job, mixture, with_vocabulary_of_data
from jaxlinear.training.loop import train
from tests.training import tiny


@pytest.fixture(scope="module")
def other_dataset(tmp_path_factory):
    """A dataset of another tokenizer, whose vocabulary is rounded to the same size as that of bytes."""
    lines = [f"line {i} of {i * i} lines" for i in range(2000)]
    return tiny.prepared(tmp_path_factory.mktemp("other") / "data", lines, tokenizer="bpe", vocab_size=300)


DIFFERENT_TOKENIZERS = "{other} were prepared with different tokenizers"
PASSKEY = {"data.path": "", "data.task": "passkey:digits=2:dataset={data}", "training.sequence_length": 128}
BAD_INPUT = [
    ({"data.path": ""}, "data.path is not set; launch/prepare_data.py makes a dataset"),
    ({"data.path": "nowhere"}, "no dataset at nowhere: the directory does not exist"),
    ({"data.path": "{data},"}, "entry without a directory"),
    ({"data.path": "{data}="}, "'' is not a weight"),
    ({"data.path": "{data}=two"}, "'two' is not a weight"),
    ({"data.path": "{data}=1,{data}=3"}, "{data} twice"),
    ({"data.path": "{data}=1,{data}/=3"}, "{data}/ twice"),
    *(
        ({"data.path": f"{{data}}={weight},B=1"}, f"the weight {weight} of {{data}} must be above 0")
        for weight in ("0", "-1", "nan", "inf")
    ),
    ({"data.heldout_path": "nowhere", "evaluation.every_steps": 1}, "no dataset at nowhere"),
    ({"data.heldout_path": "{other}"}, DIFFERENT_TOKENIZERS),
    (PASSKEY | {"data.heldout_path": "{other}"}, DIFFERENT_TOKENIZERS),
    (
        {"evaluation.every_steps": 1, "evaluation.tasks": ("passkey:length=128:dataset={other}",)},
        DIFFERENT_TOKENIZERS,
    ),
    (
        {"training.initial_from": "{run}", "data.path": "{other}"},
        "^{other} was not prepared with the tokenizer that {run}",
    ),
    ({"training.batch_size": 12}, "gives 12 rows, .*data 8 x fsdp 1 x expert 1.* nearest .* 16$"),
    (
        {"training.batch_size": 24, "training.microbatches": 2, "mesh.fsdp": 4},
        "=24 in 2 microbatches gives 12 rows, .*data 2 x fsdp 4 x expert 1.* 32$",
    ),
    ({"training.sequence_length": 48}, "sequence_length 48 neither divides the block length 64 nor .* 32 and 64"),
    ({"training.seed": -1}, "training.seed is -1"),
    ({"model.vocab_size": 256}, "has 257 tokens, more than model.vocab_size=256; leave model.vocab_size unset"),
    ({"mesh.data": 3}, "a mesh of data 3 does not use each of the 8 available devices once"),
    ({"mesh.fsdp": -1}, "only one .* can be -1, not both mesh.data and mesh.fsdp"),
    ({"mesh.sequence": 8, "training.sequence_length": 44}, "mesh.sequence=8 does not divide"),
    ({"mesh.data": 4, "mesh.expert": 2}, "mesh.expert=2: the model has no experts .* 'gated_mlp'.*; set it to 1"),
    (
        {"mesh.data": 2, "mesh.tensor": 4, "model.vocab_size": 258},
        "mesh.tensor=4 does not divide model.vocab_size=258; .* 260$",
    ),
    ({"model.num_heads": 5}, "model.num_heads=5 does not divide model.width=32"),
]


@pytest.mark.parametrize("changes, message", BAD_INPUT)
def test_bad_input_writes_nothing(tiny_config, tiny_dataset, other_dataset, tiny_run, tmp_path, changes, message):
    def named(value):
        if isinstance(value, tuple):
            return tuple(map(named, value))
        given = {"data": tiny_dataset, "other": other_dataset, "run": tiny_run}
        return value.format(**given) if isinstance(value, str) else value

    changes = {key: named(value) for key, value in changes.items()}
    with pytest.raises(UserError, match=named(message)):
        train(tiny.changed(tiny_config, changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_mixer_that_does_not_run_over_sequence_is_refused(tiny_config, tmp_path, monkeypatch):
    """It is a user's own mixer, made of plain operations: the compiler would silently gather the sequence."""

    class Mine(mixers.find("gla")):
        OVER_SEQUENCE = False

    monkeypatch.setitem(sys.modules, "mine", types.SimpleNamespace(Mine=Mine))
    config = tiny.changed(tiny_config, {"model.pattern": ("gla", "mine.Mine"), "mesh.sequence": 4})
    configs.forget_unread(config, ["model.pattern"])
    with pytest.raises(UserError, match=r"mesh.sequence=4: the mixer 'mine.Mine' does not run .* to 1$"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_nearest_batch_size_works(tiny_config):
    assert Job.build(tiny.changed(tiny_config, {"training.batch_size": 16})).batches[0]["tokens"].shape == (16, 32)


def test_the_vocabulary_follows_the_data(tiny_config):
    """launch/compile.py, which opens no data, gets it from the manifest of the data, or from the task."""
    config = tiny_config.copy_and_resolve_references()

    def found(**changes):
        config.data.update(changes)
        return with_vocabulary_of_data(configs.resolve(config)).model.vocab_size

    job = Job.build(config)
    assert job.batches.vocab_size == 257 and found() == job.config.model.vocab_size == 384
    assert job.architecture.shapes["embedding"].shape == (384, 32)
    of_task = found(path="", task="selective_copying:vocab_size=200:count=4")
    assert of_task == Job.build(config).config.model.vocab_size == 256
    advice = "set model.vocab_size, or name existing data with data.path or data.task$"
    with pytest.raises(UserError, match=f"follows the data, but no data are named; {advice}"):
        found(task="")
    with pytest.raises(UserError, match=f"no dataset at elsewhere: .*; {advice}"):
        found(path="elsewhere")
    config.model.vocab_size = 257
    assert found() == 257
    config.data.path = tiny_config.data.path
    assert Job.build(config).architecture.shapes["embedding"].shape == (257, 32)


def test_mixture():
    assert mixture("") == {}
    assert mixture("a") == {"a": 1.0}
    assert mixture("a=2, b=0.5,c") == {"a": 2.0, "b": 0.5, "c": 1.0}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model.mlp_expansion": 2.0}, "a checkpoint of another model: model.mlp_expansion is 3.0 there and 2.0"),
        ({"model.window": 4}, "a checkpoint of another model: model.window is 8 there and 4 in this config"),
        ({"training.seed": 5}, "another run: training.seed is 0 there and 5 in this config; give the new run"),
        ({"training.batch_size": 16}, "another run: training.batch_size is 8 there and 16"),
        ({"optimizer.name": "muon"}, "another run: optimizer.name is 'adamw' there and 'muon' in this config"),
        ({"schedule.name": "linear"}, "another run: schedule.name is 'cosine' there"),
        # The rate may change to get past a divergence; with no step left, nothing would be trained with the new one.
        ({"optimizer.learning_rate": 5e-4}, "another run: optimizer.learning_rate is .* there and 0.0005 in"),
        # Its config would say that it ended at a step where the learning rate had not yet decayed.
        ({"training.steps": 1}, "step 2, but training.steps is 1: a run cannot be"),
        ({"data.path": "OTHER", "training.steps": 9}, "a run on data of another tokenizer than that of OTHER"),
    ],
)
def test_another_run_in_the_same_directory_is_refused(tiny_config, tiny_run, other_dataset, changes, message):
    """Nothing is written of what is refused."""
    before = (tiny_run / workdirs.CONFIG).read_bytes()
    other = lambda value: value.replace("OTHER", str(other_dataset)) if isinstance(value, str) else value  # noqa: E731
    config = tiny.changed(tiny_config, {key: other(value) for key, value in changes.items()})
    with pytest.raises(UserError, match=rf"{tiny_run} .*{other(message)}"):
        train(config, tiny_run)
    assert (tiny_run / workdirs.CONFIG).read_bytes() == before


def test_other_data_of_the_same_tokeniser_are_refused(tiny_run, tiny_dataset, tmp_path):
    """A dataset may move; one that was prepared anew, or is mixed with others, is a different one."""
    copy, changed = (
        tiny.copy_of(tiny_dataset, tmp_path / "copy"),
        tiny.copy_of(tiny_dataset, tmp_path / "other", seed=1),
    )
    trained_data.check(tiny_run, {str(copy): 1.0})
    for datasets, difference in (
        ({changed: 1.0}, "seed is 0 there and 1 in this config"),
        ({copy: 2.0}, "weight is 1.0 there and 2.0 in this config"),
        ({copy: 1.0, changed: 1.0}, "1 datasets there and 2 in this config"),
    ):
        with pytest.raises(UserError, match=f"holds a run on other data than .*: {difference}; give the new run"):
            trained_data.check(tiny_run, {str(path): weight for path, weight in datasets.items()})


def test_data_are_compared_again_when_no_other_run_has_the_directory(tiny_config, tiny_dataset, tmp_path, monkeypatch):
    """A run on other data began there while this one waited for the directory."""
    other, alone = tiny.copy_of(tiny_dataset, tmp_path / "other", seed=1), workdirs.alone

    @contextlib.contextmanager
    def after_another(workdir):
        with alone(workdir):
            trained_data.keep(workdir, {str(other): 1.0})
            yield

    monkeypatch.setattr(workdirs, "alone", after_another)
    with pytest.raises(UserError, match=r"holds a run on other data than .*: seed is 1 there and 0 in this config"):
        train(tiny_config, tmp_path / "run")


def test_the_same_documents_in_another_order_are_other_data(tmp_path, caplog):
    documents, file = [f"document {i} of some words" for i in range(200)], tmp_path / trained_data.FILE
    one, same, turned = (
        {str(tiny.prepared(tmp_path / name, documents[::order], heldout_fraction=0.1)): 1.0}
        for name, order in (("one", 1), ("same", 1), ("turned", -1))
    )
    # Also where the processes of a run compare them.
    assert trained_data.text(one) == trained_data.text(same) != trained_data.text(turned)
    trained_data.keep(tmp_path, one)
    trained_data.check(tmp_path, same)
    with pytest.raises(UserError, match=r"holds a run on other data than .*turned: blocks is"):
        trained_data.check(tmp_path, turned)
    (known,) = json.loads(file.read_text())
    file.write_text(json.dumps([known | {"shuffle": "another"}]))
    with pytest.raises(UserError, match=r"other data than .*: shuffle is 'another' there and "):
        trained_data.check(tmp_path, one)
    # A run that was begun before its record had the blocks and the shuffle knows only the rest.
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    file.write_text(json.dumps([{k: v for k, v in known.items() if k not in ("blocks", "shuffle")}]))
    trained_data.check(tmp_path, turned)
    assert f"the run in {tmp_path} was started by a version that shuffled examples differently" in caplog.text
    file.write_text("[{}]")
    with pytest.raises(UserError, match=r"other data than .*: weight is None there and 1.0"):
        trained_data.check(tmp_path, one)
    for text, reason in (("[{", "Expecting property name"), ("{}", "not a list"), ("[1]", "not a list of datasets")):
        file.write_text(text)
        with pytest.raises(UserError, match=f"{file} is damaged: .*{reason}"):
            trained_data.check(tmp_path, one)


def test_heldout_text_that_may_have_been_trained_on_is_warned_of(tiny_config, tiny_run, tiny_dataset, tmp_path, caplog):
    apart = tiny.copy_of(tiny_dataset, tmp_path / "apart", heldout_fraction=0.5)
    with caplog.at_level(logging.WARNING, logger="jaxlinear"):
        for path, warnings in ((tiny_dataset, 0), (apart, 2)):
            Job.build(tiny.changed(tiny_config, {"data.heldout_path": str(path)}))
            trained_data.warn_of_split(tiny_run, path, data.read_manifest(path))
            assert len(caplog.records) == warnings
    first, second = caplog.messages
    assert "heldout_fraction 0.05, and" in first and "with 0 and 0.5: a document in both may be trained on" in first
    assert f"{apart} was split with seed 0 and heldout_fraction 0.5" in second and "may have been trained on" in second


def test_what_may_change_when_a_run_goes_on(tiny_config, tiny_run, tmp_path, caplog):
    """The same run on another mesh, for longer, with checkpoints and logs at other steps; the new values apply."""
    workdir = shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    rate = {"optimizer.learning_rate": 5e-4}
    workdirs.check(tiny_run, Job.build(tiny.changed(tiny_config, rate | {"training.steps": 3})).config)
    changes = rate | {
        **{"mesh.fsdp": 8, "mesh.data": 1, "training.steps": 9, "training.max_skips": 3, "model.remat": "full"},
        **{"checkpoint.every_steps": 7, "evaluation.every_steps": 7, "logging.every_steps": 7, "data.path": "moved"},
        **{"training.patience_minutes": 5.0, "training.spike_multiple": 20.0, "model.kernels": False},
    }
    config = tiny.changed(Job.build(tiny_config).config, changes)
    with caplog.at_level(logging.WARNING):
        workdirs.prepare(workdir, config)
    assert configs.to_json(workdirs.read_config(workdir)) == configs.to_json(config)
    before = tiny_config.optimizer.learning_rate
    assert f"the run continues with optimizer.learning_rate=0.0005; it was {before}" in caplog.text
    workdirs.note_start(workdir, 3, config, Job.build(tiny_config).mesh)
    assert workdirs.read_starts(workdir)[-1]["optimizer.learning_rate"] == 5e-4


def test_the_dtype_of_gradients_may_change_but_not_unnoticed(tiny_run):
    """It changes what is computed, unlike the other keys of ``parallel``: a run of a sweep may not differ in it."""
    old = configs.default()
    old.update(workdirs.read_config(tiny_run).to_dict())
    old.model.dtype = "bfloat16"
    others = {"parallel.attention": "ring", "parallel.exchange": "doubling"}
    new = tiny.changed(old, others | {"parallel.gradient_dtype": "bfloat16"})
    workdirs.check_same_run(tiny_run, old, new)
    with pytest.raises(UserError, match=r"parallel.gradient_dtype is 'float32' there and 'bfloat16' in this config"):
        workdirs.check_same_run(tiny_run, old, new, goes_on=False)
    workdirs.check_same_run(tiny_run, old, tiny.changed(old, others), goes_on=False)


def test_a_workdir_that_another_run_has(tiny_config, tiny_run, tmp_path, monkeypatch):
    """It is left alone: a second run would remove the checkpoint that the first is writing."""
    monkeypatch.setattr(locks, "_PATIENCE", 0.1)
    workdir = shutil.copytree(tiny_run, tmp_path / "run")
    (workdir / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()
    (workdir / "checkpoints" / "3.orbax-checkpoint-tmp" / "part").touch()
    with locks.of_run(workdir):
        before = tiny.files(workdir)
        with pytest.raises(RunError, match=f"^the run of process {os.getpid()} on .* is using {workdir}; end"):
            train(tiny.changed(tiny_config, {"training.steps": 4}), workdir)
        assert tiny.files(workdir) == before


@pytest.mark.parametrize("kind", ["file", "link that leads nowhere"])
def test_a_workdir_that_is_no_directory(tiny_config, tmp_path, kind):
    workdir = tmp_path / "run"
    workdir.write_text("notes") if kind == "file" else workdir.symlink_to("gone")
    with pytest.raises(UserError, match=f"^{workdir} is not a directory; give the run a --workdir of its own$"):
        train(tiny_config, workdir)
    assert os.path.lexists(workdir) and not workdir.is_dir()


def test_a_workdir_whose_folders_cannot_be_renamed(tiny_config, tmp_path, monkeypatch):
    """For example, in a bucket without folders, where no checkpoint would ever be complete."""

    def rename(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(pathlib.Path, "rename", rename)
    with pytest.raises(UserError, match=rf"^folders cannot be renamed in {tmp_path}/run \(Operation not supported\)"):
        train(tiny_config, tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_directory_that_is_not_a_run(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} is not the work directory of a run: it has no config.json"):
        workdirs.read_config(tmp_path)
    (tmp_path / workdirs.CONFIG).write_text('{"model": {"width": 3')
    with pytest.raises(UserError, match=f"{tmp_path}/config.json is damaged: "):
        workdirs.read_config(tmp_path)
