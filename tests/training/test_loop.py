"""Runs in this process: what they write, and that a stopped run resumes as if it had never been stopped."""

import concurrent.futures
import contextlib
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear import data
from jaxlinear.checkpoint import DIRECTORY, Checkpoints
from jaxlinear.errors import Diverged, UserError
from jaxlinear.parallel import distributed
from jaxlinear.sweeps.files import RunFiles
from jaxlinear.sweeps.states import is_finished
from jaxlinear.training import heldout, loop, metrics, trained_data
from jaxlinear.training import state as states
from jaxlinear.training import workdir as workdirs
from jaxlinear.training.heldout import Evaluation
from jaxlinear.training.job import Job
from jaxlinear.training.loop import FINISHED, PREEMPTED, train
from jaxlinear.training.preemption import Stop
from tests.training import tiny

KEYS = {
    *("step", "loss", "tokens", "gradient_norm", "parameter_norm", "learning_rate", "skips", "skips_in_a_row"),
    *("tokens_per_second", "mfu", "step_seconds", "data_wait_fraction"),
}


def test_what_a_run_writes(run_config, whole_run):
    files = "checkpoints config.json data.json lock metrics.jsonl starts.jsonl tokenizer_info.json"
    assert {path.name for path in whole_run.iterdir()} == set(files.split())
    lines = metrics.read(whole_run)
    assert [line["step"] for line in lines] == list(range(1, 9))
    for line in lines:
        assert set(line) == KEYS
        assert line["tokens"] == line["step"] * 8 * 32
        assert line["skips"] == line["skips_in_a_row"] == 0
        assert 0 <= line["data_wait_fraction"] <= 1 and line["mfu"] > 0
        assert line["tokens_per_second"] == pytest.approx(8 * 32 / line["step_seconds"])
        assert line["learning_rate"] == pytest.approx(run_config.optimizer.learning_rate)
    assert np.log(384) + 1 > lines[0]["loss"] > lines[-1]["loss"] > 1
    assert Checkpoints(whole_run).steps() == [6, 8]
    assert Checkpoints(whole_run).meta()["next_batch"] == 8


def same_end(workdir, config, expected):
    """Asserts that two runs have the same losses, as text, and the same last state."""
    assert tiny.losses(workdir) == tiny.losses(expected)
    tiny.assert_equal(*(tiny.restored(path, config, tiny.mesh()) for path in (workdir, expected)))


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(run_config, whole_run, tmp_path):
    workdir = tmp_path / "run"
    assert train(tiny.changed(run_config, {"training.steps": 4}), workdir) == FINISHED
    with (workdir / metrics.FILE).open("a") as file:  # logged after the checkpoint, and a truncated line
        file.write('{"step": 5, "loss": 0.0}\n{"step": 6, "lo')
    assert train(run_config, workdir) == FINISHED
    same_end(workdir, run_config, whole_run)

    before = tiny.files(workdir)
    run_config.evaluation.batches += 1  # its config.json still says what it was judged by
    assert train(run_config, workdir) == FINISHED  # nothing is left to do
    assert tiny.files(workdir) == before


@pytest.mark.parametrize("devices, sizes", [(8, {"fsdp": 4, "tensor": 2}), (1, {})])
def test_a_checkpoint_restores_on_another_mesh(run_config, whole_run, devices, sizes):
    state = tiny.restored(whole_run, run_config, tiny.mesh(devices, **sizes))
    tiny.assert_equal(state, tiny.restored(whole_run, run_config, tiny.mesh(8, data=8)))
    kernel = state.parameters["stacks"][0]["blocks"][0]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // devices


def test_evaluation_chooses_the_checkpoints_to_keep(run_config, tmp_path):
    """The run is also traced from a step that is named, although it ends before the trace would."""
    run_config.training.steps, workdir = 6, tmp_path / "run"
    run_config.checkpoint.update({"every_steps": 1, "keep_newest": 1, "keep_best": 1})
    run_config.evaluation.update({"every_steps": 3, "batches": 0})
    run_config.logging.update({"every_steps": 100, "profile_step": 6, "profile_steps": 5})
    assert train(run_config, workdir) == FINISHED
    first, logged, last = metrics.read(workdir)
    assert logged["step"] == 6 and set(logged) == KEYS
    assert set(first) == set(last) == {"step", "heldout_loss", "heldout_bits_per_byte"}
    assert (first["step"], last["step"]) == (3, 6) and first["heldout_loss"] > last["heldout_loss"] > 1
    split = data.read_manifest(run_config.data.path).splits["heldout"]
    expected = last["heldout_loss"] / np.log(2) * split.tokens / split.bytes
    assert last["heldout_bits_per_byte"] == pytest.approx(expected)
    assert Checkpoints(workdir).steps() == [6]
    (trace,) = (workdir / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000


@pytest.mark.parametrize("batches, microbatches", [(0, 1), (2, 1), (2, 2), (0, 4)])
def test_the_heldout_loss_is_the_mean_over_the_tokens(tiny_config, tmp_path, monkeypatch, batches, microbatches):
    """Not over batches, since the last one has fewer tokens; and on the dataset that is named for it. Here, a token's loss
    is its id. No more rows are on the devices at once than in training."""
    heldout_path = tiny.prepared(tmp_path / "data", [f"{i} plus {i} is {2 * i}" for i in range(900)])
    rows, counts = 8 * microbatches, {"training.microbatches": microbatches, "evaluation.batches": batches}
    changes = {"data.heldout_path": str(heldout_path), "training.batch_size": rows, "evaluation.every_steps": 1}
    evaluation = Evaluation(Job.build(tiny.changed(tiny_config, changes | counts)), lambda: None)

    def losses(_, batch):
        assert batch["targets"].shape == (8, 32)
        counted = batch["segment_ids"] > 0
        return jnp.where(counted, batch["targets"].astype(jnp.float32), 0), counted

    monkeypatch.setattr(evaluation, "_loss_step", losses)
    found = evaluation({})
    read = list(data.heldout_batches(heldout_path, batch_size=rows, sequence_length=32, limit=batches or None))
    targets = np.concatenate([batch["targets"][batch["segment_ids"] > 0] for batch in read])
    assert len(read) == batches or 0 < len(targets) % 256 < 200
    assert found["heldout_loss"] == pytest.approx(targets.mean(), rel=1e-6)
    split = data.read_manifest(heldout_path).splits["heldout"]
    bits = targets.mean() / np.log(2) * split.tokens / split.bytes
    assert found["heldout_bits_per_byte"] == pytest.approx(bits, rel=1e-6)


def one_more_byte(dataset):
    """The manifest of a dataset, changed as that of another text would be."""
    splits = json.loads((dataset / "manifest.json").read_text())["splits"]
    splits["heldout"]["bytes"] += 1
    return {"splits": splits}


def test_losses_are_told_apart_by_what_they_are_of(tiny_config, tiny_dataset, tmp_path):
    """Of a text that is replaced while a run is evaluated on it, there is none."""
    moved = tiny.copy_of(tiny_dataset, tmp_path / "moved")
    other = tiny.copy_of(tiny_dataset, tmp_path / "other", **one_more_byte(tiny_dataset))

    def evaluation(path, batches):
        changes = {"data.heldout_path": str(path), "evaluation.batches": batches, "evaluation.every_steps": 1}
        return Evaluation(Job.build(tiny.changed(tiny_config, changes)), lambda: None)

    made = [evaluation(*of) for of in ((tiny_dataset, 2), (moved, 2), (other, 2), (other, 0))]
    assert made[0].text == made[1].text and len({one.text for one in made}) == 3
    shutil.copy(other / "manifest.json", moved)
    with pytest.raises(UserError, match=f"the dataset in {moved} was replaced by a new one while the run was"):
        made[1]({})


def test_a_run_is_evaluated_at_its_end(run_config):
    for every, due in ((3, [3, 6, 8]), (0, [])):
        run_config.evaluation.every_steps = every
        assert [step for step in range(1, 9) if heldout.is_due(run_config, step)] == due


def test_batches_are_those_of_the_weights_and_the_seed(tiny_config, tiny_dataset, tmp_path):
    paths = {str(tiny_dataset): 3.0, str(tiny.copy_of(tiny_dataset, tmp_path / "copy")): 1.0}
    changes = {"data.path": ",".join(f"{path}={weight}" for path, weight in paths.items()), "training.seed": 5}
    made = Job.build(tiny.changed(tiny_config, changes)).batches
    expected, alike = (
        data.TrainBatches(weights, batch_size=8, sequence_length=32, seed=5)
        for weights in (paths, dict.fromkeys(paths, 1.0))
    )
    for step in (0, 7):
        tiny.assert_equal(made[step], expected[step])
    assert np.any(alike[7]["tokens"] != made[7]["tokens"])


def test_too_many_skips_end_the_run(run_config, tmp_path, monkeypatch):
    initialise = states.initialise

    def broken(*arguments):
        state = initialise(*arguments)
        scale = state.parameters["norm"]["scale"]
        state.parameters["norm"]["scale"] = jax.device_put(np.full(scale.shape, np.inf, np.float32), scale.sharding)
        return state

    monkeypatch.setattr(states, "initialise", broken)
    run_config.training.max_skips = 3
    with pytest.raises(Diverged, match=r"^3 steps in a row were skipped, the last of them step 3 with a gradient norm"):
        train(run_config, tmp_path / "run")
    lines = metrics.read(tmp_path / "run")
    assert [(line["skips"], line["skips_in_a_row"]) for line in lines] == [(1, 1), (2, 2)]


@pytest.mark.parametrize("damaged", ["parameters", "training", "meta"])
def test_a_damaged_checkpoint_is_not_a_fresh_start(run_config, whole_run, tmp_path, damaged):
    workdir = shutil.copytree(whole_run, tmp_path / "run")
    item = workdir / DIRECTORY / "8" / damaged
    file = max((path for path in item.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    for place in range(0, len(content), max(1, len(content) // 32)):  # some of the file may be unused
        content[place] ^= 1
    file.write_bytes(content)
    before = tiny.files(workdir / DIRECTORY), (workdir / metrics.FILE).read_bytes()
    with pytest.raises(UserError, match=rf"the checkpoint {workdir}/checkpoints/8 cannot be read .* from step 6$"):
        train(tiny.changed(run_config, {"training.steps": 10}), workdir)
    assert (tiny.files(workdir / DIRECTORY), (workdir / metrics.FILE).read_bytes()) == before


def test_a_checkpoint_of_another_run_is_refused(run_config, whole_run, tmp_path, caplog):
    """This may be one that was copied into the directory, or any, if what identifies the run is missing."""
    workdir = shutil.copytree(whole_run, tmp_path / "run")
    config = workdir / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"seed": 0', '"seed": 5'))  # so the checkpoints are not of this run
    before = tiny.files(workdir)
    for message in (
        rf"the checkpoint of step 8 was copied from another run: {workdir} .*training.seed is 0 there and 5 in this",
        rf"{workdir} has checkpoints but no config.json, .* \(checkpoints/8/meta/metadata has it",
    ):
        with pytest.raises(UserError, match=f"^{message}"):
            train(tiny.changed(run_config, {"training.steps": 10, "training.seed": 5}), workdir)
        assert tiny.files(workdir) == before
        config.unlink(missing_ok=True)
        before.pop("config.json", None)

    config.write_text(text)
    (workdir / "data.json").unlink()
    with caplog.at_level("WARNING"):
        trained_data.check(workdir, {run_config.data.path: 1.0})
    assert f"{workdir} has no data.json: cannot check whether it was trained on the text of" in caplog.text


def test_a_half_written_checkpoint_is_not_picked(run_config, whole_run, tmp_path):
    workdir = shutil.copytree(whole_run, tmp_path / "run")
    checkpoints = workdir / DIRECTORY
    shutil.move(checkpoints / "8", checkpoints / "8.orbax-checkpoint-tmp")
    (checkpoints / "8.orbax-checkpoint-tmp" / "commit_success.txt").unlink()
    assert train(run_config, workdir) == FINISHED
    same_end(workdir, run_config, whole_run)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["6", "8"]


@pytest.mark.parametrize("first, taken", [(0, 3), (1, 3), (2, 4), (3, 5), (4, None)])
def test_a_run_that_goes_on_behind_the_steps_takes_no_trace_again(run_config, tmp_path, monkeypatch, first, taken):
    """A run that takes a trace waits for the step before it and for its last step."""
    begun, waited = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", begun.append)
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    run_config.logging.profile_step, run_config.logging.profile_steps = 3, 2
    trace = loop._Trace(run_config, first, tmp_path)
    for step in range(first + 1, 8):
        trace.before(step, state=step - 1)
        assert bool(begun) == (taken is not None and step >= taken)
    assert waited == ([] if taken is None else [taken - 1, taken + 1])


def test_only_the_first_process_takes_a_trace(run_config, tmp_path, monkeypatch):
    """Two processes on one host would write the same file."""
    run_config.logging.profile_step = 2
    for first in (False, True):
        monkeypatch.setattr(distributed, "is_first", lambda first=first: first)
        trace = loop._Trace(run_config, 0, tmp_path)
        trace.before(2, state=())
        trace.close()
        assert bool(list(tmp_path.rglob("*.xplane.pb"))) == first


def test_an_evaluation_that_sigterm_ends_is_made_when_the_run_goes_on(run_config, tmp_path, monkeypatch):
    """The run is stopped during the evaluations of step 2, twice, and of the last step. It saves a checkpoint at once, and
    all lines equal those of a run that was not stopped."""
    run_config.training.steps = 4
    run_config.checkpoint.every_steps = 100
    run_config.evaluation.update({"every_steps": 2, "batches": 3})
    files = RunFiles(tmp_path, "stopped")
    whole, workdir = tmp_path / "whole", files.workdir
    assert train(run_config, whole) == FINISHED

    check, asked = Stop.check, []

    def stopped_at(batch):
        def with_signal(stop):
            asked.append(batch)
            if len(asked) == batch:
                os.kill(os.getpid(), signal.SIGTERM)
            check(stop)

        asked.clear()
        monkeypatch.setattr(Stop, "check", with_signal)
        return train(run_config, workdir)

    for batch, step in ((2, 2), (1, 2), (3 + 3, 4)):
        assert stopped_at(batch) == PREEMPTED
        assert len(asked) == batch
        assert Checkpoints(workdir).steps()[-1] == step
        assert [line["step"] for line in metrics.read(workdir) if "heldout_loss" in line] == [2] * (step == 4)
    for more in (3, 0):  # after that, nothing is left to do
        assert is_finished(files, 4) == (more == 0)
        assert stopped_at(100) == FINISHED
        assert len(asked) == more
    found, expected = ([without_times(line) for line in metrics.read(path)] for path in (workdir, whole))
    assert found == expected and sum("heldout_loss" in line for line in found) == 2
    starts = workdirs.read_starts(workdir)
    owed = [(line["step"], line.get("evaluation_owed", False)) for line in starts]
    assert owed == [(0, False), (2, True), (2, True), (4, True)]
    assert {line["heldout_text"] for line in starts} == {Evaluation(Job.build(run_config), lambda: None).text}
    # By which checkpoints are kept.
    noted = [(path / "checkpoints/4/metrics/metrics").read_text() for path in (workdir, whole)]
    assert noted[0] == noted[1]


def without_times(line):
    times = ("tokens_per_second", "mfu", "step_seconds", "data_wait_fraction")
    return {name: value for name, value in line.items() if name not in times}


@contextlib.contextmanager
def handled(number, by):
    """A signal has this handler, as if a shell had set it, until the end, and still has it then."""
    before = signal.signal(number, by)
    try:
        yield
        assert signal.getsignal(number) is by
    finally:
        signal.signal(number, before)


def heard(number):
    with Stop() as stop:
        assert not stop.came()
        signal.raise_signal(number)
        return stop.came()


@pytest.mark.parametrize(
    "number, before, expected",
    [
        (signal.SIGTERM, signal.SIG_DFL, True),
        (signal.SIGHUP, signal.SIG_DFL, True),
        (signal.SIGHUP, signal.SIG_IGN, False),
        (signal.SIGINT, signal.SIG_IGN, False),  # as in a shell's background
    ],
)
def test_signals_are_taken_for_sigterm_unless_they_are_ignored(number, before, expected):
    with handled(number, before):
        assert heard(number) == expected


def test_the_first_interrupt_is_taken_for_sigterm(capfd):
    """The second interrupt acts as usual."""
    said = "\nCtrl-C: the run saves itself and ends after this step; once more ends it at once\n"
    with handled(signal.SIGINT, signal.default_int_handler), Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.came() and capfd.readouterr().err == said
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_another_thread_hears_no_signal():
    def elsewhere():
        with Stop() as stop:
            return stop.came()

    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        assert not threads.submit(elsewhere).result()
