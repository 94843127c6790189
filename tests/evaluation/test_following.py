"""evaluation/following.py: every checkpoint of a run is evaluated once, as it appears, and the results are written."""

import datetime
import itertools
import json
import os
import shutil

import pytest

from jaxlinear import config as configs
from jaxlinear import evaluation
from jaxlinear.checkpoint import DIRECTORY
from jaxlinear.errors import UserError
from jaxlinear.evaluation import Options, following
from jaxlinear.sweeps.laws import points
from jaxlinear.training import heldout
from jaxlinear.training.workdir import CONFIG, STARTS, read_config
from tests.training import tiny

OPTIONS = Options(lengths=(1,), batches=1, batch_tokens=256, examples=8)
LATER = "2100-01-01T00:00:00+00:00"
TASKS = ["perplexity", "parity:length=8+16"]


@pytest.fixture(scope="module")
def copied(tiny_run, tmp_path_factory):
    """A run with only its first checkpoint; the second one appears while the run is followed."""
    workdir = tmp_path_factory.mktemp("followed") / "run"
    shutil.copytree(tiny_run, workdir)
    (workdir / DIRECTORY / "2").rename(workdir / "later")
    return workdir


@pytest.fixture(scope="module")
def followed(copied):
    """The reports, and the steps whose checkpoints were opened."""
    reports = []
    for report in following.follow(copied, TASKS, OPTIONS, poll=0.1):
        reports.append(report)
        assert (following.directory(copied) / f"{report['step']}.json").exists()
        if report["step"] == 1:
            (copied / "later").rename(copied / DIRECTORY / "2")
    return reports


def test_reports_are_those_of_each_checkpoint(followed, tiny_run):
    assert [report["step"] for report in followed] == [1, 2]
    run = evaluation.open_run(tiny_run, 2)
    expected = evaluation.evaluate_run(run, TASKS, OPTIONS)
    for task in TASKS:
        assert evaluation.scalars(followed[1])[task] == pytest.approx(evaluation.scalars(expected)[task])
    assert evaluation.scalars(followed[0]) != evaluation.scalars(followed[1])
    assert set(evaluation.scalars(expected)) == set(TASKS)
    assert set(evaluation.scalars(expected)[TASKS[1]]) == {"accuracy, length 8", "accuracy, length 16"}
    assert set(evaluation.scalars(expected)["perplexity"]) == {"loss, length 32", "bits_per_byte, length 32"}


def test_what_is_written(followed, copied):
    folder = following.directory(copied)
    for report in followed:
        assert json.loads((folder / f"{report['step']}.json").read_text()) == report
    assert len(list(folder.glob("events.out.tfevents.*"))) >= 1
    page = (folder / following.PAGE).read_text()
    assert page.count("<svg") == 3 and "2 checkpoints, steps 1 to 2." in page
    names = ("perplexity: loss", "perplexity: bits per byte", "parity:length=8+16: accuracy", "length 16")
    assert all(part in page for part in (*names, "step 2 of 2"))
    assert "src=" not in page and "http:" not in page and "https:" not in page


@pytest.fixture
def workdir(copied, followed, tmp_path):
    """A copy of the run with its reports."""
    return shutil.copytree(copied, tmp_path / "run")


def follow(workdir, **options):
    return list(following.follow(workdir, TASKS, OPTIONS, **options))


def start_again(workdir, step, time=LATER):
    with (workdir / STARTS).open("a") as file:
        file.write(json.dumps({"step": step, "time": time}) + "\n")


@pytest.fixture
def config(copied, monkeypatch):
    """The config that the follower reads; tests change it."""
    changed = read_config(copied).copy_and_resolve_references()
    monkeypatch.setattr(following, "read_config", lambda _: changed)
    return changed


@pytest.fixture
def look(monkeypatch, caplog):
    """``look(steps, ...)`` lets the follower find these steps when it looks, and in between wait no time."""

    def look(*looks):
        looks = iter(looks)
        monkeypatch.setattr(following, "_steps", lambda _: next(looks))
        monkeypatch.setattr(following.time, "sleep", lambda _: None)

    with caplog.at_level("WARNING", logger="jaxlinear"):
        yield look


def removed(step):
    return f"step {step} was removed before it could be evaluated"


def test_what_was_evaluated_is_not_evaluated_again(followed, copied, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a checkpoint was opened")

    monkeypatch.setattr(following, "open_run", refuse)
    assert follow(copied) == followed
    with pytest.raises(AssertionError, match="a checkpoint was opened"):  # other options make another evaluation
        list(following.follow(copied, TASKS, Options(lengths=(1,), batches=2)))


def test_the_dataset_that_a_task_names_is_part_of_what_is_asked(copied, tiny_dataset, tmp_path):
    text = tiny.copy_of(tiny_dataset, tmp_path / "text")
    own, config = f"passkey:length=128:dataset={text}", read_config(copied)
    before = following._asked(config, [own], OPTIONS)
    assert before["texts"] == {str(text): heldout.identity(tiny_dataset)} and "heldout_text" not in before
    manifest = (text / "manifest.json").read_text()
    (text / "manifest.json").write_text(manifest.replace(json.loads(manifest)["tokenizer"]["sha256"], "0" * 64))
    assert following._asked(config, [own], OPTIONS) != before
    both = following._asked(config, ["perplexity", own], OPTIONS)
    assert both["heldout_text"] == heldout.identity(tiny_dataset) and both["texts"] != before["texts"]
    assert "texts" not in following._asked(config, ["passkey:length=128"], OPTIONS)


def test_reports_of_checkpoints_that_are_gone_are_read_again(followed, workdir):
    """Only those before the newest checkpoint: a run that was set back reaches the later steps again."""
    folder = following.directory(workdir)
    shutil.rmtree(workdir / DIRECTORY / "1")
    (folder / "3.json").write_text(json.dumps(followed[0] | {"step": 3}))
    (folder / following.PAGE).unlink()
    assert follow(workdir) == followed
    assert "2 checkpoints, steps 1 to 2." in (folder / following.PAGE).read_text()
    report = (folder / "1.json").read_text()
    (folder / "1.json").write_text(json.dumps(followed[0] | {"asked": followed[0]["asked"] | {"tasks": ["parity"]}}))
    assert follow(workdir) == followed[1:]
    (folder / "1.json").write_text(report)
    start_again(workdir, 1)  # from the step of the report
    assert follow(workdir) == followed
    start_again(workdir, 0)
    assert follow(workdir) == followed[1:]


@pytest.mark.parametrize("counted", [True, False])
def test_a_copy_that_is_younger_than_all_starts(followed, workdir, counted):
    """Going by time, a report from a discarded past would be newer than the start that set the run back, so the starts are
    counted. A report from before starts were counted has only its time."""
    shutil.rmtree(workdir / DIRECTORY / "1")
    path = following.directory(workdir) / "1.json"
    if not counted:
        path.write_text(json.dumps({name: value for name, value in followed[0].items() if name != "starts"}))
    again = datetime.datetime(2050, 1, 1, tzinfo=datetime.UTC)
    os.utime(path, (again.timestamp() + (1 if counted else -1),) * 2)
    start_again(workdir, 0, again.isoformat())
    assert [report["step"] for report in follow(workdir)] == [2]


def test_a_scaling_law_takes_the_loss_of_the_last_checkpoint(followed, copied, tmp_path):
    """It reads the report in the form in which it is written."""
    shutil.copytree(copied, tmp_path / "runs" / "a")
    point = points.Point("a", "small", 10, 0, 10, 1.0, 0.0, loss=9.0)
    found = points._evaluated(point, tmp_path)
    row = followed[1]["perplexity"]["lengths"][0]
    assert (found.loss, found.heldout_tokens) == (row["loss"], row["tokens"]) and found.name == "a"
    assert found.heldout_data == followed[1]["perplexity"]["dataset"]


def test_another_checkpoint_of_a_step_is_evaluated(workdir, monkeypatch):
    """For example, after a run was set back."""
    fingerprint, open_run, opened = following.Checkpoints.fingerprint, following.open_run, []
    other = lambda self, step: "another" if step == 2 else fingerprint(self, step)  # noqa: E731
    monkeypatch.setattr(following.Checkpoints, "fingerprint", other)
    monkeypatch.setattr(following, "open_run", lambda *given: opened.append(given[1]) or open_run(*given))
    assert [report["step"] for report in follow(workdir)] == [1, 2]
    assert opened == [2]


def test_a_follower_that_is_killed_leaves_no_report_without_its_curves(followed, workdir, monkeypatch):
    """Whatever it has written by then: what has a report is not evaluated again."""
    (following.directory(workdir) / "2.json").unlink()
    made = {name: value for name, value in followed[1].items() if name not in ("asked", "starts")}
    monkeypatch.setattr(following.evaluation, "evaluate_run", lambda *_: made)

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(following, "_to_tensorboard", kill)
        follow(workdir)
    kept = []
    monkeypatch.setattr(following, "_to_tensorboard", lambda folder, step, report: kept.append((step, report)))
    assert follow(workdir) == followed
    assert kept == [(2, followed[1])]


def test_a_run_that_is_set_back_while_it_is_followed(followed, workdir, config, monkeypatch):
    """Its report of a later step is dropped, and the page shows what the run has then."""
    config.training.steps = 3

    def sleep(_):
        if config.training.steps == 3:
            shutil.rmtree(workdir / DIRECTORY / "2")
            start_again(workdir, 1)
            config.training.steps = 1

    monkeypatch.setattr(following.time, "sleep", sleep)
    assert follow(workdir) == followed  # each given once
    assert following.newest_report(workdir)["step"] == 1


def test_reports_are_given_once_though_checkpoints_are_removed(followed, workdir, config, look, monkeypatch, caplog):
    """Steps 1 and 2 are gone when step 3 disappears before its turn, and 4 appears."""
    look([1, 2], [1, 2, 3], [4], [4], *itertools.repeat([], 9))
    clock = itertools.count(step=10.0)
    monkeypatch.setattr(following.time, "monotonic", lambda: next(clock))
    config.training.steps = 5
    assert follow(workdir, patience=15.0) == followed
    assert removed(3) in caplog.text


def test_other_text_is_another_evaluation(workdir, monkeypatch):
    """Held-out data may change when a run resumes."""
    monkeypatch.setattr(following.heldout, "identity", lambda _: "another")
    assert [report["asked"]["heldout_text"] for report in follow(workdir)] == ["another"] * 2
    assert "heldout_text" not in next(following.follow(workdir, TASKS[1:], OPTIONS))["asked"]


def test_a_run_that_resumes_with_other_text_and_more_steps(followed, workdir, tmp_path):
    """It does so between two checkpoints of one look: each report is of the text, and names it, of its own time."""
    shutil.rmtree(following.directory(workdir))
    text = tiny.prepared(tmp_path / "data", [f"another document, number {i}" for i in range(200)], heldout_fraction=0.2)
    reports = following.follow(workdir, TASKS[:1], OPTIONS, poll=0.1)
    first = next(reports)
    config = read_config(workdir)
    config.data.heldout_path, config.training.steps = str(text), 3
    (workdir / CONFIG).write_text(configs.to_json(config))
    second, again = next(reports), next(reports)  # again: at the next look, of the other text
    assert [report["step"] for report in (first, second, again)] == [1, 2, 1]
    for report, former in ((second, followed[1]), (again, followed[0])):
        expected = evaluation.evaluate_run(evaluation.open_run(workdir, report["step"]), TASKS[:1], OPTIONS)
        assert _loss(report) == pytest.approx(_loss(expected))
        assert _loss(report) != pytest.approx(_loss(former), rel=1e-3)
        assert report["asked"]["heldout_text"] == heldout.identity(config.data.heldout_path)
        assert (report["perplexity"]["dataset"], report["training"]["steps"]) == (config.data.heldout_path, 3)
    assert _loss(first) == pytest.approx(_loss(followed[0]))
    assert first["asked"]["heldout_text"] == followed[0]["asked"]["heldout_text"]


def _loss(report):
    return report["perplexity"]["lengths"][0]["loss"]


def test_it_waits_and_gives_up(copied, followed, config, monkeypatch, caplog):
    """The last step of this run never comes."""
    config.training.steps, slept = 5, []
    monkeypatch.setattr(following.time, "sleep", slept.append)
    monkeypatch.setattr(following.time, "monotonic", lambda: 10.0 * len(slept))
    with caplog.at_level("WARNING", logger="jaxlinear"):
        assert follow(copied, poll=3.0, patience=25.0) == followed
    assert slept == [3.0] * 3 and "no new checkpoint for 25 s" in caplog.text


def test_a_checkpoint_that_is_removed_is_left_out(copied, followed, look, caplog):
    """It is removed between two looks at the directory. One that cannot be read and is still there is an error."""
    look([1, 2, 3], [1, 2, 3], [1, 2], [1, 2])
    assert follow(copied) == followed
    assert removed(3) in caplog.text
    look(*itertools.repeat([1, 2, 3], 99))
    with pytest.raises(UserError, match=r"has no checkpoint of step 3; it has 1, 2"):
        follow(copied)


def test_checkpoints_that_come_and_go_between_two_looks_are_named(copied, followed, config, look, caplog):
    """Those that were due by the run's config, and neither evaluated nor removed in their turn."""
    config.training.steps, config.checkpoint.every_steps = 17, 3
    # Of the past, at each look, and after each failed reading: a run of 17 steps that keeps two checkpoints.
    look([1, 2], [1, 2], [1, 2, 15, 17], [1, 2, 17], [1, 2, 17], [1, 2], [1, 2])
    assert follow(copied) == followed
    assert "4 checkpoints, of steps 3 to 12, were removed before they could be evaluated" in caplog.text
    assert removed(15) in caplog.text and removed(17) in caplog.text


def test_a_checkpoint_whose_removal_is_under_way(copied, followed, workdir, monkeypatch, caplog):
    """It is removed file by file, so it still exists but cannot be read. What an earlier call found for it is not lost."""
    first, slept = workdir / DIRECTORY / "1", []

    def half_removed():
        shutil.copytree(copied / DIRECTORY / "1", first, dirs_exist_ok=True)
        (first / "meta" / "metadata").unlink()

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) % 3 == 0:
            shutil.rmtree(first)

    monkeypatch.setattr(following.time, "sleep", sleep)
    half_removed()
    assert follow(workdir) == followed and slept == [1] * 3
    assert not caplog.records

    half_removed()
    (following.directory(workdir) / "1.json").unlink()
    with caplog.at_level("WARNING", logger="jaxlinear"):
        assert follow(workdir) == followed[1:]
    assert removed(1) in caplog.text

    half_removed()
    monkeypatch.setattr(following.time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match=r"the checkpoint .*/1 cannot be read"):  # it stays, so it is damaged
        follow(workdir)


def test_refusals(tmp_path, copied):
    for directory, tasks, message in ((tmp_path, TASKS, "is not the work dir"), (copied, ["speed"], "no task 'speed'")):
        with pytest.raises(UserError, match=message):
            list(following.follow(directory, tasks, OPTIONS))
