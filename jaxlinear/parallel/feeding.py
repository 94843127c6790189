"""From the rows that a process reads to arrays over all devices of the mesh."""

import jax
import numpy as np
from jax.sharding import NamedSharding


def local_rows(sharding: NamedSharding, shape: tuple[int, int]) -> tuple[int, int]:
    """The rows [start, stop) of ``[B, T]`` that lie on this process's devices."""
    slices = [index[0] for index in sharding.addressable_devices_indices_map(shape).values() if index is not None]
    starts, stops = [s.start or 0 for s in slices], [shape[0] if s.stop is None else s.stop for s in slices]
    return min(starts), max(stops)


def place(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """This process's rows as its part of the global batch on the mesh."""
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
