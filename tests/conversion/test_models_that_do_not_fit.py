"""Tensors, fields and models that do not fit are reported before anything is written."""

import json
import shutil

import numpy as np
import pytest

from jaxlinear import config as configs
from jaxlinear.conversion import export_weights, flax, hugging_face, import_weights
from jaxlinear.errors import UserError
from jaxlinear.training import workdir as workdirs
from tests.conversion.converted import MODELS, assert_nothing_in, launch, rewrite, run, streamed

SCALED = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 40,
}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x.pop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight is missing$"),
        (lambda x: [x.pop(name) for name in list(x) if ".q_proj." in name], "0.self_attn.q_proj.weight is missing"),
        (lambda x: x.update(score=np.zeros(3, np.float32)), "the tensor score does not belong to this model$"),
        (
            lambda x: x.update({"model.norm.weight": np.zeros(3, np.float32)}),
            r"the tensor model.norm.weight has the shape \[3\]; by the config it must be \[16\]$",
        ),
        (
            lambda x: x.update({"lm_head.weight": np.zeros((16, 31), np.float32)}),
            r"the tensor lm_head.weight has the shape \[16, 31\]; by the config it must be \[31, 16\]$",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(copied, tmp_path, change, message):
    source = copied("llama")

    def changed(values):
        change(values)
        return values

    rewrite(source, changed)
    with pytest.raises(UserError, match=rf"^{source}: .*{message}"):
        import_weights(source, tmp_path / "run")
    assert_nothing_in(tmp_path, "source")


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("llama", {"model_type": "gpt2"}, "model_type is 'gpt2'; llama, mistral, mamba, .* can be imp"),
        ("llama", {"model_type": None}, "has no model_type"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is .* only unquantised weights"),
        ("llama", {"head_dim": 8}, "head_dim is 8; only hidden_size / num_attention_heads = 4 can be imported"),
        ("llama", {"hidden_size": 18}, "hidden_size is 18; the 4 heads do not divide it"),
        ("llama", {"hidden_size": "wide"}, "hidden_size is 'wide'; it must be a whole number, at least 1"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' can be imported"),
        ("llama", {"attention_bias": True}, "attention_bias is True; only False can be imported"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True; only False can be imported"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type is 'linear'; only"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, r"rope_parameters.rope_type is 'yarn'; only"),
        ("llama", {"rope_scaling": SCALED | {"high_freq_factor": 2.0}}, "rope_scaling.high_freq_factor is 2.0; only"),
        ("llama", {"rope_scaling": SCALED | {"factor": 0.5}}, "rope_scaling.factor is 0.5; only 1 or more can be"),
        ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "has no rope_scaling.low_freq_factor"),
        ("recurrent_gemma", {"rope_scaling": SCALED}, r"rope_scaling.rope_type is 'llama3'; only .* \('default'\) can"),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 50.0}, "rope_scaling": {"rope_theta": 60.0}},
            "rope_scaling is {'rope_theta': 60.0}; rope_parameters says otherwise; keep the one that is right",
        ),
        ("llama", {"is_causal": False}, "is_causal is False; only True can be imported"),
        ("mistral", {"layer_types": ["full_attention"]}, "layer_types is .* only sliding_attention can be imported"),
        ("mistral", {"layer_types": -1}, "layer_types is -1; with this sliding_window only sliding_attention can"),
        ("recurrent_gemma", {"sliding_window": 9}, "sliding_window is 9; only 4 can be imported"),
        ("mistral", {"sliding_window": "all"}, "sliding_window is 'all'; it must be a whole number, at least 1"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only rotary positions over whole"),
        (
            "llama",
            {"hidden_size": 12, "head_dim": 3},
            r"head_dim is 3; rotary positions need an even number of channels per head \(hidden_size=12 over "
            r"num_attention_heads=4\)$",
        ),
        ("llama", {"num_key_value_heads": 3}, "key_value_heads=3 does not divide model.num_heads=4"),
        ("mamba", {"time_step_rank": 0}, "time_step_rank is 0; it must be a whole number, at least 1"),
        ("mamba", {"time_step_rank": 2, "dt_rank": "auto"}, r"x_proj.weight has the shape \[13, 32\]; .* must be \[14"),
        ("mamba", {"dt_rank": 3}, "dt_rank is 3; time_step_rank is 1"),
        ("mamba", {"intermediate_size": 24}, r"in_proj.weight has the shape \[64, 16\]; by the config it must be \[48"),
        ("mamba", {"use_bias": True}, "use_bias is True; only False can be imported"),
        ("falcon_mamba", {"mixer_rms_eps": 0}, "mixer_rms_eps is 0.0; only a number above 0 can be imported"),
        ("falcon_mamba", {"use_bias": True}, "use_bias is True; only False can be imported"),
        ("falcon_mamba", {"use_conv_bias": False}, "use_conv_bias is False; only True can be imported"),
        ("falcon_mamba", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' can be imported"),
        ("mamba2", {"n_groups": 8}, "n_groups is 8; only 1 can be imported"),
        ("mamba2", {"use_bias": True}, "use_bias is True; only False can be imported"),
        ("mamba2", {"use_conv_bias": False}, "use_conv_bias is False; only True can be imported"),
        ("mamba2", {"hidden_act": "relu"}, "hidden_act is 'relu'; only 'silu' can be imported"),
        ("mamba2", {"time_step_limit": [0.0, 1.0]}, "time_step_limit is .* only unlimited time steps can be imported"),
        ("mamba2", {"dt_limit": [0.0, 1.0]}, "dt_limit is .* only unlimited time steps can be imported"),
        ("mamba2", {"norm_before_gate": True}, "norm_before_gate is True; only False can be imported"),
        ("mamba2", {"D_has_hdim": True}, "D_has_hdim is True; only False can be imported"),
        ("mamba2", {"rmsnorm": False}, "rmsnorm is False; only True can be imported"),
        ("mamba2", {"norm_eps": 1e-2}, "norm_eps is 0.01; layer_norm_epsilon is 1e-06"),
        ("mamba2", {"head_dim": 4}, r"num_heads is 4; with head_dim 4 the heads do not add up to expand \*"),
        ("recurrent_gemma", {"attention_bias": True}, "attention_bias is True; only False can be imported"),
        ("recurrent_gemma", {"hidden_activation": "relu"}, "hidden_activation is 'relu'; only 'gelu_pytorch_tanh' can"),
        ("recurrent_gemma", {"block_types": ["recurrent", "ssm"]}, "block_types is .*; only recurrent and attention"),
        ("recurrent_gemma", {"logits_soft_cap": 0.0}, "logits_soft_cap is 0.0; it must be above 0"),
        ("recurrent_gemma", {"lru_width": 25}, "lru_width is 25; the 2 heads do not divide it"),
        ("recurrent_gemma", {"partial_rotary_factor": 0.4}, r"partial_rotary_factor is 0.4; it rotates 3 of the 8"),
        ("recurrent_gemma", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'; only unscaled positions"),
    ],
)
def test_fields_that_no_model_here_can_have(made, tmp_path, name, fields, message):
    source = shutil.copytree(made(name)[1], tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | fields
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        import_weights(source, tmp_path / "run")
    assert_nothing_in(tmp_path, "source")


@pytest.mark.parametrize(
    "name, field, value, reason",
    [
        ("llama", "model_type", [], f"{', '.join(hugging_face.FAMILIES)} can be imported"),
        ("llama", "rms_norm_eps", "1e-6", "it must be a finite number"),
        ("llama", "rope_theta", [], "it must be a finite number"),
        ("llama", "rope_theta", float("nan"), "it must be a finite number"),
        pytest.param("llama", "rope_theta", 10**400, "it must be a finite number", id="beyond float64"),
        ("llama", "rope_scaling", "linear", "it must be an object"),
        ("llama", "rope_parameters", "default", "it must be an object"),
        ("llama", "rope_parameters.rope_theta", "x", "it must be a finite number"),
        ("llama", "tie_word_embeddings", "false", "it must be true or false"),
        ("mamba2", "layer_norm_epsilon", True, "it must be a finite number"),
        ("mamba2", "tie_word_embeddings", 0, "it must be true or false"),
        ("mamba2", "time_step_limit", "none", "only unlimited time steps can be imported"),
        ("mamba2", "time_step_limit", -1, "only unlimited time steps can be imported"),
        ("recurrent_gemma", "rms_norm_eps", {}, "it must be a finite number"),
        ("recurrent_gemma", "tie_word_embeddings", [], "it must be true or false"),
        ("recurrent_gemma", "logits_soft_cap", "30", "it must be a finite number"),
        ("recurrent_gemma", "partial_rotary_factor", [], "it must be a finite number"),
        ("recurrent_gemma", "partial_rotary_factor", float("inf"), "it must be a finite number"),
        ("recurrent_gemma", "block_types", -1, "only recurrent and attention can be imported"),
        ("recurrent_gemma", "block_types", [["recurrent"]], "only recurrent and attention can be imported"),
        ("recurrent_gemma", "block_types", {"recurrent": 1}, "only recurrent and attention can be imported"),
        ("flax", "attention_window_size", "3", "it must be a whole number, at least 1"),
        ("flax", "embeddings_scale_by_sqrt_dim", 1, "it must be true or false"),
        ("flax", "logits_soft_cap", "5", "it must be a finite number"),
    ],
)
def test_fields_of_another_type(made, tmp_path, name, field, value, reason):
    source = shutil.copytree(made(name)[1], tmp_path / "source")
    file = source / "config.json"
    outer, _, inner = field.partition(".")
    file.write_text(json.dumps(json.loads(file.read_text()) | {outer: {inner: value} if inner else value}))
    with pytest.raises(UserError) as refusal:
        import_weights(source, tmp_path / "run")
    assert str(refusal.value) == f"{file}: {field} is {value!r}; {reason}"
    assert_nothing_in(tmp_path, "source")


def test_an_infinity_that_is_none(copied, tmp_path):
    source = copied("mamba2")
    (source / "config.json").write_text('{"time_step_limit": [0.0, {"__float__": []}]}')
    with pytest.raises(UserError, match=r"config.json is damaged: float\(\) argument must be "):
        import_weights(source, tmp_path / "run")


def test_fields_of_other_releases_of_transformers(copied, tmp_path):
    """Missing fields take the architecture's defaults; infinity is spelled in its own way."""
    source = copied("mamba2")
    fields = json.loads((source / "config.json").read_text())
    for name in ("expand", "conv_kernel", "use_bias", "use_conv_bias", "hidden_act", "torch_dtype"):
        del fields[name]
    fields |= {"time_step_limit": [0.0, {"__float__": "Infinity"}], "dtype": "float32"}
    (source / "config.json").write_text(json.dumps(fields))
    import_weights(source, tmp_path / "run")
    assert workdirs.read_config(tmp_path / "run").model.recurrent_width == 32


def test_the_epsilon_of_mamba2_by_its_other_name(copied, tmp_path):
    """The name in flash-linear-attention, whose model is the same."""
    source = copied("mamba2")
    fields = json.loads((source / "config.json").read_text())
    assert fields["norm_eps"] == fields.pop("layer_norm_epsilon")
    (source / "config.json").write_text(json.dumps(fields | {"norm_eps": 1e-2, "dt_limit": [0.0, float("inf")]}))
    import_weights(source, tmp_path / "run")
    assert workdirs.read_config(tmp_path / "run").model.norm_epsilon == 1e-2


@pytest.mark.parametrize("changes, warned", [({}, 1), ({"residual_in_fp32": False}, 0), ({"dtype": "float32"}, 0)])
def test_a_stream_that_is_rounded_here_is_warned_of(copied, tmp_path, caplog, changes, warned):
    """This is the residual stream of a bfloat16 Mamba-2, which there stays in float32 unless its config says otherwise."""
    source = copied("mamba2")
    fields = json.loads((source / "config.json").read_text())
    fields.pop("residual_in_fp32", None)
    (source / "config.json").write_text(json.dumps(fields | {"dtype": "bfloat16"} | changes))
    import_weights(source, tmp_path / "run")
    assert sum("residual_in_fp32 is true" in message for message in caplog.messages) == warned


@pytest.mark.parametrize(
    "name, changes, options, message",
    [
        ("recurrent_gemma", {"embedding_scale": False}, {}, "embedding_scale is False; in recurrent_gemma it must be"),
        ("recurrent_gemma", {"logit_soft_cap": 0.0}, {}, "logit_soft_cap is 0; recurrent_gemma always has one"),
        ("recurrent_gemma", {"recurrent_width": 25}, {}, "num_heads=2 does not divide model.recurrent_width=25"),
        ("recurrent_gemma", {"bias": False}, {}, "model.bias is False; in recurrent_gemma it must be True"),
        ("recurrent_gemma", {"rotary_base": 10_000.0}, {"layout": "flax"}, "key_value_heads is 2; in a recurrentgemma"),
        ("untied", {}, {"layout": "flax"}, "tied_embeddings is False; in a recurrentgemma checkpoint it must be"),
        ("llama", {}, {"layout": "flax"}, "a recurrentgemma checkpoint has no layers of the kind attention"),
        ("llama", {}, {"layout": "onnx"}, "there is no layout 'onnx'; the layouts are huggingface and flax"),
        ("llama", {"rotary_fraction": 0.5}, {}, "rotary_fraction is 0.5; in llama it must be 1.0"),
        ("mistral", {"logit_soft_cap": 5.0}, {}, "model.logit_soft_cap is 5.0; in mistral it must be 0.0"),
        ("recurrent_gemma", {"rotary_scaling": 8.0}, {}, "model.rotary_scaling is 8.0; in recurrent_gemma it must be"),
        ("flax", {"rotary_scaling": 8.0}, {"layout": "flax"}, "rotary_scaling is 8.0; in .* it must be 0.0"),
        ("gla", {"rotary_scaling": 8.0}, {}, "model.rotary_scaling is 8.0; in gla it must be 0.0"),
        ("llama", {"mlp_activation": "gelu"}, {}, "mlp_activation is 'gelu'; in llama it must be 'silu'"),
        ("llama", {"pattern": ("attention", "mamba2"), "recurrent_width": 64}, {}, "none of llama, .* has the layers"),
        ("llama", {"width": 12}, {}, "model.width=12 over model.num_heads=4 is 3 channels per head; in llama it must"),
        ("recurrent_gemma", {"rotary_fraction": 0.4}, {}, r"rotary_fraction=0.4 rotates 3 of the 8 channels of a head"),
        ("flax", {"width": 20}, {"layout": "flax"}, "model.width=20 over model.num_heads=2 is 10 channels per head"),
        ("mamba", {"channel_mixer": "gated_mlp"}, {}, "channel_mixer is 'gated_mlp'; in mamba it must be 'none'"),
        ("falcon_mamba", {"channel_mixer": "gated_mlp"}, {}, "channel_mixer is 'gated_mlp'; in falcon_mamba it must"),
        ("mamba2", {"channel_mixer": "gated_mlp"}, {}, "channel_mixer is 'gated_mlp'; in mamba2 it must be 'none'"),
        ("mamba2", {"recurrent_width": 40}, {}, "recurrent_width=40 must be a multiple of model.width=16 in mamba2"),
    ],
)
def test_models_that_are_none_of_theirs(tmp_path, name, changes, options, message):
    config = configs.default()
    config.model.update({"vocab_size": 31} | MODELS[name] | changes)
    workdirs.prepare(tmp_path / "run", configs.resolve(config))
    with pytest.raises(UserError, match=message):
        export_weights(tmp_path / "run", tmp_path / "target", **options)
    assert_nothing_in(tmp_path, "run")


def test_flax_heads_that_the_package_cannot_turn(made):
    exported = made("flax")[1]
    wide = flax.read_tensors(exported) | {"params.embedder.input_embedding": streamed(np.zeros((31, 20), np.float32))}
    with pytest.raises(
        UserError, match=rf"^{exported}: a width of 20 over 2 heads is 10 channels per head; .* multiple of 4$"
    ):
        flax.model(exported, wide)


@pytest.mark.parametrize("layout", ["huggingface", "flax"])
def test_heads_that_nothing_turns_may_be_of_any_width(tmp_path, layout):
    run(tmp_path / "run", **MODELS["flax_hawk"] | {"width": 10, "embedding_scale": True, "logit_soft_cap": 5.0})
    export_weights(tmp_path / "run", tmp_path / "exported", layout=layout)
    import_weights(tmp_path / "exported", tmp_path / "again")
    assert configs.model_config(workdirs.read_config(tmp_path / "again")).head_width == 5


def test_flags_that_do_not_go_together(tmp_path):
    done = launch(tmp_path)
    line = "convert.py: give --source to import into --workdir, or --target to export from it\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)
