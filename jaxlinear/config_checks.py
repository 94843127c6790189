"""What a config with every key filled in must be for a run to work as it says: ``check`` refuses the first violation in one
line with the reason."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import config_dict

from jaxlinear.errors import UserError
from jaxlinear.models import mixers
from jaxlinear.models.config import ModelConfig
from jaxlinear.models.language_model import REMAT_POLICIES
from jaxlinear.ops import rotary
from jaxlinear.parallel.cost import ATTENTION, EXCHANGES

MODEL_DTYPES = ("bfloat16", "float32")
OPTIMIZERS = ("adamw", "adafactor", "muon")
SCHEDULES = ("cosine", "linear", "wsd", "constant")

_LEAST = 1.2e-38  # about the smallest normal float32; devices may flush anything below to 0


def check(config: config_dict.ConfigDict, may_stand: Mapping[str, tuple[Any, ...]]) -> None:
    """``may_stand``: for every key, the values that the user did not ask for (the default first, then the preset's), which
    are accepted even where nothing reads the key."""
    for key in _POSITIVE:
        section, name = key.split(".")
        value = config[section][name]
        if value is not None and value < 1:
            raise UserError(f"{key} is {value}; it must be at least 1")
    for key in _NOT_NEGATIVE:
        section, name = key.split(".")
        if not config[section][name] >= 0:  # NaN is not
            raise UserError(f"{key} is {config[section][name]}; it must not be negative")
        if math.isinf(config[section][name]):
            raise UserError(f"{key} is {config[section][name]}; it must be finite")
    for name in ("window", "context"):
        if config.model[name] >= 1 << 31:
            raise UserError(
                f"model.{name} is {config.model[name]}; it must be below 2**31, as the positions of tokens are"
            )
    for key, choices in _CHOICES.items():
        section, name = key.split(".")
        if config[section][name] not in choices:
            raise UserError(f"{key} is {config[section][name]!r}; it must be one of {', '.join(choices)}")

    model, training = config.model, config.training
    if not model.pattern:
        raise UserError("model.pattern is empty; it must name at least one mixer")
    for name in model.pattern:
        mixers.find(name)
    if is_read(config, "model.num_heads") and model.width % model.num_heads:
        raise UserError(f"model.num_heads={model.num_heads} does not divide model.width={model.width}")
    if is_read(config, "model.key_value_heads") and model.num_heads % model.key_value_heads:
        raise UserError(
            f"model.key_value_heads={model.key_value_heads} does not divide model.num_heads={model.num_heads}"
        )
    if not 1 <= model.mlp_expansion * model.width < math.inf:
        raise UserError(f"model.mlp_expansion is {model.mlp_expansion}; it must be above 0 and finite")
    _check_experts(model)
    if not 0 <= model.rotary_fraction <= 1:
        raise UserError(f"model.rotary_fraction is {model.rotary_fraction}; it must be between 0 and 1")
    for name in _chosen(config, "model.pattern"):
        channels = _rotary_width(model, name)
        if (
            model.rotary_fraction
            and channels
            and not len(rotary.frequencies_of(channels, fraction=model.rotary_fraction))
        ):
            raise UserError(
                f"model.rotary_fraction={model.rotary_fraction} rotates no pair of the {channels} channels of a head "
                f"of {name}, which would have no rotary positions; set it higher, or to 0 for none"
            )
    if not 0 < model.rotary_base < math.inf:
        raise UserError(f"model.rotary_base is {model.rotary_base}; it must be above 0 and finite")
    if model.rotary_scaling and not 1 <= model.rotary_scaling < math.inf:
        raise UserError(f"model.rotary_scaling is {model.rotary_scaling}; it must be 0 for none, or 1 or more")
    if model.norm_offset not in (0.0, 1.0):
        raise UserError(f"model.norm_offset is {model.norm_offset}; it must be 0 or 1")
    if not 0 <= training.seed < 1 << 63:
        raise UserError(f"training.seed is {training.seed}; it must be in [0, 2**63)")
    if training.batch_size % training.microbatches:
        raise UserError(
            f"training.microbatches={training.microbatches} does not divide training.batch_size={training.batch_size}"
        )
    if config.schedule.warmup_steps > training.steps:
        raise UserError(
            f"schedule.warmup_steps={config.schedule.warmup_steps} must be at most training.steps={training.steps}"
        )
    for name in ("beta1", "beta2"):
        if not 0 <= config.optimizer[name] < 1:
            raise UserError(f"optimizer.{name} is {config.optimizer[name]}; it must be in [0, 1)")
    if config.optimizer.epsilon < _LEAST:
        # Without a gradient, as in the row of a token that is not in a batch, the update would be 0 / 0.
        raise UserError(
            f"optimizer.epsilon is {config.optimizer.epsilon}; it must be at least {_LEAST}, the smallest normal "
            "float32"
        )
    if not 0 < config.schedule.decay_fraction <= 1:
        raise UserError(f"schedule.decay_fraction is {config.schedule.decay_fraction}; it must be in (0, 1]")
    if config.schedule.final_fraction > 1:
        raise UserError(f"schedule.final_fraction is {config.schedule.final_fraction}; it must be in [0, 1]")
    if config.data.task and config.evaluation.every_steps and not config.evaluation.batches:
        raise UserError(
            "evaluation.batches=0 means the whole held-out split, but data.task has no end; set it to 1 or more"
        )
    if config.checkpoint.keep_best and not config.evaluation.every_steps:
        raise UserError("checkpoint.keep_best needs held-out losses: set evaluation.every_steps")
    steps, every = config.training.steps, (config.checkpoint.every_steps, config.evaluation.every_steps)
    if config.checkpoint.keep_best and max(every) < steps <= math.lcm(*every):
        raise UserError(
            f"checkpoint.keep_best: with checkpoint.every_steps={every[0]} and evaluation.every_steps={every[1]}, no "
            f"checkpoint before the end at step {steps} is also evaluated; make the first a multiple of the second"
        )
    # The first step after a start is never in a trace.
    if config.logging.profile_step and max(config.logging.profile_step, 2) > steps:
        raise UserError(
            f"logging.profile_step={config.logging.profile_step}: there is no such step after the first one, with "
            f"training.steps={steps}"
        )
    for name, size in config.mesh.items():
        if size < 1 and size != -1:
            raise UserError(f"mesh.{name} is {size}; it must be a number of devices, or -1 for those that are left")
    _check_read(config, may_stand)


def is_read(config: config_dict.ConfigDict, key: str) -> bool:
    """Whether this run reads ``key``, one of the keys that only some choices read."""
    for chooser, readers in _READ_BY[key].items():
        chosen = _chosen(config, chooser)
        if chooser != "model.pattern":
            found = not set(readers).isdisjoint(chosen)
        elif key == "model.num_heads" and config.model.recurrent_heads:
            # Mixers that can read both read ``recurrent_heads`` instead.
            found = any(mixers.reads(one, "num_heads") and not mixers.reads(one, "recurrent_heads") for one in chosen)
        else:
            found = any(mixers.reads(one, key.removeprefix("model.")) for one in chosen)
        if found:
            return True
    return False


def unread(config: config_dict.ConfigDict) -> Iterator[tuple[str, Mapping[str, tuple[str, ...]]]]:
    """The keys that nothing in this run reads, each with the keys that decide who reads it and, for each of these, the
    choices that do: an empty tuple if any value does except the one that switches the feature off. Leaves out
    ``model.num_heads``, which has no default: configs that give all sizes set it whatever their mixers."""
    for key, readers in _READ_BY.items():
        if key != "model.num_heads" and not is_read(config, key):
            yield key, readers
    for key, needed in _READ_WITH.items():
        section, name = needed.split(".")
        if not config[section][name]:
            yield key, {needed: ()}


def _check_read(config: config_dict.ConfigDict, may_stand: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuses a value that is set and that nothing in this run reads: it would do nothing."""
    for key, readers in unread(config):
        section, name = key.split(".")
        value = config[section][name]
        if value in may_stand[key]:
            continue
        names = [name for choices in readers.values() for name in choices]
        if not names:
            needed = " and ".join(readers)
            raise UserError(f"{key}={value!r} does nothing without {needed}; set that, or leave {key} at its default")
        chosen = " and ".join(f"{chooser}={','.join(_chosen(config, chooser))}" for chooser in readers)
        raise UserError(
            f"{key}={value!r} does nothing for {chosen}: only {', '.join(names)} "
            f"{'reads' if len(names) == 1 else 'read'} it; leave it at {may_stand[key][0]!r}"
        )


def _chosen(config: config_dict.ConfigDict, chooser: str) -> tuple[str, ...]:
    """The mixers of the model's layers, or the single value of another key."""
    section, name = chooser.split(".")
    value = config[section][name]
    return (value,) if isinstance(value, str) else value[: config.model.num_layers]


def _rotary_width(model: config_dict.ConfigDict, mixer: str) -> int:
    """``Mixer.rotary_width``; 0 for mixers without."""
    width = getattr(mixers.find(mixer), "rotary_width", None)
    return 0 if width is None else width(ModelConfig.of(model))


def _check_experts(model: config_dict.ConfigDict) -> None:
    if model.channel_mixer != "mixture_of_experts":
        return
    for name in ("experts", "experts_per_token", "expert_width"):
        if model[name] < 1:
            raise UserError(f"model.channel_mixer='mixture_of_experts' needs model.{name}; it is {model[name]}")
    if model.experts_per_token > model.experts:
        raise UserError(
            f"model.experts_per_token={model.experts_per_token} must be at most model.experts={model.experts}"
        )


_POSITIVE = (
    "model.num_layers",
    "model.vocab_size",
    "model.width",
    "model.recurrent_width",
    "model.num_heads",
    "model.window",
    "model.key_value_heads",
    "model.context",
    "model.rotary_context",
    "model.convolution_width",
    "model.householders",
    "training.steps",
    "training.batch_size",
    "training.sequence_length",
    "training.microbatches",
    "training.max_skips",
    "checkpoint.every_steps",
    "checkpoint.keep_newest",
    "evaluation.examples",
    "logging.every_steps",
    "logging.profile_steps",
)
_NOT_NEGATIVE = (
    "model.recurrent_heads",
    "model.key_width",
    "model.value_width",
    "model.time_step_rank",
    "model.experts",
    "model.experts_per_token",
    "model.expert_width",
    "model.norm_epsilon",
    "model.output_norm_epsilon",
    "model.selection_norm_epsilon",
    "model.logit_soft_cap",
    "training.z_loss",
    "training.load_balance_loss",
    "training.router_z_loss",
    "training.spike_multiple",
    "training.patience_minutes",
    "optimizer.learning_rate",
    "optimizer.epsilon",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "optimizer.muon_learning_rate",
    "schedule.warmup_steps",
    "schedule.final_fraction",
    "checkpoint.keep_every_steps",
    "checkpoint.keep_best",
    "evaluation.every_steps",
    "evaluation.batches",
    "logging.profile_step",
)
_CHOICES = {
    "model.feature_map": ("identity", "elu", "relu", "taylor", "rebased", "hedgehog"),
    "model.discretization": ("zero_order_hold", "bilinear"),
    "model.head_norm": ("group", "rms"),
    "model.output_gate": ("auto", "none", "silu"),
    "model.channel_mixer": ("gated_mlp", "mixture_of_experts", "none"),
    "model.mlp_activation": ("gelu", "silu"),
    "model.dtype": MODEL_DTYPES,
    "model.remat": tuple(REMAT_POLICIES),
    "optimizer.name": OPTIMIZERS,
    "parallel.exchange": ("auto", *EXCHANGES),
    "parallel.attention": ("auto", *ATTENTION),
    "parallel.gradient_dtype": MODEL_DTYPES,
    "schedule.name": SCHEDULES,
}

_MLP, _MIXTURE = "gated_mlp", "mixture_of_experts"
_OF_EXPERTS: dict[str, tuple[str, ...]] = {"model.channel_mixer": (_MIXTURE,)}
# Keys that only some choices read: for each, the keys that decide and the choices that read it.
_READ_BY: dict[str, dict[str, tuple[str, ...]]] = {
    **{f"model.{name}": {"model.pattern": readers} for name, readers in mixers.readers().items()},
    "model.bias": {"model.channel_mixer": (_MLP, _MIXTURE), "model.pattern": mixers.readers()["bias"]},
    "model.mlp_expansion": {"model.channel_mixer": (_MLP,)},
    "model.mlp_activation": {"model.channel_mixer": (_MLP, _MIXTURE)},
    **{f"model.{name}": _OF_EXPERTS for name in ("experts", "experts_per_token", "expert_width")},
    **{f"training.{name}": _OF_EXPERTS for name in ("load_balance_loss", "router_z_loss")},
    **{f"optimizer.{name}": {"optimizer.name": ("adamw", "muon")} for name in ("beta1", "beta2", "epsilon")},
    "optimizer.muon_learning_rate": {"optimizer.name": ("muon",)},
    "parallel.gradient_dtype": {"model.dtype": ("bfloat16",)},
    "schedule.decay_fraction": {"schedule.name": ("wsd",)},
    "schedule.final_fraction": {"schedule.name": ("cosine", "linear", "wsd")},
}
# Keys that are read only if another key is set, to neither 0 nor empty. Numbers of a feature that is switched off may
# stand, such as ``evaluation.batches``.
_READ_WITH = {
    "evaluation.tasks": "evaluation.every_steps",
    "model.rotary_context": "model.rotary_scaling",
    "model.selection_norm_epsilon": "model.selection_norm",
}
