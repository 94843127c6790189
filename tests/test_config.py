"""The config keys, what ``resolve`` fills in and refuses, and the resolved text of every file in configs/."""

import json
import math
import pathlib
import re

import pytest

from jaxlinear import config as configs
from jaxlinear.errors import UserError
from jaxlinear.models import mixers, presets
from jaxlinear.training import workdir
from tests.golden import rewrite
from tests.training import tiny

SMALL = {"model.pattern": ("rg_lru", "sliding_window"), "model.num_layers": 2, "model.width": 16}
SMALL |= {"model.num_heads": 2, "model.window": 4}


def changed(changes):
    return tiny.put(configs.default(), SMALL | changes)


def flat(config):
    return {f"{section}.{name}": value for section in config for name, value in config[section].items()}


def test_default_has_every_key_and_no_other():
    values = flat(configs.default())
    assert set(values) == set(configs.KEYS) and len(values) > 50
    for key, (value, meaning) in configs.KEYS.items():
        follows = isinstance(value, type | configs.OrPreset)
        assert values[key] == (None if follows else value), key
        assert len(meaning) > 10 and meaning.endswith("."), key


def test_an_unknown_key_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"^there is no config key 'model.wdth'; did you mean 'model.width'\?$"):
        configs.check_known(["model.window", "model.wdth", "nothing.of.it"])
    configs.check_known(list(configs.KEYS))
    with pytest.raises(AttributeError, match='Did you mean "width"'):
        configs.default().model.wdth = 3
    config = changed({})
    with config.unlocked():
        config.training.stepz = 3
    with pytest.raises(UserError, match=r"'training.stepz'; did you mean 'training.steps'\?"):
        configs.resolve(config)


@pytest.mark.parametrize("section, value, key", [("model", {"width": 64}, "preset"), ("optimizer", None, "name")])
def test_a_config_that_lacks_keys_is_refused(section, value, key):
    config = changed({})
    config[section] = value
    with pytest.raises(UserError, match=rf"^the config has no {section}.{key}; get_config\(\) must take"):
        configs.resolve(config)


@pytest.mark.parametrize(
    "key, value", [("model.width", "wide"), ("training.steps", 2.5), ("model.dtype", 16), ("model.pattern", 3)]
)
def test_a_value_of_another_type_is_refused(key, value):
    with pytest.raises(TypeError):
        changed({key: value})


def test_whole_numbers_are_taken_for_real_ones():
    assert configs.resolve(changed({"optimizer.learning_rate": 1})).optimizer.learning_rate == 1.0


AT_LEAST_1 = (
    *(f"model.{name}" for name in ("num_layers", "vocab_size", "width", "recurrent_width", "num_heads", "window")),
    *("model.key_value_heads", "model.context", "model.convolution_width"),
    *(f"training.{name}" for name in ("steps", "batch_size", "sequence_length", "microbatches", "max_skips")),
    *("checkpoint.every_steps", "checkpoint.keep_newest", "logging.every_steps", "logging.profile_steps"),
)
NOT_NEGATIVE = (
    *(f"model.{name}" for name in ("recurrent_heads", "key_width", "value_width", "experts", "experts_per_token")),
    *("model.expert_width", "model.norm_epsilon"),
    *("model.logit_soft_cap", "training.z_loss", "training.load_balance_loss", "training.router_z_loss"),
    "training.spike_multiple",
    *(f"optimizer.{name}" for name in ("learning_rate", "epsilon", "weight_decay", "clip_norm", "muon_learning_rate")),
    *("schedule.warmup_steps", "schedule.final_fraction", "checkpoint.keep_every_steps", "checkpoint.keep_best"),
    *("evaluation.every_steps", "evaluation.batches", "logging.profile_step"),
)


def refused(changes, message):
    with pytest.raises(UserError, match=message):
        configs.resolve(changed(changes))


@pytest.mark.parametrize("key", AT_LEAST_1)
def test_counts_are_at_least_1(key):
    refused({key: 0}, rf"^{key} is 0; it must be at least 1$")


@pytest.mark.parametrize("key", NOT_NEGATIVE)
def test_rates_and_weights_are_not_negative(key):
    default = configs.KEYS[key][0]
    whole = isinstance(default.value if isinstance(default, configs.OrPreset) else default, int)
    refused({key: -1 if whole else -1.0}, rf"^{key} is -1(\.0)?; it must not be negative$")
    if not whole:
        refused({key: math.nan}, rf"^{key} is nan; ")
        refused({key: math.inf}, rf"^{key} is inf; it must be finite$")


ONE_OF = {
    "model.dtype": ("float16", "bfloat16, float32"),
    "model.remat": ("some", "none, elementwise, products, full"),
    "parallel.exchange": ("ring", "auto, all_gather, doubling"),
    "parallel.attention": ("none", "auto, all_gather, ring"),
    "optimizer.name": ("sgd", "adamw, adafactor, muon"),
    "schedule.name": ("step", "cosine, linear, wsd, constant"),
}
BETWEEN = {
    "must be above 0 and finite": [
        (f"model.{name}", value)
        for name in ("mlp_expansion", "rotary_base")
        for value in (0.0, -1.0, math.inf, math.nan)
    ],
    "must be between 0 and 1": [("model.rotary_fraction", value) for value in (1.5, -0.5)],
    r"must be in \(0, 1\]": [("schedule.decay_fraction", value) for value in (0.0, 1.5)],
    r"must be in \[0, 1\]": [("schedule.final_fraction", 10.0)],
    r"must be in \[0, 1\)": [("optimizer.beta1", 1.0), ("optimizer.beta2", -0.1)],
    r"must be in \[0, 2\*\*63\)": [("training.seed", value) for value in (-1, 1 << 63)],
    r"must be below 2\*\*31": [("model.window", 2**31), ("model.context", 10**12)],
    "must be 0 or 1": [("model.norm_offset", 0.5)],
    "at least 1.2e-38, the smallest normal": [("optimizer.epsilon", value) for value in (0.0, 1e-40)],
    "must be a number of devices, or -1": [("mesh.fsdp", 0), ("mesh.data", -2)],
    "needs a value": [("optimizer.learning_rate", None)],
}
# What chooses, its choice, a key that does nothing for it, its value, and what reads it.
UNREAD = [
    ("model.channel_mixer", "gated_mlp", "model.experts", 2, "mixture_of_experts reads"),
    ("model.channel_mixer", "none", "model.expert_width", 2, "mixture_of_experts reads"),
    ("model.channel_mixer", "none", "model.mlp_expansion", 2.0, "gated_mlp reads"),
    ("model.channel_mixer", "none", "model.mlp_activation", "silu", "gated_mlp, mixture_of_experts read"),
    ("model.channel_mixer", "gated_mlp", "training.load_balance_loss", 0.1, "mixture_of_experts reads"),
    ("model.channel_mixer", "gated_mlp", "training.router_z_loss", 0.1, "mixture_of_experts reads"),
    ("optimizer.name", "adamw", "optimizer.muon_learning_rate", 0.1, "muon reads"),
    *(
        ("optimizer.name", "adafactor", f"optimizer.{x}", 0.5, "adamw, muon read")
        for x in ("beta1", "beta2", "epsilon")
    ),
    ("schedule.name", "cosine", "schedule.decay_fraction", 0.5, "wsd reads"),
    ("schedule.name", "constant", "schedule.final_fraction", 0.5, "cosine, linear, wsd read"),
]
EXPERTS = [
    ({}, "channel_mixer='mixture_of_experts' needs model.experts; it is 0"),
    ({"experts": 2, "expert_width": 3}, "needs model.experts_per_token; it is 0"),
    ({"experts": 2, "experts_per_token": 1}, "needs model.expert_width; it is 0"),
    ({"experts": 2, "experts_per_token": 3, "expert_width": 3}, "experts_per_token=3 must be at most model.experts=2"),
]
BEST, FIRST = {"checkpoint.keep_best": 1, "training.steps": 100}, {"logging.profile_step": 1, "training.steps": 1}
ALONE = {"model.window": None, "model.bias": None}
CANNOT_WORK = [
    *(({key: value}, f"^{key} is '{value}'; it must be one of {those}$") for key, (value, those) in ONE_OF.items()),
    *(({key: x}, rf"^{key} is {re.escape(str(x))}; .*{must}") for must, keys in BETWEEN.items() for key, x in keys),
    *(
        ({chooser: choice, key: x}, f"^{key}={x!r} does nothing for {chooser}={choice}: only {readers} it; leave it")
        for chooser, choice, key, x, readers in UNREAD
    ),
    *(
        ({"model.channel_mixer": "mixture_of_experts"} | {f"model.{name}": x for name, x in sizes.items()}, message)
        for sizes, message in EXPERTS
    ),
    ({"model.preset": "griffin"}, "there is no preset 'griffin'; the presets are hawk_100m"),
    ({"model.pattern": ()}, "model.pattern is empty; it must name at least one mixer"),
    ({"model.pattern": (5,)}, r"model.pattern is \(5,\); it must be names of mixers"),
    ({"model.pattern": ("mamba3",)}, "there is no mixer 'mamba3'; the mixers are "),
    ({"model.num_heads": 3}, "model.num_heads=3 does not divide model.width=16"),
    ({"model.num_heads": 8}, "model.rotary_fraction=0.5 rotates no pair of the 2 channels of a head of"),
    (
        ALONE | {"model.pattern": ("retention",), "model.key_width": 3},
        "no pair of the 3 channels of a head of retention",
    ),
    ({"evaluation.every_steps": 0, "evaluation.tasks": ("mqarx",)}, r"^evaluation.tasks=\('mqarx',\) does nothing"),
    (
        {"model.pattern": ("mamba",), "model.window": None, "model.selection_norm_epsilon": 1e-5},
        "^model.selection_norm_epsilon=1e-05 does nothing without model.selection_norm; .* leave model.sele",
    ),
    ({"evaluation.tasks": (1,)}, r"^evaluation.tasks is \(1,\); it must be names of tasks$"),
    ({"model.num_layers": 1}, "^model.window=4 does nothing for model.pattern=rg_lru: only sliding_window reads"),
    ({"training.microbatches": 3}, "training.microbatches=3 does not divide training.batch_size=8"),
    ({"training.steps": 99}, "schedule.warmup_steps=100 must be at most training.steps=99"),
    ({"checkpoint.keep_best": 1, "evaluation.every_steps": 0}, "keep_best needs held-out losses: set evaluation"),
    (
        BEST | {"checkpoint.every_steps": 30, "evaluation.every_steps": 40},
        "no checkpoint before the end at step 100 is",
    ),
    (BEST | {"checkpoint.every_steps": 25, "evaluation.every_steps": 20}, "make the first a multiple of the second"),
    ({"logging.profile_step": 101, "training.steps": 100}, "profile_step=101: there is no such step"),
    (FIRST | {"schedule.warmup_steps": 1}, "profile_step=1: there is no such step after the first one"),
]


@pytest.mark.parametrize("changes, message", CANNOT_WORK)
def test_what_cannot_work_is_refused_with_its_reason(changes, message):
    refused(changes, message)


def test_a_run_too_short_for_checkpoints_on_the_way_may_keep_the_best():
    for steps in (100, 400, 500, 501, 1000):
        configs.resolve(changed({"checkpoint.keep_best": 2, "training.steps": steps, "checkpoint.every_steps": 500}))


OTHER = dict.fromkeys((name for name in mixers.readers() if name not in ("bias", "num_heads")), 2) | {
    **{"key_width": 4, "feature_map": "elu", "discretization": "bilinear", "head_norm": "rms", "output_gate": "silu"},
    **{"rotary_fraction": 0.25, "rotary_base": 500.0, "rotary_scaling": 2.0, "output_norm_epsilon": 0.25},
    **{"selection_norm": True, "selection_norm_epsilon": 0.25, "gate_bias": True, "negative_eigenvalues": True},
}
# Which other keys have to be set for a key to be read.
BESIDE = {"rotary_context": {"rotary_scaling": 2.0}, "selection_norm_epsilon": {"selection_norm": True}}


@pytest.mark.parametrize("name", OTHER)
def test_what_no_mixer_of_the_pattern_reads_is_refused(name):
    readers, key = mixers.readers()[name], f"model.{name}"
    default = 16 if name == "recurrent_width" else configs.KEYS[key][0].value
    other = next(mixer for mixer in ("rg_lru", "gla", "mamba2") if mixer not in readers)
    for mixer in mixers.names():
        config = changed({"model.pattern": (other, mixer), "model.window": None, key: OTHER[name]})
        if mixer in readers:
            config.model.update(BESIDE.get(name, {}))
            assert configs.resolve(config).model[name] == OTHER[name]
            continue
        with pytest.raises(UserError) as refusal:
            configs.resolve(config)
        assert str(refusal.value) == (
            f"model.{name}={OTHER[name]!r} does nothing for model.pattern={other},{mixer}: only {', '.join(readers)} "
            f"read{'s' * (len(readers) == 1)} it; leave it at {default!r}"
        )
        alone = changed({"model.pattern": (mixer,), "model.window": None, key: default})
        assert configs.resolve(alone).model[name] == default


def with_bias(mixer, channel_mixer, bias):
    model = {"pattern": (mixer,), "window": None, "bias": bias, "channel_mixer": channel_mixer}
    return changed({f"model.{name}": value for name, value in model.items()})


def test_biases_are_of_the_channel_mixer_or_of_attention():
    """What nothing reads makes no other run."""
    for mixer, channel_mixer, bias in (
        ("attention", "none", False),
        ("rg_lru", "gated_mlp", False),
        ("rg_lru", "none", True),
    ):
        assert configs.resolve(with_bias(mixer, channel_mixer, bias)).model.bias is bias
    with pytest.raises(UserError) as refusal:
        configs.resolve(with_bias("rg_lru", "none", False))
    assert str(refusal.value) == (
        "model.bias=False does nothing for model.channel_mixer=none and model.pattern=rg_lru: only gated_mlp, "
        "mixture_of_experts, attention, sliding_window read it; leave it at True"
    )
    run = pathlib.Path("run")
    workdir.check_same_run(run, with_bias("mamba2", "none", False), with_bias("mamba2", "none", True))
    with pytest.raises(UserError, match=r"model\.bias is False there and True in this config"):
        workdir.check_same_run(run, with_bias("mamba2", "gated_mlp", False), with_bias("mamba2", "gated_mlp", True))


def test_heads_that_nothing_reads():
    """Their number may be missing or anything, and need not divide the width: a config that names all sizes has one."""
    config = configs.default()

    def heads(**changes):
        config.model.update(changes)
        return configs.resolve(config).model.num_heads

    assert heads(preset="mamba2_6m", width=257) == 8
    assert heads(num_heads=2) == 2
    configs.forget_unread(config, ["model.pattern"])
    assert heads() == 2
    config = changed({"model.pattern": ("lru",), "model.num_heads": None, "model.window": None})
    assert heads() == 1
    with pytest.raises(UserError, match=r"^without model.preset these keys need a value: model.num_heads$"):
        heads(pattern=("lru", "gla"))
    assert heads(recurrent_heads=2) == 1  # gla then reads these instead
    assert heads(num_heads=3) == 3  # does not divide the width
    with pytest.raises(UserError, match=r"model.num_heads=3 does not divide model.width"):
        heads(pattern=("gla", "attention"))


def test_what_a_preset_says_and_another_pattern_does_not_read_may_stand():
    config = configs.default()
    config.model.preset, config.model.pattern = "mamba2_130m", ("rg_lru",)
    resolved = configs.resolve(config)
    assert (resolved.model.key_width, resolved.model.value_width) == (128, 64)
    assert flat(configs.resolve(configs.from_json(configs.to_json(resolved)))) == flat(resolved)
    config.model.key_width = 64
    with pytest.raises(UserError, match=r"^model.key_width=64 does nothing for model.pattern=rg_lru: only delta_net, "):
        configs.resolve(config)


def test_what_is_changed_may_leave_what_the_file_says_without_a_reader():
    of_a_file = {"optimizer.name": "muon", "optimizer.muon_learning_rate": 0.05, "optimizer.beta1": 0.5}
    of_a_file |= {"evaluation.tasks": ("parity",), "evaluation.examples": 77}  # how many examples may stay
    rate, beta, window = {"optimizer.muon_learning_rate": 0.02}, {"optimizer.beta1": 0.9}, {"model.window": None}
    for changes, forgotten in (
        ({"training.seed": 3}, {}),
        ({"optimizer.name": "muon"}, {}),
        ({"optimizer.name": "adamw"}, rate),
        ({"optimizer.name": "adafactor"}, rate | beta),
        ({"model.pattern": ("gla", "gla")}, window),
        ({"model.num_layers": 1}, window),
        ({"evaluation.every_steps": 0}, {"evaluation.tasks": ()}),
        # What was changed explicitly stays, for `resolve` to refuse; so does what had no reader before.
        ({"optimizer.name": "adamw", "optimizer.muon_learning_rate": 0.1}, {}),
        ({"optimizer.name": "adamw", "schedule.decay_fraction": 0.1}, rate),
    ):
        config = changed(of_a_file | changes)
        before = flat(config)
        configs.forget_unread(config, list(changes))
        assert {key: value for key, value in flat(config).items() if value != before[key]} == forgotten


def test_without_a_preset_the_shapes_have_to_be_named():
    with pytest.raises(UserError, match=r"^without model.preset these keys need a value: ") as refusal:
        configs.resolve(configs.default())
    shapes = ("pattern", "num_layers", "width", "num_heads", "recurrent_width")
    assert set(str(refusal.value).split(": ")[1].split(", ")) == {f"model.{name}" for name in shapes}


def test_resolve_fills_in_what_follows():
    config = changed({"model.pattern": ("rg_lru, sliding_window,", "rg_lru")})
    model = configs.resolve(config).model
    assert model.pattern == ("rg_lru", "sliding_window", "rg_lru")
    assert (model.recurrent_width, model.embedding_scale, model.logit_soft_cap) == (16, False, 0.0)
    assert model.vocab_size is None  # comes from the data
    assert config.model.recurrent_width is None, "resolve changed what it was given"


def test_a_preset_gives_way_to_what_is_set():
    config = configs.default()
    config.model.preset, config.model.num_layers = "recurrentgemma_2b", 5
    model = configs.model_config(configs.resolve(config))
    preset = presets.find("recurrentgemma_2b")
    assert model.num_layers == 5 and preset["num_layers"] == 26
    assert {name: getattr(model, name) for name in preset} == preset | {"num_layers": 5}
    assert model.logit_soft_cap == 30.0 and model.embedding_scale is True


def test_json_round_trip():
    config = configs.resolve(changed({"training.seed": 7, "model.embedding_scale": True, "data.path": "a é=1"}))
    text = configs.to_json(config)
    assert flat(configs.from_json(text)) == flat(config)
    assert configs.to_json(configs.from_json(text)) == text
    values = json.loads(text)
    assert [f"{section}.{name}" for section in values for name in values[section]] == list(configs.KEYS)
    assert configs.from_json(text).model.pattern == ("rg_lru", "sliding_window")


def test_json_of_an_earlier_version():
    assert configs.from_json('{"training": {"seed": 3}}').training.seed == 3
    assert configs.from_json('{"training": {"seed": 3}}').training.steps == configs.KEYS["training.steps"][0]
    with pytest.raises(UserError, match=r"no config key 'training.sed'; did you mean 'training.seed'\?"):
        configs.from_json('{"training": {"sed": 3}}')


@pytest.mark.parametrize("path", rewrite.files(), ids=lambda path: path.stem)
def test_golden(path):
    golden = rewrite.GOLDEN / f"{path.stem}.json"
    assert golden.is_file(), f"{golden} is missing: {rewrite.COMMAND}"
    advice = f"{path.name} resolves to something else than {golden.name}; if that is meant: {rewrite.COMMAND}"
    assert rewrite.resolved_text(path) == golden.read_text(encoding="utf-8"), advice


def test_no_golden_file_is_left_over():
    files = {path.stem for path in rewrite.files()}
    assert files and {path.stem for path in rewrite.GOLDEN.glob("*.json")} == files, rewrite.COMMAND


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_resolves(name):
    config = configs.default()
    config.model.preset = name
    assert configs.model_config(configs.resolve(config)).width == presets.PRESETS[name]["width"]
