"""The cost of an exchange between shards of time, estimated from bytes and steps; ``"auto"`` chooses by it.

This is not a measurement: it uses data sheet rates and assumes that nothing is hidden behind other work. For both
passes together, with W shards, m the bytes of M as it travels, and c those of C and of the gradient D that goes back:

============== ============================== ================================ ==========================================
exchange       bytes that a device sends      bytes that it holds              work
============== ============================== ================================ ==========================================
``all_gather`` (W - 1)(m + 2c)                W(m + c), W m between passes     2W folds, M S + C
``doubling``   2 log2(W)(m + c) + 2c          2(m + c), m between passes       2 log2(W) composes, which have M2 M1 too
============== ============================== ================================ ==========================================

M2 M1 is a matrix product where M is a matrix (the delta rule). On a torus, whose links join neighbours, a permute over
d shards puts the bytes of d of them on each link: there doubling saves only memory. Through a switch it also saves
time.

Full attention gathers keys and values, and holds all of them and their float32 gradients in memory, or sends them round
a ring, and holds those of two shards at a time; the products are the same.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from jaxlinear.costs.devices import Device, Link, device_of, link_of
from jaxlinear.errors import UserError
from jaxlinear.parallel.exchanges import EXCHANGES

ATTENTION = ("all_gather", "ring")

# What one operation may hold for its exchange, as a fraction of a device's memory. A model keeps m or W m for every layer.
STATES_BOUND = 1 / 64
KEYS_AND_VALUES_BOUND = 1 / 16


class States(NamedTuple):
    """What a recurrence exchanges."""

    shards: int
    transition: int  # bytes of M as it travels, m
    state: int  # bytes of C, and of D, c
    fold: int  # FLOPs of products in M S + C
    compose: int  # FLOPs of products in (M2 M1, M2 C1 + C2)


class KeysAndValues(NamedTuple):
    """What full attention exchanges."""

    shards: int
    own: int  # bytes of a shard's keys and values
    wide: int  # bytes of their gradients while these are summed, in float32 at least


class Cost(NamedTuple):
    """The cost of one operation on one device, both passes together."""

    seconds: float
    moved: int  # bytes that it sends
    held: int  # peak bytes


def state_costs(load: States, device: Device, link: Link) -> dict[str, Cost]:
    """The cost of each of ``EXCHANGES``."""
    shards, m, c, fold, compose = load
    doublings = [2**i for i in range(math.ceil(math.log2(shards)))]

    def work(flops: int, size: int) -> float:
        """Seconds for one fold or compose, which reads and writes ``size`` bytes."""
        return max(flops / device.flops, size / device.memory_bandwidth)

    gathered = link.gather(shards, m + c) + link.gather(shards, c) + 2 * shards * work(fold, m + 3 * c)
    doubled = 2 * sum(link.permute(shards, d, m + c) + work(compose, 3 * (m + c)) for d in doublings)
    doubled += 2 * link.permute(shards, 1, c)
    return {
        "all_gather": Cost(gathered, (shards - 1) * (m + 2 * c), shards * (m + c)),
        "doubling": Cost(doubled, 2 * len(doublings) * (m + c) + 2 * c, 2 * (m + c)),
    }


def key_value_costs(load: KeysAndValues, link: Link) -> dict[str, Cost]:
    """The cost of each of ``ATTENTION``, excluding the products, behind which the ring hides what it can."""
    shards, own, wide = load
    steps = shards - 1
    ring = 2 * steps * link.permute(shards, 1, own) + (shards + 1) * link.permute(shards, 1, wide)
    return {
        # Backward, the gradients are summed on the devices that hold the keys: as many bytes, in the dtype of the keys.
        "all_gather": Cost(2 * link.gather(shards, own), 2 * steps * own, shards * (own + wide)),
        "ring": Cost(ring, 2 * steps * own + (shards + 1) * wide, 2 * own + 3 * wide),
    }


def choose_exchange(asked: str, load: States, kind: str, span: int) -> str:
    """One of ``EXCHANGES``: the one asked for or, for ``"auto"``, the cheapest one whose states fit their bound.

    Args:
      asked: ``parallel.exchange``.
      load: what has to be exchanged.
      kind: of the devices, as ``jax.Device.device_kind``.
      span: how many devices a row of shards spans, from first to last, in the order of the mesh.
    """
    _check("parallel.exchange", asked, tuple(EXCHANGES))
    device = device_of(kind)
    costs, bound = state_costs(load, device, link_of(device, span)), int(STATES_BOUND * device.memory)
    fitting = [name for name in EXCHANGES if costs[name].held <= bound]
    if fitting:
        best = min(fitting, key=lambda name: costs[name].seconds)
    else:
        best = min(EXCHANGES, key=lambda name: costs[name].held)
    chosen = best if asked == "auto" else asked
    what = f"states of {load.shards} shards, M {_size(load.transition)}, C {_size(load.state)}"
    _explain(what, chosen, asked, costs, bound, kind, span)
    return chosen


def choose_attention(asked: str, load: KeysAndValues, kind: str, span: int) -> str:
    """One of ``ATTENTION``: the one asked for or, for ``"auto"``, the gather unless it holds more than its bound."""
    _check("parallel.attention", asked, ATTENTION)
    device = device_of(kind)
    costs, bound = key_value_costs(load, link_of(device, span)), int(KEYS_AND_VALUES_BOUND * device.memory)
    best = "all_gather" if costs["all_gather"].held <= bound else "ring"
    chosen = best if asked == "auto" else asked
    what = f"keys and values of {load.shards} shards, {_size(load.own)} each"
    _explain(what, chosen, asked, costs, bound, kind, span)
    return chosen


def _check(key: str, asked: str, known: tuple[str, ...]) -> None:
    if asked not in ("auto", *known):
        raise UserError(f"{key} is {asked!r}; it must be one of auto, {', '.join(known)}")


def size_of(tree: Any) -> int:
    """The bytes of all arrays together."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


_listeners: list[list[str]] = []


@contextlib.contextmanager
def explained() -> Iterator[list[str]]:
    """Collects the lines that explain each choice made within the context, that is while a program is traced: what it
    is for, what was chosen, and what each option costs. Equal choices are explained once."""
    lines: list[str] = []
    _listeners.append(lines)
    try:
        yield lines
    finally:
        _listeners.pop()


def _explain(what: str, chosen: str, asked: str, costs: dict[str, Cost], bound: int, kind: str, span: int) -> None:
    if not _listeners:
        return
    why = "auto" if asked == "auto" else "as asked"
    lines = [f"{what}: {chosen} ({why}; at most {_size(bound)} held)"]
    for name, cost in costs.items():
        lines.append(
            f"  {name}: {1e6 * cost.seconds:.1f} us, {_size(cost.moved)} sent per device, {_size(cost.held)} held"
        )
    lines.append(f"  estimated for {device_of(kind).name}, {link_of(device_of(kind), span).name}")
    if lines[0] not in _listeners[-1]:
        _listeners[-1].extend(lines)


def _size(size: int) -> str:
    """Bytes with a binary unit."""
    exponent = min((max(size, 1).bit_length() - 1) // 10, 4)
    return f"{size / 1024**exponent:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[exponent]}"
