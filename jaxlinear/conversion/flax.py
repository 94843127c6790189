"""Checkpoints of the ``recurrentgemma`` package: nested dicts of arrays, written by Orbax.

They hold only parameters. What does not follow from shapes (the window, the scale of the embeddings, the cap of the logits)
is read from a ``config.json`` beside them, which the export writes. Without one, the shapes must be those of a published
model. That package's window does not count the current token; ours does.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxlinear import streaming
from jaxlinear.conversion.family import Fields, require
from jaxlinear.conversion.hugging_face import read_json
from jaxlinear.conversion.links import Link, by_block, under
from jaxlinear.conversion.recurrent_gemma import BLOCK_OF_MIXER, griffin, require_griffin
from jaxlinear.errors import UserError
from jaxlinear.models import presets
from jaxlinear.models.config import ModelConfig
from jaxlinear.streaming import StreamedArray

CONFIG = "config.json"
_METADATA = "_METADATA"
_ROOT = "params."
_DTYPES = ("float32", "float16", "bfloat16")
_HEAD_UNIT = 4  # channels: the package halves a head, and halves the turned part again
# Keys of our presets that cannot be inferred from shapes.
_NOT_IN_SHAPES = ("window", "embedding_scale", "logit_soft_cap")


def is_one(directory: Path) -> bool:
    """Whether Orbax wrote this directory."""
    return (directory / _METADATA).exists()


def read_tensors(directory: Path) -> dict[str, StreamedArray]:
    """The arrays by the path of their keys, which begins with ``params``. No array is read at this point."""
    try:
        metadata = json.loads((directory / _METADATA).read_text(encoding="utf-8"))["tree_metadata"]
        names = [".".join(str(key["key"]) for key in entry["key_metadata"]) for entry in metadata.values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{directory / _METADATA} is damaged: {error or type(error).__name__}") from error
    tensors = {name: _open(directory, name) for name in names}
    for name, tensor in tensors.items():
        if tensor.dtype.name not in _DTYPES:
            raise UserError(
                f"{directory}: {name} has the dtype {tensor.dtype.name}; weights are imported from {', '.join(_DTYPES)}"
            )
    return tensors


def _open(directory: Path, name: str) -> StreamedArray:
    """An array. Raises ``UserError``, here or when it is read, if it is damaged."""

    def guarded(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (ValueError, OSError) as error:
            raise UserError(f"{directory}: {name} cannot be read ({' '.join(str(error).split())[:300]})") from error

    tensor = guarded(streaming.open_array, directory, name)
    return dataclasses.replace(tensor, read=functools.partial(guarded, tensor.read))


def model(directory: Path, tensors: Mapping[str, StreamedArray]) -> dict[str, Any]:
    """Keys of our ``model`` section."""

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if _ROOT + name not in tensors:
            raise UserError(f"{directory}: the tensor {_ROOT}{name} is missing")
        found = tensors[_ROOT + name].shape
        if len(found) != axes:
            raise UserError(f"{directory}: the tensor {_ROOT}{name} has the shape {list(found)}, not {axes} axes")
        return found

    vocab_size, width = shape("embedder.input_embedding", 2)
    layers = []
    for i in range(1 + max((_layer(name) for name in tensors), default=-1)):
        recurrent = any(name.startswith(f"{_ROOT}blocks.{i}.recurrent_block.") for name in tensors)
        layers.append("rg_lru" if recurrent else "sliding_window")
    if not layers:
        raise UserError(f"{directory} has no {_ROOT}blocks.0: it is not a recurrentgemma checkpoint")
    if "rg_lru" in layers:
        i = layers.index("rg_lru")
        heads, block, _ = shape(f"blocks.{i}.recurrent_block.rg_lru.a_gate.w", 3)
        recurrent_width, taps = heads * block, shape(f"blocks.{i}.recurrent_block.conv_1d.w", 2)[0]
    else:
        heads, recurrent_width, taps = width // shape("blocks.0.attention_block.proj_k.kernel", 2)[1], width, 4
    if "sliding_window" in layers and heads and width // heads % _HEAD_UNIT:
        raise UserError(
            f"{directory}: a width of {width} over {heads} heads is {width // heads} channels per head; in "
            f"recurrentgemma it must be a multiple of {_HEAD_UNIT}"
        )
    period = next(n for n in range(1, len(layers) + 1) if all(x == layers[i % n] for i, x in enumerate(layers)))
    values = griffin(
        pattern=tuple(layers[:period]),
        num_layers=len(layers),
        vocab_size=vocab_size,
        width=width,
        recurrent_width=recurrent_width,
        num_heads=heads,
        key_value_heads=1,
        mlp_expansion=shape("blocks.0.mlp_block.ffw_up.w", 3)[2] / width,
        convolution_width=taps,
        rotary_base=10_000.0,
        rotary_fraction=0.5,
        norm_epsilon=1e-6,
        tied_embeddings=True,
        dtype="bfloat16" if tensors[_ROOT + "embedder.input_embedding"].dtype.name == "bfloat16" else "float32",
    )
    return values | _not_in_shapes(directory, values)


def _layer(name: str) -> int:
    head, _, rest = name.removeprefix(_ROOT).partition(".")
    number = rest.split(".")[0]
    return int(number) if head == "blocks" and number.isdigit() else -1


def _not_in_shapes(directory: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    if (directory / CONFIG).is_file():
        fields = Fields(read_json(directory / CONFIG), str(directory / CONFIG))
        return {
            "window": fields.integer("attention_window_size") + 1,
            "embedding_scale": fields.boolean("embeddings_scale_by_sqrt_dim"),
            "logit_soft_cap": fields.number("logits_soft_cap"),
        }
    for name, preset in presets.PRESETS.items():
        sizes = ("pattern", "num_layers", "width", "recurrent_width", "num_heads")
        if name.startswith("recurrentgemma") and all(preset[key] == values[key] for key in sizes):
            return {key: preset[key] for key in _NOT_IN_SHAPES} | {"window": preset["window"] + 1}
    raise UserError(
        f"{directory} has no {CONFIG}, and its shapes match no published RecurrentGemma; write one with the "
        "attention_window_size, embeddings_scale_by_sqrt_dim and logits_soft_cap of its GriffinConfig"
    )


def fields(config: ModelConfig) -> dict[str, Any]:
    """The arguments of the package's ``GriffinConfig``, which are written beside a checkpoint."""
    family = "a recurrentgemma checkpoint"
    others = [mixer for mixer in config.layers if mixer not in BLOCK_OF_MIXER]
    if others:
        raise UserError(f"{family} has no layers of the kind {others[0]}")
    require_griffin(config, family)
    require(config, family, tied_embeddings=True, rotary_base=10_000.0, rotary_fraction=0.5, norm_epsilon=1e-6)
    require(config, family, rotary_scaling=0.0)
    require(config, family, norm_offset=1.0, convolution_width=4, key_value_heads=1)
    if config.window < 2:
        raise UserError(f"model.window is {config.window}; in {family} it must be at least 2")
    if "sliding_window" in config.layers and config.head_width % _HEAD_UNIT:
        raise UserError(
            f"model.width={config.width} over model.num_heads={config.num_heads} is {config.head_width} channels per "
            f"head; in {family} it must be a multiple of {_HEAD_UNIT}"
        )
    return {
        "vocab_size": config.vocab_size,
        "width": config.width,
        "mlp_expanded_width": config.mlp_width,
        "num_heads": config.num_heads,
        "lru_width": config.recurrent_width,
        "block_types": [BLOCK_OF_MIXER[mixer].upper() for mixer in config.layers],
        "embeddings_scale_by_sqrt_dim": config.embedding_scale,
        "attention_window_size": config.window - 1,
        "logits_soft_cap": config.logit_soft_cap,
    }


def links(config: ModelConfig) -> Iterator[Link]:
    yield Link(f"{_ROOT}embedder.input_embedding", "embedding")
    yield Link(f"{_ROOT}final_norm.scale", "norm.scale")
    for layer, mixer in enumerate(config.layers):
        there = f"{_ROOT}blocks.{layer}"
        yield Link(f"{there}.temporal_pre_norm.scale", "mixer_norm.scale", layer)
        yield Link(f"{there}.channel_pre_norm.scale", "mlp_norm.scale", layer)
        for ours in ("gate", "up"):
            yield Link(f"{there}.mlp_block.ffw_up.w", f"mlp.{ours}.kernel", layer, under(1))
            yield Link(f"{there}.mlp_block.ffw_up.b", f"mlp.{ours}.bias", layer, under(3))
        yield Link(f"{there}.mlp_block.ffw_down.kernel", "mlp.down.kernel", layer)
        yield Link(f"{there}.mlp_block.ffw_down.bias", "mlp.down.bias", layer)
        if mixer == "sliding_window":
            for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("final", "out")):
                yield Link(f"{there}.attention_block.proj_{theirs}.kernel", f"mixer.{ours}.kernel", layer)
            yield Link(f"{there}.attention_block.proj_final.bias", "mixer.out.bias", layer)
            continue
        there = f"{there}.recurrent_block"
        for theirs, ours in (("linear_y", "gate"), ("linear_x", "input"), ("linear_out", "out")):
            yield Link(f"{there}.{theirs}.kernel", f"mixer.{ours}.kernel", layer)
            yield Link(f"{there}.{theirs}.bias", f"mixer.{ours}.bias", layer)
        yield Link(f"{there}.conv_1d.w", "mixer.convolution_kernel", layer)
        yield Link(f"{there}.conv_1d.b", "mixer.convolution_bias", layer)
        yield Link(f"{there}.rg_lru.a_param", "mixer.rg_lru.decay", layer)
        for theirs, ours in (("a_gate", "recurrence"), ("input_gate", "input")):
            yield Link(f"{there}.rg_lru.{theirs}.w", f"mixer.rg_lru.{ours}_kernel", layer)
            yield Link(f"{there}.rg_lru.{theirs}.b", f"mixer.rg_lru.{ours}_bias", layer, by_block(config.num_heads))


def write(directory: Path, fields_: Mapping[str, Any], tensors: Mapping[str, StreamedArray]) -> None:
    """Writes a new directory. Only a part of one tensor is in memory at a time."""
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *path, last = _keys(name)
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = tensor
    streaming.save(directory, tree)
    (directory / CONFIG).write_text(json.dumps(dict(fields_), indent=2) + "\n", encoding="utf-8")


def _keys(name: str) -> list[str]:
    """``params.blocks.3.mlp_block.ffw_up.w`` -> params, blocks.3, mlp_block, ffw_up, w."""
    keys = name.split(".")
    return keys if keys[1] != "blocks" else [keys[0], ".".join(keys[1:3]), *keys[3:]]
