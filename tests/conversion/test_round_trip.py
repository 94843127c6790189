"""What is written is what was read, bit for bit, and a run resumes from it."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import jaxlinear.models
from jaxlinear import generation
from jaxlinear.checkpoint import Checkpoints
from jaxlinear.conversion import convert, export_weights, hugging_face, import_weights
from jaxlinear.data import load_tokenizer
from jaxlinear.data.tokenizer import train_bpe
from jaxlinear.errors import UserError
from jaxlinear.evaluation.run import open_run
from jaxlinear.training import workdir as workdirs
from tests.conversion import converted
from tests.conversion.converted import arrays, assert_nothing_in, assert_same_bits, layout, refused, tensors
from tests.data.test_tokenizer import train_sentencepiece


@pytest.mark.slow(but_nth=3)
@pytest.mark.parametrize("name", converted.MODELS)
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
    with pytest.raises(UserError, match="has no checkpoint of step 3; it has 7"):
        export_weights(source, tmp_path / "target", step=3)
    assert_nothing_in(tmp_path, "run")
    with pytest.raises(UserError, match=r"run holds imported weights, .*, and --config.training.initial_from=.*run"):
        workdirs.prepare(tmp_path / "run", workdirs.read_config(tmp_path / "run"))


def test_the_tokenizer_comes_along(copied, tmp_path):
    """Its document token is the one that began the model's texts, which here is not the one that a dataset would use."""
    source = copied("llama")
    tokenizer = train_bpe(["def f(x): return x"] * 9, 257)
    content = json.loads(tokenizer._content)
    content["model"]["vocab"]["<s>"] = 257
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 257, "content": "<s>"})
    (source / "tokenizer.json").write_text(json.dumps(content))
    refused("has 258 tokens and the model only 31; move the tokenizer away to import", source, tmp_path / "run")
    random = np.random.default_rng(0)
    grow = ("model.embed_tokens.weight", "lm_head.weight")
    wide = {name: random.standard_normal((300, 16)).astype(np.float32) for name in grow}
    converted.rewrite(source, lambda values: values | wide, vocab_size=300, bos_token_id=257, eos_token_id=3)
    (source / "tokenizer.json").write_text(json.dumps(content))
    import_weights(source, tmp_path / "run")
    assert load_tokenizer(tmp_path / "run").document_token_name == "<s>"
    assert load_tokenizer(tmp_path / "run").stop_tokens == (257, 3)
    text = generation.Writer.open(tmp_path / "run").write(["def "], max_tokens=4, temperature=0.0)[0]
    assert text.startswith("def ")
    export_weights(tmp_path / "run", tmp_path / "exported")
    assert (tmp_path / "exported" / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()
    exported = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert (exported["bos_token_id"], exported["eos_token_id"]) == (257, 3)

    # The generation config, which transformers generates by, takes precedence.
    (tmp_path / "exported" / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    import_weights(tmp_path / "exported", tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").stop_tokens == (257, 3, 5)
    export_weights(tmp_path / "again", tmp_path / "twice")
    assert json.loads((tmp_path / "twice" / "config.json").read_text())["eos_token_id"] == [3, 5]
    (tmp_path / "exported" / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    refused("exported: eos_token_id is '</s>'; it must be a token id or", tmp_path / "exported", tmp_path / "other")

    for tokens in ([{"content": "<s>"}], [{"id": 257}], ["<s>"], 5):
        (source / "tokenizer.json").write_text(json.dumps(content | {"added_tokens": tokens}))
        refused("tokenizer.json is damaged: .* no id or no content; move the file", source, tmp_path / "other")
    (source / "tokenizer.json").write_text("{}")
    refused("tokenizer.json: .*; move the file away to import the weights without", source, tmp_path / "other")
    assert_nothing_in(tmp_path, "source", "run", "exported", "again", "twice")


def test_a_sentencepiece_model_says_itself_where_texts_begin_and_end(tmp_path):
    train_sentencepiece(tmp_path / "tokenizer.model")
    tokenizer = convert._tokenizer([tmp_path])
    assert tokenizer.document_token_name == "<s>" and tokenizer.stop_tokens == (1, 2)
    assert convert._tokenizer([tmp_path], None, (5,)).stop_tokens == (1, 5)
    (tmp_path / "run").mkdir()
    tokenizer.save(tmp_path / "run")
    assert load_tokenizer(tmp_path / "run").stop_tokens == (1, 2)


def test_other_dtypes_are_widened(copied, tmp_path):
    """Every bfloat16 and float16 number is exact in float32."""
    source = copied("llama")
    kinds = (ml_dtypes.bfloat16, np.float16, np.float32)
    values = {name: x.astype(kinds[i % 3]) for i, (name, x) in enumerate(tensors(source).items())}
    converted.write_tensors(source / "model.safetensors", values)
    converted.set_fields(source, {"torch_dtype": "bfloat16"})
    import_weights(source, tmp_path / "run")
    assert workdirs.read_config(tmp_path / "run").model.dtype == "bfloat16"
    export_weights(tmp_path / "run", tmp_path / "exported")
    assert_same_bits(tensors(tmp_path / "exported"), {name: x.astype(np.float32) for name, x in values.items()})


def test_norms_of_another_parameterisation(tmp_path):
    """A transformer trained with norms whose scale begins at 0: in the exported format the scale is 1 more."""
    converted.run(tmp_path / "run", **converted.MODELS["llama"] | {"norm_offset": 1.0})
    export_weights(tmp_path / "run", tmp_path / "exported")
    scale = arrays(tmp_path / "run")["norm.scale"]
    np.testing.assert_array_equal(tensors(tmp_path / "exported")["model.norm.weight"], 1 + scale)


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

    file_of = dict(index["weight_map"])
    first = next(iter(file_of))
    for changed, message in (
        (file_of | {"more": files[0]}, f"{files[0]} has no tensor more, which {hugging_face.INDEX} lists there"),
        (file_of | {first: files[-1]}, f"has the tensor {first}, which {hugging_face.INDEX} lists in {files[-1]}"),
        (None, "is damaged: it has no weight_map"),
        (file_of | {first: 5}, f"is damaged: it lists {first} in 5, which is not a file name$"),
    ):
        (sharded / hugging_face.INDEX).write_text(json.dumps({"weight_map": changed}))
        refused(message, sharded, tmp_path / "other")
    (sharded / hugging_face.INDEX).write_text(json.dumps(index))
    (sharded / files[1]).unlink()
    refused(f"has no {files[1]}, which model.safetensors.index.json lists", sharded, tmp_path / "other")
    (sharded / hugging_face.INDEX).unlink()
    refused("has neither model.safetensors nor model.safetensors.index.json$", sharded, tmp_path / "other")
    (sharded / "pytorch_model.bin").touch()
    refused("pytorch_model.bin cannot be read, so save the model as safetensors$", sharded, tmp_path / "other")
    assert_nothing_in(tmp_path, "sharded", "run")


def test_program(made, start, tmp_path):
    """Imports, then refuses a target that already exists: one line and status 2."""
    workdir = f"--workdir={tmp_path / 'run'}"
    done = start("convert", workdir, f"--source={made('llama')[1]}")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert jaxlinear.models.load(tmp_path / "run").config.pattern == ("attention",)
    for flags, refusal in (
        ([f"--target={tmp_path / 'run'}"], f"{tmp_path / 'run'} already exists; name a new or empty directory"),
        ([], "give --source to import into --workdir, or --target to export from it"),
    ):
        done = start("convert", workdir, *flags)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"convert.py: {refusal}\n")
