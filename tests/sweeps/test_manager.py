"""Sweeps that are killed, stopped, started again and broken; their runs are those of ``stand_in``."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from jaxlinear.errors import UserError
from jaxlinear.sweeps import executors, manager, plans, states
from jaxlinear.sweeps.sweep import prepare, read
from jaxlinear.training import trained_data
from tests.sweeps import stand_in
from tests.training import tiny


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Jobs, which are separate processes, find the package of tests there."""
    monkeypatch.chdir(stand_in.ROOT)
    monkeypatch.setenv("PYTHONPATH", str(stand_in.ROOT))


@pytest.fixture
def sweep(tiny_dataset, tmp_path):
    """``sweep(seeds, **options)`` runs a sweep to its end in this process, and returns its status."""

    def run(seeds=stand_in.SEEDS, **options):
        return stand_in.sweep(tmp_path, tiny_dataset, stand_in.runs(seeds), **options)

    return run


@pytest.fixture
def planned(tiny_dataset, tmp_path):
    """``planned(runs)`` plans a sweep without running it, and returns its runs."""

    def plan(runs, **evaluation):
        config = stand_in.config(tiny_dataset)
        config.evaluation.update(evaluation)
        with prepare(tmp_path, config, runs) as made:
            return made.runs

    return plan


ALL, COUNT = list(range(1, stand_in.STEPS + 1)), len(stand_in.SEEDS)


def start(directory, dataset, *, hold):
    """Starts a manager in its own process group. Runs with seeds from ``hold`` onwards wait until the file is removed."""
    (directory / stand_in.HOLD).write_text(str(hold))
    command = [sys.executable, "-m", "tests.sweeps.stand_in", "sweep", str(directory), str(dataset)]
    return subprocess.Popen(command, start_new_session=True)


def finished(directory):
    """The names of the runs that have their last checkpoint."""
    return {path.parent.parent.name for path in directory.glob(f"runs/*/checkpoints/{stand_in.STEPS}")}


def steps(directory):
    """The steps that each run did, in order."""
    return {path.parent.name: list(map(int, path.read_text().split())) for path in directory.glob("runs/*/steps.txt")}


def attempts(directory):
    return {run.name: run.files.attempts() for run in read(directory).runs}


def running(directory):
    return {run.name for run in read(directory).runs if run.files.is_running()}


def test_killed_half_way_it_ends_complete_and_no_run_is_done_twice(tiny_dataset, tmp_path, sweep):
    process = start(tmp_path, tiny_dataset, hold=4)
    tiny.wait_for([process], lambda: len(finished(tmp_path)) >= 4)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (tmp_path / stand_in.HOLD).unlink()
    before, tries = steps(tmp_path), attempts(tmp_path)
    done = {name for name in finished(tmp_path) if tries[name] and tries[name][-1].get("status") == 0}
    assert 4 <= len(finished(tmp_path)) < COUNT and done
    begun = {name for name in tries if tries[name]} - done

    assert sweep() == 0
    after, tries = steps(tmp_path), attempts(tmp_path)
    assert finished(tmp_path) == set(tries) == set(after) and len(after) == COUNT
    for name, taken in after.items():
        if name in done:  # it was left alone
            assert taken == before[name] == ALL and len(tries[name]) == 1
        else:  # it went on from its last checkpoint: a step is repeated only if the kill came before it was saved
            assert sorted(set(taken)) == ALL and len(taken) <= stand_in.STEPS + 1
            assert len(tries[name]) <= (2 if name in begun else 1)
    assert {run.progress().state for run in read(tmp_path).runs} == {states.FINISHED}

    assert sweep() == 0
    assert steps(tmp_path) == after and attempts(tmp_path) == tries, "a sweep that is done does nothing"


def test_runs_that_survive_their_manager_are_waited_for(tiny_dataset, tmp_path, sweep):
    process = start(tmp_path, tiny_dataset, hold=0)
    tiny.wait_for([process], lambda: len(list(tmp_path.glob("jobs/*/submitted.json"))) == 4)
    process.kill()  # only the manager, whose four jobs are just beginning
    process.wait()
    assert not finished(tmp_path)
    assert sweep(show=lambda table: (tmp_path / stand_in.HOLD).unlink(missing_ok=True)) == 0
    assert list(steps(tmp_path).values()) == [ALL] * COUNT
    assert [len(tries) for tries in attempts(tmp_path).values()] == [1] * COUNT


@pytest.mark.parametrize("tell, number", [(os.kill, signal.SIGTERM), (os.killpg, signal.SIGINT)])  # as Ctrl-C does
def test_told_to_stop_it_has_its_runs_save_themselves(tiny_dataset, tmp_path, sweep, tell, number):
    process = start(tmp_path, tiny_dataset, hold=2)
    tiny.wait_for([process], lambda: len(finished(tmp_path)) >= 1 and running(tmp_path))
    tell(process.pid, number)
    assert process.wait(timeout=tiny.PATIENCE) == 75
    (tmp_path / stand_in.HOLD).unlink()
    assert not running(tmp_path)
    assert 0 < len(finished(tmp_path)) < COUNT
    ended = {tries[-1]["status"] for tries in attempts(tmp_path).values() if tries}
    assert ended <= {0, 75, -signal.SIGTERM}, "the last: before the run had learned what to do"
    found = {run.progress().state for run in read(tmp_path).runs}
    assert found <= {states.FINISHED, states.INTERRUPTED, states.WAITING} and states.WAITING in found
    assert sweep() == 0
    assert list(steps(tmp_path).values()) == [ALL] * COUNT


@pytest.mark.parametrize("inherited", [False, True])
def test_a_run_that_just_begins_is_told_to_stop_and_is_no_failure(tiny_dataset, tmp_path, monkeypatch, inherited):
    """For a moment, the file of its attempts still describes the previous attempt, which was killed."""
    killed, begun, told = 1, 2, []

    def kill(pid, number):
        if pid == killed:
            assert inherited, "another process may have its number by now"
            raise ProcessLookupError
        told.append((pid, number))

    def show(table):
        if told:
            run.files.end(75)
            lock.close()
        elif len(run.files.attempts()) == 1:
            run.files.begin(host=socket.gethostname(), pid=begun)

    monkeypatch.setattr(manager.os, "kill", kill)
    with prepare(tmp_path, stand_in.config(tiny_dataset), stand_in.runs([0])) as planned:
        (run,) = planned.runs
        run.files.begin(host=socket.gethostname(), pid=killed)
        work = manager.Manager(planned, executors.Local(tmp_path / "jobs" / "submitit", parallel=1), stand_in.TRAIN)
        work._jobs[run.name] = manager._Job(None, *((-1, -1) if inherited else (1, 0)))
        work._stop = True
        with run.files.locked() as lock:
            work._stop_runs(show, 0.01)
        assert told == [(begun, signal.SIGTERM)]
        ((_, progress),) = work.progress()
        assert (progress.state, progress.step) == (states.INTERRUPTED, 0)


def test_a_failed_run_is_named_with_its_error_and_the_others_end(tmp_path, sweep):
    tables = []
    assert sweep([0, stand_in.BROKEN, 1], show=tables.append) == 1
    found = dict(tables[-1])
    assert [run.state for run in found.values()] == [states.FINISHED, states.FAILED, states.FINISHED]
    assert found[f"seed={stand_in.BROKEN}"].error == "stand_in: this seed is broken"
    assert {run.name: run.progress() for run in read(tmp_path).runs} == found
    assert sweep([0, stand_in.BROKEN, 1]) == 1, "started again, what failed is tried again"
    assert [len(tries) for tries in attempts(tmp_path).values()] == [1, 2, 1]


def test_more_runs_and_more_steps_may_be_asked_for_later(tmp_path, sweep):
    assert sweep([0, 1]) == 0
    assert sweep([0, 1, 2], steps=stand_in.STEPS + 2) == 0
    assert steps(tmp_path) == {f"seed={seed}": list(range(1, stand_in.STEPS + 3)) for seed in range(3)}


def test_a_run_that_was_begun_in_another_way_is_refused(tiny_dataset, tmp_path, sweep):
    """With fewer steps, its loss would be taken for that of a run whose learning rate ended there. A single run may go on
    with other values of the last two keys; in a sweep, it would be taken for one that always had them, and its losses are
    compared, so they must be of as much text."""
    assert sweep([0, 1]) == 0
    for changes, message in (
        ({"steps": 5}, "runs/seed=0 has a checkpoint of step 6, but the plan is for 5 steps"),
        ({"batch_size": 4}, r"another run: training\.batch_size is 8 there and 4 in this config"),
        ({"spike_multiple": 10.0}, r"another run: training\.spike_multiple is 0\.0 there and 10\.0 in this config"),
    ):
        with pytest.raises(UserError, match=message):
            sweep([0, 1], **changes)
    with pytest.raises(UserError, match=r"another run: evaluation\.batches is 16 there and 2 in this config"):
        stand_in.sweep(tmp_path, tiny_dataset, [run | {"evaluation.batches": 2} for run in stand_in.runs([0, 1, 2])])


def test_an_evaluation_that_is_asked_for_later_is_owed(tiny_dataset, tmp_path, planned, caplog):
    """Finished runs owe it too, at their end; a line says that other tasks asked for there are not measured."""

    def state(**evaluation):
        (run,) = planned(stand_in.runs([0]), **evaluation)
        return run.progress().state

    assert state(every_steps=0) == states.WAITING
    assert stand_in.sweep(tmp_path, tiny_dataset, [{"training.seed": 0, "evaluation.every_steps": 0}]) == 0
    (log,) = tmp_path.glob("runs/*/metrics.jsonl")
    log.write_text("".join(line.replace("heldout_loss", "other") + "\n" for line in log.read_text().splitlines()))
    assert state(every_steps=0) == states.FINISHED
    assert state(every_steps=2) != states.FINISHED
    assert state(every_steps=0, examples=7) == states.FINISHED
    assert [record.getMessage() for record in caplog.records if record.name.startswith("jaxlinear")] == [
        "run: evaluation.examples differs in the plan, but the run is finished; launch/evaluate.py --tasks measures it"
    ]


def test_runs_keep_their_names_when_others_are_planned_beside_them(tmp_path, planned):
    """Names contain the keys in which runs differ, so a second seed would change them."""

    def names(rates, **axes):
        return [run.name for run in planned(plans.grid({"optimizer.learning_rate": rates, **axes}))]

    one, two = "learning_rate=0.001", "learning_rate=0.002"
    assert names([1e-3, 2e-3]) == [one, two]
    seeds = {"training.seed": [0, 1]}
    both = [one, f"{one}-seed=1", two, f"{two}-seed=1"]
    assert names([1e-3, 2e-3], **seeds) == both
    assert names([1e-3, 2e-3], **seeds) == both and names([1e-3, 2e-3]) == both[::2]
    assert names([2e-3], **seeds) == both[2:]
    assert len(list(tmp_path.glob("jobs/*/config.json"))) == 4
    assert names([2e-3]) == [two]


def labelled(planned, size, *rates):
    return [run.name for run in planned([{"size": size, "optimizer.learning_rate": rate} for rate in rates])]


def test_a_run_keeps_its_name_though_another_one_had_what_it_would_be_called(planned):
    assert labelled(planned, "small", 1e-3) == ["small"]
    assert labelled(planned, "small", 1e-3, 3e-3) == ["small", "small-learning_rate=0.003"]
    assert labelled(planned, "small", 3e-3) == ["small-learning_rate=0.003"]


@pytest.mark.parametrize(
    "axis, message",
    [
        ({"model.vocab_size": [384, 128]}, "has 257 tokens, more than model.vocab_size=128"),
        ({"training.batch_size": [4, 4096]}, "an epoch has .* fewer than the batch size 4096"),
        ({"training.sequence_length": [64, 65]}, "65"),
    ],
)
def test_a_run_that_its_data_do_not_fit_stops_the_sweep_before_the_first(tmp_path, planned, axis, message):
    with pytest.raises(UserError, match=message):
        planned(plans.grid(axis))
    assert not list(tmp_path.iterdir())


def test_a_run_on_data_that_were_replaced_stops_the_sweep(tmp_path):
    """A finished one too: its loss would be compared with those of the new runs."""

    def planned(*seeds):
        with prepare(tmp_path / "sweep", stand_in.config(path), stand_in.runs(seeds)) as sweep:
            return sweep.runs

    path, other = (tiny.prepared(tmp_path / name, [f"{name} {i}" for i in range(3000)]) for name in ("data", "other"))
    (run,) = planned(0)
    stand_in.train(str(run.files.config), str(run.files.workdir))
    trained_data.keep(run.files.workdir, {str(path): 1.0})
    assert len(planned(0, 1)) == 2
    shutil.rmtree(path)
    other.rename(path)
    with pytest.raises(UserError, match=f"{run.files.workdir} holds a run on other data than {path}: "):
        planned(0, 1)


def test_two_runs_of_one_name_are_refused(tmp_path, planned):
    """One of them keeps the name from an earlier label. Nothing is written."""
    assert labelled(planned, "small", 1e-3) == ["small"]
    before = (tmp_path / "sweep.json").read_text()
    rates = {"tiny": 1e-3, "small": 3e-3}
    with pytest.raises(UserError, match=r"^two runs would be named small: .*; give the new one a label$"):
        planned([{"size": size, "optimizer.learning_rate": rate} for size, rate in rates.items()])
    assert (tmp_path / "sweep.json").read_text() == before
    assert labelled(planned, "tiny", 1e-3) == ["small"]


def test_a_note_of_a_job_that_was_cut_counts_as_none(tiny_dataset, tmp_path, sweep):
    assert sweep([0]) == 0
    note = read(tmp_path).runs[0].files.job / "submitted.json"
    assert json.loads(note.read_text())["executor"] == "local"
    with prepare(tmp_path, stand_in.config(tiny_dataset), stand_in.runs([0])) as planned:
        work = manager.Manager(planned, executors.Local(tmp_path / "jobs" / "submitit", parallel=1), stand_in.TRAIN)
        for text in ("", "[]", "{}", '{"executor": "lo'):
            note.write_text(text)
            assert work._submitted(planned.runs[0]) is None
    assert sweep([0], steps=stand_in.STEPS + 1) == 0
    assert json.loads(note.read_text())["executor"] == "local"


def test_a_run_that_another_process_holds_is_waited_for(tmp_path, sweep):
    assert sweep([0, 1]) == 0
    files, held = read(tmp_path).runs[0].files, []
    with files.locked() as lock:
        assert lock is not None and files.is_running()
        assert sweep([0, 1], steps=stand_in.STEPS + 1, show=lambda table: held.append(lock.close())) == 0
    assert held and steps(tmp_path)["seed=0"] == [*ALL, stand_in.STEPS + 1]


def test_two_managers_are_one_too_many_and_the_second_changes_nothing(tmp_path, sweep):
    """Above all, runs that have not begun stay as they are: the first manager starts them with the config it finds then."""

    def plan():
        return {path: path.read_bytes() for path in [tmp_path / "sweep.json", *tmp_path.glob("jobs/*/config.json")]}

    def second(_):
        before = plan()
        assert len(before) == 3
        with pytest.raises(UserError, match=r"another launch/sweep\.py is running on"):
            sweep([1, 2], batch_size=4)
        assert plan() == before and not (tmp_path / "jobs" / "seed=2").exists()
        asked.append(True)

    asked = []
    assert sweep([0, 1], parallel=1, show=second) == 0
    assert asked
    sizes = [json.loads(path.read_text())["training"]["batch_size"] for path in tmp_path.glob("runs/*/config.json")]
    assert sizes == [8, 8]


def test_what_is_no_sweep_and_no_data(tiny_dataset, tmp_path):
    """Nothing is written."""
    file = tmp_path / "file"
    file.write_text("")
    for directory, dataset, message in (
        (file, tiny_dataset, f"^{file} is not a directory; give the sweep a --workdir of its own$"),
        (tmp_path / "sweep", "", r"data\.path is not set"),
        (tmp_path / "sweep", tmp_path / "nothing", "no dataset at"),
    ):
        with pytest.raises(UserError, match=message):
            stand_in.sweep(directory, dataset, stand_in.runs([0]))
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(UserError, match=r"is not the directory of a sweep: it has no sweep\.json"):
        read(tmp_path)
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": [{}]}))
    with pytest.raises(UserError, match=r"sweep\.json is damaged: 'name'"):
        read(tmp_path)
