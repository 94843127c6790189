"""The mixers: one file each, found by name. A mixer mixes over time; the block around it is the same for all.

``Mixer(config, layer=..., rngs=...)`` builds one; a few depend on their place in the model.
``mixer(x, segment_ids=None, state=None) -> (y, state)`` runs it over ``[B, T, D]``, from an empty past or from a state;
``mixer.init_state(batch)`` is the empty past. A state is a pytree of arrays with B first, whose size does not depend on the
number of tokens seen.

A class declares ``OVER_SEQUENCE = True`` if everything it does over time goes through ``jaxlinear.parallel.operations``:
time may then be spread over devices. Other mixers are refused there, since the compiler would silently gather their whole
sequence.

A class may declare ``ACROSS_LAYERS``, functions by parameter name: ``function(rows [L, ...]) -> [L, ...]`` takes that
parameter of every layer of this mixer, in order, and returns what the mixer of each layer sees in its place.

``READERS`` names the mixers that read a key which others do not.

A mixer of another package is named by its location, ``package.module.Class``, and declares these keys itself: ``READS``
(docs/mixers.md).
"""

import difflib
import importlib
from collections.abc import Iterable

from flax import nnx

from jaxlinear.errors import UserError
from jaxlinear.models.mixers.attention import Attention
from jaxlinear.models.mixers.convolution import Convolution
from jaxlinear.models.mixers.delta_net import DeltaNet
from jaxlinear.models.mixers.gated_delta_net import GatedDeltaNet
from jaxlinear.models.mixers.gateloop import GateLoop
from jaxlinear.models.mixers.gla import GLA
from jaxlinear.models.mixers.hgrn import HGRN
from jaxlinear.models.mixers.hgrn2 import HGRN2
from jaxlinear.models.mixers.kda import KimiDeltaAttention
from jaxlinear.models.mixers.lightning import Lightning
from jaxlinear.models.mixers.linear_attention import LinearAttention
from jaxlinear.models.mixers.longhorn import Longhorn
from jaxlinear.models.mixers.lru import LRU
from jaxlinear.models.mixers.mamba import Mamba
from jaxlinear.models.mixers.mamba2 import Mamba2
from jaxlinear.models.mixers.retention import Retention
from jaxlinear.models.mixers.rg_lru import RGLRUBlock
from jaxlinear.models.mixers.s5 import S5
from jaxlinear.models.mixers.sliding_window import SlidingWindow

MIXERS = {
    "attention": Attention,
    "convolution": Convolution,
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
    "gateloop": GateLoop,
    "gla": GLA,
    "hgrn": HGRN,
    "hgrn2": HGRN2,
    "kda": KimiDeltaAttention,
    "lightning": Lightning,
    "linear_attention": LinearAttention,
    "longhorn": Longhorn,
    "lru": LRU,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "retention": Retention,
    "rg_lru": RGLRUBlock,
    "s5": S5,
    "sliding_window": SlidingWindow,
}


# Keys of the config section ``model`` that only some mixers read, and which mixers those are: patterns of others refuse
# them. A mixer that reads one is listed here (tests/models/test_options.py).
_HEADS_OF_KEYS = ("delta_net", "gated_delta_net", "gla", "hgrn2", "kda", "lightning", "linear_attention", "retention")
_DELTA_RULE = ("delta_net", "gated_delta_net", "kda")
_ATTENTION = ("attention", "sliding_window")
_SELECTIVE = ("longhorn", "mamba")
_OF_CHANNELS = ("convolution", "gateloop", "hgrn", "lru", "mamba2", "rg_lru", "s5", *_SELECTIVE)
READERS = {
    # Others take their heads from other keys, or have none.
    "num_heads": (*_ATTENTION, *(name for name in _HEADS_OF_KEYS if name != "hgrn2"), "gateloop", "rg_lru", "s5"),
    "bias": _ATTENTION,
    "recurrent_width": _OF_CHANNELS,
    "window": ("sliding_window",),
    "key_value_heads": _ATTENTION,
    "context": ("attention",),
    "recurrent_heads": (*_HEADS_OF_KEYS, "gateloop", "s5"),
    "key_width": (*_HEADS_OF_KEYS, "mamba2", *_SELECTIVE),
    "value_width": (*_HEADS_OF_KEYS, "mamba2"),
    "time_step_rank": _SELECTIVE,
    "feature_map": ("linear_attention",),
    "discretization": ("s5",),
    "convolution_width": ("convolution", "delta_net", "gated_delta_net", "kda", "mamba2", "rg_lru", *_SELECTIVE),
    "rotary_fraction": (*_ATTENTION, "retention"),
    "rotary_base": (*_ATTENTION, "retention"),
    "rotary_scaling": _ATTENTION,
    "rotary_context": _ATTENTION,
    "output_norm_epsilon": ("hgrn2",),
    "selection_norm": ("mamba",),
    "selection_norm_epsilon": ("mamba",),
    "head_norm": ("retention",),
    "output_gate": ("delta_net", "gated_delta_net"),
    "gate_bias": ("kda",),
    "negative_eigenvalues": _DELTA_RULE,
    "householders": _DELTA_RULE,
}


def find(name: str):
    """The mixer's class, one of ``MIXERS`` or of another package."""
    if name in MIXERS:
        return MIXERS[name]
    if "." in name and all(part.isidentifier() for part in name.split(".")):
        return _of_another_package(name)
    raise UserError(
        f"there is no mixer {name!r}; the mixers are {', '.join(sorted(MIXERS))}, and those of other packages as "
        "package.module.Class"
    )


def reads(mixer: str, key: str) -> bool:
    """Whether the mixer reads a key of ``READERS``."""
    return mixer in READERS[key] if mixer in MIXERS else key in _own_keys(find(mixer))


def _of_another_package(name: str) -> type[nnx.Module]:
    path, _, attribute = name.rpartition(".")
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise  # the missing module is one that the mixer's module imports
        raise UserError(
            f"the mixer {name!r}: there is no module {error.name!r}; install it, or add its directory to PYTHONPATH"
        ) from None
    found = getattr(module, attribute, None)
    if not (isinstance(found, type) and issubclass(found, nnx.Module)):
        raise UserError(f"the mixer {name!r}: {module.__file__} has no nnx.Module {attribute}")
    if missing := [part for part in ("init_state", "flops") if not hasattr(found, part)]:
        raise UserError(f"the mixer {name!r} has no {' and no '.join(missing)}; docs/mixers.md says what a mixer needs")
    for key in set(_own_keys(found)) - set(READERS):
        near = difflib.get_close_matches(key, READERS, n=1, cutoff=0.0)
        raise UserError(
            f"the mixer {name!r}: READS has {key!r}, which is not a key that only some mixers read; did you mean "
            f"{near[0]!r}?"
        )
    return found


def _own_keys(mixer: type[nnx.Module]) -> tuple[str, ...]:
    return getattr(mixer, "READS", ())


def check_over_sequence(names: Iterable[str], shards: int) -> None:
    """Raises ``UserError`` for the first of these mixers whose time cannot be spread over so many devices."""
    for name in names:
        if shards > 1 and not getattr(find(name), "OVER_SEQUENCE", False):
            raise UserError(
                f"mesh.sequence={shards}: the mixer {name!r} does not run with the sequence split (its class does "
                "not declare OVER_SEQUENCE, see jaxlinear/models/mixers/__init__.py); set mesh.sequence to 1"
            )
