"""Tensors, fields and models that do not fit are reported before anything is written."""

import json
import re
import shutil

import numpy as np
import pytest

from jaxlinear import config as configs
from jaxlinear.conversion import export_weights, flax, hugging_face, import_weights
from jaxlinear.errors import UserError
from jaxlinear.training import workdir as workdirs
from tests.conversion import fla_reference
from tests.conversion.converted import MODELS, assert_nothing_in, refused, rewrite, run, set_fields, streamed


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x.pop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight is missing$"),
        (lambda x: [x.pop(name) for name in list(x) if ".q_proj." in name], "0.self_attn.q_proj.weight is missing"),
        (lambda x: x.update(score=np.zeros(3, np.float32)), "the tensor score does not belong to this model$"),
        (lambda x: x.update({"model.norm.weight": np.zeros(3, np.float32)}), r"norm.weight .* \[3\]; .* be \[16\]$"),
        (lambda x: x.update({"lm_head.weight": np.zeros((16, 31), np.float32)}), r"head.*\[16, 31\]; .* \[31, 16\]$"),
    ],
)
def test_tensors_that_do_not_fit_are_named(copied, tmp_path, change, message):
    source = copied("llama")
    rewrite(source, lambda values: (change(values), values)[1])
    refused(rf"^{source}: .*{message}", source, tmp_path / "run")
    assert_nothing_in(tmp_path, "source")


# By family, each field's value here and the only one that a model here can have.
ONLY = {
    "llama": dict(
        hidden_act=("gelu", "silu"), attention_bias=(True, False), mlp_bias=(True, False), is_causal=(False, True)
    ),
    "mamba": dict(use_bias=(True, False)),
    "falcon_mamba": dict(use_bias=(True, False), use_conv_bias=(False, True), hidden_act=("gelu", "silu")),
    "mamba2": dict(
        **dict(n_groups=(8, 1), use_bias=(True, False), use_conv_bias=(False, True), hidden_act=("relu", "silu")),
        **dict(norm_before_gate=(True, False), D_has_hdim=(True, False), rmsnorm=(False, True)),
    ),
    "recurrent_gemma": dict(
        attention_bias=(True, False), hidden_activation=("relu", "gelu_pytorch_tanh"), sliding_window=(9, 4)
    ),
    "gla": dict(
        **dict(hidden_act=("powlu", "swish"), attnres_block_size=(2, None), clamp_min=(-1.0, None)),
        **dict(feature_map=("relu", None), num_kv_heads=(1, 2), use_short_conv=(True, False)),
        **dict(use_output_gate=(False, True), elementwise_affine=(False, True)),
    ),
    "gated_deltanet": dict(num_v_heads=(4, 3), use_short_conv=(False, True)),
    "gated_deltaproduct": dict(use_short_conv=(False, True)),
    "delta_net": dict(
        **dict(use_beta=(False, True), use_short_conv=(False, True), use_rope=(True, False)),
        **dict(qk_norm=("sum", "l2"), qk_activation=("elu", "silu")),
    ),
    "hgrn": dict(use_lower_bound=(False, True), use_short_conv=(True, False), elementwise_affine=(False, True)),
    "hgrn2": dict(use_lower_bound=(False, True), use_short_conv=(True, False), elementwise_affine=(False, True)),
    "kda": dict(num_v_heads=(4, 2), use_short_conv=(False, True), lower_bound=(-5.0, None)),
    "retnet": dict(
        num_kv_heads=(1, 2), feature_map=("relu", None), use_output_gate=(False, True), elementwise_affine=(False, True)
    ),
    "transformer": dict(qk_norm=(True, False), qkv_bias=(True, False)),
}
WINDOW = {"layers": [1], "num_heads": 2, "window_size": 4}
# By reason, values that are refused for it.
REASONS = {
    "it must be a finite number": [
        ("llama", {"rms_norm_eps": "1e-6", "rope_theta": [], "rope_parameters.rope_theta": "x"}),
        *(("llama", {"rope_theta": value}) for value in (float("nan"), 10**400)),  # the latter exceeds float64
        ("mamba2", {"layer_norm_epsilon": True}),
        ("recurrent_gemma", {"rms_norm_eps": {}, "logits_soft_cap": "30", "partial_rotary_factor": []}),
        ("recurrent_gemma", {"partial_rotary_factor": float("inf")}),
        ("flax", {"logits_soft_cap": "5"}),
    ],
    "it must be a whole number, at least 1": [
        ("llama", {"hidden_size": "wide"}),
        ("mistral", {"sliding_window": "all"}),
        ("mamba", {"time_step_rank": 0}),
        ("flax", {"attention_window_size": "3"}),
        ("gated_deltaproduct", {"num_householder": 0}),
        ("transformer", {"window_size": 0}),
    ],
    "it must be true or false": [
        ("llama", {"tie_word_embeddings": "false"}),
        ("mamba2", {"tie_word_embeddings": 0}),
        ("recurrent_gemma", {"tie_word_embeddings": []}),
        ("flax", {"embeddings_scale_by_sqrt_dim": 1}),
        ("gated_deltanet", {"use_gate": 0}),
        ("gated_deltaproduct", {"use_output_gate": "silu", "use_forget_gate": 1}),
        ("delta_net", {"use_gate": 1}),
    ],
    "it must be an object": [("llama", {"rope_scaling": "linear", "rope_parameters": "default"})],
    f"{', '.join(hugging_face.FAMILIES)} can be imported": [
        ("llama", {"model_type": "gpt2"}),
        ("llama", {"model_type": []}),
    ],
    "only unquantised weights can be imported": [("llama", {"quantization_config": {"bits": 4}})],
    "only unlimited time steps can be imported": [
        ("mamba2", {"time_step_limit": [0.0, 1.0], "dt_limit": [0.0, 1.0]}),
        *(("mamba2", {"time_step_limit": value}) for value in ("none", -1)),
    ],
    "only recurrent and attention can be imported": [
        ("recurrent_gemma", {"block_types": value})
        for value in (["recurrent", "ssm"], -1, [["recurrent"]], {"recurrent": 1})
    ],
    "only null can be imported": [("hgrn", {"attn": WINDOW}), ("hgrn2", {"attn": WINDOW})],
}


def single(name, field, value, reason):
    outer, _, inner = field.partition(".")
    return name, {outer: {inner: value} if inner else value}, f"^FILE: {re.escape(f'{field} is {value!r}; {reason}')}$"


SCALED = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=40
)
FIELDS = [
    *(
        single(name, field, value, f"only {'null' if only is None else repr(only)} can be imported")
        for name, fields in ONLY.items()
        for field, (value, only) in fields.items()
    ),
    *(
        single(name, field, value, reason)
        for reason, cases in REASONS.items()
        for name, fields in cases
        for field, value in fields.items()
    ),
    ("llama", {"model_type": None}, "has no model_type"),
    ("llama", {"head_dim": 8}, "head_dim is 8; only hidden_size / num_attention_heads = 4"),
    ("llama", {"hidden_size": 18}, "hidden_size is 18; the 4 heads do not divide it"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type is 'linear'; only"),
    ("llama", {"rope_parameters": {"rope_type": "yarn"}}, r"rope_parameters.rope_type is 'yarn'; only"),
    ("llama", {"rope_scaling": SCALED | {"high_freq_factor": 2.0}}, "rope_scaling.high_freq_factor is 2.0; only"),
    ("llama", {"rope_scaling": SCALED | {"factor": 0.5}}, "rope_scaling.factor is 0.5; only 1 or more"),
    ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "has no rope_scaling.low_freq_factor"),
    (
        "llama",
        {"rope_parameters": {"rope_theta": 5.0}, "rope_scaling": {"rope_theta": 6.0}},
        "rope_parameters says oth",
    ),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only rotary positions over whole"),
    ("llama", {"hidden_size": 12, "head_dim": 3}, r"head_dim is 3; .* even .* \(.*=12 over num_attention_heads=4\)$"),
    ("llama", {"num_key_value_heads": 3}, "key_value_heads=3 does not divide model.num_heads=4"),
    ("mistral", {"layer_types": ["full_attention"]}, "layer_types is .* only sliding_attention"),
    ("mistral", {"layer_types": -1}, "layer_types is -1; with this sliding_window only sliding_attention"),
    ("mamba", {"time_step_rank": 2, "dt_rank": "auto"}, r"x_proj.weight has the shape \[13, 32\]; .* must be \[14"),
    ("mamba", {"dt_rank": 3}, "dt_rank is 3; time_step_rank is 1"),
    ("mamba", {"intermediate_size": 24}, r"in_proj.weight has the shape \[64, 16\]; by the config it must be \[48"),
    ("falcon_mamba", {"mixer_rms_eps": 0}, "mixer_rms_eps is 0.0; only a number above 0"),
    ("mamba2", {"norm_eps": 1e-2}, "norm_eps is 0.01; layer_norm_epsilon is 1e-06"),
    ("mamba2", {"head_dim": 4}, r"num_heads is 4; with head_dim 4 the heads do not add up to expand \*"),
    ("mamba2", {"time_step_limit": [0.0, {"__float__": []}]}, r"config.json is damaged: float\(\) argument must be "),
    ("recurrent_gemma", {"rope_scaling": SCALED}, r"rope_scaling.rope_type is 'llama3'; only .* \('default'\) can"),
    ("recurrent_gemma", {"logits_soft_cap": 0.0}, "logits_soft_cap is 0.0; it must be above 0"),
    ("recurrent_gemma", {"lru_width": 25}, "lru_width is 25; the 2 heads do not divide it"),
    ("recurrent_gemma", {"partial_rotary_factor": 0.4}, r"partial_rotary_factor is 0.4; it rotates 3 of the 8"),
    ("recurrent_gemma", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'; only unscaled positions"),
    ("gla", {"expand_k": 0.51}, "expand_k is 0.51; that is 16.32 channels"),
    ("gla", {"expand_v": 0}, "expand_v is 0.0; that is 0.0 channels"),
    ("gla", {"num_heads": 3, "attn": WINDOW}, "expand_k is None; that is 16 channels, which 3 heads do not divide"),
    ("gla", {"intermediate_size": None, "hidden_ratio": 0}, "hidden_ratio is 0.0; the MLP would have no channels"),
    ("gla", {"attn": "window"}, "attn is 'window'; it must be an object or a list of objects"),
    ("gla", {"attn": {"num_heads": 2}}, "attn has no layers"),
    ("gla", {"attn": WINDOW | {"layers": [3]}}, r"attn: layers is \[3\]; it must be a list of layers, each 0 to 2"),
    ("gla", {"attn": WINDOW | {"layers": [1, 1]}}, r"attn: layers is \[1, 1\]; layer 1 is listed twice"),
    ("gla", {"attn": WINDOW | {"layers": [0, 1, 2]}}, "attn is .*; at least one layer must not be softmax"),
    ("gla", {"attn": WINDOW | {"num_heads": 3}}, "attn: num_heads is 3; hidden_size=32 must split into that many"),
    ("gla", {"attn": WINDOW | {"num_heads": 32}}, "attn: num_heads is 32; .* an even number of channels"),
    ("gla", {"attn": WINDOW | {"qkv_bias": True}}, "attn: qkv_bias is True; only False"),
    ("gla", {"attn": WINDOW | {"window_size": 0}}, "attn: window_size is 0; it must be a whole number, at least 1"),
    *(
        ("gla", {"attn": [WINDOW, WINDOW | {"layers": [0]} | other]}, "attn is .*; only layers with the same")
        for other in ({"num_heads": 4}, {"window_size": 5})
    ),
    ("gated_deltanet", {"output_gate_activation": "sigmoid"}, "'sigmoid'; only 'swish' or 'silu' can be imported"),
    ("gated_deltanet", {"expand_v": 0.3}, "expand_v is 0.3; that is 3.59"),
    ("hgrn", {"expand_ratio": 1.01}, "expand_ratio is 1.01; that is 32.32 channels"),
    ("hgrn2", {"expand_ratio": 12}, "expand_ratio is 12; it does not divide hidden_size=32"),
    ("hgrn2", {"expand_ratio": None, "num_heads": 3}, "num_heads is 3; that is 32 channels, which 3 heads do not"),
    ("retnet", {"expand_k": 30 / 32}, "expand_k is 0.9375; rotary positions need an even number of channels per"),
    ("retnet", {"attn": WINDOW | {"rope_theta": 500}}, "attn is .*; only rope_theta 10000, that of retention, can"),
    ("transformer", {"num_heads": 3}, "num_heads is 3; hidden_size=32 must split into that many heads, each with"),
    ("delta_net", {"qk_norm": None}, "qk_norm is None; only 'l2' can be imported"),
]


@pytest.mark.parametrize("name, fields, message", FIELDS)
def test_fields_that_no_model_here_can_have(made, tmp_path, name, fields, message):
    source = tmp_path / "source"
    if name in fla_reference.MODELS:  # without tensors
        source.mkdir()
        (source / "config.json").write_text(json.dumps(fla_reference.MODELS[name]))
    else:
        shutil.copytree(made(name)[1], source)
    set_fields(source, fields)
    refused(message.replace("FILE", str(source / "config.json")), source, tmp_path / "run")
    assert_nothing_in(tmp_path, "source")


@pytest.mark.parametrize(
    "changes, without, key, value",
    [
        # Missing fields take the architecture's defaults; infinity is spelled in transformers' own way.
        (
            {"time_step_limit": [0.0, {"__float__": "Infinity"}], "dtype": "float32"},
            ("expand", "conv_kernel", "use_bias", "use_conv_bias", "hidden_act", "torch_dtype"),
            *("recurrent_width", 32),
        ),
        # The names in flash-linear-attention, whose model is the same.
        ({"norm_eps": 1e-2, "dt_limit": [0.0, float("inf")]}, ("layer_norm_epsilon",), "norm_epsilon", 1e-2),
    ],
)
def test_fields_of_mamba2_in_other_releases(copied, tmp_path, changes, without, key, value):
    source = copied("mamba2")
    before = set_fields(source, changes, without)
    assert set(without) < set(before) and before["norm_eps"] == before["layer_norm_epsilon"]
    import_weights(source, tmp_path / "run")
    assert workdirs.read_config(tmp_path / "run").model[key] == value


@pytest.mark.parametrize("changes, warned", [({}, 1), ({"residual_in_fp32": False}, 0), ({"dtype": "float32"}, 0)])
def test_a_stream_that_is_rounded_here_is_warned_of(copied, tmp_path, caplog, changes, warned):
    """This is the residual stream of a bfloat16 Mamba-2, which there stays in float32 unless its config says otherwise."""
    source = copied("mamba2")
    set_fields(source, {"dtype": "bfloat16"} | changes, without=["residual_in_fp32"])
    import_weights(source, tmp_path / "run")
    assert sum("residual_in_fp32 is true" in message for message in caplog.messages) == warned


FLAX = {"layout": "flax"}
# By family, each key's value here and the only one that its models have.
MUST_BE = {
    "recurrent_gemma": dict(embedding_scale=(False, True), bias=(False, True), rotary_scaling=(8.0, 0.0)),
    "llama": dict(rotary_fraction=(0.5, 1.0), mlp_activation=("gelu", "silu")),
    "mistral": dict(logit_soft_cap=(5.0, 0.0)),
    "mamba": dict(channel_mixer=("gated_mlp", "none")),
    "falcon_mamba": dict(channel_mixer=("gated_mlp", "none")),
    "mamba2": dict(channel_mixer=("gated_mlp", "none")),
    "gla": dict(
        rotary_scaling=(8.0, 0.0), mlp_activation=("gelu", "silu"), bias=(True, False), rotary_fraction=(0.5, 1.0)
    ),
    "gated_deltanet": dict(embedding_scale=(True, False)),
    "delta_net": dict(logit_soft_cap=(5.0, 0.0)),
    "hgrn": dict(logit_soft_cap=(5.0, 0.0)),
    "kda": dict(gate_bias=(False, True), householders=(2, 1)),
    "retnet": dict(head_norm=("group", "rms"), rotary_base=(500.0, 10000.0)),
}


@pytest.mark.parametrize(
    "name, changes, options, message",
    [
        *(
            (name, {key: value}, {}, f"^model.{key} is {value!r}; in {name} it must be {must!r}$")
            for name, keys in MUST_BE.items()
            for key, (value, must) in keys.items()
        ),
        ("recurrent_gemma", {"logit_soft_cap": 0.0}, {}, "logit_soft_cap is 0; recurrent_gemma always has one"),
        ("recurrent_gemma", {"recurrent_width": 25}, {}, "num_heads=2 does not divide model.recurrent_width=25"),
        ("recurrent_gemma", {"rotary_base": 10_000.0}, FLAX, "key_value_heads is 2; in a recurrentgemma"),
        ("recurrent_gemma", {"rotary_fraction": 0.4}, {}, r"rotary_fraction=0.4 rotates 3 of the 8 channels of a head"),
        ("untied", {}, FLAX, "tied_embeddings is False; in a recurrentgemma checkpoint it must be"),
        ("flax", {"rotary_scaling": 8.0}, FLAX, "rotary_scaling is 8.0; in .* it must be 0.0"),
        ("flax", {"width": 20}, FLAX, "model.width=20 over model.num_heads=2 is 10 channels per head"),
        ("llama", {}, FLAX, "a recurrentgemma checkpoint has no layers of the kind attention"),
        ("llama", {}, {"layout": "onnx"}, "there is no layout 'onnx'; the layouts are huggingface and flax"),
        ("llama", {"pattern": ("attention", "mamba2"), "recurrent_width": 64}, {}, "none of llama, .* has the layers"),
        ("llama", {"width": 12}, {}, "model.width=12 over model.num_heads=4 is 3 channels per head; in llama it must"),
        ("mamba2", {"recurrent_width": 40}, {}, "recurrent_width=40 must be a multiple of model.width=16 in mamba2"),
        ("gla", {"width": 24, "num_heads": 8}, {}, "model.width=24 over model.num_heads=8 is 3 channels per attention"),
        *(
            (name, {"pattern": pattern}, {}, f"none of .* has the layers {', '.join(pattern)}$")
            for name, pattern in {
                "delta_net": ("delta_net", "gla"),
                "llama": ("attention", "sliding_window"),
                "gated_deltaproduct": ("gated_delta_net", "delta_net"),
                "hgrn": ("hgrn", "hgrn2"),
            }.items()
        ),
        ("retnet", {"key_width": 7}, {}, "retention has keys of 7 channels; in retnet it must be an even number up to"),
        ("hgrn2", {"value_width": 4}, {}, "2 heads of 8 and 4 channels .* must each add up to model.width=16 in hgrn2"),
        ("hgrn2", {"output_norm_epsilon": 0.0}, {}, "norm of hgrn2's output has the epsilon 1e-06 .*; in .* it must"),
    ],
)
def test_models_that_are_none_of_theirs(tmp_path, name, changes, options, message):
    config = configs.default()
    config.model.update({"vocab_size": 31} | MODELS[name] | changes)
    configs.forget_unread(config, ["model.pattern"])
    workdirs.prepare(tmp_path / "run", configs.resolve(config))
    with pytest.raises(UserError, match=message):
        export_weights(tmp_path / "run", tmp_path / "target", **options)
    assert_nothing_in(tmp_path, "run")


def test_flax_heads_that_the_package_cannot_turn(made):
    exported = made("flax")[1]
    wide = flax.read_tensors(exported) | {"params.embedder.input_embedding": streamed(np.zeros((31, 20), np.float32))}
    with pytest.raises(UserError, match=rf"^{exported}: .* 20 over 2 heads is 10 channels per head; .* multiple of 4$"):
        flax.model(exported, wide)


@pytest.mark.parametrize("layout", ["huggingface", "flax"])
def test_heads_that_nothing_turns_may_be_of_any_width(tmp_path, layout):
    run(tmp_path / "run", **MODELS["flax_hawk"] | {"width": 10, "embedding_scale": True, "logit_soft_cap": 5.0})
    export_weights(tmp_path / "run", tmp_path / "exported", layout=layout)
    import_weights(tmp_path / "exported", tmp_path / "again")
    assert configs.model_config(workdirs.read_config(tmp_path / "again")).head_width == 5
