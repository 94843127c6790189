"""How another program's tensors correspond to our arrays: only names, axes and positions."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from jaxlinear.errors import UserError
from jaxlinear.models import stacks
from jaxlinear.models.config import ModelConfig
from jaxlinear.models.parameters import describe
from jaxlinear.streaming import StreamedArray, rows_at_once

_FLOAT32 = np.dtype(np.float32)


class Form(NamedTuple):
    """Two functions, inverse to each other: ours from theirs, and theirs from ours."""

    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


SAME = Form(lambda x: x, lambda x: x)
TRANSPOSED = Form(np.transpose, np.transpose)  # [inputs, outputs] here, [outputs, inputs] in PyTorch
TAPS = Form(lambda x: x[:, 0].T, lambda x: x.T[:, None])  # [width, C] here, [C, 1, width] in PyTorch


def by_block(blocks: int) -> Form:
    """``[blocks * n]`` here, ``[blocks, n]`` there."""
    return Form(lambda x: x.reshape(-1), lambda x: x.reshape(blocks, -1))


def under(axes: int) -> Form:
    """Theirs has ``axes`` leading axes of length 1: one of several that are stacked."""
    return Form(lambda x: x.reshape(x.shape[axes:]), lambda x: x.reshape((1,) * axes + x.shape))


def regrouped(outer: int, inner: int, form: Form) -> Form:
    """``form`` for a tensor whose first axis is ``[outer, inner, n]`` there and is first made ``[inner, outer, n]``."""

    def turned(x: np.ndarray, *axes: int) -> np.ndarray:
        return x.reshape(*axes, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)

    return Form(lambda x: form.ours(turned(x, outer, inner)), lambda x: turned(form.theirs(x), inner, outer))


def shifted(offset: float) -> Form:
    """Theirs is ours plus ``offset``. Without an offset the bits are the same; with one, both directions round."""
    return Form(lambda x: x - np.float32(offset), lambda x: x + np.float32(offset)) if offset else SAME


@dataclasses.dataclass(frozen=True)
class Link:
    """One of our arrays, and the tensor of theirs that it is, or is a part of.

    Attributes:
      theirs: the tensor's name.
      ours: the path of our array: within a layer (``mixer.gate.kernel``) or, if ``layer`` is None, in the model.
      layer: counted from 0.
      form: how the array is laid out in the tensor. A tensor's links, if several, are its parts along its first axis.
    """

    theirs: str
    ours: str
    layer: int | None = None
    form: Form = SAME


class _Place(NamedTuple):
    """A resolved link: index ``repeat`` of the first axis of our ``leaf`` (None: all of it), and the rows ``[begin:end]``
    of the tensor ``theirs``."""

    theirs: str
    leaf: str
    repeat: int | None
    form: Form
    begin: int
    end: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """All arrays of a model and all tensors of the other program's: each number of one occurs exactly once in the other.

    Attributes:
      shapes: of their tensors, by name.
      leaves: the shapes of our arrays, by their path in a checkpoint.
      by_tensor: the parts of each tensor, in the order of its rows.
      by_leaf: the parts of each array, in the order of its repetitions.
    """

    shapes: dict[str, tuple[int, ...]]
    leaves: dict[str, tuple[int, ...]]
    by_tensor: dict[str, list[_Place]]
    by_leaf: dict[str, list[_Place]]

    @classmethod
    def of(cls, config: ModelConfig, links: Iterable[Link]) -> "Plan":
        """The plan of ``links``, which must cover the model: a number without a link, or with two, would be a defect."""
        paths = jax.tree_util.tree_leaves_with_path(describe(config).shapes)
        leaves = {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in paths}
        shapes: dict[str, tuple[int, ...]] = {}
        by_tensor, by_leaf = defaultdict(list), defaultdict(list)
        for link in links:
            leaf, repeat = _leaf(config, link)
            ours = leaves[leaf] if repeat is None else leaves[leaf][1:]
            part = link.form.theirs(np.broadcast_to(np.float32(0), ours)).shape  # a broadcast takes no memory
            begin = shapes[link.theirs][0] if link.theirs in shapes else 0
            place = _Place(link.theirs, leaf, repeat, link.form, begin, begin + part[0])
            shapes[link.theirs] = (place.end, *part[1:])
            by_tensor[link.theirs].append(place)
            by_leaf[leaf].append(place)
        for leaf, shape in leaves.items():
            repeats = [place.repeat for place in by_leaf[leaf]]
            assert repeats in ([None], [*range(shape[0])]), f"{leaf} has links for {repeats}"
        return cls(shapes, leaves, dict(by_tensor), dict(by_leaf))

    def check(self, tensors: Mapping[str, StreamedArray], origin: str) -> None:
        """Raises ``UserError`` naming a tensor that is missing, does not belong to the model, or has the wrong shape."""
        missing = [name for name in self.shapes if name not in tensors]
        extra = sorted(tensors.keys() - self.shapes.keys())
        for names, what in ((missing, "is missing"), (extra, "does not belong to this model")):
            if names:
                more = f", and {len(names) - 1} more" if len(names) > 1 else ""
                raise UserError(f"{origin}: the tensor {names[0]} {what}{more}")
        for name, shape in self.shapes.items():
            if tensors[name].shape != shape:
                raise UserError(
                    f"{origin}: the tensor {name} has the shape {list(tensors[name].shape)}; by the config it must be "
                    f"{list(shape)}"
                )

    def name_of(self, leaf: str) -> str:
        """The name of the tensor that an array of ours is, or is a part of."""
        return self.by_leaf[leaf][0].theirs

    def to_ours(self, tensors: Mapping[str, StreamedArray]) -> dict[str, StreamedArray]:
        """Our arrays, in float32, from their tensors, which must have passed ``check``."""
        return {leaf: self._ours(leaf, tensors) for leaf in self.leaves}

    def _ours(self, leaf: str, tensors: Mapping[str, StreamedArray]) -> StreamedArray:
        places = self.by_leaf[leaf]

        def part(place: _Place, begin: int, end: int) -> np.ndarray:
            return place.form.ours(tensors[place.theirs].read(begin, end).astype(_FLOAT32, copy=False))

        def read(begin: int, end: int) -> np.ndarray:
            first = places[0]
            if first.repeat is not None:
                layers = [part(place, place.begin, place.end)[None] for place in places[begin:end]]
                return layers[0] if len(layers) == 1 else np.concatenate(layers)
            if first.form is SAME:
                return part(first, first.begin + begin, first.begin + end)
            return part(first, first.begin, first.end)[begin:end]

        rows = _rows(self.leaves[leaf], places) if places[0].repeat is None else 1
        return StreamedArray(self.leaves[leaf], _FLOAT32, rows, read)

    def to_theirs(self, arrays: Mapping[str, StreamedArray]) -> dict[str, StreamedArray]:
        """Their tensors, in float32, from our arrays. Read in their ``order``, no data of ours is read more than once."""
        number = {leaf: i for i, leaf in enumerate(self.leaves)}
        first = {name: (number[places[0].leaf], places[0].repeat) for name, places in self.by_tensor.items()}
        chunks = _Chunks(arrays)
        order = {name: i for i, name in enumerate(sorted(first, key=first.__getitem__))}
        return {name: self._theirs(name, arrays, chunks, order[name]) for name in self.by_tensor}

    def _theirs(self, name: str, arrays: Mapping[str, StreamedArray], chunks: "_Chunks", order: int) -> StreamedArray:
        shape, places = self.shapes[name], self.by_tensor[name]

        def read(begin: int, end: int) -> np.ndarray:
            if _is_one_of_ours(places):
                return arrays[places[0].leaf].read(begin, end)
            parts = [place.form.theirs(x) for place, x in zip(places, chunks.read(places), strict=True)]
            return (parts[0] if len(parts) == 1 else np.concatenate(parts))[begin:end]

        return StreamedArray(shape, _FLOAT32, _rows(shape, places), read, order)


class _Chunks:
    """Reads the arrays of single layers. In a trained run's checkpoint a stacked array is a single chunk, which is read
    whole and is kept for the following tensors, which are those of the other layers."""

    def __init__(self, arrays: Mapping[str, StreamedArray]):
        self._arrays = arrays
        self._kept: dict[tuple[str, int, int], np.ndarray] = {}

    def read(self, places: list[_Place]) -> list[np.ndarray]:
        keys = [self._key(place) for place in places]
        self._kept = {key: chunk for key, chunk in self._kept.items() if key in keys}
        for key in keys:
            if key not in self._kept:
                leaf, begin, end = key
                self._kept[key] = self._arrays[leaf].read(begin, end)
        return [
            self._kept[key] if place.repeat is None else self._kept[key][place.repeat - key[1]]
            for place, key in zip(places, keys, strict=True)
        ]

    def _key(self, place: _Place) -> tuple[str, int, int]:
        array = self._arrays[place.leaf]
        if place.repeat is None:
            return place.leaf, 0, array.shape[0]
        begin = place.repeat // array.rows * array.rows
        return place.leaf, begin, min(begin + array.rows, array.shape[0])


def _leaf(config: ModelConfig, link: Link) -> tuple[str, int | None]:
    """The path of a link's array in a checkpoint and, for a stacked array, the repetition."""
    if link.layer is None:
        return link.ours, None
    place = stacks.place(config.stacks, link.layer)
    return f"stacks.{place.stack}.blocks.{place.block}.{link.ours}", place.repeat


def _is_one_of_ours(places: list[_Place]) -> bool:
    """Whether a tensor is one of our arrays unchanged, so that it may be cut anywhere."""
    return len(places) == 1 and places[0].repeat is None and places[0].form is SAME


def _rows(shape: tuple[int, ...], places: list[_Place]) -> int:
    return rows_at_once(shape, _FLOAT32.itemsize) if _is_one_of_ours(places) else shape[0]
