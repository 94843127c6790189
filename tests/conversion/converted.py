"""Shared by the conversion tests: tiny models, their runs, and the contents of files."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxlinear.models
from jaxlinear import config as configs
from jaxlinear.checkpoint import Checkpoints
from jaxlinear.conversion import flax, hugging_face
from jaxlinear.models.parameters import describe
from jaxlinear.streaming import StreamedArray
from jaxlinear.training import workdir as workdirs
from tests import numerics, small

REPOSITORY = pathlib.Path(__file__).parents[2]
GRIFFIN = {
    "pattern": ("rg_lru", "sliding_window"),
    "num_layers": 5,  # two periods and one more layer
    "width": 16,
    "recurrent_width": 24,
    "num_heads": 2,
    "window": 4,
    "embedding_scale": True,
    "logit_soft_cap": 5.0,
}
FLA = {
    "num_layers": 5,
    "width": 16,
    "num_heads": 1,
    "mlp_expansion": 40 / 16,
    "mlp_activation": "silu",
    "bias": False,
    "norm_offset": 0.0,
    "tied_embeddings": False,
}
HYBRID = FLA | {"num_heads": 4, "recurrent_heads": 2, "key_value_heads": 2, "rotary_fraction": 1.0}
LLAMA = {
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
}
MODELS = {
    "recurrent_gemma": GRIFFIN | {"key_value_heads": 2, "rotary_base": 5000.0},
    "untied": GRIFFIN | {"num_layers": 3, "tied_embeddings": False, "convolution_width": 3},
    "flax": GRIFFIN,
    "flax_hawk": GRIFFIN | {"pattern": ("rg_lru",), "num_layers": 2, "embedding_scale": False, "logit_soft_cap": 0.0},
    "flax_local": GRIFFIN | {"pattern": ("sliding_window",), "num_layers": 2, "recurrent_width": 16},
    "llama": LLAMA,
    "llama3.1": LLAMA | {"rotary_scaling": 8.0, "rotary_context": 40},
    "mistral": {**LLAMA, "pattern": ("sliding_window",), "context": 4096, "window": 5},
    "mamba": {
        "pattern": ("mamba",),
        "num_layers": 2,
        "width": 16,
        "recurrent_width": 32,
        "num_heads": 1,
        "key_width": 6,
        "channel_mixer": "none",
        "norm_offset": 0.0,
    },
    "mamba_rank": {
        "pattern": ("mamba",),
        "num_layers": 2,
        "width": 16,
        "recurrent_width": 24,
        "num_heads": 1,
        "key_width": 6,
        "time_step_rank": 3,
        "channel_mixer": "none",
        "norm_offset": 0.0,
    },
    "falcon_mamba": {
        "pattern": ("mamba",),
        "num_layers": 2,
        "width": 16,
        "recurrent_width": 32,
        "num_heads": 1,
        "key_width": 6,
        "channel_mixer": "none",
        "norm_offset": 0.0,
        "selection_norm": True,
        "selection_norm_epsilon": 1e-5,
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
    "gla": HYBRID | {"pattern": ("gla", "gla", "sliding_window"), "key_width": 4, "value_width": 8, "window": 4},
    "gated_deltanet": FLA | {"pattern": ("gated_delta_net",), "recurrent_heads": 3, "key_width": 6, "value_width": 10},
    "gated_deltaproduct": FLA
    | {
        "pattern": ("gated_delta_net",),
        "recurrent_heads": 3,
        "householders": 2,
        "key_width": 6,
        "value_width": 10,
        "output_gate": "none",
    },
    "kda": FLA | {"pattern": ("kda",), "recurrent_heads": 2, "key_width": 6, "value_width": 10, "gate_bias": True},
    "retnet": HYBRID
    | {
        "pattern": ("retention", "attention"),
        "key_width": 4,
        "value_width": 12,
        "head_norm": "rms",
        "context": 32,
    },
    "hgrn": FLA | {"pattern": ("hgrn",), "recurrent_width": 24},
    "hgrn2": FLA | {"pattern": ("hgrn2",), "key_width": 8, "value_width": 8, "output_norm_epsilon": 1e-5},
    "delta_net": HYBRID
    | {
        "pattern": ("delta_net", "attention"),
        "key_width": 8,
        "value_width": 8,
        "output_gate": "silu",
        "context": 32,
    },
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


def rewrite(directory, change=None, fields=None):
    """Rewrites the files with the tensors that ``change`` returns for theirs, and with changed ``fields``."""
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


def launch(folder, *arguments):
    return subprocess.run(
        [sys.executable, "launch/convert.py", f"--workdir={folder / 'run'}", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
