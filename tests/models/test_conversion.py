"""models/conversion: what is written is what was read, bit for bit, and what does not fit is named before any of it."""

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import jaxlinear.models
from jaxlinear import config as configs
from jaxlinear import generation, streaming
from jaxlinear.checkpoint import Checkpoints
from jaxlinear.data import load_tokenizer
from jaxlinear.data.tokenizer import train_bpe
from jaxlinear.errors import UserError
from jaxlinear.evaluation.run import open_run
from jaxlinear.models import presets
from jaxlinear.models.conversion import export_weights, flax, hugging_face, import_weights, safetensors
from jaxlinear.models.parameters import describe
from jaxlinear.streaming import StreamedArray
from jaxlinear.training import workdir as workdirs
from tests import small

REPOSITORY = pathlib.Path(__file__).parents[2]
GRIFFIN = {
    "pattern": ("rg_lru", "sliding_window"),
    "num_layers": 5,  # two periods, and a layer more
    "width": 16,
    "recurrent_width": 24,
    "num_heads": 2,
    "window": 4,
    "embedding_scale": True,
    "logit_soft_cap": 5.0,
}
MODELS = {
    "recurrent_gemma": GRIFFIN | {"key_value_heads": 2, "rotary_base": 5000.0},
    "untied": GRIFFIN | {"num_layers": 3, "tied_embeddings": False, "convolution_width": 3},
    "flax": GRIFFIN,
    "flax_hawk": GRIFFIN | {"pattern": ("rg_lru",), "num_layers": 2, "embedding_scale": False, "logit_soft_cap": 0.0},
    "flax_local": GRIFFIN | {"pattern": ("sliding_window",), "num_layers": 2, "recurrent_width": 16},
    "llama": {
        "pattern": ("attention",),
        "num_layers": 3,
        "width": 16,
        "num_heads": 4,
        "key_value_heads": 2,
        "context": 32,
        "mlp_expansion": 40 / 16,
        "mlp_activation": "silu",
        "bias": False,
        "rotary_fraction": 1.0,
        "norm_offset": 0.0,
        "tied_embeddings": False,
    },
    "mamba2": {
        "pattern": ("mamba2",),
        "num_layers": 3,
        "width": 16,
        "recurrent_width": 32,
        "num_heads": 1,
        "key_width": 6,
        "value_width": 8,
        "channel_mixer": "none",
        "norm_offset": 0.0,
    },
}


def layout(name):
    return "flax" if name.startswith("flax") else "huggingface"


def run(workdir, **model):
    """A run's directory, as training leaves it, with a checkpoint of step 7."""
    config = configs.default()
    config.model.update({"vocab_size": 31, "dtype": "float32"} | model)
    config = configs.resolve(config)
    workdirs.prepare(workdir, config)
    values = small.parameters(describe(configs.model_config(config)).shapes)
    checkpoints = Checkpoints(workdir, config)
    checkpoints.save(7, {"parameters": jax.tree.map(lambda x: jax.numpy.asarray(x, np.float32), values)}, next_batch=7)
    checkpoints.close()
    return workdir


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """``made(name)``: the run of that model and what was exported of it, made once; neither is to be changed."""

    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp(name)
        run(folder / "run", **MODELS[name])
        export_weights(folder / "run", folder / "exported", layout=layout(name))
        return folder / "run", folder / "exported"

    return make


@pytest.fixture
def copied(made, tmp_path):
    """``copied(name)``: a copy of what was exported."""
    return lambda name: shutil.copytree(made(name)[1], tmp_path / "source")


def arrays(workdir):
    streamed = Checkpoints(workdir).stream("parameters")
    return {name: x.read(0, x.shape[0]) for name, x in streamed.items()}


def tensors(directory):
    read = flax.read_tensors if flax.is_one(directory) else hugging_face.read_tensors
    return {name: x.read(0, x.shape[0]) for name, x in read(directory).items()}


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys() and expected
    for name, x in expected.items():
        assert actual[name].shape == x.shape and actual[name].dtype == x.dtype == np.float32, name
        np.testing.assert_array_equal(actual[name].view(np.uint32), x.view(np.uint32), err_msg=name)


def rewrite(directory, change=None, fields=None):
    """Writes the files again with the tensors that ``change`` makes of theirs, and with other ``fields``."""
    values = tensors(directory)
    values = values if change is None else change(values)
    config = json.loads((directory / "config.json").read_text()) | (fields or {})
    shutil.rmtree(directory)
    hugging_face.write(directory, config, {name: streamed(x) for name, x in values.items()})


def streamed(x):
    return StreamedArray(x.shape, x.dtype, len(x), lambda begin, end: x[begin:end])


def write_header(path, header, data=b""):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def assert_nothing_in(folder, *but):
    assert sorted(path.name for path in folder.iterdir()) == sorted(but)


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(made, tmp_path, name):
    """Export, import, export again: the same arrays, the same tensors, the same model."""
    source, exported = made(name)
    import_weights(exported, tmp_path / "imported")
    assert_same_bits(arrays(tmp_path / "imported"), arrays(source))
    export_weights(tmp_path / "imported", tmp_path / "again", layout=layout(name))
    assert_same_bits(tensors(tmp_path / "again"), tensors(exported))
    assert (tmp_path / "again" / "config.json").read_text() == (exported / "config.json").read_text()
    assert workdirs.read_config(tmp_path / "imported").model == workdirs.read_config(source).model
    assert_nothing_in(tmp_path, "imported", "again")


def test_an_imported_run_is_a_run(made, tmp_path):
    source, exported = made("recurrent_gemma")
    import_weights(exported, tmp_path / "run")
    assert Checkpoints(tmp_path / "run").steps() == [0]
    opened = open_run(tmp_path / "run")
    assert opened.step == 0 and opened.config.data.path == ""
    expected = nnx.to_pure_dict(nnx.split(jaxlinear.models.load(source, 7))[1])
    jax.tree.map(np.testing.assert_array_equal, opened.parameters, expected)
    with pytest.raises(UserError, match=r"run holds imported weights, without .* optimiser: .* --workdir of its own$"):
        workdirs.prepare(tmp_path / "run", workdirs.read_config(tmp_path / "run"))


def test_another_step(made, tmp_path):
    with pytest.raises(UserError, match="has no checkpoint of step 3; it has 7"):
        export_weights(made("llama")[0], tmp_path / "target", step=3)
    assert_nothing_in(tmp_path)


def test_the_tokenizer_comes_along(copied, tmp_path):
    """Its document token is what the model's texts began with, here another than the one a dataset would take."""
    source = copied("llama")
    tokenizer = train_bpe(["def f(x): return x"] * 9, 257)
    content = json.loads(tokenizer._serialized())
    content["model"]["vocab"]["<s>"] = 257
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 257, "content": "<s>"})
    (source / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        UserError, match="has 258 tokens, the model 31; move the tokenizer away to import the weights wi"
    ):
        import_weights(source, tmp_path / "run")
    random = np.random.default_rng(0)
    grow = ("model.embed_tokens.weight", "lm_head.weight")
    wide = {name: random.standard_normal((300, 16)).astype(np.float32) for name in grow}
    rewrite(source, lambda values: values | wide, {"vocab_size": 300, "bos_token_id": 257})
    (source / "tokenizer.json").write_text(json.dumps(content))
    import_weights(source, tmp_path / "run")
    assert load_tokenizer(tmp_path / "run").document_token_name == "<s>"
    text = generation.Writer.open(tmp_path / "run").write(["def "], max_tokens=4, temperature=0.0)[0]
    assert text.startswith("def ")
    export_weights(tmp_path / "run", tmp_path / "exported")
    assert (tmp_path / "exported" / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["bos_token_id"] == 257

    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"source/tokenizer.json: .*; move the file away to import the weights without"):
        import_weights(source, tmp_path / "other")
    assert_nothing_in(tmp_path, "source", "run", "exported")


def test_other_dtypes_are_widened(copied, tmp_path):
    """Of bfloat16 and float16 every number is a float32."""
    source = copied("llama")
    values = tensors(source)
    kinds = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for i, (name, x) in enumerate(values.items()):
        kind = list(kinds)[i % 3]
        values[name] = x.astype(kinds[kind])
        content = values[name].tobytes()
        header[name] = {"dtype": kind, "shape": x.shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    write_header(source / "model.safetensors", header, data)
    fields = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(fields | {"torch_dtype": "bfloat16"}))
    import_weights(source, tmp_path / "run")
    assert workdirs.read_config(tmp_path / "run").model.dtype == "bfloat16"
    export_weights(tmp_path / "run", tmp_path / "exported")
    assert_same_bits(tensors(tmp_path / "exported"), {name: x.astype(np.float32) for name, x in values.items()})


def test_norms_of_another_parameterisation(tmp_path):
    """A transformer that was trained with norms that begin at a scale of 0: theirs is 1 more."""
    run(tmp_path / "run", **MODELS["llama"] | {"norm_offset": 1.0})
    export_weights(tmp_path / "run", tmp_path / "exported")
    scale = arrays(tmp_path / "run")["norm.scale"]
    np.testing.assert_array_equal(tensors(tmp_path / "exported")["model.norm.weight"], 1 + scale)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x.pop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight is missing$"),
        (
            lambda x: [x.pop(name) for name in list(x) if ".q_proj." in name],
            "0.self_attn.q_proj.weight is missing, and 2 m",
        ),
        (lambda x: x.update(score=np.zeros(3, np.float32)), "the tensor score is none of this model's$"),
        (
            lambda x: x.update({"model.norm.weight": np.zeros(3, np.float32)}),
            r"the tensor model.norm.weight has the shape \[3\]; by the config it is \[16\]$",
        ),
        (
            lambda x: x.update({"lm_head.weight": np.zeros((16, 31), np.float32)}),
            r"the tensor lm_head.weight has the shape \[16, 31\]; by the config it is \[31, 16\]$",
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
        ("llama", {"model_type": "gpt2"}, "model_type is 'gpt2'; llama, mamba2, recurrent_gemma can be imported"),
        ("llama", {"model_type": None}, "has no model_type"),
        (
            "llama",
            {"quantization_config": {"bits": 4}},
            "quantization_config is .* only weights that are not quantised",
        ),
        ("llama", {"head_dim": 8}, "head_dim is 8; only hidden_size / num_attention_heads = 4 can be imported"),
        ("llama", {"hidden_size": 18}, "hidden_size is 18; its 4 heads do not divide it"),
        ("llama", {"hidden_size": "wide"}, "hidden_size is 'wide'; it is a whole number from 1 on"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' can be imported"),
        ("llama", {"attention_bias": True}, "attention_bias is True; only False can be imported"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True; only False can be imported"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type is 'linear'; only pos"),
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.rope_type is 'llama3'; only pos"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only positions of whole heads"),
        ("llama", {"num_key_value_heads": 3}, "key_value_heads=3 does not divide model.num_heads=4"),
        ("mamba2", {"n_groups": 8}, "n_groups is 8; only 1 can be imported"),
        ("mamba2", {"use_bias": True}, "use_bias is True; only False can be imported"),
        ("mamba2", {"use_conv_bias": False}, "use_conv_bias is False; only True can be imported"),
        ("mamba2", {"hidden_act": "relu"}, "hidden_act is 'relu'; only 'silu' can be imported"),
        ("mamba2", {"time_step_limit": [0.0, 1.0]}, "time_step_limit is .* without a limit can be imported"),
        ("mamba2", {"head_dim": 4}, r"num_heads is 4; with head_dim 4 it does not give expand \* hidden_size = 32"),
        ("recurrent_gemma", {"attention_bias": True}, "attention_bias is True; only False can be imported"),
        ("recurrent_gemma", {"hidden_activation": "relu"}, "hidden_activation is 'relu'; only 'gelu_pytorch_tanh' can"),
        (
            "recurrent_gemma",
            {"block_types": ["recurrent", "ssm"]},
            "block_types is .*; only recurrent and attention can",
        ),
        ("recurrent_gemma", {"logits_soft_cap": 0.0}, "logits_soft_cap is 0.0; it must be above 0"),
        ("recurrent_gemma", {"lru_width": 25}, "lru_width is 25; its 2 heads do not divide it"),
        ("recurrent_gemma", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'; only positions that are"),
    ],
)
def test_fields_that_no_model_here_can_have(made, tmp_path, name, fields, message):
    source = shutil.copytree(made(name)[1], tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | fields
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        import_weights(source, tmp_path / "run")
    assert_nothing_in(tmp_path, "source")


def test_fields_of_other_releases_of_transformers(copied, tmp_path):
    """What is left out has the default of the architecture; infinity has a spelling of its own."""
    source = copied("mamba2")
    fields = json.loads((source / "config.json").read_text())
    for name in ("expand", "conv_kernel", "use_bias", "use_conv_bias", "hidden_act", "torch_dtype"):
        del fields[name]
    fields |= {"time_step_limit": [0.0, {"__float__": "Infinity"}], "dtype": "float32"}
    (source / "config.json").write_text(json.dumps(fields))
    import_weights(source, tmp_path / "run")
    assert workdirs.read_config(tmp_path / "run").model.recurrent_width == 32


@pytest.mark.parametrize(
    "name, changes, options, message",
    [
        (
            "recurrent_gemma",
            {"embedding_scale": False},
            {},
            "embedding_scale is False; in recurrent_gemma it can only be",
        ),
        ("recurrent_gemma", {"logit_soft_cap": 0.0}, {}, "logit_soft_cap is 0; recurrent_gemma always has one"),
        (
            "recurrent_gemma",
            {"recurrent_width": 25},
            {},
            "num_heads=2 does not divide model.recurrent_width=25; in recu",
        ),
        ("recurrent_gemma", {"bias": False}, {}, "model.bias is False; in recurrent_gemma it can only be True"),
        (
            "recurrent_gemma",
            {"rotary_base": 10_000.0},
            {"layout": "flax"},
            "key_value_heads is 2; in a checkpoint of recurrentgemma it can onl",
        ),
        (
            "untied",
            {},
            {"layout": "flax"},
            "tied_embeddings is False; in a checkpoint of recurrentgemma it can only be",
        ),
        ("llama", {}, {"layout": "flax"}, "a checkpoint of recurrentgemma has no layers like attention"),
        ("llama", {}, {"layout": "onnx"}, "there is no layout 'onnx'; there are huggingface and flax"),
        ("llama", {"rotary_fraction": 0.5}, {}, "rotary_fraction is 0.5; in llama it can only be 1.0"),
        ("llama", {"mlp_activation": "gelu"}, {}, "mlp_activation is 'gelu'; in llama it can only be 'silu'"),
        (
            "llama",
            {"pattern": ("attention", "mamba2"), "recurrent_width": 64},
            {},
            "no model of llama, .* has the layers a",
        ),
        ("mamba2", {"channel_mixer": "gated_mlp"}, {}, "channel_mixer is 'gated_mlp'; in mamba2 it can only be 'none'"),
        ("mamba2", {"recurrent_width": 40}, {}, "recurrent_width=40 is no multiple of model.width=16; in mamba2 it is"),
    ],
)
def test_models_that_are_none_of_theirs(tmp_path, name, changes, options, message):
    config = configs.default()
    config.model.update({"vocab_size": 31} | MODELS[name] | changes)
    workdirs.prepare(tmp_path / "run", configs.resolve(config))
    with pytest.raises(UserError, match=message):
        export_weights(tmp_path / "run", tmp_path / "target", **options)
    assert_nothing_in(tmp_path, "run")


def test_several_files_with_an_index(made, tmp_path, monkeypatch):
    source, whole = made("mamba2")
    monkeypatch.setattr(hugging_face, "SHARD_BYTES", 5_000)
    sharded = tmp_path / "sharded"
    export_weights(source, sharded)
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((sharded / hugging_face.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors(whole).values())
    import_weights(sharded, tmp_path / "run")
    assert_same_bits(arrays(tmp_path / "run"), arrays(source))

    def refused(message):
        with pytest.raises(UserError, match=message):
            import_weights(sharded, tmp_path / "other")

    file_of = dict(index["weight_map"])
    first = next(iter(file_of))
    for changed, message in (
        (file_of | {"more": files[0]}, f"{files[0]} has no tensor more, which model.safetensors.index.json has there"),
        (
            file_of | {first: files[-1]},
            f"has the tensor {first}, which model.safetensors.index.json has in {files[-1]}",
        ),
        (None, "is damaged: it has no weight_map"),
    ):
        (sharded / hugging_face.INDEX).write_text(json.dumps({"weight_map": changed}))
        refused(message)
    (sharded / hugging_face.INDEX).write_text(json.dumps(index))
    (sharded / files[1]).unlink()
    refused(f"lacks {files[1]}, which model.safetensors.index.json names")
    (sharded / hugging_face.INDEX).unlink()
    refused("has neither model.safetensors nor model.safetensors.index.json$")
    (sharded / "pytorch_model.bin").touch()
    refused("pytorch_model.bin is not read, save the model as safetensors$")
    assert_nothing_in(tmp_path, "sharded", "run")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.write_bytes(b"short"), "is no safetensors file, or is cut short"),
        (
            lambda path: path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}"),
            "is no safetensors file, or is cut short",
        ),
        (lambda path: path.write_bytes((4).to_bytes(8, "little") + b"none"), "its header is not JSON"),
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), "does not lie where its header says; .* cut short"),
        (lambda path: write_header(path, {"x": {"dtype": "F32"}}), "the entry of x is damaged"),
        (
            lambda path: write_header(path, {"x": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}}, b"0"),
            "x has the dtype I8; weights are imported from F32, F16, BF16",
        ),
    ],
)
def test_damaged_files(copied, tmp_path, damage, message):
    source = copied("llama")
    damage(source / "model.safetensors")
    with pytest.raises(UserError, match=f"model.safetensors.*{message}"):
        import_weights(source, tmp_path / "run")
    assert_nothing_in(tmp_path, "source")


def test_an_embedding_that_is_there_twice(copied, tmp_path):
    """Some files of tied models also hold the head. It has to be the same."""
    source = copied("mamba2")
    rewrite(source, lambda x: x | {"lm_head.weight": x["backbone.embeddings.weight"]})
    import_weights(source, tmp_path / "run")
    rewrite(source, lambda x: x | {"lm_head.weight": x["backbone.embeddings.weight"] + 1})
    with pytest.raises(
        UserError, match=r"lm_head.weight is not backbone.embeddings.weight, though tie_word_embeddings"
    ):
        import_weights(source, tmp_path / "other")
    # An older name, and something that is no weight.
    rewrite(source, lambda x: {name: y for name, y in x.items() if name != "lm_head.weight"})
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    rewrite(source, lambda x: {name.replace("embeddings", "embedding"): y for name, y in x.items()} | frequencies)
    import_weights(source, tmp_path / "old")
    assert_same_bits(arrays(tmp_path / "old"), arrays(tmp_path / "run"))


def test_what_is_no_model(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match=r"empty is neither a directory of Hugging Face, with .* nor a checkpoint of rec"
    ):
        import_weights(tmp_path / "empty", tmp_path / "run")
    with pytest.raises(UserError, match=r"nowhere is not a directory"):
        import_weights(tmp_path / "nowhere", tmp_path / "run")
    (tmp_path / "empty" / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"empty has no config.json"):
        import_weights(tmp_path / "empty", tmp_path / "run")
    (tmp_path / "empty" / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config.json is damaged: it is not an object"):
        import_weights(tmp_path / "empty", tmp_path / "run")
    with pytest.raises(UserError, match=r"empty is there already; name a directory that is not, or is empty"):
        import_weights(tmp_path / "empty", tmp_path / "empty")
    with pytest.raises(UserError, match=r"nowhere is not the work directory of a run: it has no config.json"):
        export_weights(tmp_path / "nowhere", tmp_path / "target")
    assert_nothing_in(tmp_path, "empty")


def test_nothing_is_left_of_what_failed(made, tmp_path, monkeypatch):
    """Nor of what was killed before."""
    source, exported = made("llama")
    remains = [tmp_path / f".{name}.unfinished" for name in ("run", "target")]
    for directory in remains:
        (directory / "whole").mkdir(parents=True)
        (directory / "whole" / "config.json").touch()
    write = streaming._Handler.serialize

    async def fail(*arguments):
        await write(*arguments)
        raise OSError("the disk went away")

    monkeypatch.setattr(streaming._Handler, "serialize", fail)
    with pytest.raises(OSError, match="the disk went away"):
        import_weights(exported, tmp_path / "run")
    monkeypatch.setattr(hugging_face, "write", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        export_weights(source, tmp_path / "target")
    assert_nothing_in(tmp_path)


def test_a_full_disk(made, tmp_path, monkeypatch):
    source, exported = made("llama")
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
        with pytest.raises(
            UserError, match=r"no space left on the disk for .*run: it takes up to [\d.]+ MB and 0.1 MB are"
        ):
            import_weights(exported, tmp_path / "run")

    def fail(*_):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr(hugging_face, "write", fail)
    with pytest.raises(
        UserError, match=r"no space left on the disk for .*target: other data took it while this was wr"
    ):
        export_weights(source, tmp_path / "target")
    assert_nothing_in(tmp_path)


def test_a_damaged_checkpoint_is_not_exported(made, tmp_path):
    workdir = shutil.copytree(made("llama")[0], tmp_path / "run")
    largest = max((workdir / "checkpoints" / "7" / "parameters").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(UserError, match=r"the checkpoint .*/7 cannot be read"):
        export_weights(workdir, tmp_path / "target")
    assert_nothing_in(tmp_path, "run")


@pytest.mark.parametrize("name", ["flax", "mamba2"])
def test_what_is_read_at_once(made, tmp_path, monkeypatch, name):
    """No more than a tensor of one layer, of an array that can be cut anywhere a few rows; and nothing twice but for the
    checksums."""
    monkeypatch.setattr(streaming, "PIECE_BYTES", 1000)
    read = []

    def watched(tensors):
        def one(tensor_name, x):
            def read_rows(begin, end):
                rows = x.read(begin, end)
                read.append((tensor_name, rows.nbytes))
                return rows

            return StreamedArray(x.shape, x.dtype, x.rows, read_rows, x.order)

        return {tensor_name: one(tensor_name, x) for tensor_name, x in tensors.items()}

    source, exported = made(name)
    layouts = flax if layout(name) == "flax" else hugging_face
    read_tensors = layouts.read_tensors
    monkeypatch.setattr(layouts, "read_tensors", lambda directory: watched(read_tensors(directory)))
    import_weights(exported, tmp_path / "run")
    sizes = {tensor: x.nbytes for tensor, x in read_tensors(exported).items()}
    embedding = next(tensor for tensor in sizes if "embed" in tensor)
    assert max(size for tensor, size in read if tensor == embedding) <= 1000 < sizes[embedding]
    assert sum(size for _, size in read) == 2 * sum(sizes.values())
    assert all(size <= sizes[tensor] for tensor, size in read)

    read.clear()
    stream = Checkpoints.stream
    monkeypatch.setattr(Checkpoints, "stream", lambda *arguments: watched(stream(*arguments)))
    export_weights(tmp_path / "run", tmp_path / "again", layout=layout(name))
    stacked = {path: x.nbytes for path, x in stream(Checkpoints(tmp_path / "run"), "parameters").items()}
    assert sum(size for _, size in read) == sum(stacked.values())
    periods = describe(configs.model_config(workdirs.read_config(source))).config.num_layers // len(
        workdirs.read_config(source).model.pattern
    )
    assert all(size <= stacked[path] / (periods if path.startswith("periods") else 1) for path, size in read)


def test_a_checkpoint_of_training_is_read_once(made, tmp_path, monkeypatch):
    """Though each of its arrays is one piece, with the tensors of many layers in it."""
    read = []
    stream = Checkpoints.stream

    def watched(*arguments):
        def one(path, x):
            def read_rows(begin, end):
                read.append(path)
                return x.read(begin, end)

            return StreamedArray(x.shape, x.dtype, x.rows, read_rows)

        return {path: one(path, x) for path, x in stream(*arguments).items()}

    monkeypatch.setattr(Checkpoints, "stream", watched)
    for name in ("recurrent_gemma", "flax", "mamba2"):
        read.clear()
        export_weights(made(name)[0], tmp_path / name, layout=layout(name))
        assert len(read) == len(set(read)) > 10


def test_flax_checkpoints_of_other_kinds(made, tmp_path):
    """A file an array, as older ones are; in bfloat16; and without a config."""
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
    with pytest.raises(
        UserError, match=r"files has no config.json, and its shapes are those of no published Recurrent"
    ):
        import_weights(tmp_path / "files", tmp_path / "run")
    shutil.copyfile(exported / "config.json", tmp_path / "files" / "config.json")
    import_weights(tmp_path / "files", tmp_path / "run")
    assert workdirs.read_config(tmp_path / "run").model.dtype == "bfloat16"
    want = {name: x.astype(ml_dtypes.bfloat16).astype(np.float32) for name, x in arrays(source).items()}
    assert_same_bits(arrays(tmp_path / "run"), want)

    ocp.PyTreeCheckpointer().save(tmp_path / "more", tree | {"step": np.zeros(1, np.float32)})
    shutil.copyfile(exported / "config.json", tmp_path / "more" / "config.json")
    with pytest.raises(UserError, match=r"the tensor step is none of this model's$"):
        import_weights(tmp_path / "more", tmp_path / "other")
    ocp.PyTreeCheckpointer().save(tmp_path / "integers", {"step": np.zeros(1, np.int32)})
    with pytest.raises(UserError, match=r"step has the dtype int32; weights are imported from float32"):
        import_weights(tmp_path / "integers", tmp_path / "other")
    chunk = next(tmp_path.glob("files/params.blocks.0.mlp_block.ffw_up.w/0*"))
    chunk.write_bytes(b"0" + chunk.read_bytes()[1:])
    with pytest.raises(UserError, match=r"files: params.blocks.0.mlp_block.ffw_up.w cannot be read \("):
        import_weights(tmp_path / "files", tmp_path / "other")
    del tree["params"]["embedder"]
    ocp.PyTreeCheckpointer().save(tmp_path / "lacking", tree)
    with pytest.raises(UserError, match=r"the tensor params.embedder.input_embedding is missing"):
        import_weights(tmp_path / "lacking", tmp_path / "other")
    (tmp_path / "lacking" / "_METADATA").write_text("{}")
    with pytest.raises(UserError, match=r"lacking/_METADATA is damaged"):
        import_weights(tmp_path / "lacking", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["recurrentgemma_2b", "recurrentgemma_9b"])
def test_published_flax_checkpoints_need_no_config(tmp_path, name):
    """Their shapes tell which they are. That package's window is one longer than the number that it is given."""
    preset = presets.find(name)
    config = configs.default()
    config.model.preset = name
    fields = flax.fields(configs.model_config(configs.resolve(config)))
    assert fields["attention_window_size"] == preset["window"] - 1
    found = flax._not_in_shapes(tmp_path, preset)
    assert found == {"window": 2049, "embedding_scale": True, "logit_soft_cap": 30.0}


def test_safetensors_header():
    x = streamed(np.zeros((2, 3), np.float32))
    header, places = safetensors.header({"a": x, "b": x})
    length = int.from_bytes(header[:8], "little")
    entries = json.loads(header[8:])
    assert len(header) == 8 + length and length % 8 == 0
    assert entries["b"] == {"dtype": "F32", "shape": [2, 3], "data_offsets": [24, 48]}
    assert places == {"a": len(header), "b": len(header) + 24}


def test_flags_that_do_not_go_together(tmp_path):
    done = launch(tmp_path)
    line = "convert.py: give --source to import into --workdir, or --target to export from it\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_program(made, tmp_path):
    """Imports, and then refuses what is there already: one line and status 2."""
    exported = made("llama")[1]
    done = launch(tmp_path, f"--source={exported}")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert jaxlinear.models.load(tmp_path / "run").config.pattern == ("attention",)
    done = launch(tmp_path, f"--target={tmp_path / 'run'}")
    assert done.returncode == 2
    assert (
        done.stderr == f"convert.py: {tmp_path / 'run'} is there already; name a directory that is not, or is empty\n"
    )


def launch(folder, *arguments):
    return subprocess.run(
        [sys.executable, "launch/convert.py", f"--workdir={folder / 'run'}", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
