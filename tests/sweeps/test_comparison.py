"""Several architectures on the same axes, from runs with known laws; the report on them; the runs of a sweep."""

import dataclasses
import itertools
import json
import math
import shutil
import signal
import types

import numpy as np
import pytest
from ml_collections import config_dict

from jaxlinear.errors import UserError
from jaxlinear.sweeps.laws import comparison, optimum, plots, points, report
from jaxlinear.sweeps.laws.parametric import Law
from jaxlinear.sweeps.sweep import prepare
from jaxlinear.training import heldout
from tests.evaluation import test_html
from tests.sweeps import stand_in

LAWS = {
    "slow": Law(E=1.8, A=400.0, B=1500.0, alpha=0.34, beta=0.36),
    "fast": Law(E=1.8, A=300.0, B=1300.0, alpha=0.34, beta=0.36),
}
BUDGETS = (1e15, 4e15, 1.6e16)


def ladder(budgets=BUDGETS, sizes=5, noise=0.0005):
    """Runs at the optimum's size and around it; a third of the parameters are embeddings, a quarter of the FLOPs logits."""
    random, made = np.random.default_rng(0), []
    for (name, law), budget in itertools.product(LAWS.items(), budgets):
        for size in optimum.compute_optimal(law, budget).parameters * np.geomspace(0.25, 4, sizes):
            tokens = budget / (6 * size)
            loss = float(law.loss(size, tokens) * np.exp(noise * random.standard_normal()))
            spent = dict(
                flops_per_token=6 * size, logits_flops_per_token=1.5 * size, budget=budget, budget_counts="with"
            )
            counts = dict(parameters=int(size), embedding_parameters=int(size / 3), tokens=int(tokens))
            made.append(points.Point(f"{name}-{budget:g}-{size:.0f}", name, loss=loss, **counts, **spent))
    return made


def fast():
    return [run for run in ladder() if run.architecture == "fast"]


@pytest.fixture(scope="module")
def compared():
    return comparison.compare(ladder(), replicates=50)


def test_the_laws_are_those_that_made_the_losses(compared):
    for name, law in LAWS.items():
        fit = compared.fits["with"][name]
        assert (fit.cost.kappa, fit.cost.gamma) == pytest.approx((6, 1), rel=1e-4)
        assert abs(fit.constant("E").value - law.E) < 0.06
        for constant in ("alpha", "beta"):
            found = fit.constant(constant)
            assert found.low <= getattr(law, constant) <= found.high and found.high - found.low < 0.05
        best = optimum.compute_optimal(law, 4e15)
        assert fit.optimum(4e15)["parameters"].value == pytest.approx(best.parameters, rel=0.03)
        assert fit.optimum(4e15)["loss"].value == pytest.approx(best.loss, rel=0.003)
        assert fit.profile is not None and fit.profile.best.power == pytest.approx(fit.exponents()[0].value, abs=0.02)
        assert fit.undetermined() == [] and fit.refusals == []


def test_without_embeddings_parameters_and_flops_are_fewer(compared):
    for name, law in LAWS.items():
        fit = compared.fits["without"][name]
        assert fit.cost.per_token(1e6) == pytest.approx(4.5 * 1.5e6, rel=1e-3), "3/4 of 6 N for 2/3 of N"
        assert fit.law is not None and pytest.approx(law.A * (2 / 3) ** law.alpha, rel=0.15) == fit.law.best.A
        assert fit.profile is None, "the budgets counted the logits"
    assert compared.budgets["with"] == [*BUDGETS, 1.6e17]
    assert compared.budgets["without"] == pytest.approx([7.5e14, 3e15, 1.2e16, 1.2e17], rel=1e-3)


@pytest.mark.parametrize("least", [10**16, 10**20])
def test_without_a_ladder_the_middle_budget_is_between_what_runs_spent(least):
    """Formulas give FLOPs as whole numbers: their products exceed 64 bits, and at 1e20 so do the numbers themselves."""
    run = dataclasses.replace(ladder()[0], budget=None, budget_counts=None, tokens=10**9, logits_flops_per_token=0)
    runs = [dataclasses.replace(run, flops_per_token=times * least // 10**9) for times in (1, 100)]
    found = comparison.compare(runs, replicates=20).budgets["with"]
    assert found == pytest.approx([least, 10 * least, 100 * least, 1000 * least], rel=1e-9)
    assert {type(run.flops("with")) for run in runs} == {float}


def test_what_one_is_worth_in_the_others_flops(compared):
    assert compared.baseline == "slow"
    truth = optimum.compute_multiplier(LAWS["fast"], optimum.Cost(), LAWS["slow"], optimum.Cost(), 4e15)
    found = compared.multiplier("with", "fast", 4e15)
    assert truth > 1.5 and found.low <= truth <= found.high and found.value == pytest.approx(truth, rel=0.03)
    for counts in ("with", "without"):  # each by its own count
        assert compared.multiplier(counts, "slow", 4e15).value == pytest.approx(1)


def test_each_architecture_is_judged_by_what_its_own_parameters_cost():
    """One costs 6 N per token, the other 20 N^0.97. The optimum for a budget is compared with a search over sizes."""
    costs = {"slow": (6.0, 1.0), "fast": (20.0, 0.97)}

    def flops_of(run):
        kappa, gamma = costs[run.architecture]
        return kappa * run.parameters**gamma

    runs = [dataclasses.replace(run, flops_per_token=flops_of(run), budget=None) for run in ladder(noise=0)]
    found = comparison.compare(runs, replicates=1)

    def searched(name, flops):
        kappa, gamma = costs[name]
        sizes = np.geomspace(1e5, 1e10, 100_001)
        losses = found.fits["with"][name].law.best.loss(sizes, flops / (kappa * sizes**gamma))
        return losses.min(), sizes[losses.argmin()]

    for name, fit in found.fits["with"].items():
        sizes = {flops: fit.optimum(flops)["parameters"].value for flops in (1e15, 1e16)}
        for flops, size in sizes.items():
            assert size == pytest.approx(searched(name, flops)[1], rel=1e-3)
        of_n, of_d = fit.exponents()
        assert of_n.value == pytest.approx(math.log10(sizes[1e16] / sizes[1e15]))
        assert of_n.value * costs[name][1] + of_d.value == pytest.approx(1, rel=1e-4)
    worth = found.multiplier("with", "fast", 1e15).value
    assert searched("slow", worth * 1e15)[0] == pytest.approx(searched("fast", 1e15)[0], rel=1e-6)


def test_of_runs_that_differ_in_nothing_else_the_best_counts():
    """Those of another architecture, size or number of tokens are kept, and one that diverged never wins."""
    runs = ladder()
    worse = [dataclasses.replace(run, name="worse", loss=run.loss + 1) for run in runs]
    assert points.best([*worse, *runs]) == runs
    changes = ({"architecture": "other"}, {"tokens": 2 * runs[0].tokens}, {"parameters": 2 * runs[0].parameters})
    others = [dataclasses.replace(worse[0], **change) for change in changes]
    assert points.best([runs[0], *others]) == [runs[0], *others]
    for loss in (math.nan, math.inf, -math.inf):
        broken = [dataclasses.replace(run, name=f"broken-{run.name}", loss=loss) for run in runs[:2]]
        assert points.best([*broken, *runs]) == points.best([*runs, *broken]) == [*runs, *broken]


def test_architectures_are_resampled_apart():
    """The same runs under two names have the same law, but different replicates of it."""
    again = [dataclasses.replace(run, architecture="again") for run in fast()]
    first, second = comparison.compare([*fast(), *again], replicates=3).fits["with"].values()
    assert first.law.best == second.law.best and first.profile.best == second.profile.best
    for one, other in ((first.law, second.law), (first.profile, second.profile)):
        assert not set(one.replicates) & set(other.replicates)


def test_runs_that_diverged_or_are_not_finished_are_left_out_and_named(tmp_path, compared):
    runs = ladder()
    broken = dataclasses.replace(runs[0], name="broken-1", loss=math.nan)
    lone = dataclasses.replace(runs[0], name="broken-2", architecture="lone", loss=math.inf)
    unfinished = ["late (running)", "lost (failed)"]
    found = comparison.compare([broken, lone, *runs], replicates=50, unfinished=unfinished)
    left_out = {"diverged": ["broken-1", "broken-2"], "unfinished": unfinished}
    assert (found.baseline, compared.diverged) == ("slow", [])
    assert comparison.to_json(found) == comparison.to_json(compared) | left_out
    remarks = {
        "left out because their loss is not finite: broken-1, broken-2",
        "left out because they are not finished: late (running), lost (failed)",
    }
    text = report.text(found)
    assert text.startswith(f"{report.text(compared)}\n\n")
    assert set(text.removeprefix(f"{report.text(compared)}\n\n").split("\n\n")) == remarks
    values, *_, page = report.write(found, tmp_path, title="A ladder")
    assert all(remark in page.read_text() for remark in remarks)
    assert json.loads(values.read_text()).items() >= left_out.items()


@pytest.mark.parametrize(
    "architectures, baseline, message",
    [
        (["lone"], None, "^there are no runs to compare whose loss is finite$"),
        ([], None, "^there are no runs to compare$"),
        (["lone", "slow", "fast"], "lone", "no run of the baseline 'lone' has a finite loss; .* are slow, fast"),
        (["slow", "fast"], "faster", "no architecture 'faster' .* are slow, fast"),
    ],
)
def test_refusals(architectures, baseline, message):
    runs = [dataclasses.replace(ladder()[0], architecture="lone", loss=math.inf), *ladder()]
    with pytest.raises(UserError, match=message):
        comparison.compare([run for run in runs if run.architecture in architectures], baseline=baseline)


def test_too_few_runs_have_no_law():
    found = comparison.compare(ladder(budgets=(1e15,), sizes=4), replicates=20).fits["with"]["fast"]
    assert found.law is None and found.profile is not None
    assert found.refusals == ["the parametric law needs at least 6 runs, not 4"]


def test_few_runs_have_a_law_without_intervals():
    """The law passes nearly through all of them, and so through resampled ones: replicates add no information."""
    slow = [run for run in ladder() if run.architecture == "slow"]
    found = comparison.compare([*slow[:8], *fast()[:7]], replicates=20)
    many, few = (found.fits["with"][name] for name in LAWS)
    assert len(many.law.replicates) == 20 and np.isfinite(many.constant("alpha")).all()
    assert math.isfinite(few.law.best.alpha) and np.isnan(few.constant("alpha")[1:]).all()
    times, *bounds = found.multiplier("with", "fast", 1e16)
    assert math.isfinite(times) and np.isnan(bounds).all()
    remark = "fast: 7 runs are too few for intervals; 8 or more give them"
    assert remark in report.text(found) and "slow: 8 runs" not in report.text(found)
    assert comparison.to_json(found)["counts"]["with embeddings"]["fast"]["law"]["alpha"][1:] == [None, None]


def test_where_flops_fall_as_sizes_grow_the_others_are_reported():
    """For example, mixtures whose tokens use fewer of more experts."""
    size = min(run.parameters for run in ladder())
    sparse = []
    for run in fast():
        falling = 6 * size * (size / run.parameters) ** 0.2
        changes = {"architecture": "sparse", "flops_per_token": falling, "logits_flops_per_token": 0}
        sparse.append(dataclasses.replace(run, **changes))
    found = comparison.compare([*ladder(), *sparse], replicates=20)
    fit = found.fits["with"]["sparse"]
    assert fit.law is None and fit.profile is not None and found.fits["with"]["fast"].law is not None
    assert "sparse: FLOPs per token grow as N^-0.2, so no size is the best" in report.text(found)


def test_constants_that_the_runs_do_not_tell():
    """The losses depend on nothing."""
    random, runs = np.random.default_rng(0), fast()

    def with_losses(runs, loss):
        return [dataclasses.replace(run, loss=float(loss(run))) for run in runs]

    found = comparison.compare(with_losses(runs, lambda _: 3 + 0.01 * random.standard_normal()), replicates=30)
    assert {"alpha", "beta"} <= set(found.fits["with"]["fast"].undetermined())
    assert "fast: these runs do not determine" in report.text(found)
    # Nor do seven runs whose losses rise with N. Their constants have no intervals.
    few = comparison.compare(with_losses(runs[:7], lambda run: 2 + 0.1 * math.log(run.parameters / 1e3)))
    few = few.fits["with"]["fast"]
    assert np.isnan(few.constant("alpha")[1:]).all() and "alpha" in few.undetermined()
    # Losses that fall to nothing say that E is small, but not what it is.
    law, wobble = dataclasses.replace(LAWS["fast"], E=0.0), itertools.cycle([0.992, 1.02, 0.988])
    falling = with_losses(runs, lambda run: law.loss(run.parameters, run.tokens) * next(wobble))
    assert "E" in comparison.compare(falling, replicates=30).fits["with"]["fast"].undetermined()


def test_a_sweep_with_ladders_of_both_counts_has_both_profiles():
    """Each profile is made from the runs whose budgets were counted in that way."""
    others = [dataclasses.replace(run, name=f"{run.name}-", tokens=run.tokens + 1000) for run in ladder()]
    runs = ladder() + [dataclasses.replace(run, budget_counts="without") for run in others]
    compared = comparison.compare(runs, replicates=20)
    profiles = [compared.fits[counts]["fast"].profile.best for counts in points.COUNTS]
    sizes = [[parabola.best for parabola in profile.parabolas] for profile in profiles]
    assert sizes[1] == pytest.approx(np.multiply(2 / 3, sizes[0]), rel=1e-3), "a third are embeddings"
    drawn = plots.figures(compared)
    assert [name for name in drawn if name.startswith("isoflop")] == ["isoflop_with", "isoflop_without"]
    for counts in ("with", "without"):
        figure, caption = drawn[f"isoflop_{counts}"]
        assert f"({counts} embeddings)" in caption
        shown = [len(dots.get_offsets()) for panel in figure.axes for dots in panel.collections]
        assert [count for count in shown if count > 1] == [5] * 6, "two architectures at three budgets"


def test_the_report(compared, tmp_path):
    """And the terminal shows the same."""
    written = report.write(compared, tmp_path / "out", title="A ladder")
    drawn = [f"{name}.{kind}" for name in ("loss", "optimum", "residuals", "isoflop") for kind in ("svg", "png")]
    assert [path.name for path in written] == ["scaling.json", *drawn, "scaling.html"]
    assert all(path.stat().st_size > 1000 for path in written)
    read = test_html.assert_self_contained(written[-1].read_text())
    for text in ("A ladder", "fast-4e+15-", "IsoFLOP profiles (with embeddings)", "The best use of 1.6e+17 FLOPs"):
        assert text in read.text
    values = json.loads(written[0].read_text())
    fast = values["counts"]["with embeddings"]["fast"]
    assert fast["law"]["alpha"] == list(compared.fits["with"]["fast"].constant("alpha"))
    assert [found["flops"] for found in fast["optimum"]] == [*BUDGETS, 1.6e17]
    assert fast["optimum"][1]["baseline_flops_multiplier"][0] > 1.5
    assert len(fast["isoflop"]["minima"]) == 3 and all(minimum["inside"] for minimum in fast["isoflop"]["minima"])
    assert len(fast["runs"]) == 15
    for path in report.write(compared, tmp_path / "again", title="A ladder"):
        assert path.suffix == ".png" or path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    lines = report.text(compared).splitlines()
    assert lines[0] == "counted with embeddings" and lines[2].split("  ")[0] == "architecture"
    assert sum(line.startswith("fast ") for line in lines) == 2 * (1 + 4)


@pytest.mark.parametrize(
    "values, texts",
    [
        ([0.3412, 12.34, 1234.0, 5.6e6, 7.8e9, 2e12, math.nan, math.inf], "0.341 12.3 1.23k 5.6M 7.8G 2T ? ∞"),
        ([999.4, 999.9, 999.4e3, 999.9e6, 999.9e9, 999.9e12], "999 1k 999k 1G 1T 1e+15"),
    ],
)
def test_numbers_for_people(values, texts):
    assert " ".join(map(report._number, values)) == texts


@pytest.fixture(scope="module")
def sweep(tiny_dataset, tmp_path_factory):
    """A finished run and one that failed, of ``stand_in``."""
    directory = tmp_path_factory.mktemp("sweep")
    plan = [{"architecture": "small", "training.seed": seed} for seed in (0, stand_in.BROKEN)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(stand_in.ROOT)
        patch.setenv("PYTHONPATH", str(stand_in.ROOT))
        assert stand_in.sweep(directory, tiny_dataset, plan) == 1
    return directory


def test_the_runs_of_a_sweep(sweep):
    refused(r"1 of the 2 runs in .* are not finished, small-seed=13 \(failed\) among them", sweep)
    (point,) = points.sweep_points(sweep, partial=True)
    assert (point.name, point.architecture, point.loss) == ("small-seed=0", "small", 5.5)
    assert point.tokens == stand_in.STEPS * 8 * 1024
    assert point.embedding_parameters == 384 * 8 and point.size("without") == point.parameters - 384 * 8
    assert point.logits_flops_per_token == 3 * 2 * 8 * 384
    assert point.flops("with") - point.flops("without") == point.tokens * point.logits_flops_per_token


@pytest.mark.parametrize(
    "models, names",
    [
        ([{"width": 8}, {"width": 16}, {"pattern": ("hawk",) * 4}], ["hawk"] * 3),
        (
            [{"pattern": ("hawk", "hawk", "window")}, {"pattern": ("hawk", "window") * 3}, {}],
            ["2 hawk+window", "hawk+window", "hawk"],
        ),
        (
            [{"bias": True}, {"remat": "full"}, {"dtype": "float32"}, {"pattern": ("gla",), "bias": True}],
            [
                *(f"hawk bias={x}" for x in ("True dtype=bfloat16", "False dtype=bfloat16", "False dtype=float32")),
                "gla",
            ],
        ),
    ],
)
def test_runs_without_a_label_are_one_architecture_if_they_differ_in_numbers_alone(models, names):
    """Otherwise, a law would be fitted to the lower of their losses. Runs with a label are left out."""
    model = {"pattern": ("hawk",), "width": 8, "bias": False, "dtype": "bfloat16", "remat": "none"}
    given = [config_dict.ConfigDict(model | changes) for changes in [*models, {"bias": True, "remat": "all"}]]
    runs = [types.SimpleNamespace(labels={})] * len(models) + [types.SimpleNamespace(labels={"architecture": "mine"})]
    assert points._architectures(runs, given) == [*names, "mine"]


def finished(directory, dataset, plan):
    """A sweep whose runs ``stand_in`` trained in this process."""
    before = signal.getsignal(signal.SIGTERM)
    with prepare(directory, stand_in.config(dataset, steps=1, sequence_length=64), plan) as planned:
        for run in planned.runs:
            stand_in.train(str(run.files.config), str(run.files.workdir))
    signal.signal(signal.SIGTERM, before)
    return directory


def refused(message, directory, **options):
    with pytest.raises(UserError, match=message):
        points.sweep_points(directory, **options)


def rows(batch_size, batches, **changes):
    return {"training.batch_size": batch_size, "evaluation.batches": batches} | changes


LONG = {"training.sequence_length": 128}


@pytest.mark.parametrize(
    "plan",  # the first 1,024 tokens, twice; all of some 2,000
    [[rows(8, 2), rows(4, 4)], [rows(8, 2), rows(4, 2, **LONG)], [rows(8, 1000), rows(4, 1000), rows(4, 0)]],
)
def test_runs_of_other_batches_may_be_measured_on_the_same_text(tiny_dataset, tmp_path, plan):
    finished(tmp_path, tiny_dataset, plan)
    assert {point.loss for point in points.sweep_points(tmp_path)} == {5.5}


def test_losses_of_different_parts_of_a_text_are_refused(tiny_dataset, tmp_path):
    finished(tmp_path, tiny_dataset, [rows(8, 2), rows(4, 2)])
    refused(
        f"^the held-out losses are of different text: batch_size=8 has 1,024 tokens of {tiny_dataset}, "
        f"batch_size=4 has 512 tokens of {tiny_dataset}; train a sweep whose runs have the same data.heldout_path",
        tmp_path,
    )


def test_losses_of_finished_runs_may_be_those_of_their_evaluations(tiny_dataset, tmp_path, monkeypatch):
    """The evaluations are all of one text, whatever was measured during training."""
    finished(tmp_path, tiny_dataset, [rows(8, 2), rows(4, 2)])
    monkeypatch.setattr(points.Checkpoints, "fingerprint", lambda self, step: f"of {step}")
    lacks = "the run batch_size=8 has no report of its last checkpoint's loss: .*/runs/batch_size=8 --follow makes it"

    def report(batch_size, loss, tokens, checkpoint="of 1"):
        path = tmp_path / "runs" / f"batch_size={batch_size}" / "evaluations" / "1.json"
        path.parent.mkdir(exist_ok=True)
        lengths = [{"multiple": 2, "loss": 1.0, "tokens": 10}, {"multiple": 1, "loss": loss, "tokens": tokens}]
        found = {"perplexity": {"dataset": str(tiny_dataset), "lengths": lengths}}
        path.write_text(json.dumps(found | {"asked": {"checkpoint": checkpoint}}))

    refused(lacks, tmp_path, evaluated=True)
    report(8, 4.5, 900, "another of 1")  # after the run was set back
    report(4, 4.25, 900)
    refused(lacks, tmp_path, evaluated=True)
    report(8, 4.5, 900)
    assert [point.loss for point in points.sweep_points(tmp_path, evaluated=True)] == [4.5, 4.25]
    report(8, 4.5, 800)
    refused(r"different text: .*batch_size=8 has 800 tokens .*batch_size=4 has 900", tmp_path, evaluated=True)


def test_losses_of_a_dataset_that_was_prepared_again_are_refused(tiny_dataset, tmp_path):
    """A run records the text that it was evaluated on; before that was recorded, the present text is taken to be it."""
    finished(tmp_path, tiny_dataset, [rows(8, 2), rows(4, 4)])

    def record(batch_size, *texts):
        lines = [json.dumps({"step": 0, "heldout_text": f"{text} 2"}) for text in texts]
        (run,) = (tmp_path / "runs").glob(f"batch_size={batch_size}*")
        (run / "starts.jsonl").write_text("\n".join([*lines, ""]))

    record(8, "0" * 16, heldout.identity(tiny_dataset))
    assert len(points.sweep_points(tmp_path)) == 2
    record(4, "0" * 16)
    refused(rf"batch_size=4\S* has 1,024 tokens of {tiny_dataset} as it was before it was prepared again;", tmp_path)
    record(8, "0" * 16)
    assert len(points.sweep_points(tmp_path)) == 2


def test_losses_on_different_difficulties_of_a_task_are_refused(tmp_path):
    """Of as many tokens."""
    finished(tmp_path, "", [{"data.task": "parity"} | changes for changes in (rows(8, 2), rows(4, 2, **LONG))])
    refused(r"1,024 tokens of parity:length=64.*, .* 1,024 tokens of parity:length=128", tmp_path)


def test_losses_of_different_data_are_refused_and_of_a_copy_accepted(tiny_dataset, tmp_path):
    copy = shutil.copytree(tiny_dataset, tmp_path / "copy")
    finished(tmp_path / "sweep", tiny_dataset, [{"data.heldout_path": str(path)} for path in (tiny_dataset, copy)])
    assert len(points.sweep_points(tmp_path / "sweep")) == 1
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"seed": 1}))
    refused(rf"different text: .* tokens of {tiny_dataset}, .* tokens of {copy};", tmp_path / "sweep")


def test_the_program(start, sweep):
    refused = start("scaling", f"--workdir={sweep}")
    assert refused.returncode == 2 and refused.stderr.startswith("scaling.py: 1 of the 2 runs in ")
    done = start("scaling", f"--workdir={sweep}", "--partial")
    assert done.returncode == 0, done.stderr
    assert "small: the parametric law needs at least 6 runs, not 1" in done.stdout
    assert done.stdout.splitlines()[-1] == str(sweep / "scaling" / "scaling.html")
    assert (sweep / "scaling" / "loss.png").exists()
