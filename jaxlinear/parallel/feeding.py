"""From the rows that a process reads to arrays over all devices of the mesh."""

import jax
import numpy as np
from jax.sharding import NamedSharding


def local_rows(sharding: NamedSharding, shape: tuple[int, int]) -> tuple[int, int]:
    """The rows [start, stop) of ``[B, T]`` that lie on this process's devices."""
    slices = [index[0] for index in sharding.addressable_devices_indices_map(shape).values() if index is not None]
    starts, stops = [s.start or 0 for s in slices], [shape[0] if s.stop is None else s.stop for s in slices]
    return min(starts), max(stops)


def place(batch: dict[str, np.ndarray], sharding: NamedSharding, batch_size: int) -> dict[str, jax.Array]:
    """The global batch of ``batch_size`` rows, of which ``batch`` are this process's: whole rows of T tokens, of which
    each device gets its part."""

    def one(rows: np.ndarray) -> jax.Array:
        shape = (batch_size, rows.shape[1])
        first, _ = local_rows(sharding, shape)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(batch_size)
            return rows[start - first : stop - first, index[1]]

        return jax.make_array_from_callback(shape, sharding, part)

    return {name: one(rows) for name, rows in batch.items()}
