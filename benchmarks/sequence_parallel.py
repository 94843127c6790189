"""Memory and exchanged bytes of a training step with time split over W devices, from programs that are compiled, not run.

    python benchmarks/sequence_parallel.py --json=docs/sequence_parallel.json --plot=docs/sequence_parallel.png
    python benchmarks/sequence_parallel.py --headline --json=FILE     # GLA 1.3B at 2,048K and 4,096K tokens
    python benchmarks/sequence_parallel.py --from=docs/sequence_parallel.json [--plot=FILE]     # show existing results

XLA's own compiler compiles the whole step (forward, backward, AdamW) of models of 1.3 B parameters at full depth, with one
sequence of T tokens and remat ``full``, for W H100s. No GPU is needed (``pip install 'jaxlinear[aot,plot]'``). For
comparison:

- ``gathered`` is the same model, but its recurrences gather their inputs over time, run over the whole sequence on every
  device, and keep their part of the outputs, as sequence parallelism does without a state to exchange;
- ``ring`` is full attention with a ring of keys and values, beside gathering them (``all_gather``).

Memory is XLA's count for a device: arguments, temporaries and outputs. Bytes are those that a device receives over the axis
``sequence`` in a step: of states, windows, keys and values; and, separately, of the gradients of parameters, which every
scheme sums over it. An existing file of --json is continued: what it contains is not compiled again.
"""

import contextlib
import dataclasses
import json
import pathlib
import time
from typing import Any
from unittest import mock

from absl import flags

from jaxlinear import cli
from jaxlinear.costs import targets

K = 1024
MODELS = ("hawk", "gla", "gated_delta_net", "griffin", "transformer")
TOKENS, DEVICES = (64 * K, 256 * K, 1024 * K, 4096 * K), (8, 64, 256)
LONG, MANY = 1024 * K, 64  # T where W varies, and W where T varies
HEADLINE = [
    ("gla", "exchanged", t * K, w, remat) for t, w in ((2048, 64), (4096, 128)) for remat in ("full", "elementwise")
]

_MODELS = flags.DEFINE_list("models", list(MODELS), "Which models; the preset of each is NAME_1b3.")
_HEADLINE = flags.DEFINE_bool("headline", False, "Only GLA, at 2,048K tokens on 64 H100s and at 4,096K on 128.")
_JSON = flags.DEFINE_string("json", None, "Write the rows to this file; rows already in it are not compiled again.")
_FROM = flags.DEFINE_string("from", None, "Compile nothing: take the rows of this file.")
_PLOT = flags.DEFINE_string("plot", None, "Plot the rows to this file.")


def main() -> None:
    targets.set_environment()
    if _FROM.value:
        rows = json.loads(pathlib.Path(_FROM.value).read_text(encoding="utf-8"))
    else:
        rows = _compiled(HEADLINE if _HEADLINE.value else _cases(_MODELS.value))
    _print(rows)
    if _PLOT.value:
        _draw(rows, _PLOT.value)


def _cases(models: list[str]) -> list[tuple[str, str, int, int, str]]:
    """(model, scheme, T, W, remat)."""
    points = [(t, MANY) for t in TOKENS] + [(LONG, w) for w in DEVICES if w != MANY]
    schemes = {name: ("all_gather", "ring") if name == "transformer" else ("exchanged", "gathered") for name in models}
    return [(name, scheme, *point, "full") for name in models for scheme in schemes[name] for point in points]


def _compiled(cases: list[tuple[str, str, int, int, str]]) -> list[dict[str, Any]]:
    file = pathlib.Path(_JSON.value) if _JSON.value else None
    rows = json.loads(file.read_text(encoding="utf-8")) if file and file.exists() else []
    for case in cases:
        key = dict(zip(("model", "scheme", "tokens", "devices", "remat"), case, strict=True))
        if any(key.items() <= row.items() for row in rows):
            continue
        rows.append(key | _measure(*case))
        print(json.dumps(rows[-1]), flush=True)
        if file:
            file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows


def _measure(model: str, scheme: str, tokens: int, devices: int, remat: str) -> dict[str, Any]:
    from jaxlinear import config as configs
    from jaxlinear.costs import programs
    from jaxlinear.parallel import on_mesh
    from jaxlinear.training import ahead_of_time

    config = configs.default()
    config.model.update({"preset": f"{model}_1b3", "remat": remat})
    config.training.update({"batch_size": 1, "sequence_length": tokens})
    config.mesh.update({"data": 1, "sequence": devices})
    if model == "transformer":
        config.parallel.attention = scheme
    begin = time.perf_counter()
    sharded = on_mesh.ShardedTime
    whole = mock.patch.object(on_mesh, "ShardedTime", lambda *given: _Gathered(sharded(*given)))
    with whole if scheme == "gathered" else contextlib.nullcontext():
        made = ahead_of_time.trace(config, targets.find(f"h100:{devices}").devices)
    program = programs.read(made.compile(), made.mesh)
    received = {"exchanged": 0, "gradients": 0}
    for collective in program.collectives:
        if "sequence" in collective.axes:
            kind = "gradients" if collective.kind == "all-reduce" else "exchanged"
            received[kind] += round(collective.received * collective.runs)
    return {
        "memory": program.memory.total,
        "temporaries": program.memory.temporaries,
        "received": received["exchanged"],
        "received_of_gradients": received["gradients"],
        "parameters": made.architecture.num_parameters,
        "compile_seconds": round(time.perf_counter() - begin, 1),
    }


@dataclasses.dataclass(frozen=True)
class _Gathered:
    """A ``protocol.TimeAxis``: inputs are gathered over time, and each device keeps its part of the outputs."""

    sharded: Any

    def starts(self, segment_ids):
        return self.sharded.starts(segment_ids)

    def run(self, family, chunk, inputs, constants, state):
        import jax
        from jax import lax

        from jaxlinear.ops import protocol

        def local(inputs, constants, state):
            length = jax.tree.leaves(inputs)[0].shape[1]
            whole = jax.tree.map(lambda x: lax.all_gather(x, "sequence", axis=1, tiled=True), inputs)
            size = chunk or jax.tree.leaves(whole)[0].shape[1]
            outputs, final = protocol.chunked(family, size, whole, constants, state)
            return lax.dynamic_slice_in_dim(outputs, lax.axis_index("sequence") * length, length, axis=1), final

        time_axis, everywhere = jax.P(None, "sequence"), jax.P()
        specs = time_axis, everywhere, everywhere
        run = jax.shard_map(
            local, mesh=self.sharded.mesh, in_specs=specs, out_specs=(time_axis, everywhere), check_vma=False
        )
        return run(inputs, constants, state)


def _print(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'model':16} {'scheme':11} {'tokens':>9} {'H100s':>6} {'remat':>12} {'memory, GB':>11} {'received, MB':>13}"
    )
    for row in rows:
        tokens = f"{row['tokens'] // K:,}K"
        print(
            f"{row['model']:16} {row['scheme']:11} {tokens:>9} {row['devices']:6} {row['remat']:>12} "
            f"{row['memory'] / 1e9:11.1f} {row['received'] / 1e6:13,.1f}"
        )


def _draw(rows: list[dict[str, Any]], output: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2)
    lines = [("memory", 1e9, "memory of a device, GB"), ("received", 1e6, "received by a device in a step, MB")]
    for i, (value, unit, label) in enumerate(lines):
        for j, (x, fixed, at) in enumerate((("tokens", "devices", MANY), ("devices", "tokens", LONG))):
            axes = panels[i][j]
            for model, scheme in dict.fromkeys((row["model"], row["scheme"]) for row in rows):
                chosen = [row for row in rows if (row["model"], row["scheme"], row[fixed]) == (model, scheme, at)]
                chosen.sort(key=lambda row: row[x])
                axes.plot(
                    [row[x] for row in chosen],
                    [row[value] / unit for row in chosen],
                    color=f"C{MODELS.index(model)}",
                    linestyle="-" if scheme in ("exchanged", "ring") else ":",
                    marker="o",
                    markersize=3,
                    label=f"{model}, {scheme}",
                )
            if value == "memory":
                axes.axhline(80, color="black", linewidth=0.8)
                axes.annotate("80 GB", (0.01, 80), xycoords=("axes fraction", "data"), va="bottom")
            axes.set(xscale="log", yscale="log", ylabel=label)
            ticks = TOKENS if x == "tokens" else DEVICES
            axes.set_xticks(ticks, [f"{n // K:,}K" if x == "tokens" else str(n) for n in ticks])
            axes.set_xlabel(f"tokens, on {MANY} H100s" if x == "tokens" else f"H100s, at {LONG // K:,}K tokens")
    panels[0][0].legend(fontsize=7)
    figure.savefig(output, dpi=120)


if __name__ == "__main__":
    cli.run(main)
