"""Runs on a synthetic task: only answers count, measurements agree with the logits, and a stopped run resumes exactly."""

import jax
import numpy as np
import pytest

from jaxlinear import config as configs
from jaxlinear import evaluation
from jaxlinear.checkpoint import Checkpoints
from jaxlinear.data import tasks
from jaxlinear.errors import UserError
from jaxlinear.training import metrics
from jaxlinear.training.heldout import Evaluation
from jaxlinear.training.job import Job
from jaxlinear.training.loop import FINISHED, train
from jaxlinear.training.step import make_loss_step
from jaxlinear.training.task_evaluation import TaskEvaluator
from tests.training import tiny

TASK = "mqar:pairs=3:vocab_size=32"


def task_config(**changes):
    made = {
        **{"data__task": TASK, "training__steps": 4, "checkpoint__every_steps": 2, "evaluation__every_steps": 2},
        **{"evaluation__batches": 2, "evaluation__tasks": ("parity:length=6",), "evaluation__examples": 12},
        **{"logging__every_steps": 1, "logging__tensorboard": False},
    }
    return tiny.config(**made | changes)


@pytest.fixture(scope="module")
def task_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("task_run") / "run"
    assert train(task_config(), workdir) == FINISHED
    return workdir


def test_what_a_run_writes(task_run):
    assert not (task_run / "tokenizer_info.json").exists()
    lines = metrics.read(task_run)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    evaluated = [line for line in lines if "heldout_loss" in line]
    assert [set(line) for line in evaluated] == [
        {*("step", "heldout_loss", "heldout_accuracy", "heldout_solved"), "parity:length=6/accuracy"}
    ] * 2
    assert all(0 <= value <= 1 for line in evaluated for name, value in line.items() if "accuracy" in name)
    assert abs(evaluated[0]["heldout_loss"] - np.log(32)) < 1


def test_an_evaluation_of_a_checkpoint_gives_what_the_run_wrote(task_run):
    """On the same held-out examples: with those of another seed the losses would be others."""
    config = task_config()
    options = evaluation.Options(examples=config.evaluation.batches * config.training.batch_size)
    for line in metrics.read(task_run):
        if "heldout_loss" in line:
            report = evaluation.evaluate_run(evaluation.open_run(task_run, line["step"]), [TASK], options)
            (found,) = report[TASK]["difficulties"]
            assert found["loss"] == pytest.approx(line["heldout_loss"], rel=1e-5)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(task_run, tmp_path):
    for steps in (2, 4):
        assert train(task_config(training__steps=steps), tmp_path / "run") == FINISHED
    names, runs = (
        ("step", "loss", "heldout_loss", "heldout_accuracy", "parity:length=6/accuracy"),
        (tmp_path / "run", task_run),
    )
    logged = [[{name: line.get(name) for name in names} for line in metrics.read(run)] for run in runs]
    assert logged[0] == logged[1] and len(logged[0]) == 6
    tiny.assert_equal(*(tiny.restored(run, task_config(), tiny.mesh()) for run in runs))


def test_batches_are_the_training_examples_of_the_seed():
    job = Job.build(task_config(training__seed=5))
    expected = tasks.TaskBatches(job.trained_tasks, batch_size=tiny.BATCH, seed=5, split="train")[3]
    tiny.assert_equal(job.batches[3], expected)


def test_each_task_is_asked_by_itself_while_a_run_trains(monkeypatch):
    """The accuracy under a task's name is of that task's own examples, as many as the config says."""
    changes = {"training__batch_size": 16, "training__microbatches": 2, "training__seed": 5}
    config = task_config(evaluation__tasks=("parity:length=6+8",), **changes)
    evaluation, asked = Evaluation(Job.build(config), lambda: None), []

    def measure(parameters, made, *, examples, seed):
        asked.append(([tasks.text(task) for task in made], examples, seed))
        return {"loss": 0.1, "accuracy": made[0].length / 100, "solved": 0.2}

    monkeypatch.setattr(evaluation._answers, "measure", measure)
    assert evaluation({}) == {
        **{"heldout_loss": 0.1, "heldout_accuracy": 0.16, "heldout_solved": 0.2},
        **{"parity:length=6/accuracy": 0.06, "parity:length=8/accuracy": 0.08},
    }
    trained = [tasks.text(task) for task in tasks.training_set(TASK, tasks.Setting(tiny.LENGTH, 32))]
    assert asked == [(trained, 2 * 16, 5), (["parity:length=6"], 12, 5), (["parity:length=8"], 12, 5)]


def test_the_best_checkpoint_is_kept_by_its_heldout_loss(tmp_path, monkeypatch):
    losses = iter([2.0, 1.0, 3.0])
    monkeypatch.setattr(Evaluation, "__call__", lambda self, parameters: {"heldout_loss": next(losses)})
    config = task_config(model__pattern=("convolution",), model__num_layers=1, training__steps=3)
    config.evaluation.every_steps = 1
    config.checkpoint.update({"every_steps": 1, "keep_newest": 1, "keep_best": 1})
    assert train(config, tmp_path / "run") == FINISHED
    assert Checkpoints(tmp_path / "run").steps() == [2, 3]


def test_another_task_is_another_run(task_run):
    with pytest.raises(UserError, match=r"another run: data.task is 'mqar:pairs=3:vocab_size=32' there and"):
        train(task_config(data__task="mqar:pairs=2:vocab_size=32"), task_run)


def test_the_loss_is_that_of_the_answers_alone():
    """A step's loss is the mean over the answers; other tokens have weight 0 and so no gradient."""
    trainer = tiny.Trainer(tiny.config())
    made = tasks.training_set(TASK, tasks.Setting(tiny.LENGTH, 32))
    batch = tasks.TaskBatches(made, batch_size=tiny.BATCH, seed=0)[0]
    state = trainer.state()
    loss_step = make_loss_step(trainer.config, trainer.architecture, trainer.mesh)
    everything = dict(batch, targets=np.where(batch["targets"] < 0, batch["tokens"], batch["targets"]))
    nll, due = loss_step(state.parameters, trainer.place(everything))
    nll, answers = np.asarray(nll, np.float64), batch["targets"] >= 0
    assert due.all() and answers.sum() == 3 * tiny.BATCH
    of_answers, found = loss_step(state.parameters, trainer.place(batch))
    np.testing.assert_array_equal(found, answers)
    np.testing.assert_allclose(np.asarray(of_answers), np.where(answers, nll, 0), rtol=1e-6)
    _, values = trainer(state, batch)
    np.testing.assert_allclose(values["loss"], nll[answers].mean(), rtol=1e-5)
    assert abs(values["loss"] - nll.mean()) > 1e-3


@pytest.mark.parametrize("spec, likely", [("mqar:pairs=1+2:vocab_size=6", slice(3, 6)), ("parity", slice(2))])
def test_answers_are_those_of_the_logits(spec, likely):
    """Against NumPy on all logits, on one device and on eight, for a model whose answers are often right by chance: some
    tokens are likelier than the others."""
    config = tiny.config()
    architecture = tiny.described(configs.model_config(config))
    parameters = tiny.parameters(architecture, 1)
    parameters["embedding"][likely] *= 10
    made = tasks.training_set(spec, tasks.Setting(tiny.LENGTH, 32))
    found = [
        TaskEvaluator(config, architecture, mesh, batch_tokens=8 * tiny.LENGTH).measure(
            jax.device_put(parameters, architecture.shardings(mesh)), made, examples=20, seed=5
        )
        for mesh in (tiny.mesh(), tiny.mesh(8, data=2, sequence=2, tensor=2))
    ]
    model = architecture.bind(parameters)
    forward = jax.jit(lambda tokens, ids: model(tokens, ids)[0])
    right, solved, losses = [], [], []
    batches = tasks.TaskBatches(made, batch_size=8, seed=5, split="heldout")
    for step in range(3):
        batch = batches[step]
        logits = np.asarray(forward(batch["tokens"], batch["segment_ids"]), np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for row, targets in list(zip(log_p, batch["targets"], strict=True))[: 20 - 8 * step]:
            at = np.flatnonzero(targets >= 0)
            correct = row[at].argmax(-1) == targets[at]
            right += correct.tolist()
            solved.append(correct.all())
            losses += (-row[at, targets[at]]).tolist()
    for values in found:
        assert (values["examples"], values["answers"]) == (20, len(right))
        assert [values["accuracy"], values["solved"]] == pytest.approx([np.mean(right), np.mean(solved)])
        assert values["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert 0 < np.mean(right) < 1 and (0 < np.mean(solved) < np.mean(right) or spec == "parity")


def test_the_pass_key_trains_on_text(tiny_dataset, tmp_path):
    own, other = str(tiny_dataset), str(tiny.copy_of(tiny_dataset, tmp_path / "heldout"))
    changes = {"model__vocab_size": 384, "training__sequence_length": 128, "evaluation__tasks": ("passkey:length=128",)}

    def build(heldout="", **more):
        return Job.build(task_config(**changes | {"data__heldout_path": heldout} | more))

    job = build(data__task="passkey:digits=2", data__path=own)
    judged = build(other, data__task="passkey:digits=2", data__path=own)
    assert {task.dataset for task in judged.trained_tasks} == {own}
    assert {task.dataset for task in [*judged.evaluation_tasks()[1:], *judged.heldout_tasks()]} == {other}
    named = build(other, data__task=f"passkey:digits=2:dataset={own}")
    assert {task.dataset for task in named.heldout_tasks()} == {other}
    named = build(data__task=f"passkey:digits=2:dataset={own}:split=train", evaluation__tasks=())
    assert job.texts == named.texts == {own: 1.0}
    assert (job.batches[0]["targets"] >= 0).sum(axis=1).tolist() == [3] * tiny.BATCH
    assert job.trained_tasks[0].split == "train"
    assert [task.depth for task in job.evaluation_tasks()] == [-1, 0, 0.25, 0.5, 0.75, 1]
    assert {task.split for task in [*job.evaluation_tasks(), *job.heldout_tasks()]} == {"heldout"}


def test_one_text_is_named_once_or_twice(tiny_dataset, tmp_path):
    """A task that reads one dataset beside another would leave the other unread, and the run would record both."""
    changes = {"training__sequence_length": 128, "model__vocab_size": 384, "evaluation__tasks": ()}
    other = str(tiny.copy_of(tiny_dataset, tmp_path / "other"))
    changes["data__task"] = f"passkey:digits=2:dataset={other}"
    assert list(Job.build(task_config(data__path=f"{other}=0.5", **changes)).texts) == [other]
    with pytest.raises(UserError, match=f"dataset={other} has a dataset of its own, but data.path={tiny_dataset}"):
        Job.build(task_config(data__path=str(tiny_dataset), **changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data__task": "mqa"}, "there is no task 'mqa'; the tasks are mqar"),
        ({"data__path": "somewhere"}, "takes no text, but data.path=somewhere is set; leave one out"),
        ({"data__heldout_path": "somewhere"}, "takes no text, and neither do the evaluation.tasks, but"),
        ({"data__heldout_path": "nowhere", "evaluation__tasks": ("passkey",)}, "no tokenizer in nowhere"),
        ({"evaluation__batches": 0}, "data.task has no end; set it to 1 or more"),
        ({"data__task": "mqar:pairs=3:vocab_size=64"}, "mqar:pairs=3:vocab_size=64 has 64 tokens, more than"),
        ({"evaluation__tasks": ("speed",)}, "there is no task 'speed'"),
        ({"data__task": "passkey"}, "passkey: it needs text"),
        ({"data__task": "passkey", "data__path": "a=0.5,b=0.5"}, "one dataset at most, but data.path=a=0.5,b=0.5"),
        ({"mesh__sequence": 2, "evaluation__tasks": ("parity:length=6+15",)}, "examples of 15 tokens cannot be spread"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(UserError, match=message):
        Job.build(task_config(**changes))


def test_the_vocabulary_follows_the_task():
    job = Job.build(task_config(model__vocab_size=None, evaluation__tasks=()))
    assert (job.config.model.vocab_size, job.batches.vocab_size) == (128, 32)
