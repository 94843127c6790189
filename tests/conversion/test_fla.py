"""Models of flash-linear-attention: logits match ``fla_reference.py`` to 1e-4 in float32. ``fla_check.py`` compared that
with release 0.6.0 of the package, its modules and kernels in Triton's interpreter, to 5e-5 of the largest logit."""

import json

import numpy as np
import pytest

from jaxlinear import config as configs
from jaxlinear.conversion import convert, export_weights, hugging_face, import_weights
from jaxlinear.conversion.family import Fields
from jaxlinear.conversion.fla import delta_net, gated_deltanet, gla, hgrn, retnet
from jaxlinear.models.parameters import describe
from tests import small
from tests.conversion import converted
from tests.conversion import fla_reference as reference
from tests.conversion.converted import MODELS, arrays, assert_same_bits, assert_same_logits, refused, tensors


def saved(directory, fields):
    """Writes a directory as the package saves it; returns its tensors."""
    drawn = reference.draw(fields)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(fields))
    converted.write_tensors(directory / "model.safetensors", drawn)
    return drawn


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


def test_a_norm_that_is_there_under_both_names(tmp_path):
    drawn = saved(tmp_path / "saved", reference.MODELS["gla"])
    usual = "model.layers.1.attn.g_norm_swish_gate.weight"
    other = usual.replace("g_norm_swish_gate", "g_norm")
    converted.write_tensors(tmp_path / "saved" / "model.safetensors", drawn | {other: drawn[usual] + 1})
    refused(f"the tensor {other} does not belong to this model$", tmp_path / "saved", tmp_path / "run")


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
    converted.write_tensors(tmp_path / "saved" / "model.safetensors", old)
    import_weights(tmp_path / "saved", tmp_path / "old")
    assert_same_bits(arrays(tmp_path / "old"), arrays(tmp_path / "run"))


# Parameter counts of the models that the package makes by default.
DEFAULTS = dict(
    **dict(gla=1_365_514_240, gated_deltanet=1_387_348_732, gated_deltaproduct=1_387_090_432, delta_net=1_365_677_056),
    **dict(hgrn=1_364_396_032, hgrn2=1_364_396_032, kda=1_390_941_568, retnet=1_351_727_104, transformer=1_364_297_728),
)


@pytest.mark.parametrize("name", DEFAULTS)
def test_what_is_left_out_has_the_default_of_the_package(name):
    fields = Fields({"model_type": name}, "config.json")
    model = convert._config(hugging_face.family_of_fields(fields).model(fields))
    assert describe(configs.model_config(model)).num_parameters == DEFAULTS[name]


RATIOS = [
    *(
        (gated_deltanet, {"key_width": key, "value_width": value}, key, {"expand_v": value})
        for key, value in [(49, 1), (256, 512), (6, 10), (161, 7)]
    ),
    *(  # heads that are parts of the width: in Python 704 * (480 / 704) is 479.99999999999994; 480 is four heads of 120
        (
            module,
            {"width": 704, "recurrent_heads": 4, "key_width": 120, "value_width": 240},
            *(704, {"expand_k": 480, "expand_v": 960}),
        )
        for module in (delta_net, gla, retnet)
    ),
    *(
        (hgrn, {"width": width, "recurrent_width": inner}, width, {"expand_ratio": inner})
        for width, inner in [(49, 1), (11, 15), (7, 61), (256, 384), (32, 32)]
    ),
]


@pytest.mark.parametrize("module, widths, base, written", RATIOS)
def test_a_width_that_is_written_as_a_ratio_is_read_as_it_was(module, widths, base, written):
    """The package rounds down when it reads it."""
    others = {"embedding_scale": False, "logit_soft_cap": 0.0}
    fields = module.FAMILY.fields(small.config(**MODELS[module.FAMILY.name] | widths | others))
    assert {name: int(base * fields[name]) for name in written} == written
