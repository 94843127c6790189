"""The whole training step in float32: tokens per second and the time to compile it.

    python benchmarks/train_step.py --model=griffin_6m --batch=4 --length=1024 [--json=FILE]
    python benchmarks/train_step.py --batch=1 --length=4096 --against=RG/bin/python    # and the recurrentgemma package
    python benchmarks/train_step.py --layers=48 --batch=1 --length=256                 # another depth
    python benchmarks/train_step.py --mixers=all [--size=100m]                         # a table of every mixer

The step is the one that `launch/train.py` runs (forward, backward, AdamW, skipping of bad steps, metrics), on random
tokens, since the speed does not depend on them. The compile time covers tracing, lowering and compiling; ``lower_seconds``
covers only the first two, which the table of mixers leaves out. With --against, the named Python runs the same model in
the recurrentgemma package (benchmarks/recurrentgemma_worker.py says how to make its environment) with each of its two
scans, in turn with ours, so that all see the same machine.
"""

import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import common
from absl import flags

from jaxlinear import cli
from jaxlinear.errors import UserError

_MODEL = flags.DEFINE_string("model", "griffin_6m", "A preset; --against supports griffin_6m only.")
_BATCH = flags.DEFINE_integer("batch", 4, "Rows per step, B.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 1024, "Tokens per row, T.", lower_bound=1)
_LAYERS = flags.DEFINE_integer("layers", None, "A depth other than the preset's.", lower_bound=1)
_REMAT = flags.DEFINE_string("remat", None, "A model.remat other than the default.")
_STEPS = flags.DEFINE_integer("steps", 7, "Timed steps, after one warm-up step.", lower_bound=4)
_MIXERS = flags.DEFINE_list("mixers", None, "Instead of --model: a table of these mixers, or of 'all'.")
_SIZE = flags.DEFINE_enum("size", "6m", ["6m", "100m"], "With --mixers: about 6 M or 100 M parameters.")
_AGAINST = flags.DEFINE_string("against", None, "The Python of an environment with the recurrentgemma package.")
common.define_json()


def main() -> None:
    if _AGAINST.value and (_MODEL.value != "griffin_6m" or _LAYERS.value):
        raise UserError("--against supports the model griffin_6m only, at its own depth")
    if _MIXERS.value:
        common.write(_table())
        return
    ours, result = _ours(_config(_MODEL.value))
    with contextlib.ExitStack() as stack:
        options = {"batch": _BATCH.value, "length": _LENGTH.value}
        workers = {
            scan: stack.enter_context(common.Worker(_AGAINST.value, "train", scan=scan, **options))
            for scan in ("native", "associative")
            if _AGAINST.value
        }
        parts = {"jaxlinear": ours} | {scan: worker.tokens_per_second for scan, worker in workers.items()}
        rates = common.alternate(parts, _STEPS.value)
    speeds = {name: statistics.median(values) for name, values in rates.items()}
    speed = speeds.pop("jaxlinear")
    result = {"model": _MODEL.value, **result, "tokens_per_second": speed, "rates": rates["jaxlinear"]}
    result["mfu"] = speed * result["flops_per_token"] / result.pop("peak_flops")
    if workers:
        result["recurrentgemma"] = {
            scan: {"tokens_per_second": speeds[scan], "rates": rates[scan]}
            | {name: worker.told[name] for name in ("compile_seconds", "lower_seconds")}
            for scan, worker in workers.items()
        }
        best = max(speeds, key=lambda scan: speeds[scan])
        result |= {"ratio_to_better_scan": speed / speeds[best], "better_scan": best}
        result["compile_ratio"] = {
            scan: result["compile_seconds"] / worker.told["compile_seconds"] for scan, worker in workers.items()
        }
    print(json.dumps(result, indent=2))
    common.write(result)


def _table() -> list[dict[str, Any]]:
    """Every mixer by itself, one after another, at the same width, depth and batch shape."""
    from jaxlinear import config as configs
    from jaxlinear.models import mixers, presets

    small = {preset["pattern"][0]: name for name, preset in presets.PRESETS.items() if name.endswith("_6m")}
    small |= {"rg_lru": "hawk_6m", "sliding_window": "transformer_6m", "convolution": "transformer_6m"}
    chosen = sorted(mixers.MIXERS) if _MIXERS.value == ["all"] else _MIXERS.value
    print(f"{'mixer':18} {'parameters':>12} {'tokens/s':>9} {'mfu':>6} {'compile, s':>10}")
    rows = []
    for mixer in chosen:
        mixers.find(mixer)
        config = _config(small[mixer])
        config.model.pattern = (mixer,)
        if _SIZE.value == "100m":
            _enlarge(config.model, presets.find(small[mixer]))
        configs.forget_unread(config, ["model.pattern"])
        go, row = _ours(config)
        speed = statistics.median(common.alternate({mixer: go}, _STEPS.value)[mixer])
        row = {"mixer": mixer, "size": _SIZE.value, "tokens_per_second": speed} | row
        row["mfu"] = speed * row["flops_per_token"] / row.pop("peak_flops")
        rows.append(row)
        compiler = row["compile_seconds"] - row["lower_seconds"]
        print(f"{mixer:18} {row['parameters']:12,} {speed:9,.0f} {row['mfu']:6.3f} {compiler:10.1f}", flush=True)
    return rows


def _enlarge(model: Any, preset: dict[str, Any]) -> None:
    """From 6 M parameters to about 100 M: three times the width and the heads, twice the depth, 32,000 words."""
    for name in ("width", "recurrent_width", "num_heads", "key_value_heads"):
        if name in preset:
            model[name] = 3 * preset[name]
    model.num_layers, model.vocab_size = 2 * preset["num_layers"], 32_000


def _config(preset: str) -> Any:
    """An unresolved config with the preset and the changes that the flags ask for."""
    from jaxlinear import config as configs

    config = configs.default()
    config.model.preset, config.model.dtype = preset, "float32"
    config.model.num_layers = _LAYERS.value
    if _REMAT.value:
        config.model.remat = _REMAT.value
    config.training.batch_size, config.training.sequence_length = _BATCH.value, _LENGTH.value
    config.data.segment_documents = False  # nor does the package in this comparison
    return config


def _ours(config: Any) -> tuple[Callable[[], float], dict[str, Any]]:
    """A function that runs one step and returns its tokens per second, and what is known before it runs."""
    import jax
    import numpy as np

    from jaxlinear import config as configs
    from jaxlinear.costs import hardware
    from jaxlinear.models import flops, parameters
    from jaxlinear.parallel import feeding
    from jaxlinear.parallel import mesh as meshes
    from jaxlinear.training import state as states
    from jaxlinear.training.optimizer import make_optimizer
    from jaxlinear.training.step import make_train_step

    config = configs.resolve(config)
    mesh = meshes.make_mesh(config.mesh)
    architecture = parameters.describe(configs.model_config(config))
    optimizer = make_optimizer(config, architecture)
    shape = (_BATCH.value, _LENGTH.value)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (shape[0], shape[1] + 1), np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": np.ones(shape, np.int32)}
    batch = feeding.place(batch, meshes.batch_sharding(mesh), shape[0])
    state = states.initialise(architecture, optimizer, 0, mesh)

    begin = time.perf_counter()
    lowered = make_train_step(config, architecture, optimizer, mesh).lower(state, batch)
    lower_seconds = time.perf_counter() - begin
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - begin
    holder = [state]

    def go() -> float:
        begin = time.perf_counter()
        holder[0], metrics = compiled(holder[0], batch)
        jax.block_until_ready((holder[0], metrics))
        return shape[0] * shape[1] / (time.perf_counter() - begin)

    return go, {
        "batch": shape[0],
        "length": shape[1],
        "layers": config.model.num_layers,
        "parameters": architecture.num_parameters,
        "device": jax.devices()[0].device_kind,
        "load_average": os.getloadavg()[0],
        "compile_seconds": compile_seconds,
        "lower_seconds": lower_seconds,
        "flops_per_token": flops.training_flops_per_token(architecture.config, _LENGTH.value),
        "peak_flops": hardware.peak_flops(jax.devices()[0]) or float("nan"),
    }


if __name__ == "__main__":
    cli.run(main)
