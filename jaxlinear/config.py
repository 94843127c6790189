"""Every key of a run's configuration: its default, its type and its meaning, in one place.

A config file in ``configs/`` defines ``get_config()``, which starts from ``default()``, sets the keys of the experiment and
returns the config; ``--config.section.key=VALUE`` changes one key on the command line. ``resolve`` fills in the values that
follow from a preset and refuses what cannot work; a run writes its result to ``config.json``.
"""

import difflib
import json
from collections.abc import Collection
from typing import Any, NamedTuple

from ml_collections import config_dict

from jaxlinear import config_checks
from jaxlinear.errors import UserError
from jaxlinear.models import presets
from jaxlinear.models.config import ModelConfig


class OrPreset(NamedTuple):
    """A default that a preset may replace: None until ``resolve`` has applied the preset."""

    value: Any


# A key whose default is a type instead of a value is None until a preset, the data or the user sets it.
KEYS: dict[str, tuple[Any, str]] = {
    "model.preset": ("", "A published size (jaxlinear/models/presets.py), which the keys below can change."),
    "model.pattern": (tuple, "Mixer names, repeated to a depth of num_layers."),
    "model.num_layers": (int, "Blocks, each with a mixer and a channel mixer."),
    "model.vocab_size": (int, "Rows of the embedding; by default the tokenizer's, rounded up to a multiple of 128."),
    "model.width": (int, "Channels of the residual stream, D."),
    "model.recurrent_width": (int, "Channels of the recurrent block; by default D."),
    "model.num_heads": (
        int,
        "Attention heads; also blocks of the RG-LRU's gates (the largest number up to it that divides recurrent_width). "
        "The default is 1 if no mixer of the pattern reads it.",
    ),
    "model.window": (OrPreset(1024), "Tokens that local attention sees, the present one included."),
    "model.key_value_heads": (
        OrPreset(1),
        "Key and value heads of attention, a divisor of num_heads; 1 is multi-query.",
    ),
    "model.context": (OrPreset(4096), "Tokens that full attention keeps when decoding."),
    "model.recurrent_heads": (
        OrPreset(0),
        "Heads of linear attention and the delta rule, H; also blocks of s5's states and groups of gateloop's norm. "
        "0 means num_heads, or D / K in hgrn2.",
    ),
    "model.key_width": (OrPreset(0), "Key channels per head of a recurrence, K; 0 means as in the mixer's paper."),
    "model.value_width": (OrPreset(0), "Value channels per head of a recurrence, V; 0 means as in the mixer's paper."),
    "model.time_step_rank": (
        OrPreset(0),
        "Rank of the projection to the time step in mamba and longhorn; 0 means D / 16, rounded up.",
    ),
    "model.feature_map": (
        OrPreset("identity"),
        "Feature map of linear_attention's queries and keys: identity, elu, relu, taylor (Based), rebased or hedgehog.",
    ),
    "model.discretization": (OrPreset("zero_order_hold"), "How s5 is discretised: zero_order_hold or bilinear."),
    "model.head_norm": (
        OrPreset("group"),
        "Norm of retention's heads: group, as in RetNet, or rms, with a learned scale.",
    ),
    "model.selection_norm": (
        OrPreset(False),
        "In mamba, apply RMS norms without weights to the input of the time step, B and C, as in Falcon-Mamba.",
    ),
    "model.output_gate": (
        OrPreset("auto"),
        "Gate on the normalised output of delta_net and gated_delta_net: silu (of a projection of x) or none; auto is "
        "none in delta_net and silu in gated_delta_net.",
    ),
    "model.gate_bias": (OrPreset(False), "Give kda's gate a bias, as in flash-linear-attention."),
    "model.negative_eigenvalues": (
        OrPreset(False),
        "Let the delta rule's beta reach 2, not 1, and its transition's eigenvalues -1, not 0 (arXiv:2411.12537).",
    ),
    "model.householders": (
        OrPreset(1),
        "Delta-rule updates per token, each with its own key, value and beta; they are the factors of its transition "
        "(DeltaProduct, arXiv:2502.10297).",
    ),
    "model.channel_mixer": (OrPreset("gated_mlp"), "What follows each mixer: gated_mlp, mixture_of_experts or none."),
    "model.mlp_expansion": (OrPreset(3.0), "Inner width of the MLP, as a multiple of D."),
    "model.mlp_activation": (OrPreset("gelu"), "Activation of the gate of an MLP or an expert: gelu or silu."),
    "model.experts": (OrPreset(0), "Number of experts in a mixture."),
    "model.experts_per_token": (OrPreset(0), "Number of experts that each token is routed to."),
    "model.expert_width": (OrPreset(0), "Inner width of each expert."),
    "model.bias": (OrPreset(True), "Biases in MLPs, experts and the output projection of attention, as in Griffin."),
    "model.convolution_width": (OrPreset(4), "Tokens that a short convolution sees."),
    "model.rotary_fraction": (
        OrPreset(0.5),
        "Fraction of each attention head that rotary positions rotate, in whole pairs of channels.",
    ),
    "model.rotary_base": (OrPreset(10_000.0), "Base of the rotary frequencies."),
    "model.rotary_scaling": (
        OrPreset(0.0),
        "Divisor of the slow rotary frequencies, so that a context longer by this factor has familiar angles, as in "
        "Llama 3.1; 0 means none.",
    ),
    "model.rotary_context": (
        OrPreset(8192),
        "Tokens of the context that rotary_scaling extends; a frequency that turns less than once in it is slow.",
    ),
    "model.norm_epsilon": (OrPreset(1e-6), "Added to the mean square in RMSNorm."),
    "model.output_norm_epsilon": (OrPreset(0.0), "The same for the norm of hgrn2's output; 0 means norm_epsilon."),
    "model.selection_norm_epsilon": (
        OrPreset(0.0),
        "The same for the norms of model.selection_norm; 0 means norm_epsilon.",
    ),
    "model.norm_offset": (OrPreset(1.0), "Added to the scale of RMSNorm: 1 as in Griffin, 0 as in Llama."),
    "model.tied_embeddings": (
        OrPreset(True),
        "Compute the logits with the embedding instead of a matrix of their own.",
    ),
    "model.embedding_scale": (
        OrPreset(False),
        "Multiply embeddings by sqrt(D), a factor rounded to bfloat16, as in RecurrentGemma.",
    ),
    "model.logit_soft_cap": (OrPreset(0.0), "Logits become cap * tanh(logits / cap); 0 means none."),
    "model.dtype": ("bfloat16", "Dtype of activations: bfloat16 or float32. Parameters and losses are float32."),
    "model.remat": (
        "elementwise",
        "What the backward pass recomputes: none; elementwise (all but matrix products, recurrences and attention); "
        "products (all but products with parameters); full (all). Exchanged states and windows are always kept.",
    ),
    "model.kernels": (
        True,
        "Use kernels on TPU and GPU where there are any (docs/kernels.md); False computes the same without them.",
    ),
    "data.path": ("", "A prepared dataset, or a mixture: DIR=WEIGHT,DIR=WEIGHT."),
    "data.task": (
        "",
        "A synthetic task to train on instead, e.g. mqar:pairs=8 (docs/evaluation.md); passkey reads text from data.path.",
    ),
    "data.heldout_path": ("", "The dataset whose held-out split is evaluated; by default the first of data.path."),
    "data.segment_documents": (True, "Documents packed in one row do not see each other."),
    "training.steps": (1000, "Optimiser steps in the run."),
    "training.batch_size": (8, "Rows per step, over all devices and microbatches."),
    "training.sequence_length": (1024, "Tokens per row, T."),
    "training.seed": (0, "Seed of the parameters and of the order of the data."),
    "training.initial_from": (
        "",
        "Begin with the newest weights of this run or import (its work directory; or one of its checkpoints, "
        "DIR/checkpoints/STEP); all else begins anew.",
    ),
    "training.microbatches": (1, "Parts of the batch, whose gradients are computed one after another and averaged."),
    "training.z_loss": (0.0, "Weight of the squared log normaliser of the logits in the objective."),
    "training.load_balance_loss": (0.01, "Weight of the load-balancing loss of a mixture of experts."),
    "training.router_z_loss": (0.001, "Weight of the squared log normaliser of the routers of a mixture of experts."),
    "training.spike_multiple": (
        0.0,
        "Skip a step, after the first 20, whose gradient norm exceeds this many times its running average; 0 means "
        "never.",
    ),
    "training.max_skips": (20, "End the run after this many skipped steps in a row."),
    "training.patience_minutes": (
        60.0,
        "End a process that gives no sign of life for this long in a step, a batch or a save; 0 means never.",
    ),
    "optimizer.name": (
        "adamw",
        "adamw, adafactor or muon (Muon for matrices that map activations to activations, AdamW for the rest).",
    ),
    "optimizer.learning_rate": (1e-3, "Peak learning rate of the schedule."),
    "optimizer.beta1": (0.9, "Decay of the first moment (adamw, muon's AdamW part)."),
    "optimizer.beta2": (0.95, "Decay of the second moment (adamw, muon's AdamW part)."),
    "optimizer.epsilon": (
        1e-8,
        "Added to the root of the second moment (adamw, muon's AdamW part) and to the norm by which Muon divides a matrix.",
    ),
    "optimizer.weight_decay": (
        0.1,
        "Decoupled weight decay, scaled by optimizer.learning_rate, with muon too. It applies to matrices only: to no "
        "bias, norm or decay vector.",
    ),
    "optimizer.clip_norm": (1.0, "Global norm to which larger gradients are scaled down; 0 means never."),
    "optimizer.muon_learning_rate": (0.02, "Peak learning rate for the matrices that Muon updates."),
    "schedule.name": ("cosine", "cosine, linear, wsd (warm-up, stable, decay) or constant, each after a warm-up."),
    "schedule.warmup_steps": (100, "Steps of linear warm-up; the first has the peak over their number."),
    "schedule.decay_fraction": (0.2, "Fraction of the run, at its end, in which wsd decays."),
    "schedule.final_fraction": (0.1, "Learning rate at the last step, as a fraction of the peak."),
    "mesh.data": (-1, "Devices over which the batch is split, each with all parameters; -1 takes those that are left."),
    "mesh.fsdp": (1, "Devices over which the batch, the parameters and the optimiser state are split."),
    "mesh.sequence": (1, "Devices over which the time of each sequence is split."),
    "mesh.tensor": (1, "Devices over which heads, channels and the vocabulary are split."),
    "mesh.expert": (1, "Devices over which the batch and the experts of a mixture are split."),
    "parallel.exchange": (
        "auto",
        "How shards of time exchange the states of recurrences: all_gather (one step, the states of all shards in "
        "memory), doubling (log2 W steps for W shards, two states) or auto (the cheaper one that fits, by "
        "jaxlinear/parallel/cost.py).",
    ),
    "parallel.attention": (
        "auto",
        "How shards of time exchange the keys and values of full attention: all_gather (all in memory), ring (those of "
        "two shards in memory) or auto (all_gather if it fits).",
    ),
    "parallel.gradient_dtype": (
        "float32",
        "Dtype of the gradients of linear maps as devices sum them: float32, or bfloat16, with half the bytes and a "
        "rounding at each sum. Those of embeddings, experts and vectors are float32 in any case.",
    ),
    "checkpoint.every_steps": (500, "Steps between checkpoints, with another at the end."),
    "checkpoint.keep_newest": (2, "Number of newest checkpoints to keep."),
    "checkpoint.keep_every_steps": (0, "Also keep every checkpoint whose step is a multiple of this; 0 means none."),
    "checkpoint.keep_best": (
        0,
        "Number of checkpoints of the lowest held-out loss to keep too, of those that have one.",
    ),
    "evaluation.every_steps": (
        500,
        "Steps between evaluations of the held-out split, with another at the end; 0 means never.",
    ),
    "evaluation.batches": (16, "Held-out batches per evaluation; 0 means the whole split."),
    "evaluation.tasks": (
        (),
        "Synthetic tasks to evaluate too, e.g. mqar,induction:length=64 (docs/evaluation.md).",
    ),
    "evaluation.examples": (256, "Examples of each difficulty of these tasks."),
    "logging.every_steps": (10, "Steps between lines of metrics."),
    "logging.layer_norms": (False, "Also write gradient and parameter norms by group of layers."),
    "logging.tensorboard": (True, "Write TensorBoard events."),
    "logging.profile_step": (0, "First step in a profiler trace, from the second after a start; 0 means none."),
    "logging.profile_steps": (3, "Number of steps in the trace."),
}


_UNREAD_HEADS = 1  # the value of model.num_heads where no mixer reads it and it is not set


def default() -> config_dict.ConfigDict:
    """A config with every key at its default, locked against unknown keys."""
    config = config_dict.ConfigDict()
    for key, (value, _) in KEYS.items():
        section, name = key.split(".")
        if section not in config:
            config[section] = config_dict.ConfigDict()
        kind = type(value.value) if isinstance(value, OrPreset) else value
        config[section][name] = config_dict.placeholder(kind) if isinstance(kind, type) else kind
    config.lock()
    return config


def kind(key: str) -> type:
    """The type of a key's value."""
    value = _default(key)
    return value if isinstance(value, type) else type(value)


def default_text(key: str) -> str:
    """The default of a key as Python writes it (a preset may replace it); empty where it follows from other keys."""
    value = _default(key)
    return "" if isinstance(value, type) else repr(value)


def _default(key: str) -> Any:
    value = KEYS[key][0]
    return value.value if isinstance(value, OrPreset) else value


def check_known(keys: list[str]) -> None:
    """Raises ``UserError`` for the first key that does not exist and names the nearest one that does."""
    for key in keys:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.0)
            raise UserError(f"there is no config key {key!r}; did you mean {near[0]!r}?")


def check_whole(config: object) -> None:
    """Raises ``UserError`` for the first key that a config lacks, as one that is not made from ``default()`` may."""
    for key in KEYS:
        section, name = key.split(".")
        if name not in (getattr(config, section, None) or ()):
            raise UserError(
                f"the config has no {key}; get_config() must take jaxlinear.config.default() and set its keys one by "
                "one, as in config.model.width = 64"
            )


def resolve(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
    """A checked copy with the preset's values filled in; ``UserError`` says what cannot work and why."""
    check_whole(config)
    config = config.copy_and_resolve_references()
    check_known([f"{section}.{name}" for section in config for name in config[section]])
    _fill_in(config)
    model = config.model
    missing = [f"model.{name}" for name in model if model[name] is None and name != "vocab_size"]
    if missing:
        raise UserError(f"without model.preset these keys need a value: {', '.join(missing)}")
    for key in KEYS:
        section, name = key.split(".")
        if config[section][name] is None and key != "model.vocab_size":
            raise UserError(f"{key} is None; it needs a value")
    config_checks.check(config, _may_stand(config))
    return config


def forget_unread(config: config_dict.ConfigDict, changed: Collection[str]) -> None:
    """Resets values that nothing reads any more because of the keys ``changed``, which were set after the config was made
    (e.g. on the command line). Whatever cannot work is left for ``resolve`` to refuse."""
    filled = config.copy_and_resolve_references()
    _fill_in(filled)
    if filled.model.pattern is None:
        return
    for key, readers in config_checks.unread(filled):
        choosers = set(readers)
        if any(chooser.startswith("model.") for chooser in readers):
            choosers |= {"model.preset", "model.num_layers"}
        if key not in changed and choosers & set(changed):
            section, name = key.split(".")
            config[section][name] = default()[section][name]


def model_config(config: config_dict.ConfigDict) -> ModelConfig:
    """The model that a resolved config describes."""
    return ModelConfig.of(config.model)


def to_json(config: config_dict.ConfigDict) -> str:
    """The text of ``config.json``: keys in the order of ``KEYS``."""
    values: dict[str, dict[str, Any]] = {}
    for key in KEYS:
        section, name = key.split(".")
        values.setdefault(section, {})[name] = config[section][name]
    return json.dumps(values, indent=2) + "\n"


def from_json(text: str) -> config_dict.ConfigDict:
    """The inverse of ``to_json``. Unknown keys are refused; a missing key has its default."""
    config = default()
    values = json.loads(text)
    check_known([f"{section}.{name}" for section in values for name in values[section]])
    for section, names in values.items():
        for name, value in names.items():
            config[section][name] = tuple(value) if isinstance(value, list) else value
    _fill_defaults(config)
    return config


def _fill_in(config: config_dict.ConfigDict) -> None:
    """Sets the model's unset keys to the preset's values, and those that follow from other keys."""
    model = config.model
    if model.preset:
        for name, value in presets.find(model.preset).items():
            if model[name] is None:
                model[name] = value
    if model.recurrent_width is None:
        model.recurrent_width = model.width
    _fill_defaults(config)
    if model.pattern is not None:
        model.pattern = _names("model.pattern", "mixers", model.pattern)
        if model.num_heads is None and not config_checks.is_read(config, "model.num_heads"):
            model.num_heads = _UNREAD_HEADS
    config.evaluation.tasks = _names("evaluation.tasks", "tasks", config.evaluation.tasks)


def _fill_defaults(config: config_dict.ConfigDict) -> None:
    """Sets the keys that no preset has set to their defaults."""
    for key, (default_, _) in KEYS.items():
        section, name = key.split(".")
        if isinstance(default_, OrPreset) and config[section][name] is None:
            config[section][name] = default_.value


def _may_stand(config: config_dict.ConfigDict) -> dict[str, tuple[Any, ...]]:
    """For every key, the values that it may have without being set: its default and that of the preset."""
    preset = presets.find(config.model.preset) if config.model.preset else {}
    values = {}
    for key, (default_, _) in KEYS.items():
        name = key.removeprefix("model.")
        default_ = default_.value if isinstance(default_, OrPreset) else default_
        values[key] = (default_, preset[name]) if name in preset else (default_,)
    return values | {"model.recurrent_width": (config.model.width, *values["model.recurrent_width"][1:])}


def _names(key: str, what: str, texts: tuple[Any, ...]) -> tuple[str, ...]:
    """The parts between commas: a tuple on the command line may be a single text."""
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{key} is {texts!r}; it must be names of {what}")
    return tuple(part.strip() for text in texts for part in text.split(",") if part.strip())


def markdown() -> str:
    """``docs/configuration.md``: every key with its type, default and meaning."""
    lines = [_MARKDOWN_HEAD]
    section = ""
    for key, (_, meaning) in KEYS.items():
        if key.split(".")[0] != section:
            section = key.split(".")[0]
            lines.append(f"\n## {section}\n\n| key | type | default | meaning |\n| --- | --- | --- | --- |")
        default = default_text(key)
        shown = default and f"`{default}`"
        lines.append(f"| `{key}` | {kind(key).__name__} | {shown} | {meaning.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


_MARKDOWN_HEAD = """# Configuration

A config file in `configs/` is Python: `get_config()` starts from `jaxlinear.config.default()`, sets the keys of the
experiment and returns the config. On the command line, `--config.section.key=VALUE` changes one key; a tuple is written
`"('a','b')"` or `a,b`.

A key that does not exist is refused, and the nearest one that does is named. Values of the wrong type and combinations that
cannot work are refused with the reason. So is a value that nothing in the run reads (a window where no layer has one,
Muon's learning rate for AdamW), with two exceptions: a value from the config file is dropped if a key on the command line
leaves it without a reader, and numbers of a feature that is switched off may stay (`evaluation.batches`,
`logging.profile_steps`). A key without a default below follows from the preset, the data or another key.

The resolved config is written to the run's `config.json`. When a run is resumed, only the keys of `mesh`, `parallel`,
`checkpoint`, `evaluation` and `logging`, `training.steps`, `training.max_skips`, `training.patience_minutes`,
`model.remat`, `model.kernels` and the paths of the data may change. To get over a divergence, so may
`optimizer.learning_rate`, `optimizer.muon_learning_rate`, `optimizer.clip_norm` and `training.spike_multiple`. Such a
change, and one of `parallel.gradient_dtype`, is logged and recorded in the run's `starts.jsonl`.

This page is generated by `python -m jaxlinear.config > docs/configuration.md`.
"""


if __name__ == "__main__":
    print(markdown(), end="")
