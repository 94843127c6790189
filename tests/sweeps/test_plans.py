"""The runs of a sweep, their names, and what is refused."""

import importlib.util
import pathlib
import re

import pytest

from jaxlinear import config as configs
from jaxlinear.errors import UserError
from jaxlinear.models import flops
from jaxlinear.sweeps import plans


def base(**changes):
    config = configs.default()
    config.model.vocab_size = 512
    config.training.update({"batch_size": 4, "sequence_length": 64})
    config.update(changes)
    return config


SIZES = plans.ladder({"hawk": ["hawk_6m"], "griffin": ["griffin_2m", {"model.preset": "griffin_6m", "size": "six"}]})
SEEDS = plans.grid({"training.seed": [0, 1]})


def test_a_grid_is_every_combination():
    runs = plans.grid({"optimizer.learning_rate": [1e-3, 2e-3], "training.seed": [0, 1]})
    assert [tuple(run.values()) for run in runs] == [(1e-3, 0), (1e-3, 1), (2e-3, 0), (2e-3, 1)]
    assert plans.names(runs)[1] == "learning_rate=0.001-seed=1"


def test_a_product_joins_runs():
    runs = plans.product(SIZES, plans.grid({"training.seed": [7]}))
    assert [run["training.seed"] for run in runs] == [7, 7, 7]
    assert [run["model.preset"] for run in runs] == ["hawk_6m", "griffin_2m", "griffin_6m"]


def test_names_are_those_of_sizes_budgets_and_what_differs():
    """Names are names of directories, inside that of the sweep."""
    runs = plans.isoflops(base(), SIZES[:1], [1e13, 2e13])
    patterns = [{"model.pattern": ("rg_lru", "gla"), "data.path": "a/b"}, {"model.pattern": ("gla",)}]
    labels = [{"architecture": "../..", "size": "a/b"}, {"size": "../../x"}, {"size": "7 B"}]
    for given, names in (
        (SIZES, "hawk_6m griffin_2m griffin-six"),
        (runs, "hawk_6m-1e13flops hawk_6m-2e13flops"),
        (plans.product(runs[:1], SEEDS), "hawk_6m-1e13flops-seed=0 hawk_6m-1e13flops-seed=1"),
        (patterns, "pattern=rg_lru+gla-path=a_b pattern=gla"),
        (labels, ".._..-a_b .._.._x 7_B"),
    ):
        assert plans.names(given) == names.split()


@pytest.mark.parametrize("logits", [True, False])
def test_isoflops_spend_the_budget(logits):
    budget, config = 2e13, base()
    for run in plans.isoflops(config, SIZES, [budget], logits=logits, warmup_fraction=0.1):
        resolved = plans.resolve(config, run)
        tokens = resolved.training.steps * 4 * 64
        spent = tokens * flops.training_flops_per_token(configs.model_config(resolved), 64, logits=logits)
        assert spent == pytest.approx(budget, rel=0.02)
        assert run["budget"] == budget and run["budget_counts"] == ("with" if logits else "without")
        assert resolved.schedule.warmup_steps == round(0.1 * resolved.training.steps)


@pytest.mark.parametrize("key, value", [("training.batch_size", 16), ("model.width", 320), ("training.steps", 150)])
def test_a_budget_that_a_run_does_not_spend_is_refused(key, value):
    """For example, if a product changes the values from which a ladder's steps were computed."""
    config = base()
    (run,) = plans.isoflops(config, SIZES[:1], [2e13])
    for right in (run, run | {"optimizer.learning_rate": 0.1}):
        plans.check_budget(right, plans.resolve(config, right))
    (changed,) = plans.product([run], plans.grid({key: [value]}))
    with pytest.raises(UserError, match=r"^hawk_6m-2e13flops: the run needs \S+ FLOPs, but its budget is 2e\+13"):
        plans.check_budget(changed, plans.resolve(config, changed))


def test_fixed_tokens():
    runs = plans.fixed_tokens(base(), SIZES, [25_600, 51_200], warmup_fraction=0.05)
    assert [run["training.steps"] for run in runs] == [100] * 3 + [200] * 3
    assert [run["schedule.warmup_steps"] for run in runs] == [5] * 3 + [10] * 3
    nearest = plans.fixed_tokens(base(), SIZES[:1], [20.6 * 256, 21.4 * 256], warmup_fraction=0.01)
    assert [(run["training.steps"], run["schedule.warmup_steps"]) for run in nearest] == [(21, 1), (21, 1)]
    names = [f"{size}-steps=100-warmup_steps=5" for size in ("hawk_6m", "griffin_2m", "griffin-six")]
    assert plans.names(runs)[:3] == names


PLAIN = dict(preset="", pattern=("gla",), num_layers=1, width=8, num_heads=1)
PLAIN = {f"model.{key}": value for key, value in PLAIN.items()}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: plans.resolve(base(), {"model.wdth": 3}), "key 'model.wdth'; did you mean 'model.width'?"),
        (lambda: plans.resolve(base(), {"architectur": "x"}), "label 'architectur'; did you mean 'architecture'?"),
        (lambda: plans.resolve(base(), {"training.steps": "many"}), "training.steps='many': "),
        (lambda: plans.resolve(base(), {"model.preset": "griffin_3m"}), "there is no preset 'griffin_3m'"),
        (lambda: plans.resolve(base(), SIZES[1] | {"training.steps": 0}), "training.steps is 0"),
        (lambda: plans.isoflops(base(), SIZES, [6e9]), " steps of 256 tokens for hawk_6m"),
        (lambda: plans.fixed_tokens(base(evaluation={"every_steps": 0}), SIZES, [25_600]), "compares held-out losses"),
        (lambda: plans.isoflops(base(model={"vocab_size": None}), [PLAIN], [1e13]), "set model.vocab_size"),
        (lambda: plans.names([SIZES[1], SIZES[1]]), "2 runs of the sweep are identical: griffin_2m"),
        (lambda: plans.grid({"model.preset": "griffin_2m"}), "a grid needs a list"),
        (lambda: plans.names([{"size": "."}, {"size": "x"}]), "a run cannot be named '.', "),
        (lambda: plans.names([{"size": ".."}, {"size": "x"}]), "a run cannot be named '..', "),
    ],
)
def test_refusals(make, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make()


def test_what_a_run_leaves_without_a_reader_is_not_set_in_it():
    config = base(model={"window": 64}, optimizer={"name": "muon", "muon_learning_rate": 0.05})
    hawk, griffin = ({"model.preset": name, "optimizer.name": "adamw"} for name in ("hawk_6m", "griffin_6m"))
    assert plans.resolve(config, hawk).model.window == 512  # from the preset
    config.model.mlp_expansion = 2.0
    assert plans.resolve(config, {"model.preset": "mamba2_6m"}).model.mlp_expansion == 3.0
    resolved = plans.resolve(config, griffin)
    assert (resolved.model.window, resolved.optimizer.muon_learning_rate) == (64, 0.02)
    with pytest.raises(UserError, match=r"^model.window=32 does nothing for model.pattern=rg_lru: only sliding_window"):
        plans.resolve(config, hawk | {"model.window": 32})


def test_the_quickstart_sweep():
    path = pathlib.Path(__file__).parents[2] / "configs" / "sweeps" / "quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart_sweep", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    runs = module.get_runs(config)
    assert len(set(plans.names(runs))) == 48 and plans.names(runs)[0] == "transformer-w24-5e11flops"
    for run in runs:
        resolved = plans.resolve(config, run)
        tokens = resolved.training.steps * 2 * 256
        spent = tokens * flops.training_flops_per_token(configs.model_config(resolved), 256)
        assert spent == pytest.approx(run["budget"], rel=0.01)
        assert resolved.training.steps >= 450
        assert len(resolved.model.pattern) in (1, 3)
