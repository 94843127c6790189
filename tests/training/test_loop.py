"""Runs in this process: what they write, and that a stopped run resumes as if it had never been stopped."""

import concurrent.futures
import json
import logging
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
    assert {path.name for path in whole_run.iterdir()} == {
        *("checkpoints", "config.json", "data.json", "lock", "metrics.jsonl", "starts.jsonl", "tokenizer_info.json")
    }
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


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(run_config, whole_run, tmp_path):
    workdir = tmp_path / "run"
    run_config.training.steps = 4
    assert train(run_config, workdir) == FINISHED
    with (workdir / metrics.FILE).open("a") as file:  # logged after the checkpoint, and a truncated line
        file.write('{"step": 5, "loss": 0.0}\n{"step": 6, "lo')
    run_config.training.steps = 8
    assert train(run_config, workdir) == FINISHED
    assert tiny.losses(workdir) == tiny.losses(whole_run)
    mesh = tiny.mesh()
    tiny.assert_equal(tiny.restored(workdir, run_config, mesh), tiny.restored(whole_run, run_config, mesh))

    before = tiny.files(workdir)
    run_config.evaluation.batches += 1  # its config.json still says what it was judged by
    assert train(run_config, workdir) == FINISHED  # nothing is left to do
    assert tiny.files(workdir) == before


def test_held_out_losses_of_other_text_are_warned_of(run_config, tmp_path, caplog):
    workdir = tmp_path / "run"
    run_config.evaluation.every_steps = 1
    for steps, batches, said in ((1, 1, False), (2, 2, True), (3, 2, False)):
        run_config.training.steps, run_config.evaluation.batches = steps, batches
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert train(run_config, workdir) == FINISHED
        assert ("held-out losses from here on are of other text" in caplog.text) == said
    assert workdirs.heldout_changes(workdirs.read_starts(workdir)) == [1]


@pytest.mark.parametrize("devices, sizes", [(8, {"fsdp": 4, "tensor": 2}), (1, {})])
def test_a_checkpoint_restores_on_another_mesh(run_config, whole_run, devices, sizes):
    state = tiny.restored(whole_run, run_config, tiny.mesh(devices, **sizes))
    tiny.assert_equal(state, tiny.restored(whole_run, run_config, tiny.mesh(8, data=8)))
    kernel = state.parameters["stacks"][0]["blocks"][0]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // devices


def test_evaluation_chooses_the_checkpoints_to_keep(run_config, tmp_path):
    run_config.training.steps = 6
    run_config.checkpoint.update({"every_steps": 1, "keep_newest": 1, "keep_best": 1})
    run_config.evaluation.update({"every_steps": 3, "batches": 0})
    run_config.logging.every_steps = 100
    workdir = tmp_path / "run"
    assert train(run_config, workdir) == FINISHED
    first, logged, last = metrics.read(workdir)
    assert logged["step"] == 6 and set(logged) == KEYS
    assert set(first) == set(last) == {"step", "heldout_loss", "heldout_bits_per_byte"}
    assert (first["step"], last["step"]) == (3, 6) and first["heldout_loss"] > last["heldout_loss"] > 1
    split = data.read_manifest(run_config.data.path).splits["heldout"]
    expected = last["heldout_loss"] / np.log(2) * split.tokens / split.bytes
    assert last["heldout_bits_per_byte"] == pytest.approx(expected)
    assert Checkpoints(workdir).steps() == [6]


@pytest.mark.parametrize("batches, microbatches", [(0, 1), (2, 1), (2, 2), (0, 4)])
def test_the_heldout_loss_is_the_mean_over_the_tokens(tiny_config, tmp_path, monkeypatch, batches, microbatches):
    """Not over batches, since the last one has fewer tokens; and on the dataset that is named for it. Here, a token's loss
    is its id. No more rows are on the devices at once than in training."""
    (tmp_path / "text.txt").write_text("\n".join(f"{i} plus {i} is {2 * i}" for i in range(900)))
    heldout_path = str(tmp_path / "data")
    options = {"tokenizer": "bytes", "document_separator": "\n", "block_length": 64, "workers": 1}
    split = data.prepare(str(tmp_path / "text.txt"), heldout_path, heldout_fraction=0.05, **options).splits["heldout"]
    config = tiny_config.copy_and_resolve_references()
    config.data.heldout_path = heldout_path
    rows = 8 * microbatches
    config.training.update({"batch_size": rows, "microbatches": microbatches})
    config.evaluation.update({"every_steps": 1, "batches": batches})
    evaluation = Evaluation(Job.build(config), lambda: None)

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
    bits = targets.mean() / np.log(2) * split.tokens / split.bytes
    assert found["heldout_bits_per_byte"] == pytest.approx(bits, rel=1e-6)


def test_losses_are_told_apart_by_what_they_are_of(tiny_config, tiny_dataset, tmp_path):
    config = tiny_config.copy_and_resolve_references()
    config.evaluation.every_steps = 1
    changed = shutil.copytree(tiny_dataset, tmp_path / "changed")
    manifest = json.loads((changed / "manifest.json").read_text())
    manifest["splits"]["heldout"]["bytes"] += 1
    (changed / "manifest.json").write_text(json.dumps(manifest))
    texts = []
    for path, batches in (
        (tiny_dataset, 2),
        (shutil.copytree(tiny_dataset, tmp_path / "moved"), 2),
        (changed, 2),
        (changed, 0),
    ):
        config.data.heldout_path, config.evaluation.batches = str(path), batches
        texts.append(Evaluation(Job.build(config), lambda: None).text)
    assert texts[0] == texts[1] and len(set(texts)) == 3


def test_a_dataset_that_is_replaced_while_a_run_is_evaluated_on_it_is_refused(tiny_config, tiny_dataset, tmp_path):
    config = tiny_config.copy_and_resolve_references()
    replaced = shutil.copytree(tiny_dataset, tmp_path / "replaced")
    config.data.heldout_path, config.evaluation.every_steps = str(replaced), 1
    evaluation = Evaluation(Job.build(config), lambda: None)
    manifest = json.loads((replaced / "manifest.json").read_text())
    manifest["splits"]["heldout"]["bytes"] += 1
    (replaced / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"the dataset in {replaced} was replaced by a new one while the run was"):
        evaluation({})


def test_a_run_is_evaluated_at_its_end(run_config):
    run_config.evaluation.every_steps = 3
    assert [step for step in range(1, 9) if heldout.is_due(run_config, step)] == [3, 6, 8]
    run_config.evaluation.every_steps = 0
    assert not heldout.is_due(run_config, 8)


def test_batches_are_those_of_the_weights_and_the_seed(tiny_config, tiny_dataset, tmp_path):
    paths = {str(tiny_dataset): 3.0, str(shutil.copytree(tiny_dataset, tmp_path / "copy")): 1.0}
    config = tiny_config.copy_and_resolve_references()
    config.data.path, config.training.seed = ",".join(f"{path}={weight}" for path, weight in paths.items()), 5
    made = Job.build(config).batches
    expected = data.TrainBatches(paths, batch_size=8, sequence_length=32, seed=5)
    for step in (0, 7):
        for name, values in expected[step].items():
            np.testing.assert_array_equal(made[step][name], values, err_msg=name)
    alike = data.TrainBatches(dict.fromkeys(paths, 1.0), batch_size=8, sequence_length=32, seed=5)
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
    run_config.training.steps = 10
    item = workdir / DIRECTORY / "8" / damaged
    file = max((path for path in item.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    for place in range(0, len(content), max(1, len(content) // 32)):  # some of the file may be unused
        content[place] ^= 1
    file.write_bytes(content)
    before = tiny.files(workdir / DIRECTORY) | {metrics.FILE: (workdir / metrics.FILE).read_bytes()}
    with pytest.raises(UserError, match=rf"the checkpoint {workdir}/checkpoints/8 cannot be read .* from step 6$"):
        train(run_config, workdir)
    assert tiny.files(workdir / DIRECTORY) | {metrics.FILE: (workdir / metrics.FILE).read_bytes()} == before


def test_a_checkpoint_of_another_run_is_refused(run_config, whole_run, tmp_path, caplog):
    """This may be one that was copied into the directory, or any, if what identifies the run is missing."""
    workdir = shutil.copytree(whole_run, tmp_path / "run")
    run_config.training.steps = 10
    config = workdir / "config.json"
    text = config.read_text()
    other = run_config.copy_and_resolve_references()
    other.training.seed = 5
    config.write_text(text.replace('"seed": 0', '"seed": 5'))  # so the checkpoints are not of this run
    before = tiny.files(workdir)
    message = (
        rf"the checkpoint of step 8 was copied from another run: {workdir} holds another run: training.seed is 0 there"
    )
    with pytest.raises(UserError, match=rf"^{message} and 5 in this config"):
        train(other, workdir)
    config.unlink()
    message = rf"{workdir} has checkpoints but no config.json, .* \(checkpoints/8/meta/metadata has it"
    with pytest.raises(UserError, match=rf"^{message}"):
        train(other, workdir)
    left = tiny.files(workdir)
    assert left == {name: content for name, content in before.items() if name in left}
    assert set(before) - set(left) == {"config.json"}

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
    assert tiny.losses(workdir) == tiny.losses(whole_run)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["6", "8"]
    mesh = tiny.mesh()
    tiny.assert_equal(tiny.restored(workdir, run_config, mesh), tiny.restored(whole_run, run_config, mesh))


def test_a_trace_is_taken_of_the_steps_that_are_named(run_config, tmp_path):
    """Even if the run ends before the trace would."""
    run_config.training.steps = 3
    run_config.logging.profile_step, run_config.logging.profile_steps = 2, 5
    assert train(run_config, tmp_path / "run") == FINISHED
    traces = list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 1000


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
    owed = [(line["step"], line.get("evaluation_owed", False)) for line in workdirs.read_starts(workdir)]
    assert owed == [(0, False), (2, True), (2, True), (4, True)]
    # By which checkpoints are kept.
    noted = [(path / "checkpoints/4/metrics/metrics").read_text() for path in (workdir, whole)]
    assert noted[0] == noted[1]


def without_times(line):
    times = ("tokens_per_second", "mfu", "step_seconds", "data_wait_fraction")
    return {name: value for name, value in line.items() if name not in times}


@pytest.mark.parametrize("before, heard", [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_sighup_is_taken_for_sigterm_unless_it_is_ignored(before, heard):
    at_first = signal.signal(signal.SIGHUP, before)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.came() == heard
        assert signal.getsignal(signal.SIGHUP) is before
    finally:
        signal.signal(signal.SIGHUP, at_first)


def test_the_first_interrupt_is_taken_for_sigterm(capfd):
    """The second interrupt acts as usual; if interrupts are ignored, as in a shell's background, they stay ignored."""
    at_first = signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may be in the background themselves
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.came()
            assert capfd.readouterr().err == (
                "\nCtrl-C: the run saves itself and ends after this step; once more ends it at once\n"
            )
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with Stop() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.came()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, at_first)


def test_sigterm_is_heard_within_a_run_alone():
    before = signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        assert not stop.came()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.came()
    assert signal.getsignal(signal.SIGTERM) is before

    def elsewhere():
        with Stop() as stop:
            return stop.came()

    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        assert not threads.submit(elsewhere).result()
