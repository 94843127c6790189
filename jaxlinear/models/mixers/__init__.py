"""The mixers: one file each, found by name. A mixer mixes over time; the block around it is the same for all.

``Mixer(config, layer=..., rngs=...)`` builds one; its place in the model matters to a few. ``mixer(x, segment_ids=None, state=None) -> (y, state)`` runs it over
``[B, T, D]``, from an empty past or from a state; ``mixer.init_state(batch)`` is the empty past. A state is a pytree of
arrays with B first, whose size does not depend on the tokens seen.
"""

from jaxlinear.errors import UserError
from jaxlinear.models.mixers.rg_lru import RGLRUBlock
from jaxlinear.models.mixers.sliding_window import SlidingWindow

MIXERS = {"rg_lru": RGLRUBlock, "sliding_window": SlidingWindow}


def find(name: str):
    """The mixer's class."""
    if name not in MIXERS:
        raise UserError(f"there is no mixer {name!r}; there are {', '.join(sorted(MIXERS))}")
    return MIXERS[name]
