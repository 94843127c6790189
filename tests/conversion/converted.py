"""Shared by the conversion tests: tiny models, their runs, and the contents of files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxlinear.models
from jaxlinear import config as configs
from jaxlinear.checkpoint import Checkpoints
from jaxlinear.conversion import flax, hugging_face, import_weights
from jaxlinear.errors import UserError
from jaxlinear.models.parameters import describe
from jaxlinear.streaming import StreamedArray
from jaxlinear.training import workdir as workdirs
from tests import numerics, small

GRIFFIN = dict(  # two periods and one more layer
    **dict(pattern=("rg_lru", "sliding_window"), num_layers=5, width=16, recurrent_width=24, num_heads=2, window=4),
    **dict(embedding_scale=True, logit_soft_cap=5.0),
)
LLAMA_BLOCK = dict(mlp_expansion=40 / 16, mlp_activation="silu", bias=False, norm_offset=0.0, tied_embeddings=False)
FLA = dict(num_layers=5, width=16, num_heads=1) | LLAMA_BLOCK
HYBRID = FLA | dict(num_heads=4, recurrent_heads=2, key_value_heads=2, rotary_fraction=1.0)
LLAMA = LLAMA_BLOCK | dict(
    pattern=("attention",), num_layers=3, width=16, num_heads=4, key_value_heads=2, context=32, rotary_fraction=1.0
)
MAMBA = dict(
    num_layers=2, width=16, recurrent_width=32, num_heads=1, key_width=6, channel_mixer="none", norm_offset=0.0
)
MAMBA |= {"pattern": ("mamba",)}
DELTA = FLA | dict(pattern=("gated_delta_net",), recurrent_heads=3, key_width=6, value_width=10)
MODELS = {
    "recurrent_gemma": GRIFFIN | dict(key_value_heads=2, rotary_base=5000.0),
    "untied": GRIFFIN | dict(num_layers=3, tied_embeddings=False, convolution_width=3),
    "flax": GRIFFIN,
    "flax_hawk": GRIFFIN | dict(pattern=("rg_lru",), num_layers=2, embedding_scale=False, logit_soft_cap=0.0),
    "flax_local": GRIFFIN | dict(pattern=("sliding_window",), num_layers=2, recurrent_width=16),
    "llama": LLAMA,
    "llama3.1": LLAMA | dict(rotary_scaling=8.0, rotary_context=40),
    "mistral": LLAMA | dict(pattern=("sliding_window",), context=4096, window=5),
    "mamba": MAMBA,
    "mamba_rank": MAMBA | dict(recurrent_width=24, time_step_rank=3),
    "falcon_mamba": MAMBA | dict(selection_norm=True, selection_norm_epsilon=1e-5),
    "mamba2": MAMBA | dict(pattern=("mamba2",), num_layers=3, value_width=8),
    "gla": HYBRID | dict(pattern=("gla", "gla", "sliding_window"), key_width=4, value_width=8, window=4),
    "gated_deltanet": DELTA,
    "gated_deltaproduct": DELTA | dict(householders=2, output_gate="none"),
    "kda": FLA | dict(pattern=("kda",), recurrent_heads=2, key_width=6, value_width=10, gate_bias=True),
    "retnet": HYBRID
    | dict(pattern=("retention", "attention"), key_width=4, value_width=12, head_norm="rms", context=32),
    "hgrn": FLA | dict(pattern=("hgrn",), recurrent_width=24),
    "hgrn2": FLA | dict(pattern=("hgrn2",), key_width=8, value_width=8, output_norm_epsilon=1e-5),
    "delta_net": HYBRID
    | dict(pattern=("delta_net", "attention"), key_width=8, value_width=8, output_gate="silu", context=32),
}


def layout(name):
    return "flax" if name.startswith("flax") else "huggingface"


def run(workdir, **model):
    """Makes a run's directory as training leaves it, with a checkpoint of step 7."""
    config = configs.default()
    config.model.update({"vocab_size": 31, "dtype": "float32"} | model)
    configs.forget_unread(config, ["model.pattern"])
    config = configs.resolve(config)
    workdirs.prepare(workdir, config)
    values = small.parameters(describe(configs.model_config(config)).shapes)
    checkpoints = Checkpoints(workdir, config)
    checkpoints.save(7, {"parameters": jax.tree.map(lambda x: jax.numpy.asarray(x, np.float32), values)}, next_batch=7)
    checkpoints.close()
    return workdir


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


def assert_same_logits(workdir, tokens, expected):
    """Asserts that logits equal those of another program, to 1e-4 in float32."""
    model = jaxlinear.models.load(workdir)
    assert model.config.dtype == "float32" and np.abs(expected).max() > 1
    graph, parameters = nnx.split(model)
    logits = numerics.jit(lambda parameters, tokens: nnx.merge(graph, parameters)(tokens)[0])
    numerics.assert_close(np.asarray(logits(parameters, jnp.asarray(tokens, jnp.int32))), expected, 1e-4)


def rewrite(directory, change, **fields):
    """Rewrites the files with the tensors that ``change`` returns for theirs, and with changed ``fields``."""
    write_tensors(directory / "model.safetensors", change(tensors(directory)))
    set_fields(directory, fields)


def set_fields(directory, changes, without=()):
    """Changes a ``config.json``; returns the fields that it had."""
    file = directory / "config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({name: x for name, x in fields.items() if name not in without} | changes))
    return fields


def write_tensors(path, values):
    """Writes arrays in float32, float16 or bfloat16 as safetensors."""
    kinds = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, x in values.items():
        place = [len(data), len(data) + x.nbytes]
        header[name] = {"dtype": kinds[x.dtype.name], "shape": x.shape, "data_offsets": place}
        data += x.tobytes()
    write_header(path, header, data)


def write_header(path, header, data=b""):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def streamed(x):
    return StreamedArray(x.shape, x.dtype, len(x), lambda begin, end: x[begin:end])


def refused(match, source, workdir):
    with pytest.raises(UserError, match=match):
        import_weights(source, workdir)
    assert not workdir.exists()


def assert_nothing_in(folder, *but):
    assert sorted(path.name for path in folder.iterdir()) == sorted(but)
