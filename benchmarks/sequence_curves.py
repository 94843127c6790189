"""The loss curves of training with time split over 1, 2, 4 and 8 devices: they coincide.

    python benchmarks/sequence_curves.py [--steps=200] [--models=griffin,delta_net_hybrid] [--json=FILE]

The models are small hybrids of a recurrence and windows, in float32, on the bytes of Python's standard library; every mesh
gets the same batches and the same initial parameters. The devices are virtual CPU devices. The window of 48 tokens spans
two shards of 32, and the documents of a row begin and end anywhere. The script prints, and with --json writes, the losses
and how far apart the curves are.
"""

import dataclasses
import os
import pathlib
import tempfile

import common
from absl import flags

from jaxlinear import cli
from jaxlinear.errors import UserError

DEVICES = (1, 2, 4, 8)
BATCH, LENGTH = 4, 256
MODELS = {
    "griffin": {"pattern": ("rg_lru", "rg_lru", "sliding_window"), "num_layers": 3},
    "delta_net_hybrid": {"pattern": ("delta_net", "sliding_window"), "num_layers": 2},
}

_STEPS = flags.DEFINE_integer("steps", 200, "Steps of each run.", lower_bound=1)
_MODELS = flags.DEFINE_list("models", list(MODELS), "Which models.")
_DATA = flags.DEFINE_string("data", None, "A prepared dataset; by default, the bytes of the standard library.")
common.define_json()


def main() -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported
    flag = f"--xla_force_host_platform_device_count={max(DEVICES)}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    for name in _MODELS.value:
        if name not in MODELS:
            raise UserError(f"there is no model {name!r} here; there are {', '.join(MODELS)}")
    with tempfile.TemporaryDirectory() as directory:
        path = _DATA.value or _prepare(directory)
        report = {"batch_size": BATCH, "sequence_length": LENGTH, "steps": _STEPS.value, "models": {}}
        for name in _MODELS.value:
            losses = {devices: curve(MODELS[name], path, devices, _STEPS.value) for devices in DEVICES}
            report["models"][name] = {"losses": losses, "apart": (apart := differences(losses))}
            print(f"{name}: loss {losses[1][0]:.4f} at step 1, {losses[1][-1]:.4f} at step {_STEPS.value}")
            for devices, difference in apart.items():
                print(f"  mesh.sequence={devices}: at most {difference:.1e} from one device", flush=True)
    common.write(report)


def _prepare(directory: str) -> str:
    from jaxlinear import data

    path = pathlib.Path(directory, "corpus")
    data.prepare("python-stdlib", str(path), tokenizer="bytes", block_length=LENGTH)
    return str(path)


def curve(model: dict, data_path: str, devices: int, steps: int) -> list[float]:
    """The loss of each step with ``mesh.sequence`` = ``devices``."""
    import jax

    from jaxlinear import config as configs
    from jaxlinear.parallel import feeding
    from jaxlinear.parallel import mesh as meshes
    from jaxlinear.training import state as states
    from jaxlinear.training.job import Job
    from jaxlinear.training.step import make_train_step

    config = configs.default()
    config.model.update({"width": 64, "num_heads": 4, "window": 48, "dtype": "float32", **model})
    config.data.path = data_path
    config.training.update({"batch_size": BATCH, "sequence_length": LENGTH, "steps": steps})
    config.schedule.warmup_steps = min(20, steps)
    config.evaluation.every_steps = 0
    config.mesh.update({"data": 1, "sequence": len(jax.devices())})
    job = Job.build(config)
    sizes = {**dict.fromkeys(meshes.AXES, 1), "sequence": devices}
    job = dataclasses.replace(job, mesh=meshes.make_mesh(sizes, jax.devices()[:devices]))
    state = states.initialise(job.architecture, job.optimizer, job.config.training.seed, job.mesh)
    step = make_train_step(job.config, job.architecture, job.optimizer, job.mesh)
    losses = []
    for i in range(steps):
        state, metrics = step(state, feeding.place(job.batches[i], meshes.batch_sharding(job.mesh), BATCH))
        losses.append(float(metrics["loss"]))
    return losses


def differences(losses: dict[int, list[float]]) -> dict[int, float]:
    """How far each curve is from that of one device, at the step where it is furthest."""
    return {
        devices: max(abs(a - b) for a, b in zip(losses[1], others, strict=True))
        for devices, others in losses.items()
        if devices > 1
    }


if __name__ == "__main__":
    cli.run(main)
