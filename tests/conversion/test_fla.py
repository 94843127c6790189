"""Models of flash-linear-attention: logits match ``fla_reference.py`` to 1e-4 in float32. ``fla_check.py`` compared that
with release 0.6.0 of the package, its modules and kernels in Triton's interpreter, to 5e-5 of the largest logit."""

import json

import numpy as np
import pytest

from jaxlinear import config as configs
from jaxlinear.conversion import convert, export_weights, hugging_face, import_weights
from jaxlinear.conversion.family import Fields
from jaxlinear.conversion.fla import delta_net, gated_deltanet, gla, hgrn, retnet
from jaxlinear.errors import UserError
from jaxlinear.models.parameters import describe
from jaxlinear.training import workdir as workdirs
from tests import small
from tests.conversion import fla_reference as reference
from tests.conversion.converted import (
    MODELS,
    arrays,
    assert_nothing_in,
    assert_same_bits,
    assert_same_logits,
    tensors,
    write_header,
)


def saved(directory, fields):
    """Writes a directory as the package saves it; returns its tensors."""
    drawn = reference.draw(fields)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(fields))
    write_tensors(directory, drawn)
    return drawn


def write_tensors(directory, values):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, x in values.items():
        header[name] = {"dtype": "F32", "shape": x.shape, "data_offsets": [len(data), len(data) + x.nbytes]}
        data += x.tobytes()
    write_header(directory / "model.safetensors", header, data)


@pytest.mark.slow(
    but=[
        *("gla, with windows", "delta_net, with a gate", "gated_deltanet", "gated_deltaproduct", "kda, with windows"),
        *("retnet, with windows", "hgrn, wider", "hgrn2, by heads", "transformer, grouped"),
    ]
)
@pytest.mark.parametrize("name", reference.MODELS)
def test_logits(tmp_path, name):
    fields = reference.MODELS[name]
    drawn = saved(tmp_path / "saved", fields)
    expected = reference.logits(fields, drawn, reference.TOKENS)
    import_weights(tmp_path / "saved", tmp_path / "run")
    assert_same_logits(tmp_path / "run", reference.TOKENS, expected)

    export_weights(tmp_path / "run", tmp_path / "exported")
    again, written = json.loads((tmp_path / "exported" / "config.json").read_text()), tensors(tmp_path / "exported")
    if fields["model_type"] == "transformer":
        assert again["model_type"] == ("mistral" if "window_size" in fields else "llama")
    else:
        if not fields.get("fuse_norm", True):
            drawn = {key.replace(".g_norm.", ".g_norm_swish_gate."): x for key, x in drawn.items()}
        assert_same_bits(written, drawn)
        np.testing.assert_array_equal(reference.logits(again, written, reference.TOKENS), expected)
    import_weights(tmp_path / "exported", tmp_path / "again")
    assert_same_bits(arrays(tmp_path / "again"), arrays(tmp_path / "run"))


def test_several_files(tmp_path, monkeypatch):
    fields = reference.MODELS["gla, with windows"]
    saved(tmp_path / "saved", fields)
    import_weights(tmp_path / "saved", tmp_path / "run")
    monkeypatch.setattr(hugging_face, "SHARD_BYTES", 20_000)
    export_weights(tmp_path / "run", tmp_path / "exported")
    assert len(list((tmp_path / "exported").glob("*.safetensors"))) > 2
    assert_same_bits(tensors(tmp_path / "exported"), tensors(tmp_path / "saved"))
    import_weights(tmp_path / "exported", tmp_path / "again")
    assert_same_bits(arrays(tmp_path / "again"), arrays(tmp_path / "run"))


def test_a_norm_that_is_there_under_both_names(tmp_path):
    fields = reference.MODELS["gla"]
    drawn = saved(tmp_path / "saved", fields)
    usual = "model.layers.1.attn.g_norm_swish_gate.weight"
    other = usual.replace("g_norm_swish_gate", "g_norm")
    write_tensors(tmp_path / "saved", drawn | {other: drawn[usual] + 1})
    with pytest.raises(UserError, match=f"the tensor {other} does not belong to this model$"):
        import_weights(tmp_path / "saved", tmp_path / "run")


def test_files_of_2024(tmp_path):
    """The block's norms are in the mixer and in the MLP, the MLP's two maps are one, and a parameter is not read."""
    fields = reference.MODELS["gated_deltanet, with windows"]
    drawn = saved(tmp_path / "saved", fields)
    import_weights(tmp_path / "saved", tmp_path / "run")
    old = {name: x for name, x in drawn.items() if "up_proj" not in name}
    for layer in range(3):
        there = f"model.layers.{layer}"
        for part in ("attn", "mlp"):
            old[f"{there}.{part}.norm.weight"] = old.pop(f"{there}.{part}_norm.weight")
        gate, up = (drawn[f"{there}.mlp.{name}_proj.weight"] for name in ("gate", "up"))
        old[f"{there}.mlp.gate_proj.weight"] = np.concatenate([gate, up])
        old[f"{there}.attn.D"] = np.ones(3, np.float32)
    write_tensors(tmp_path / "saved", old)
    import_weights(tmp_path / "saved", tmp_path / "old")
    assert_same_bits(arrays(tmp_path / "old"), arrays(tmp_path / "run"))


# Parameter counts of the models that the package makes by default.
DEFAULTS = {
    "gla": 1_365_514_240,
    "gated_deltanet": 1_387_348_732,
    "gated_deltaproduct": 1_387_090_432,
    "delta_net": 1_365_677_056,
    "hgrn": 1_364_396_032,
    "hgrn2": 1_364_396_032,
    "kda": 1_390_941_568,
    "retnet": 1_351_727_104,
    "transformer": 1_364_297_728,
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_what_is_left_out_has_the_default_of_the_package(name):
    fields = Fields({"model_type": name}, "config.json")
    model = convert._config(hugging_face.family_of_fields(fields).model(fields))
    assert describe(configs.model_config(model)).num_parameters == DEFAULTS[name]


WINDOW = {"layers": [1], "num_heads": 2, "window_size": 4}


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("gla", {"hidden_act": "powlu"}, "hidden_act is 'powlu'; only 'swish' can be imported"),
        ("gla", {"attnres_block_size": 2}, "attnres_block_size is 2; only null can be imported"),
        ("gla", {"clamp_min": -1.0}, "clamp_min is -1.0; only null can be imported"),
        ("gla", {"feature_map": "relu"}, "feature_map is 'relu'; only null can be imported"),
        ("gla", {"num_kv_heads": 1}, "num_kv_heads is 1; only 2 can be imported"),
        ("gla", {"use_short_conv": True}, "use_short_conv is True; only False can be imported"),
        ("gla", {"use_output_gate": False}, "use_output_gate is False; only True can be imported"),
        ("gla", {"elementwise_affine": False}, "elementwise_affine is False; only True can be imported"),
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
        ("gla", {"attn": WINDOW | {"qkv_bias": True}}, "attn: qkv_bias is True; only False can be imported"),
        ("gla", {"attn": WINDOW | {"window_size": 0}}, "attn: window_size is 0; it must be a whole number, at least 1"),
        ("gla", {"attn": [WINDOW, WINDOW | {"layers": [0], "num_heads": 4}]}, "attn is .*; only layers with the same"),
        (
            "gla",
            {"attn": [WINDOW, WINDOW | {"layers": [0], "window_size": 5}]},
            "attn is .*; only layers with the same",
        ),
        ("gated_deltanet", {"num_v_heads": 4}, "num_v_heads is 4; only 3 can be imported"),
        ("gated_deltanet", {"use_gate": 0}, "use_gate is 0; it must be true or false"),
        ("gated_deltanet", {"output_gate_activation": "sigmoid"}, "'sigmoid'; only 'swish' or 'silu' can be imported"),
        ("gated_deltanet", {"use_short_conv": False}, "use_short_conv is False; only True can be imported"),
        ("gated_deltanet", {"expand_v": 0.3}, "expand_v is 0.3; that is 3.59"),
        ("gated_deltaproduct", {"use_output_gate": "silu"}, "use_output_gate is 'silu'; it must be true or false"),
        ("gated_deltaproduct", {"use_forget_gate": 1}, "use_forget_gate is 1; it must be true or false"),
        ("gated_deltaproduct", {"use_short_conv": False}, "use_short_conv is False; only True can be imported"),
        ("gated_deltaproduct", {"num_householder": 0}, "num_householder is 0; it must be a whole number, at least 1"),
        ("delta_net", {"use_gate": 1}, "use_gate is 1; it must be true or false"),
        ("delta_net", {"use_beta": False}, "use_beta is False; only True can be imported"),
        ("delta_net", {"use_short_conv": False}, "use_short_conv is False; only True can be imported"),
        ("hgrn", {"attn": WINDOW}, "attn is .*; only null can be imported"),
        ("hgrn", {"use_lower_bound": False}, "use_lower_bound is False; only True can be imported"),
        ("hgrn", {"use_short_conv": True}, "use_short_conv is True; only False can be imported"),
        ("hgrn", {"elementwise_affine": False}, "elementwise_affine is False; only True can be imported"),
        ("hgrn", {"expand_ratio": 1.01}, "expand_ratio is 1.01; that is 32.32 channels"),
        ("hgrn2", {"attn": WINDOW}, "attn is .*; only null can be imported"),
        ("hgrn2", {"use_lower_bound": False}, "use_lower_bound is False; only True can be imported"),
        ("hgrn2", {"use_short_conv": True}, "use_short_conv is True; only False can be imported"),
        ("hgrn2", {"elementwise_affine": False}, "elementwise_affine is False; only True can be imported"),
        ("hgrn2", {"expand_ratio": 12}, "expand_ratio is 12; it does not divide hidden_size=32"),
        ("hgrn2", {"expand_ratio": None, "num_heads": 3}, "num_heads is 3; that is 32 channels, which 3 heads do not"),
        ("kda", {"num_v_heads": 4}, "num_v_heads is 4; only 2 can be imported"),
        ("kda", {"use_short_conv": False}, "use_short_conv is False; only True can be imported"),
        ("kda", {"lower_bound": -5.0}, "lower_bound is -5.0; only null can be imported"),
        ("retnet", {"num_kv_heads": 1}, "num_kv_heads is 1; only 2 can be imported"),
        ("retnet", {"feature_map": "relu"}, "feature_map is 'relu'; only null can be imported"),
        ("retnet", {"use_output_gate": False}, "use_output_gate is False; only True can be imported"),
        ("retnet", {"elementwise_affine": False}, "elementwise_affine is False; only True can be imported"),
        ("retnet", {"expand_k": 30 / 32}, "expand_k is 0.9375; rotary positions need an even number of channels per"),
        ("retnet", {"attn": WINDOW | {"rope_theta": 500}}, "attn is .*; only rope_theta 10000, that of retention, can"),
        ("transformer", {"qk_norm": True}, "qk_norm is True; only False can be imported"),
        ("transformer", {"window_size": 0}, "window_size is 0; it must be a whole number, at least 1"),
        ("transformer", {"qkv_bias": True}, "qkv_bias is True; only False can be imported"),
        ("transformer", {"num_heads": 3}, "num_heads is 3; hidden_size=32 must split into that many heads, each with"),
        ("delta_net", {"qk_norm": None}, "qk_norm is None; only 'l2' can be imported"),
        ("delta_net", {"use_rope": True}, "use_rope is True; only False can be imported"),
        ("delta_net", {"qk_norm": "sum"}, "qk_norm is 'sum'; only 'l2' can be imported"),
        ("delta_net", {"qk_activation": "elu"}, "qk_activation is 'elu'; only 'silu' can be imported"),
    ],
)
def test_what_cannot_be_imported(tmp_path, name, fields, message):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(reference.MODELS[name] | fields))
    with pytest.raises(UserError, match=message):
        import_weights(tmp_path / "source", tmp_path / "run")
    assert_nothing_in(tmp_path, "source")


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("gla", {"mlp_activation": "gelu"}, "mlp_activation is 'gelu'; in gla it must be 'silu'"),
        ("gla", {"bias": True}, "model.bias is True; in gla it must be False"),
        ("gla", {"rotary_fraction": 0.5}, "rotary_fraction is 0.5; in gla it must be 1.0"),
        ("gla", {"width": 24, "num_heads": 8}, "model.width=24 over model.num_heads=8 is 3 channels per attention"),
        ("delta_net", {"logit_soft_cap": 5.0}, "logit_soft_cap is 5.0; in delta_net it must be 0.0"),
        ("delta_net", {"pattern": ("delta_net", "gla")}, "none of .* has the layers delta_net, gla"),
        ("delta_net", {"pattern": ("attention", "sliding_window")}, "none of .* has the layers attention, sliding_w"),
        ("kda", {"gate_bias": False}, "gate_bias is False; in kda it must be True"),
        ("kda", {"householders": 2}, "model.householders is 2; in kda it must be 1"),
        (
            "gated_deltaproduct",
            {"pattern": ("gated_delta_net", "delta_net")},
            "none of .* has the layers gated_delta_net, delta_net",
        ),
        ("retnet", {"head_norm": "group"}, "head_norm is 'group'; in retnet it must be 'rms'"),
        ("retnet", {"rotary_base": 500.0}, "rotary_base is 500.0; in retnet it must be 10000.0"),
        ("retnet", {"key_width": 7}, "retention has keys of 7 channels; in retnet it must be an even number up to 256"),
        ("hgrn", {"logit_soft_cap": 5.0}, "logit_soft_cap is 5.0; in hgrn it must be 0.0"),
        ("hgrn", {"pattern": ("hgrn", "hgrn2")}, "none of .* has the layers hgrn, hgrn2"),
        ("hgrn2", {"value_width": 4}, "2 heads of 8 and 4 channels .* must each add up to model.width=16 in hgrn2"),
        ("hgrn2", {"output_norm_epsilon": 0.0}, "the norm of hgrn2's output has the epsilon 1e-06 .*; in .* it must"),
        ("gated_deltanet", {"embedding_scale": True}, "embedding_scale is True; in gated_deltanet it must be False"),
    ],
)
def test_what_cannot_be_exported(tmp_path, name, changes, message):
    config = configs.default()
    config.model.update({"vocab_size": 31} | MODELS[name] | changes)
    configs.forget_unread(config, ["model.pattern"])
    workdirs.prepare(tmp_path / "run", configs.resolve(config))
    with pytest.raises(UserError, match=message):
        export_weights(tmp_path / "run", tmp_path / "target")
    assert_nothing_in(tmp_path, "run")


@pytest.mark.parametrize("key_width, value_width", [(49, 1), (256, 512), (6, 10), (161, 7)])
def test_a_width_that_is_written_as_a_ratio_is_read_as_it_was(key_width, value_width):
    """The package rounds down when it reads it."""
    widths = {"key_width": key_width, "value_width": value_width, "embedding_scale": False, "logit_soft_cap": 0.0}
    model = small.config(**MODELS["gated_deltanet"] | widths)
    fields = gated_deltanet.FAMILY.fields(model)
    assert int(key_width * fields["expand_v"]) == value_width


@pytest.mark.parametrize("module", [delta_net, gla, retnet])
def test_the_same_of_heads_that_are_parts_of_the_width(module):
    """In Python 704 * (480 / 704) is 479.99999999999994, and 480 channels are four heads of 120."""
    widths = {"width": 704, "recurrent_heads": 4, "key_width": 120, "value_width": 240}
    others = {"embedding_scale": False, "logit_soft_cap": 0.0}
    fields = module.FAMILY.fields(small.config(**MODELS[module.FAMILY.name] | widths | others))
    assert [int(704 * fields[name]) for name in ("expand_k", "expand_v")] == [480, 960]


@pytest.mark.parametrize("width, inner", [(49, 1), (11, 15), (7, 61), (256, 384), (32, 32)])
def test_the_same_of_hgrn(width, inner):
    widths = {"width": width, "recurrent_width": inner, "embedding_scale": False, "logit_soft_cap": 0.0}
    fields = hgrn.FAMILY.fields(small.config(**MODELS["hgrn"] | widths))
    assert int(width * fields["expand_ratio"]) == inner
