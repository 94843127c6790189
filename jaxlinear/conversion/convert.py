"""Converts weights of other programs into a run's directory, and back."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import config_dict

from jaxlinear import checkpoint
from jaxlinear import config as configs
from jaxlinear.conversion import flax, hugging_face
from jaxlinear.conversion.family import Fields
from jaxlinear.conversion.links import Plan
from jaxlinear.data import staging
from jaxlinear.data.tokenizer import INFO_FILE, Tokenizer, load_tokenizer, open_tokenizer
from jaxlinear.errors import UserError
from jaxlinear.streaming import StreamedArray
from jaxlinear.training.workdir import CONFIG, read_config

LAYOUTS = ("huggingface", "flax")
TREE = "parameters"
_OVERHEAD_BYTES = 1 << 20  # of a directory, in addition to its arrays


def import_weights(source: str | os.PathLike, workdir: str | os.PathLike) -> None:
    """Makes a run's directory from another program's model: its config, its tokenizer, and a checkpoint of step 0.

    Args:
      source: a Hugging Face directory with a model of ``hugging_face.FAMILIES`` in safetensors, or a checkpoint of the
        ``recurrentgemma`` package.
      workdir: must not exist yet, or be empty.

    Anything wrong is refused before anything is written, and the directory appears only when it is complete. Only a part
    of one array is in memory, at most a tensor of one layer.
    """
    source, workdir = Path(source).absolute(), Path(workdir).absolute()
    _check_empty(workdir)
    if not source.is_dir():
        raise UserError(f"{source} is not a directory")
    if flax.is_one(source):
        config, arrays, tokenizer = _from_flax(source)
    elif hugging_face.is_one(source):
        config, arrays, tokenizer = _from_hugging_face(source)
    else:
        raise UserError(
            f"{source} is neither a Hugging Face directory (config.json, model.safetensors) nor a recurrentgemma "
            "checkpoint (_METADATA)"
        )
    if tokenizer is not None and tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer of {source} has {tokenizer.vocab_size} tokens and the model only "
            f"{config.model.vocab_size}; move the tokenizer away to import the weights without it"
        )
    with _made_whole(workdir, arrays) as unfinished:
        unfinished.mkdir()
        (unfinished / CONFIG).write_text(configs.to_json(config), encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(unfinished)
        checkpoint.save_streamed(unfinished, config, TREE, arrays)


def export_weights(
    workdir: str | os.PathLike, target: str | os.PathLike, *, step: int | None = None, layout: str = "huggingface"
) -> None:
    """Writes a run's weights, in float32, and its tokenizer in the format of another program.

    Args:
      workdir: the run; its newest checkpoint is used, or that of ``step``.
      target: the directory to make; must not exist yet, or be empty.
      layout: one of ``LAYOUTS``: that of Hugging Face, for a model of ``hugging_face.FAMILIES``, or that of the
        ``recurrentgemma`` package.

    Nothing is written before the model is known to be one of theirs and the checkpoint to be undamaged. The target appears
    only when it is complete. At most one tensor of theirs is in memory; for a trained run, whose checkpoints hold each
    array of all repetitions in one piece, also those arrays of ours that the tensor is made from.
    """
    workdir, target = Path(workdir).absolute(), Path(target).absolute()
    if layout not in LAYOUTS:
        raise UserError(f"there is no layout {layout!r}; the layouts are {' and '.join(LAYOUTS)}")
    _check_empty(target)
    model = configs.model_config(read_config(workdir))
    tokenizer = load_tokenizer(workdir) if (workdir / INFO_FILE).is_file() else None
    if layout == "flax":
        fields, links = flax.fields(model), flax.links(model)
    else:
        family = hugging_face.family_of_model(model)
        fields = family.fields(model) | hugging_face.shared_fields(family.name, model, tokenizer)
        links = family.links(model)
    plan, checkpoints = Plan.of(model, links), checkpoint.Checkpoints(workdir)
    checkpoints.check_paths(TREE, plan.leaves, step)
    tensors = plan.to_theirs(checkpoints.stream(TREE, step))
    with _made_whole(target, tensors) as unfinished:
        (flax if layout == "flax" else hugging_face).write(unfinished, fields, tensors)
        if tokenizer is not None and tokenizer.file is not None:
            shutil.copyfile(workdir / tokenizer.file, unfinished / tokenizer.file)


class _Imported(NamedTuple):
    config: config_dict.ConfigDict
    arrays: dict[str, StreamedArray]
    tokenizer: Tokenizer | None


def _from_hugging_face(source: Path) -> _Imported:
    fields = Fields(hugging_face.read_json(source / hugging_face.CONFIG), str(source / hugging_face.CONFIG))
    family = hugging_face.family_of_fields(fields)
    config = _config(family.model(fields) | {"dtype": fields.dtype()})
    model = configs.model_config(config)
    plan = Plan.of(model, family.links(model))
    tensors = family.read(model, hugging_face.read_tensors(source))
    if model.tied_embeddings:
        tensors = hugging_face.without_copy(tensors, plan.name_of("embedding"), str(source))
    plan.check(tensors, str(source))
    tokenizer = _tokenizer([source], fields.optional("bos_token_id"), hugging_face.end_tokens(source, fields))
    return _Imported(config, plan.to_ours(tensors), tokenizer)


def _from_flax(source: Path) -> _Imported:
    tensors = flax.read_tensors(source)
    config = _config(flax.model(source, tensors))
    model = configs.model_config(config)
    plan = Plan.of(model, flax.links(model))
    plan.check(tensors, str(source))
    return _Imported(config, plan.to_ours(tensors), _tokenizer([source, source.parent]))


def _config(model: Mapping[str, Any]) -> config_dict.ConfigDict:
    config = configs.default()
    config.model.update(model)
    configs.forget_unread(config, ["model.pattern"])  # a file may set more than its model has parts for
    return configs.resolve(config)


def _tokenizer(
    directories: Sequence[Path], first_token: int | None = None, end_tokens: tuple[int, ...] = ()
) -> Tokenizer | None:
    """The tokenizer stored with the weights. Its document token is the one that the model's texts began with. If no end
    tokens are given, those of a SentencePiece model are its own."""
    files = [directory / name for directory in directories for name in ("tokenizer.json", "tokenizer.model")]
    path = next((path for path in files if path.is_file()), None)
    if path is None:
        return None
    if path.suffix == ".json":
        name = _added_token(path, first_token)
    else:
        name, last = _borders(path)
        end_tokens = end_tokens or last
    try:
        tokenizer = open_tokenizer(str(path), name)
    except UserError as error:
        raise UserError(f"{path}: {error}; move the file away to import the weights without it") from error
    tokenizer.end_tokens = end_tokens
    return tokenizer


def _added_token(path: Path, index: int | None) -> str | None:
    """The name of a special token of a ``tokenizer.json``."""
    tokens = hugging_face.read_json(path).get("added_tokens") or []
    try:
        names = [(token["id"], token["content"]) for token in tokens]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged: an entry of added_tokens has no id or no content; move the file away to import the "
            "weights without it"
        ) from error
    return next((name for token, name in names if token == index), None)


def _borders(path: Path) -> tuple[str | None, tuple[int, ...]]:
    """The name of a SentencePiece model's token that begins a text, and the id of the one that ends it."""
    try:
        import sentencepiece
    except ImportError:
        return None, ()  # opening the tokenizer reports what is missing
    try:
        pieces: Any = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        return None, ()  # likewise, what is wrong with it
    first, last = pieces.bos_id(), pieces.eos_id()
    return pieces.id_to_piece(first) if first >= 0 else None, (last,) if last >= 0 else ()


def _check_empty(directory: Path) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} already exists; name a new or empty directory")


@contextlib.contextmanager
def _made_whole(directory: Path, arrays: Mapping[str, StreamedArray]) -> Iterator[Path]:
    """A path to fill, which is then renamed to ``directory``. If that fails, nothing is left."""
    staging.clear(directory)
    try:
        with staging.directory(directory) as around:  # before the space: where nothing can be made, none is free
            needed, free = sum(x.nbytes for x in arrays.values()) + _OVERHEAD_BYTES, shutil.disk_usage(around).free
            if free < needed:
                raise UserError(
                    f"no space left on the disk for {directory}: it needs up to {needed / 1e6:,.1f} MB and "
                    f"{free / 1e6:,.1f} MB are free"
                )
            yield around / "whole"
            _check_empty(directory)  # again, since another program may have made it meanwhile
            os.replace(around / "whole", directory)
    except (OSError, ValueError, RuntimeError) as error:
        if not checkpoint.is_disk_full(error):
            raise
        raise UserError(
            f"no space left on the disk for {directory}: it was used up by other data during the write"
        ) from error
