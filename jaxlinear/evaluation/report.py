"""A one-page report of a run: its config, its progress, its evaluations, sample texts, and the hardware it ran on."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlinear import config as configs
from jaxlinear import evaluation
from jaxlinear.evaluation import following, html, plots
from jaxlinear.models import flops, parameters
from jaxlinear.training import metrics
from jaxlinear.training.workdir import heldout_changes, read_config, read_starts

# For each figure: the numbers of the lines of metrics.jsonl that it shows, its axis, and what they are.
_CURVES = {
    "throughput": (("tokens_per_second",), "tokens per second", "Speed."),
    "utilisation": (
        ("mfu", "data_wait_fraction"),
        "parts of 1",
        "The model's FLOPs over the devices' peak, and the part of a step that waits for data.",
    ),
    "gradients": (("gradient_norm",), "norm", "The norm of the gradient, before it is clipped."),
    "schedule": (("learning_rate",), "learning rate", "The learning rate."),
}


def page(workdir: str | os.PathLike, samples: Sequence[tuple[str, str]] = ()) -> str:
    """The HTML of a run's page, which needs no other file and no network. ``samples`` are prompts and the run's
    continuations of them."""
    config = read_config(workdir)
    lines = metrics.read(workdir)
    training = [line for line in lines if "loss" in line]  # none for an imported run, or before the first is logged
    heldout = [line for line in lines if "heldout_loss" in line]
    parts = [html.table(["", ""], _summary(config, training))]
    if training or heldout:
        parts.append(html.heading("Losses"))
    if training:
        svg = plots.to_svg(plots.loss_curves([workdir]))
        parts.append(html.figure(svg, "Training and held-out loss.", name="losses"))
    if heldout:
        parts.append(html.table(["step", "held-out loss", "bits per byte"], _heldout(heldout)))
        for step in heldout_changes(read_starts(workdir)):
            parts.append(html.paragraph(f"Held-out losses after step {step} are not of the same text as those before."))
    if training:
        parts += [html.heading("How it went"), *_curves(training)]
    if report := following.newest_report(workdir):
        parts += [html.heading(f"Evaluation of step {report['step']}"), html.preformatted(evaluation.table(report))]
    if samples:
        parts.append(html.heading("Samples"))
        for prompt, text in samples:
            parts += [html.paragraph(f"After {prompt!r}:"), html.preformatted(text)]
    if starts := read_starts(workdir):
        parts += [html.heading("Started"), html.table(*_starts(starts))]
    parts += [html.heading("Config"), html.preformatted(configs.to_json(config))]
    return html.page(f"The run {Path(workdir).resolve().name}", *parts)


def _summary(config: Any, training: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A summary of the lines with losses, if there are any."""
    model = configs.model_config(config)
    rows = [
        ["model", config.model.preset or ", ".join(config.model.pattern)],
        ["parameters", f"{parameters.describe(model).num_parameters:,}"],
    ]
    if not training:
        return rows
    last = training[-1]
    rates = sorted(line["tokens_per_second"] for line in training if line.get("tokens_per_second"))
    per_token = flops.training_flops_per_token(model, config.training.sequence_length)
    rows += [
        ["step", f"{last['step']:,} of {config.training.steps:,}"],
        ["tokens", f"{last['tokens']:,}"],
        ["FLOPs, forward and backward", f"{per_token * last['tokens']:.3e}"],
        ["loss", f"{last['loss']:.4f} nats per token"],
    ]
    if rates:
        rows.append(["median speed", f"{rates[len(rates) // 2]:,.0f} tokens per second"])
    if skips := last.get("skips"):
        rows.append(["steps skipped", f"{skips:.0f}"])
    return rows


def _curves(lines: Sequence[dict[str, Any]]) -> list[str]:
    """A figure for each of ``_CURVES`` for which the lines have numbers."""
    figures = []
    for name, (keys, axis, caption) in _CURVES.items():
        curves = {key: {line["step"]: line[key] for line in lines if line.get(key) is not None} for key in keys}
        if any(curves.values()):
            svg = plots.to_svg(plots.step_curves({key: one for key, one in curves.items() if one}, axis, marker=""))
            figures.append(html.figure(svg, caption, name=name))
    return figures


def _heldout(lines: Sequence[dict[str, Any]]) -> list[list[str]]:
    bits = (line.get("heldout_bits_per_byte") for line in lines)
    return [
        [str(line["step"]), f"{line['heldout_loss']:.4f}", "" if one is None else f"{one:.4f}"]
        for line, one in zip(lines, bits, strict=True)
    ]


def _starts(starts: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    head = ["at", "from step", "devices", "processes", "mesh", "versions"]
    rows = [
        [
            line["time"],
            str(line["step"]),
            f"{line['devices']} x {line['device']}",
            str(line["processes"]),
            " x ".join(f"{axis} {size}" for axis, size in line["mesh"].items() if size > 1) or "one device",
            ", ".join(f"{name} {line[name]}" for name in ("python", "jaxlinear", "jax", "flax", "optax")),
        ]
        for line in starts
    ]
    return head, rows
