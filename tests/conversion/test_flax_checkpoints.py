"""Checkpoints of the recurrentgemma package: how their configuration is found."""

import shutil

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxlinear import config as configs
from jaxlinear.conversion import flax, import_weights
from jaxlinear.models import presets
from jaxlinear.training import workdir as workdirs
from tests.conversion.converted import arrays, assert_same_bits, refused, tensors


def test_flax_checkpoints_of_other_kinds(made, tmp_path):
    """One file per array, as in older ones; in bfloat16; and without a config."""
    source, exported = made("flax")
    flat = {tuple(flax._keys(name)): x for name, x in tensors(exported).items()}
    tree = {}
    for keys, x in flat.items():
        node = tree
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = x.astype(ml_dtypes.bfloat16)
    assert "blocks.3" in tree["params"]
    ocp.PyTreeCheckpointer(use_ocdbt=False).save(tmp_path / "files", tree)
    refused("files has no config.json, and its shapes match no published", tmp_path / "files", tmp_path / "run")
    shutil.copyfile(exported / "config.json", tmp_path / "files" / "config.json")
    import_weights(tmp_path / "files", tmp_path / "run")
    assert workdirs.read_config(tmp_path / "run").model.dtype == "bfloat16"
    want = {name: x.astype(ml_dtypes.bfloat16).astype(np.float32) for name, x in arrays(source).items()}
    assert_same_bits(arrays(tmp_path / "run"), want)

    lacking = {name: x for name, x in tree["params"].items() if name != "embedder"}
    for name, saved, message in (
        ("more", tree | {"step": np.zeros(1, np.float32)}, "the tensor step does not belong to this model$"),
        ("integers", {"step": np.zeros(1, np.int32)}, "step has the dtype int32; weights are imported from float32"),
        ("lacking", {"params": lacking}, "params.embedder.input_embedding is missing"),
    ):
        ocp.PyTreeCheckpointer().save(tmp_path / name, saved)
        shutil.copyfile(exported / "config.json", tmp_path / name / "config.json")
        refused(message, tmp_path / name, tmp_path / "other")
    (tmp_path / "lacking" / "_METADATA").write_text("{}")
    refused("lacking/_METADATA is damaged", tmp_path / "lacking", tmp_path / "other")
    chunk = next(tmp_path.glob("files/params.blocks.0.mlp_block.ffw_up.w/0*"))
    chunk.write_bytes(b"0" + chunk.read_bytes()[1:])
    refused(r"files: params.blocks.0.mlp_block.ffw_up.w cannot be read \(", tmp_path / "files", tmp_path / "other")


@pytest.mark.parametrize("name", ["recurrentgemma_2b", "recurrentgemma_9b"])
def test_published_flax_checkpoints_need_no_config(tmp_path, name):
    """Their shapes identify them. That package's window is one longer than the number it is given."""
    preset = presets.find(name)
    config = configs.default()
    config.model.preset = name
    fields = flax.fields(configs.model_config(configs.resolve(config)))
    assert fields["attention_window_size"] == preset["window"] - 1
    found = flax._not_in_shapes(tmp_path, preset)
    assert found == {"window": 2049, "embedding_scale": True, "logit_soft_cap": 30.0}
