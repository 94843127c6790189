"""Hugging Face directories: ``config.json`` and the weights in one safetensors file, or in several with an index."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlinear.conversion import falcon_mamba, fla, llama, mamba, mamba2, recurrent_gemma, safetensors
from jaxlinear.conversion.family import Family, Fields
from jaxlinear.data import Tokenizer
from jaxlinear.errors import UserError
from jaxlinear.models.config import ModelConfig
from jaxlinear.streaming import StreamedArray

FAMILIES = {
    family.name: family
    for family in (
        llama.FAMILY,
        llama.MISTRAL,
        mamba.FAMILY,
        falcon_mamba.FAMILY,
        mamba2.FAMILY,
        recurrent_gemma.FAMILY,
        *fla.FAMILIES,
    )
}
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
SHARD_BYTES = 5_000_000_000
# Left over in files of older releases: the frequencies of rotary positions, which follow from their base.
_NO_WEIGHT = re.compile(r".*\.rotary_emb\.inv_freq")


def is_one(directory: Path) -> bool:
    """Whether this is such a directory, whatever state it is in."""
    return any((directory / name).exists() for name in (WEIGHTS, INDEX, CONFIG))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. transformers writes infinity, which JSON lacks, as an object of its own."""
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_hook=_number)
    except (ValueError, TypeError) as error:  # TypeError for a malformed infinity
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it is not an object")
    return values


def _number(value: dict[str, Any]) -> Any:
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def family_of_fields(fields: Fields) -> Family:
    """The family of a ``config.json``."""
    name = fields.get("model_type")
    if name not in tuple(FAMILIES):
        fields.refuse("model_type", name, f"{', '.join(FAMILIES)} can be imported")
    quantization = fields.optional("quantization_config")
    if quantization is not None:
        fields.refuse("quantization_config", quantization, "only unquantised weights can be imported")
    return FAMILIES[name]


def family_of_model(config: ModelConfig) -> Family:
    """The first family whose layers have the model's mixers."""
    for family in FAMILIES.values():
        fits = set(config.layers) <= set(family.mixers) and family.main in (None, *config.layers)
        if fits and family.is_one(config):
            return family
    raise UserError(f"none of {', '.join(FAMILIES)} has the layers {', '.join(dict.fromkeys(config.layers))}")


def end_tokens(directory: Path, fields: Fields) -> tuple[int, ...]:
    """The tokens at which texts of the model end: those in ``generation_config.json``, else those in ``config.json``."""
    found = fields.optional("eos_token_id")
    if (directory / GENERATION).is_file():
        found = read_json(directory / GENERATION).get("eos_token_id", found)
    tokens = [] if found is None else found if isinstance(found, list) else [found]
    if not all(isinstance(token, int) for token in tokens):
        raise UserError(f"{directory}: eos_token_id is {found!r}; it must be a token id or a list of token ids")
    return tuple(tokens)


def shared_fields(name: str, config: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Fields of a ``config.json`` that are the same in every family."""
    first = None if tokenizer is None else tokenizer.document_token
    ends = () if tokenizer is None else tokenizer.end_tokens or (first,)
    return {
        "model_type": name,
        "torch_dtype": "float32",
        "num_hidden_layers": config.num_layers,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": first,
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends) or None,
        "pad_token_id": None,
    }


def read_tensors(directory: Path) -> dict[str, StreamedArray]:
    """The tensors by name. Only the headers of the files are read at this point."""
    if (directory / WEIGHTS).is_file():
        return _weights(safetensors.read(directory / WEIGHTS))
    if not (directory / INDEX).is_file():
        others = sorted(path.name for pattern in ("*.bin", "*.pth") for path in directory.glob(pattern))
        advice = f"; {others[0]} cannot be read, so save the model as safetensors" if others else ""
        raise UserError(f"{directory} has neither {WEIGHTS} nor {INDEX}{advice}")
    file_of = read_json(directory / INDEX).get("weight_map")
    if not isinstance(file_of, dict):
        raise UserError(f"{directory / INDEX} is damaged: it has no weight_map")
    for name, file in file_of.items():
        if not isinstance(file, str):
            raise UserError(f"{directory / INDEX} is damaged: it lists {name} in {file!r}, which is not a file name")
    tensors: dict[str, StreamedArray] = {}
    for file in sorted(set(file_of.values())):
        path = directory / Path(file).name
        if not path.is_file():
            raise UserError(f"{directory} has no {path.name}, which {INDEX} lists")
        for name, tensor in safetensors.read(path).items():
            if file_of.get(name) != file:
                raise UserError(f"{path} has the tensor {name}, which {INDEX} lists in {file_of.get(name, 'no file')}")
            tensors[name] = tensor
    for name, file in file_of.items():
        if name not in tensors:
            raise UserError(f"{directory / file} has no tensor {name}, which {INDEX} lists there")
    return _weights(tensors)


def _weights(tensors: dict[str, StreamedArray]) -> dict[str, StreamedArray]:
    return {name: x for name, x in tensors.items() if not _NO_WEIGHT.fullmatch(name)}


def without_copy(tensors: dict[str, StreamedArray], embedding: str, origin: str) -> dict[str, StreamedArray]:
    """The tensors of a model with tied embeddings. Some files hold the embedding twice; the copy is left out."""
    head = "lm_head.weight"
    if head not in tensors or embedding not in tensors:
        return tensors
    copies = [tensors[name] for name in (head, embedding)]
    if copies[0].shape != copies[1].shape or not all(
        np.array_equal(x, y) for (_, x), (_, y) in zip(*(copy.pieces() for copy in copies), strict=True)
    ):
        raise UserError(f"{origin}: the tensor {head} differs from {embedding}, although tie_word_embeddings is true")
    return {name: x for name, x in tensors.items() if name != head}


def write(directory: Path, fields: Mapping[str, Any], tensors: Mapping[str, StreamedArray]) -> None:
    """Writes a new directory. Only a part of one tensor is in memory at a time."""
    directory.mkdir()
    (directory / CONFIG).write_text(json.dumps(dict(fields), indent=2) + "\n", encoding="utf-8")
    shards = _shards(tensors)
    places = {}
    for i, names in enumerate(shards):
        file = WEIGHTS if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        header, begins = safetensors.header({name: tensors[name] for name in names})
        (directory / file).write_bytes(header)
        places.update({name: (file, begin) for name, begin in begins.items()})
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].order):
        file, begin = places[name]
        with (directory / file).open("r+b") as stream:
            stream.seek(begin)
            for _, piece in tensor.pieces():
                stream.write(np.ascontiguousarray(piece, np.dtype("<f4")).data)
    if len(shards) > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": {name: places[name][0] for name in tensors}}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Mapping[str, StreamedArray]) -> list[list[str]]:
    """The names, split where a file would exceed ``SHARD_BYTES``."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards
