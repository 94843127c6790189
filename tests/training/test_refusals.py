"""Configs, runs and data that do not fit together are refused before anything is written."""

import contextlib
import errno
import json
import logging
import os
import pathlib
import re
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
    directory = tmp_path_factory.mktemp("other_dataset")
    (directory / "text.txt").write_text("\n".join(f"line {i} of {i * i} lines" for i in range(2000)))
    data.prepare(
        str(directory / "text.txt"),
        str(directory / "data"),
        tokenizer="bpe",
        vocab_size=300,
        document_separator="\n",
        block_length=64,
        heldout_fraction=0.05,
        workers=1,
    )
    return directory / "data"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data.path": ""}, r"data.path is not set; launch/prepare_data.py makes a dataset"),
        ({"data.path": "nowhere"}, r"no dataset at nowhere: the directory does not exist"),
        ({"data.path": "DATA,"}, r"data.path: '.*data,' has an entry without a directory; write DIR=WEIGHT,DIR=WEIGHT"),
        ({"data.path": "DATA="}, r"data.path: '' is not a weight; write DIR=WEIGHT,DIR=WEIGHT"),
        ({"data.path": "DATA=two"}, r"data.path: 'two' is not a weight; write DIR=WEIGHT,DIR=WEIGHT"),
        ({"data.path": "DATA=1,DATA=3"}, r"data.path names .*data twice; give it one weight"),
        ({"data.path": "DATA=1,DATA/=3"}, r"data.path names .*data/ twice; give it one weight"),
        *(
            ({"data.path": f"DATA={weight},B=1"}, rf"data.path: the weight {weight} of .*data must be above 0 and")
            for weight in ("0", "-1", "nan", "inf")
        ),
        ({"data.heldout_path": "nowhere", "evaluation.every_steps": 1}, r"no dataset at nowhere"),
        (
            {"training.batch_size": 12},
            r"training.batch_size=12 in 1 microbatches gives 12 rows, which the mesh \(data 8 x fsdp 1 x expert "
            r"1\) does not "
            r"divide; the nearest batch size that works is 16$",
        ),
        (
            {"training.batch_size": 24, "training.microbatches": 2, "mesh.fsdp": 4},
            r"=24 in 2 microbatches gives 12 rows, which the mesh \(data 2 x fsdp 4 x expert 1\) does not divide; "
            r".* is 32$",
        ),
        ({"training.sequence_length": 48}, r"sequence_length 48 neither divides the block length 64 nor .* 32 and 64"),
        ({"training.seed": -1}, r"training.seed is -1; it must be in \[0, 2\*\*63\)"),
        ({"model.vocab_size": 256}, r"has 257 tokens, more than model.vocab_size=256; leave model.vocab_size unset"),
        ({"mesh.data": 3}, r"a mesh of data 3 does not use each of the 8 available devices once"),
        ({"mesh.fsdp": -1}, r"only one size of the mesh can be -1, not both mesh.data and mesh.fsdp"),
        ({"mesh.sequence": 8, "training.sequence_length": 44}, r"mesh.sequence=8 does not divide"),
        ({"mesh.data": 4, "mesh.expert": 2}, r"mesh.expert=2: the model has no experts .* 'gated_mlp'\); set it to 1"),
        (
            {"mesh.data": 2, "mesh.tensor": 4, "model.vocab_size": 258},
            r"mesh.tensor=4 does not divide model.vocab_size=258; .*, and the next size that works is 260$",
        ),
        ({"model.num_heads": 5}, r"model.num_heads=5 does not divide model.width=32"),
    ],
)
def test_bad_input_writes_nothing(tiny_config, tmp_path, changes, message):
    config = tiny_config.copy_and_resolve_references()
    for key, value in changes.items():
        section, name = key.split(".")
        config[section][name] = value.replace("DATA", config.data.path) if isinstance(value, str) else value
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_mixer_that_does_not_run_over_sequence_is_refused(tiny_config, tmp_path, monkeypatch):
    """It is a user's own mixer, made of plain operations: the compiler would silently gather the sequence."""

    class Mine(mixers.find("gla")):
        OVER_SEQUENCE = False

    monkeypatch.setitem(sys.modules, "mine", types.SimpleNamespace(Mine=Mine))
    config = tiny_config.copy_and_resolve_references()
    config.model.pattern = ("gla", "mine.Mine")
    configs.forget_unread(config, ["model.pattern"])
    config.mesh.sequence = 4
    with pytest.raises(
        UserError, match=r"mesh.sequence=4: the mixer 'mine.Mine' does not run with the sequence sharded .* to 1$"
    ):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_nearest_batch_size_works(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.training.batch_size = 16
    assert Job.build(config).batches[0]["tokens"].shape == (16, 32)


def test_the_vocabulary_follows_the_data(tiny_config, other_dataset):
    config = tiny_config.copy_and_resolve_references()
    job = Job.build(config)
    assert job.batches.vocab_size == 257 and job.config.model.vocab_size == 384
    assert job.architecture.shapes["embedding"].shape == (384, 32)
    config.model.vocab_size = 257
    assert Job.build(config).architecture.shapes["embedding"].shape == (257, 32)


def test_the_vocabulary_of_a_run_is_known_before_it(tiny_config):
    """launch/compile.py, which opens no data, gets it from the manifest of the data, or from the task."""
    config = tiny_config.copy_and_resolve_references()

    def found(**changes):
        config.data.update(changes)
        return with_vocabulary_of_data(configs.resolve(config)).model.vocab_size

    assert found() == Job.build(config).config.model.vocab_size == 384
    assert (
        found(path="", task="selective_copying:vocab_size=200:count=4")
        == Job.build(config).config.model.vocab_size
        == 256
    )
    advice = r"set model\.vocab_size, or name existing data with data\.path or data\.task"
    with pytest.raises(UserError, match=f"not set and follows the data, but no data are named; {advice}$"):
        found(task="")
    with pytest.raises(UserError, match=f"no dataset at elsewhere: the directory does not exist .*; {advice}$"):
        found(path="elsewhere")
    config.model.vocab_size = 257
    assert found() == 257


def test_mixture():
    assert mixture("") == {}
    assert mixture("a") == {"a": 1.0}
    assert mixture("a=2, b=0.5,c") == {"a": 2.0, "b": 0.5, "c": 1.0}


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("model.mlp_expansion", 2.0, "holds a checkpoint of another model: model.mlp_expansion is 3.0 there and 2.0"),
        ("model.window", 4, "holds a checkpoint of another model: model.window is 8 there and 4 in this config"),
        ("training.seed", 5, "holds another run: training.seed is 0 there and 5 in this config; give the new run"),
        ("training.batch_size", 16, "holds another run: training.batch_size is 8 there and 16"),
        ("optimizer.name", "muon", "holds another run: optimizer.name is 'adamw' there and 'muon' in this config"),
        ("schedule.name", "linear", "holds another run: schedule.name is 'cosine' there"),
    ],
)
def test_another_run_in_the_same_directory_is_refused(tiny_config, tiny_run, tmp_path, key, value, message):
    workdir = shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    before = (workdir / workdirs.CONFIG).read_bytes()
    config = tiny_config.copy_and_resolve_references()
    section, name = key.split(".")
    config[section][name] = value
    with pytest.raises(UserError, match=re.escape(f"{workdir} {message}")):
        train(config, workdir)
    assert (workdir / workdirs.CONFIG).read_bytes() == before


def test_a_finished_run_is_of_its_own_learning_rate(tiny_config, tiny_run):
    """The rate may change to get a run past a divergence; with no step left, nothing would be trained with the new one."""
    before = (tiny_run / workdirs.CONFIG).read_bytes()
    config = tiny_config.copy_and_resolve_references()
    config.optimizer.learning_rate = 5e-4
    with pytest.raises(UserError, match=r"holds another run: optimizer.learning_rate is .* there and 0.0005 in"):
        train(config, tiny_run)
    assert (tiny_run / workdirs.CONFIG).read_bytes() == before
    config.training.steps = 3
    workdirs.check(tiny_run, Job.build(config).config)


def test_a_run_does_not_become_shorter(tiny_config, tiny_run):
    """Its config would say that it ended earlier, at a step where the learning rate had not yet decayed."""
    before = (tiny_run / workdirs.CONFIG).read_bytes()
    config = tiny_config.copy_and_resolve_references()
    config.training.steps = 1
    with pytest.raises(UserError, match=r"with a checkpoint of step 2, but training.steps is 1: a run cannot be"):
        train(config, tiny_run)
    assert (tiny_run / workdirs.CONFIG).read_bytes() == before


def test_data_of_another_tokeniser_are_refused(tiny_config, tiny_run, other_dataset):
    config, before = tiny_config.copy_and_resolve_references(), (tiny_run / workdirs.CONFIG).read_bytes()
    config.data.path = str(other_dataset)
    config.training.steps = 9
    message = f"{tiny_run} holds a run on data of another tokenizer than that of {other_dataset}"
    with pytest.raises(UserError, match=message):
        train(config, tiny_run)
    assert (tiny_run / workdirs.CONFIG).read_bytes() == before, "nothing is written of what is refused"


def test_other_data_of_the_same_tokeniser_are_refused(tiny_config, tiny_run, tiny_dataset, tmp_path):
    """A dataset may move; one that was prepared anew, or is mixed with others, is a different one."""
    copy, changed = tmp_path / "copy", tmp_path / "changed"
    for path in (copy, changed):
        shutil.copytree(tiny_dataset, path)
    manifest = json.loads((changed / "manifest.json").read_text())
    (changed / "manifest.json").write_text(json.dumps(manifest | {"seed": manifest["seed"] + 1}))
    trained_data.check(tiny_run, {str(copy): 1.0})
    for datasets, difference in (
        ({changed: 1.0}, r"seed is 0 there and 1 in this config"),
        ({copy: 2.0}, r"weight is 1.0 there and 2.0 in this config"),
        ({copy: 1.0, changed: 1.0}, r"1 datasets there and 2 in this config"),
    ):
        with pytest.raises(UserError, match=f"holds a run on other data than .*: {difference}; give the new run"):
            trained_data.check(tiny_run, {str(path): weight for path, weight in datasets.items()})


def test_data_are_compared_again_when_no_other_run_has_the_directory(tiny_config, tiny_dataset, tmp_path, monkeypatch):
    """A run on other data began there while this one waited for the directory."""
    other = shutil.copytree(tiny_dataset, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"seed": manifest["seed"] + 1}))
    alone = workdirs.alone

    @contextlib.contextmanager
    def after_another(workdir):
        with alone(workdir):
            trained_data.keep(workdir, {str(other): 1.0})
            yield

    monkeypatch.setattr(workdirs, "alone", after_another)
    with pytest.raises(UserError, match=r"holds a run on other data than .*: seed is 1 there and 0 in this config"):
        train(tiny_config, tmp_path / "run")


def test_the_same_documents_in_another_order_are_other_data(tmp_path, caplog):
    documents = [f"document {i} of some words" for i in range(200)]
    for name, order in (("one", 1), ("same", 1), ("turned", -1)):
        (tmp_path / "text.txt").write_text("\n".join(documents[::order]), encoding="utf-8")
        data.prepare(
            *(str(tmp_path / "text.txt"), str(tmp_path / name)),
            **{"tokenizer": "bytes", "document_separator": "\n", "block_length": 64, "workers": 1},
            heldout_fraction=0.1,
        )
    # Also where the processes of a run compare them.
    one, same, turned = (trained_data.text({str(tmp_path / name): 1.0}) for name in ("one", "same", "turned"))
    assert one == same != turned
    trained_data.keep(tmp_path, {str(tmp_path / "one"): 1.0})
    trained_data.check(tmp_path, {str(tmp_path / "same"): 1.0})
    with pytest.raises(UserError, match=r"holds a run on other data than .*turned: blocks is"):
        trained_data.check(tmp_path, {str(tmp_path / "turned"): 1.0})
    known = json.loads((tmp_path / trained_data.FILE).read_text())
    (tmp_path / trained_data.FILE).write_text(json.dumps([known[0] | {"shuffle": "another"}]))
    with pytest.raises(UserError, match=r"other data than .*: shuffle is 'another' there and "):
        trained_data.check(tmp_path, {str(tmp_path / "one"): 1.0})
    # A run that was begun before its record had the blocks and the shuffle knows only the rest.
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    of_before = {k: v for k, v in known[0].items() if k not in ("blocks", "shuffle")}
    (tmp_path / trained_data.FILE).write_text(json.dumps([of_before]))
    trained_data.check(tmp_path, {str(tmp_path / "turned"): 1.0})
    assert f"the run in {tmp_path} was started by a version that shuffled examples differently" in caplog.text
    (tmp_path / trained_data.FILE).write_text("[{}]")
    with pytest.raises(UserError, match=r"other data than .*: weight is None there and 1.0"):
        trained_data.check(tmp_path, {str(tmp_path / "one"): 1.0})


def test_heldout_text_that_may_have_been_trained_on_is_warned_of(tiny_config, tiny_run, tiny_dataset, tmp_path, caplog):
    apart = shutil.copytree(tiny_dataset, tmp_path / "apart")
    manifest = json.loads((apart / "manifest.json").read_text())
    (apart / "manifest.json").write_text(json.dumps(manifest | {"heldout_fraction": 0.5}))
    config = tiny_config.copy_and_resolve_references()
    config.data.heldout_path = str(tiny_dataset)
    with caplog.at_level(logging.WARNING, logger="jaxlinear"):
        Job.build(config)
        trained_data.warn_of_split(tiny_run, tiny_dataset, data.read_manifest(tiny_dataset))
        assert not caplog.records
        config.data.heldout_path = str(apart)
        Job.build(config)
        trained_data.warn_of_split(tiny_run, apart, data.read_manifest(apart))
    first, second = (record.getMessage() for record in caplog.records)
    assert "heldout_fraction 0.05, and" in first and "with 0 and 0.5: a document in both may be trained on" in first
    assert f"{apart} was split with seed 0 and heldout_fraction 0.5" in second and "may have been trained on" in second


@pytest.mark.parametrize(
    ("text", "reason"),
    [("[{", "Expecting property name"), ("{}", "not a list of datasets"), ("[1]", "not a list of datasets")],
)
def test_a_damaged_record_of_the_data_is_refused(tiny_dataset, tmp_path, text, reason):
    (tmp_path / trained_data.FILE).write_text(text)
    with pytest.raises(UserError, match=rf"{tmp_path / trained_data.FILE} is damaged: .*{reason}"):
        trained_data.check(tmp_path, {str(tiny_dataset): 1.0})


def test_text_in_other_tokens_is_not_evaluated(tiny_config, tiny_dataset, other_dataset):
    own = {"data.path": "", "data.task": f"passkey:digits=2:dataset={tiny_dataset}", "training.sequence_length": 128}
    for changes in (
        {"data.heldout_path": str(other_dataset)},
        {"evaluation.every_steps": 1, "evaluation.tasks": (f"passkey:length=128:dataset={other_dataset}",)},
        own | {"data.heldout_path": str(other_dataset)},
    ):
        config = tiny_config.copy_and_resolve_references()
        for key, value in changes.items():
            section, name = key.split(".")
            config[section][name] = value
        with pytest.raises(UserError, match=f"and {other_dataset} were prepared with different tokenizers"):
            Job.build(config)


def test_weights_of_a_run_on_other_tokens_are_refused(tiny_config, tiny_run, other_dataset, tmp_path):
    config = tiny_config.copy_and_resolve_references()
    config.training.initial_from, config.data.path = str(tiny_run), str(other_dataset)
    with pytest.raises(UserError, match=rf"^{other_dataset} was not prepared with the tokenizer that {tiny_run}"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_may_change_when_a_run_goes_on(tiny_config, tiny_run, tmp_path, caplog):
    """The same run on another mesh, for longer, with checkpoints and logs at other steps; the new values apply."""
    workdir = shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    config = Job.build(tiny_config).config
    changes = {
        **{"mesh.fsdp": 8, "mesh.data": 1, "training.steps": 9, "training.max_skips": 3, "model.remat": "full"},
        "model.kernels": False,
        **{"checkpoint.every_steps": 7, "evaluation.every_steps": 7, "logging.every_steps": 7, "data.path": "moved"},
        **{"training.patience_minutes": 5.0, "optimizer.learning_rate": 5e-4, "training.spike_multiple": 20.0},
    }
    for key, value in changes.items():
        section, name = key.split(".")
        config[section][name] = value
    before = tiny_config.optimizer.learning_rate
    with caplog.at_level(logging.WARNING):
        workdirs.prepare(workdir, config)
    assert configs.to_json(workdirs.read_config(workdir)) == configs.to_json(config)
    assert f"the run continues with optimizer.learning_rate=0.0005; it was {before}" in caplog.text
    workdirs.note_start(workdir, 3, config, Job.build(tiny_config).mesh)
    assert workdirs.read_starts(workdir)[-1]["optimizer.learning_rate"] == 5e-4


def test_the_dtype_of_gradients_may_change_but_not_unnoticed(tiny_config, tiny_run):
    """It changes what is computed, unlike the other keys of ``parallel``: a run of a sweep may not differ in it."""
    old = configs.default()
    old.update(workdirs.read_config(tiny_run).to_dict())
    old.model.dtype = "bfloat16"
    new = old.copy_and_resolve_references()
    new.parallel.update({"gradient_dtype": "bfloat16", "attention": "ring", "exchange": "doubling"})
    workdirs.check_same_run(tiny_run, old, new)
    with pytest.raises(UserError, match=r"parallel.gradient_dtype is 'float32' there and 'bfloat16' in this config"):
        workdirs.check_same_run(tiny_run, old, new, goes_on=False)
    new.parallel.gradient_dtype = "float32"
    workdirs.check_same_run(tiny_run, old, new, goes_on=False)


def test_a_workdir_that_another_run_has(tiny_config, tiny_run, tmp_path, monkeypatch):
    """It is left alone: a second run would remove the checkpoint that the first is writing."""
    monkeypatch.setattr(locks, "_PATIENCE", 0.1)
    workdir = shutil.copytree(tiny_run, tmp_path / "run")
    (workdir / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()
    (workdir / "checkpoints" / "3.orbax-checkpoint-tmp" / "part").touch()
    config = tiny_config.copy_and_resolve_references()
    config.training.steps = 4
    with locks.of_run(workdir):
        before = tiny.files(workdir)
        with pytest.raises(RunError, match=rf"^the run of process {os.getpid()} on .* is using {workdir}; end"):
            train(config, workdir)
        assert tiny.files(workdir) == before


@pytest.mark.parametrize("kind", ["file", "link that leads nowhere"])
def test_a_workdir_that_is_no_directory(tiny_config, tmp_path, kind):
    workdir = tmp_path / "run"
    workdir.write_text("notes") if kind == "file" else workdir.symlink_to("gone")
    with pytest.raises(UserError, match=rf"^{workdir} is not a directory; give the run a --workdir of its own$"):
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
    with pytest.raises(UserError, match=rf"{tmp_path} is not the work directory of a run: it has no config.json"):
        workdirs.read_config(tmp_path)
    (tmp_path / workdirs.CONFIG).write_text('{"model": {"width": 3')
    with pytest.raises(UserError, match=rf"{tmp_path}/config.json is damaged: .*"):
        workdirs.read_config(tmp_path)
