"""From the rows that a process reads to arrays over all devices of the mesh."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding

_Item = TypeVar("_Item")


def local_rows(sharding: NamedSharding, shape: tuple[int, int], process: int | None = None) -> list[int]:
    """The rows of ``[B, T]`` that lie on the devices of this process, or of another one, in ascending order. They need
    not be adjacent: on TPUs the mesh follows the torus, not the hosts."""
    process = jax.process_index() if process is None else process
    places: Mapping[Any, tuple[slice, ...]] = sharding.devices_indices_map(shape)
    rows: set[int] = set()
    for device, index in places.items():
        if device.process_index == process:
            rows.update(range(*index[0].indices(shape[0])))
    return sorted(rows)


def place(batch: dict[str, np.ndarray], sharding: NamedSharding, batch_size: int) -> dict[str, jax.Array]:
    """The global batch of ``batch_size`` rows. ``batch`` holds those of this process (``local_rows``): whole rows of T
    tokens, of which each device gets its part."""

    def one(rows: np.ndarray) -> jax.Array:
        shape = (batch_size, rows.shape[1])
        held = local_rows(sharding, shape)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(batch_size)
            first = held.index(start)  # a device's own rows are adjacent
            return rows[first : first + stop - start, index[1]]

        return jax.make_array_from_callback(shape, sharding, part)

    return {name: one(rows) for name, rows in batch.items()}


def one_behind(items: Iterable[_Item]) -> Iterator[_Item]:
    """Yields each item after the next one has been made, so that the results of one batch are read while the devices
    compute the next, and the devices do not wait for it."""
    before: list[_Item] = []
    for item in items:
        yield from before
        before = [item]
    yield from before
