"""The runs of a sweep. A run is a dict: keys with a dot are config keys; a few words without one are labels for reports."""

import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import config_dict

from jaxlinear import config as configs
from jaxlinear.errors import UserError
from jaxlinear.models import flops

# architecture and size name what is compared; budget is in FLOPs, counted "with" or "without" the logits (budget_counts).
LABELS = ("architecture", "size", "budget", "budget_counts")
_ROUNDING = 0.05  # how far whole steps may be from the number of tokens that a ladder asks for

Run = dict[str, Any]


def grid(axes: Mapping[str, Sequence[Any]]) -> list[Run]:
    """Every combination of the values of each key; the last key varies fastest."""
    for key, values in axes.items():
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise UserError(f"{key}: {values!r} is one value; a grid needs a list of values")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def product(*lists: Sequence[Run]) -> list[Run]:
    """Every combination of one run from each list. Where two set the same key, the later list's value counts."""
    return [{key: value for run in runs for key, value in run.items()} for runs in itertools.product(*lists)]


def ladder(architectures: Mapping[str, Sequence[str | Run]]) -> list[Run]:
    """The sizes of each architecture: names of presets, or dicts of config keys."""
    runs: list[Run] = []
    for architecture, sizes in architectures.items():
        for size in sizes:
            changes: Run = {"model.preset": size, "size": size} if isinstance(size, str) else dict(size)
            runs.append({"architecture": architecture, **changes})
    return runs


def fixed_tokens(
    config: config_dict.ConfigDict, sizes: Sequence[Run], tokens: Sequence[float], **options: Any
) -> list[Run]:
    """Each size with each number of tokens. ``options`` may contain the ``warmup_fraction`` of ``isoflops``."""
    return [_lasting(config, size, count, f"{count:.4g} tokens", **options) for count in tokens for size in sizes]


def isoflops(
    config: config_dict.ConfigDict,
    sizes: Sequence[Run],
    budgets: Sequence[float],
    *,
    logits: bool = True,
    warmup_fraction: float | None = None,
) -> list[Run]:
    """Each size with each budget: as many steps as the budget allows (``models/flops.py``, forward and backward).

    Args:
      config: what all runs share; its batch size and sequence length give the tokens of a step.
      sizes: runs of ``ladder``.
      budgets: FLOPs.
      logits: whether the products with the output embedding count.
      warmup_fraction: also sets ``schedule.warmup_steps``, to this fraction of the run's steps.
    """
    runs = []
    for budget in budgets:
        for size in sizes:
            resolved = resolve(config, size)
            if resolved.model.vocab_size is None:
                raise UserError(
                    "an isoFLOP ladder counts the FLOPs of the logits: set model.vocab_size to that of the data"
                )
            per_token = flops.training_flops_per_token(
                configs.model_config(resolved), resolved.training.sequence_length, logits=logits
            )
            what = f"the budget of {budget:.4g} FLOPs"
            run = _lasting(config, size, budget / per_token, what, warmup_fraction=warmup_fraction)
            runs.append({**run, "budget": budget, "budget_counts": "with" if logits else "without"})
    return runs


def resolve(config: config_dict.ConfigDict, run: Run) -> config_dict.ConfigDict:
    """The resolved config of a run."""
    labels = [key for key in run if "." not in key]
    for label in labels:
        if label not in LABELS:
            near = difflib.get_close_matches(label, [*LABELS, *configs.KEYS], n=1, cutoff=0.0)
            raise UserError(f"there is neither a config key nor a label {label!r}; did you mean {near[0]!r}?")
    changes = {key: value for key, value in run.items() if key not in LABELS}
    configs.check_known(list(changes))
    config = config.copy_and_resolve_references()
    for key, value in changes.items():
        section, name = key.split(".")
        try:
            config[section][name] = value
        except TypeError as error:
            raise UserError(f"{key}={value!r}: {error}") from error
    configs.forget_unread(config, changes)
    return configs.resolve(config)


def check_budget(run: Run, config: config_dict.ConfigDict) -> None:
    """Raises ``UserError`` if the run, whose resolved config this is, does not spend the budget of its label: a key
    combined with a ladder may change the tokens or FLOPs that its steps were based on."""
    if "budget" not in run or "budget_counts" not in run or config.model.vocab_size is None:
        return
    training, logits = config.training, run["budget_counts"] == "with"
    tokens = training.steps * training.batch_size * training.sequence_length
    model = configs.model_config(config)
    spent = tokens * flops.training_flops_per_token(model, training.sequence_length, logits=logits)
    if abs(spent / run["budget"] - 1) > _ROUNDING + 1e-9:
        raise UserError(
            f"{_labelled(run)}: the run needs {spent:.4g} FLOPs, but its budget is {run['budget']:.4g}; give keys "
            "that change the tokens or the FLOPs of a step to isoflops, in its sizes or its config, and not to what "
            "it returns"
        )


def names(runs: Sequence[Run]) -> list[str]:
    """A name for each run, which is also that of its directory: its labels, and the keys in which runs with the same labels
    differ. Two identical runs are refused."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_labelled(run), []).append(run)
    made = [_name(run, groups[_labelled(run)]) for run in runs]
    for name, count in ((name, made.count(name)) for name in made):
        if count > 1:
            raise UserError(f"{count} runs of the sweep are identical: {name}")
    return made


def _lasting(
    config: config_dict.ConfigDict, size: Run, tokens: float, what: str, *, warmup_fraction: float | None = None
) -> Run:
    """``size`` with the number of steps for ``tokens``."""
    resolved = resolve(config, size)
    if not resolved.evaluation.every_steps:
        raise UserError("a ladder compares held-out losses: set evaluation.every_steps; the end is always evaluated")
    per_step = resolved.training.batch_size * resolved.training.sequence_length
    steps = round(tokens / per_step)
    if abs(steps * per_step / tokens - 1) > _ROUNDING:
        raise UserError(
            f"{what} is {tokens / per_step:.2f} steps of {per_step} tokens for {_labelled(size) or size}; take more, or a "
            "smaller training.batch_size"
        )
    run = {**size, "training.steps": steps}
    if warmup_fraction is not None:
        run["schedule.warmup_steps"] = max(1, round(warmup_fraction * steps))
    return run


def _labelled(run: Run) -> str:
    parts = [_text(run[label]) for label in ("architecture", "size") if label in run]
    if len(parts) == 2 and parts[1].startswith(parts[0]):
        parts = parts[1:]  # a preset's name begins with its architecture
    if "budget" in run:
        parts.append(f"{run['budget']:.3g}flops".replace("+", ""))
    return "-".join(parts)


def _name(run: Run, alike: Iterable[Run]) -> str:
    alike = list(alike)
    keys = [key for key in run if "." in key and any(other.get(key) != run[key] for other in alike)]
    parts = [f"{key.split('.')[1]}={_text(run[key])}" for key in keys]
    name = "-".join(([_labelled(run)] if _labelled(run) else []) + parts) or "run"
    if name in (".", ".."):
        raise UserError(
            f"a run cannot be named {name!r}, since its directory would have that name; give it another label"
        )
    if len(name) > 200:
        raise UserError(f"the run's name is too long for a file name; give its size a label: {name}")
    return name


def _text(value: Any) -> str:
    text = "+".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
    return text.replace("/", "_").replace(" ", "_")
