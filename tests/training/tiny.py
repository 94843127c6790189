"""Runs and training states small enough to compile in a moment, in this process and in others."""

import copy
import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import jax
import numpy as np

from jaxlinear import config as configs
from jaxlinear import data
from jaxlinear.checkpoint import Checkpoints
from jaxlinear.models import mixers
from jaxlinear.models.parameters import describe
from jaxlinear.parallel import feeding
from jaxlinear.parallel import mesh as meshes
from jaxlinear.training import state as states
from jaxlinear.training.job import Job
from jaxlinear.training.optimizer import make_optimizer
from jaxlinear.training.step import make_train_step
from tests import xla_flags

REPOSITORY = pathlib.Path(__file__).parents[2]
ONES = dict.fromkeys(meshes.AXES, 1)
BATCH, LENGTH, VOCABULARY = 8, 16, 32
PATIENCE = 240  # seconds for a program


def config(**changes):
    """A resolved config with one period of two layers; ``section__key=value`` changes a key."""
    values = {
        **{"model__pattern": ("rg_lru", "sliding_window"), "model__num_layers": 2, "model__vocab_size": VOCABULARY},
        **{"model__width": 32, "model__num_heads": 4, "model__window": 4, "model__dtype": "float32"},
        **{"training__batch_size": BATCH, "training__sequence_length": LENGTH, "optimizer__learning_rate": 1e-2},
        **{"schedule__name": "constant", "schedule__warmup_steps": 0},
    }
    pattern = changes.get("model__pattern", values["model__pattern"])
    for name in ("num_heads", "window"):
        if not set(mixers.readers()[name]) & set(pattern):
            del values[f"model__{name}"]
    named = {key.replace("__", "."): value for key, value in (values | changes).items()}
    return configs.resolve(put(configs.default(), named))


def put(config, changes):
    """``config`` itself, with other values of its keys, ``{"section.key": value}``."""
    for key, value in changes.items():
        section, name = key.split(".")
        config[section][name] = value
    return config


def changed(config, changes):
    """A copy of ``config`` with other values of its keys."""
    return put(config.copy_and_resolve_references(), changes)


def prepared(path, documents, **options):
    """A dataset of text, at ``path``, whose manifest is ``data.read_manifest(path)``."""
    path.parent.mkdir(exist_ok=True)
    text = path.with_suffix(".txt")
    text.write_text("\n".join(documents), encoding="utf-8")
    given = {
        "tokenizer": "bytes",
        "document_separator": "\n",
        "block_length": 64,
        "heldout_fraction": 0.05,
        "workers": 1,
    }
    data.prepare(str(text), str(path), **(given | options))
    return path


def copy_of(dataset, path, **changes):
    """A copy of a dataset, at ``path``, with other entries in its manifest."""
    shutil.copytree(dataset, path)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))
    return path


def architecture(pattern=("rg_lru", "sliding_window"), num_layers=2):
    return described(configs.model_config(config(model__pattern=pattern, model__num_layers=num_layers)))


described = functools.cache(describe)


def parameters(architecture, seed=0):
    """NumPy arrays with the shapes of the parameters; nothing is compiled for them."""
    random = np.random.default_rng(seed)

    def draw(path, shape):
        scale = shape.shape[-2] ** -0.5 if path[-1].key in ("kernel", "recurrence_kernel", "input_kernel") else 0.2
        return (scale * random.standard_normal(shape.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, architecture.shapes)


def batch(seed=0, padding=0):
    """Random tokens in documents of about 5 tokens; the last ``padding`` positions of the odd rows are padding."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, VOCABULARY, (BATCH, LENGTH + 1)).astype(np.int32)
    ids = 1 + np.cumsum(random.random((BATCH, LENGTH)) < 0.2, axis=1, dtype=np.int32)
    if padding:
        ids[1::2, -padding:] = 0
    return {"tokens": tokens[:, :-1].copy(), "targets": tokens[:, 1:].copy(), "segment_ids": ids}


def with_other_padding(batch):
    """The batch with other tokens and targets in its padding."""
    padding = batch["segment_ids"] == 0
    return batch | {x: np.where(padding, (batch[x] + 7) % VOCABULARY, batch[x]) for x in ("tokens", "targets")}


def mesh(devices=1, **sizes):
    return meshes.make_mesh(ONES | sizes, jax.devices()[:devices])


def compiled(function, *arguments):
    """``function`` compiled for arguments like these, as fast as possible."""
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    return jitted.lower(*arguments).compile(compiler_options={"xla_backend_optimization_level": 0})


class Trainer:
    """The compiled step of a config on a mesh, and its state before the first step."""

    def __init__(self, config, mesh=None):
        self.config, self.mesh = config, mesh or meshes.make_mesh(ONES, jax.devices()[:1])
        self.architecture = described(configs.model_config(config))
        self.optimizer = make_optimizer(config, self.architecture)
        self.placed = states.shardings(self.architecture, self.optimizer, self.mesh)
        self.step = compiled(
            make_train_step(config, self.architecture, self.optimizer, self.mesh),
            states.structs(self.architecture, self.optimizer, self.mesh),
            self.place(batch()),
        )

    def state(self, seed=0, **changes):
        """A new state, since a step takes over the memory of the state that it is given."""
        values = parameters(self.architecture, seed)
        zero = np.zeros((), np.int32)
        state = states.TrainState(
            step=zero,
            parameters=values,
            optimizer=jax.tree.map(np.array, self.optimizer.init(values)),
            key=np.zeros(2, np.uint32),
            norm_average=np.zeros((), np.float32),
            skips=zero,
            skips_in_a_row=zero,
        )
        return jax.device_put(copy.deepcopy(dataclasses.replace(state, **changes)), self.placed)

    def place(self, batch):
        return feeding.place(batch, meshes.batch_sharding(self.mesh), len(batch["tokens"]))

    def __call__(self, state, batch):
        """The state after a step, and its metrics as floats."""
        state, metrics = self.step(state, self.place(batch))
        return state, {name: float(value) for name, value in metrics.items()}


def host(tree):
    """A tree of NumPy arrays, whose memory no later step can take over."""
    return jax.tree.map(lambda x: np.array(x), tree)


def assert_equal(actual, expected):
    """Asserts that two trees of arrays have the same bits and are not empty."""
    paths, structure = jax.tree.flatten_with_path(host(expected))
    leaves, actual_structure = jax.tree.flatten(host(actual))
    assert actual_structure == structure and leaves
    for (path, want), got in zip(paths, leaves, strict=True):
        where = jax.tree_util.keystr(path)
        assert got.dtype == want.dtype and got.shape == want.shape, where
        assert got.tobytes() == want.tobytes(), f"{where} differs by {np.max(np.abs(got - want))}"


def assert_close(actual, expected, rtol=0.0, atol=0.0):
    """Asserts that two trees of arrays are alike within tolerances, and not empty."""
    paths, leaves = jax.tree.leaves_with_path(expected), jax.tree.leaves(actual)
    assert leaves
    for (path, want), got in zip(paths, leaves, strict=True):
        np.testing.assert_allclose(got, want, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))


def lasting(config):
    """``config`` for 8 steps, with a schedule that does not depend on their number."""
    layers = {"model.pattern": ("rg_lru", "sliding_window"), "model.num_layers": 2}
    return changed(config, layers | {"schedule.name": "constant", "training.steps": 8, "checkpoint.every_steps": 2})


def restored(workdir, config, mesh, step=None):
    """The training state in a checkpoint."""
    job = Job.build(config)
    structs = states.structs(job.architecture, job.optimizer, mesh)
    return states.from_trees(Checkpoints(workdir).restore(states.to_trees(structs), step))


def saved_structs(workdir):
    """The trees into which a run's checkpoint is restored: on one device, by the run's own config."""
    from jaxlinear.training.workdir import read_config

    config = read_config(workdir)
    described = describe(configs.model_config(config))
    return states.to_trees(states.structs(described, make_optimizer(config, described), mesh()))


def losses(workdir):
    """``{step: the text of its loss}``, as in metrics.jsonl; the lines of evaluations have no loss."""
    lines = [line for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines() if '"loss": ' in line]
    found = [(json.loads(line)["step"], re.search(r'"loss": ([^,}]*)', line)[1]) for line in lines]
    assert len(dict(found)) == len(found), "a step is there twice"
    return dict(found)


def last_step(workdir):
    """The newest step in metrics.jsonl, whose last line may be incomplete; 0 if there is none."""
    file = pathlib.Path(workdir) / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def wait_for(running, condition):
    """Waits until ``condition()``, while these processes must keep running. Returns the seconds that it took."""
    begin = time.monotonic()
    while not condition():
        for process in running:
            assert process.poll() is None, process.stderr.read() if process.stderr else process.args
        assert time.monotonic() - begin < PATIENCE
        time.sleep(0.002)
    return time.monotonic() - begin


def files(directory):
    """``{path: content}`` of everything in a directory."""
    directory = pathlib.Path(directory)
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


_KEYS = {
    "model": {"preset": "", "pattern": "rg_lru,sliding_window", "num_layers": 2, "vocab_size": 384, "width": 32}
    | {"recurrent_width": 32, "num_heads": 4, "window": 8},
    "training": {"batch_size": 8, "sequence_length": 32, "steps": 20},
    "schedule": {"name": "constant", "warmup_steps": 1},
    "checkpoint": {"every_steps": 1},
    "evaluation": {"every_steps": 0},
    "logging": {"every_steps": 1, "tensorboard": "false"},
}
ARGUMENTS = {"config": "configs/quickstart.py"} | {
    f"config.{section}.{key}": value for section, keys in _KEYS.items() for key, value in keys.items()
}


# Python that a run may begin with: the run hangs when it reads the batch of a step, as on a file server that does not
# answer. By then, the losses up to the step two before it are written, and that step's checkpoint.
STOPS = """
import time
from jaxlinear.data import loader
read = loader.TrainBatches.__getitem__
def waits_for_a_file_server(self, index):
    if index == STEP - 1:
        time.sleep(1000)
    return read(self, index)
loader.TrainBatches.__getitem__ = waits_for_a_file_server
"""


def program(file="launch/train.py", before=""):
    """The beginning of a command line that runs the Python code ``before`` and then a program of the project."""
    if not before:
        return [sys.executable, str(REPOSITORY / file)]
    run = f"import runpy\nrunpy.run_path({str(REPOSITORY / file)!r}, run_name='__main__')\n"
    return [sys.executable, "-c", f"{before}\n{run}"]


def command(workdir, dataset, *arguments, before=""):
    """The command line of a small run; later arguments take precedence."""
    options = ARGUMENTS | {"config.data.path": dataset, "workdir": workdir}
    options |= dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
    return [*program(before=before), *(f"--{name}={value}" for name, value in options.items())]


def environment():
    """The environment for a program on one device, compiled as fast as possible."""
    own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_backend_optimization_level=0 {xla_flags.FAST}"}
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), **own}


def run(file, *arguments):
    """Runs a program of the project to its end."""
    given = {"cwd": REPOSITORY, "env": environment(), "capture_output": True, "text": True, "timeout": PATIENCE}
    return subprocess.run([*program(file), *map(str, arguments)], **given)


def start(workdir, dataset, *arguments, before=""):
    """Starts launch/train.py in its own process."""
    line = command(workdir, dataset, *arguments, before=before)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, cwd=REPOSITORY, env=environment(), **pipes)
