"""Each mixer's parameters and states by shape, its initial values, and the widths that it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlinear.errors import UserError
from jaxlinear.models import mixers
from jaxlinear.models.mixers.linear_attention import Hedgehog
from jaxlinear.models.parameters import describe
from jaxlinear.training.optimizer import decay_mask
from tests import numerics, oracles, small

WIDTHS = {"hgrn2": {"key_width": 8}, "mamba2": {"key_width": 6, "value_width": 8}}  # smaller than by default


def each(names, *shape):
    return dict.fromkeys(names.split(), shape)


def delta_inputs(key, value):
    """2 heads; their filters have four taps."""
    parts = {"query": key, "key": key, "value": value}
    filters = {f"inputs.{name}_convolution.convolution_kernel": (4, width) for name, width in parts.items()}
    return {f"inputs.{name}": (16, width) for name, width in parts.items()} | filters | {"inputs.beta": (16, 2)}


def attention(groups, bias):
    shapes = each("query out", 16, 16) | each("key value", 16, 4 * groups)
    return shapes | ({"out.bias": (16,)} if bias else {})


# With D = 16, R = 24 and 2 heads; what Mamba and Longhorn share, with D = 40 and a rank of 40 / 16, rounded up.
SELECTED = {
    **each("value gate", 40, 24),
    **{"out": (24, 40), "selection": (24, 3 + 2 * 5), "time_step": (3, 24)},
    **{"value_convolution.convolution_kernel": (4, 24), "value_convolution.convolution_bias": (24,)},
    **each("dt_bias D", 24),
}
SQUARE = each("query key value out", 16, 16)
PAIRS = SQUARE | each("query key", 16, 32)  # feature maps with products have K = 16
GATED_DELTA_NET = delta_inputs(12, 24) | {"decay": (16, 2)} | each("A_log dt_bias", 2)  # K = 3/4 D / H, V = 2 K
GATED_DELTA_NET |= {"norm.scale": (12,), "out": (24, 16)}
KDA = delta_inputs(12, 16) | {
    **{"decay.down": (16, 8), "decay.up": (8, 12), "A_log": (2,), "dt_bias": (12,)},  # a decay for each key channel
    **{"gate.down": (16, 8), "gate.up": (8, 16), "norm.scale": (8,), "out": (16, 16)},
}
RETENTION = each("query key", 16, 16) | each("value gate", 16, 32) | {"out": (32, 16)}  # V = 2 K

# mixer, changes of the config, shapes by name, without ".kernel"
SHAPES = [
    *(
        (mixer, {"num_heads": 4, "key_value_heads": groups, "bias": bias}, attention(groups, bias))
        for mixer in ("attention", "sliding_window")
        for groups, bias in ((1, True), (2, True), (4, False))
    ),
    (
        "convolution",  # as published, the maps have biases whatever ``bias`` says; the filters have none
        {"recurrent_width": 32, "convolution_width": 3, "bias": False},
        {
            **each("input gate", 16, 32),
            **each("input.bias gate.bias", 32),
            **{"convolution.convolution_kernel": (3, 32), "out": (32, 16), "out.bias": (16,)},
        },
    ),
    ("delta_net", {}, delta_inputs(16, 16) | {"norm.scale": (8,), "out": (16, 16)}),
    ("delta_net", {"output_gate": "none"}, delta_inputs(16, 16) | {"norm.scale": (8,), "out": (16, 16)}),
    (
        "delta_net",
        {"output_gate": "silu", "value_width": 6},
        delta_inputs(16, 12) | {"norm.scale": (6,), "out": (12, 16), "gate": (16, 12)},
    ),
    ("gated_delta_net", {}, GATED_DELTA_NET | {"gate": (16, 24)}),
    ("gated_delta_net", {"output_gate": "none"}, GATED_DELTA_NET),
    (
        "gateloop",
        {},
        {
            **each("query key value magnitude phase gate", 16, 24),
            **each("magnitude_bias phase_bias", 24),
            **{"norm.scale": (12,), "out": (24, 16)},
        },
    ),
    (
        "gla",  # K = D / 2 / H, V = D / H
        {},
        {
            **each("query key", 16, 8),
            **each("value gate decay_in out", 16, 16),
            **{"decay_out": (16, 8), "decay_out.bias": (8,), "norm.scale": (8,)},
        },
    ),
    ("hgrn", {}, each("input forget gate", 16, 24) | each("lower_bound norm.scale", 24) | {"out": (24, 16)}),
    ("hgrn2", {}, each("query forget value out", 16, 16) | each("lower_bound norm.scale", 16)),
    ("kda", {"key_width": 6}, KDA),
    ("kda", {"key_width": 6, "gate_bias": True}, KDA | {"gate.up.bias": (16,)}),
    ("lightning", {}, each("query key value gate out", 16, 16) | {"log_decay": (2,)}),
    ("linear_attention", {}, SQUARE | {"norm.scale": (8,)}),
    ("linear_attention", {"feature_map": "elu"}, SQUARE),
    ("linear_attention", {"feature_map": "relu"}, SQUARE),
    ("linear_attention", {"feature_map": "taylor"}, PAIRS),
    (
        "linear_attention",
        {"feature_map": "rebased"},
        PAIRS | each("query_map.scale query_map.bias key_map.scale key_map.bias", 32),
    ),
    ("linear_attention", {"feature_map": "hedgehog"}, SQUARE | each("query_map key_map", 2, 8, 8)),
    ("longhorn", {"key_width": 5, "width": 40}, SELECTED),
    (
        "longhorn",
        {"key_width": 5, "width": 40, "time_step_rank": 7},
        SELECTED | {"selection": (24, 17), "time_step": (7, 24)},
    ),
    (
        "lru",
        {},
        {
            **each("nu theta gamma", 24),
            **{"input_kernel": (2, 16, 24), "output_kernel": (2, 24, 16), "skip": (16,)},
            **each("value gate", 16, 16),
            **each("value.bias gate.bias", 16),
        },
    ),
    ("mamba", {"key_width": 5, "width": 40}, SELECTED | {"A_log": (24, 5)}),
    (
        "mamba",
        {"key_width": 5, "width": 40, "time_step_rank": 7},
        SELECTED | {"A_log": (24, 5), "selection": (24, 17), "time_step": (7, 24)},
    ),
    ("mamba", {"key_width": 5, "width": 40, "selection_norm": True}, SELECTED | {"A_log": (24, 5)}),
    (
        "mamba2",  # 3 heads of 8, which share one key and one query of 6
        {},
        {
            **each("gate value", 16, 24),
            **each("key query", 16, 6),
            **{"time_step": (16, 3), "out": (24, 16), "norm.scale": (24,)},
            **{
                f"{name}_convolution.convolution_kernel": (4, n)
                for name, n in (("value", 24), ("key", 6), ("query", 6))
            },
            **{f"{name}_convolution.convolution_bias": (n,) for name, n in (("value", 24), ("key", 6), ("query", 6))},
            **each("A_log dt_bias D", 3),
        },
    ),
    ("retention", {}, RETENTION),
    ("retention", {"head_norm": "rms"}, RETENTION | {"norm.scale": (16,)}),
    (
        "rg_lru",
        {},
        {
            **each("input gate", 16, 24),
            **each("input.bias gate.bias convolution_bias", 24),
            **{"convolution_kernel": (4, 24), "out": (24, 16), "out.bias": (16,)},
            **each("rg_lru.recurrence_kernel rg_lru.input_kernel", 2, 12, 12),
            **each("rg_lru.recurrence_bias rg_lru.input_bias rg_lru.decay", 24),
        },
    ),
    (
        "s5",
        {},
        {
            **each("log_rate frequency log_step", 12),
            **{"input_kernel": (2, 16, 12), "output_kernel": (2, 12, 16)},
            **{"skip": (16,), "gate": (16, 16), "gate.bias": (16,)},
        },
    ),
]


def by_name(tree):
    return {
        ".".join(str(entry.key) for entry in path).removesuffix(".kernel"): value
        for path, value in jax.tree.leaves_with_path(tree)
    }


@pytest.mark.parametrize("mixer, changes, shapes", SHAPES, ids=[f"{mixer}-{changes}" for mixer, changes, _ in SHAPES])
def test_the_parameters(mixer, changes, shapes):
    config = small.config(**(WIDTHS.get(mixer, {}) | changes))
    _, parameters = small.module(lambda rngs: mixers.find(mixer)(config, rngs=rngs))
    assert jax.tree.map(np.shape, by_name(parameters)) == shapes


def test_every_mixer_is_here():
    assert {mixer for mixer, _, _ in SHAPES} == set(mixers.names())


@pytest.mark.parametrize("mixer", mixers.names())
def test_kernels_alone_are_decayed(mixer):
    """Not rates and vectors. All are float32."""
    architecture = describe(small.config(pattern=(mixer,), num_layers=2, **WIDTHS.get(mixer, {})))
    shapes, decayed = (
        jax.tree.leaves_with_path(tree["stacks"][0]["blocks"][0]["mixer"])
        for tree in (architecture.shapes, decay_mask(architecture))
    )
    assert {shape.dtype for _, shape in shapes} == {jnp.dtype("float32")}
    assert [path[-1].key for path, is_decayed in decayed if is_decayed != path[-1].key.endswith("kernel")] == []


PAPER = {"width": 64, "recurrent_width": 128}  # with states of the papers' widths
ATTENDED = {"num_heads": 4, "key_value_heads": 2, "window": 5, "context": 5}
CACHE = each("keys values", 2, 5, 4) | each("position seen")
GIVEN = {"recurrent_heads": 3, "key_width": 6, "value_width": 5}
# mixer, changes of the config, the state's shapes after the rows
STATES = [
    ("attention", ATTENDED, CACHE),
    ("sliding_window", ATTENDED, CACHE),
    ("delta_net", GIVEN, {"memory": (3, 6, 5), "query": (3, 18), "key": (3, 18), "value": (3, 15)}),
    ("gated_delta_net", {"key_width": 5}, {"memory": (2, 5, 10)}),
    ("gated_delta_net", {"value_width": 5}, {"memory": (2, 6, 5)}),
    ("gateloop", {}, {"h": (24,)}),
    ("gla", {}, {"memory": (2, 4, 8)}),
    ("gla", {"recurrent_heads": 4}, {"memory": (4, 2, 4)}),
    ("gla", {"recurrent_heads": 3, "key_width": 5, "value_width": 7}, {"memory": (3, 5, 7)}),
    ("hgrn", {}, {"h": (24,)}),
    ("hgrn2", {"width": 256, "key_width": 0}, {"memory": (2, 128, 128)}),
    ("hgrn2", {}, {"memory": (2, 8, 8)}),
    ("hgrn2", {"recurrent_heads": 4, "key_width": 0}, {"memory": (4, 4, 4)}),
    ("hgrn2", {"recurrent_heads": 4, "key_width": 6}, {"memory": (4, 6, 4)}),
    ("hgrn2", GIVEN, {"memory": (3, 6, 5)}),
    ("lightning", GIVEN, {"memory": (3, 6, 5)}),
    # The divisor takes up one more value channel.
    *(
        ("linear_attention", GIVEN | {"feature_map": name}, {"memory": (3, features, values)})
        for name, features, values in (
            *(("identity", 6, 5), ("elu", 6, 6), ("relu", 6, 6)),
            *(("taylor", 28, 6), ("rebased", 21, 6), ("hedgehog", 12, 6)),
        )
    ),
    ("mamba", PAPER, {"memory": (128, 16), "value": (3, 128)}),
    ("mamba2", PAPER | {"key_width": 0, "value_width": 0}, {"memory": (2, 128, 64)} | each("query key value", 3, 128)),
    ("retention", GIVEN, {"memory": (3, 6, 5), "position": ()}),
]


@pytest.mark.parametrize("mixer, changes, shapes", STATES, ids=[f"{mixer}-{changes}" for mixer, changes, _ in STATES])
def test_the_state(mixer, changes, shapes):
    config = small.config(**(WIDTHS.get(mixer, {}) | changes))
    made = nnx.eval_shape(lambda: mixers.find(mixer)(config, rngs=nnx.Rngs(0)))
    state = jax.eval_shape(lambda: made.init_state(7))
    assert {name: state[name].shape for name in shapes} == {name: (7, *shape) for name, shape in shapes.items()}
    assert state.keys() == shapes.keys() or mixer == "gated_delta_net"


@pytest.mark.parametrize(
    "mixer, changes, message",
    [
        *(
            ("delta_net", {"recurrent_heads": 3, **given}, "3 heads do not divide 16 channels")
            for given in ({}, {"key_width": 4}, {"value_width": 4})
        ),
        ("gated_delta_net", {"recurrent_heads": 5}, "5 heads do not divide 12 channels"),
        ("gateloop", {"recurrent_heads": 5}, "5 heads do not divide 24 channels"),
        ("gla", {"recurrent_heads": 3}, "3 heads do not divide 8 channels; change model.recurrent_heads"),
        ("gla", {"width": 1, "num_heads": 1}, "1 heads do not divide 0 channels"),  # half of 1
        ("hgrn2", {}, "heads of 128 channels do not divide model.width=16; set model.key_w"),
        ("hgrn2", {"recurrent_heads": 3, "key_width": 4}, "3 heads do not divide 16 channels"),
        ("kda", {"recurrent_heads": 3}, "3 heads do not divide 16 channels"),
        ("lightning", {"recurrent_heads": 3, "key_width": 5}, "3 heads do not divide 16 channels"),
        ("linear_attention", {"recurrent_heads": 3}, "3 heads do not divide 16 channels"),
        ("mamba2", {}, "the heads' width 64 does not divide model.recurrent_width=24; set"),
        ("retention", {"recurrent_heads": 3}, "3 heads do not divide 16 channels"),
        ("s5", {"recurrent_heads": 5}, "recurrent_width=24 does not split into 5 blocks .* must be a multiple of 10"),
    ],
    ids=str,
)
def test_widths_that_are_refused(mixer, changes, message):
    with pytest.raises(UserError, match=message) as refused:
        mixers.find(mixer)(small.config(**changes), rngs=nnx.Rngs(0))
    assert mixer == "s5" or str(refused.value).startswith(f"{mixer}: ")


LAYERS, FEW_HEADS = {"num_layers": 8}, {"width": 256, "num_heads": 4, "num_layers": 8}
OF_MAMBA = {"width": 256, "recurrent_width": 2048, "num_layers": 8}
MANY_HEADS = {"width": 512, "num_heads": 512, "num_layers": 8}
OF_KDA = MANY_HEADS | {"key_width": 2, "value_width": 64}
OF_MAMBA2 = OF_MAMBA | {"value_width": 2, "key_width": 128}
LOW_RANK = {"width": 40, "key_width": 5, "recurrent_width": 400, "time_step_rank": 200}


def glorot(inputs, outputs, gain=1.0):
    return gain**2 * 2 / (inputs + outputs)


# mixer, changes of the config, variances by name, those that are uniform, what is zero, what is one
VALUES = [
    *(
        (
            mixer,
            FEW_HEADS | {"key_value_heads": 2},
            each("query key value", 1 / 256) | {"out": (2 / 8 / 256,)},
            "",
            "out.bias",
            "",
        )
        for mixer in ("attention", "sliding_window")
    ),
    (
        "convolution",
        {"width": 256, "recurrent_width": 512, "num_layers": 8, "convolution_width": 3},
        each("input gate", 1 / 256) | {"out": (2 / 8 / 512,), "convolution.convolution_kernel": (1 / 9,)},
        "convolution.convolution_kernel",
        "input.bias gate.bias out.bias",
        "",
    ),
    (
        "delta_net",
        FEW_HEADS,
        each("inputs.query inputs.key inputs.value inputs.beta", 1 / 256) | {"out": (2 / 8 / 256,)},
        "",
        "norm.scale",
        "",
    ),
    (
        "gated_delta_net",
        MANY_HEADS | {"key_width": 1},
        {"decay": (1 / 3 / 512,), "gate": (1 / 512,), "out": (2 / 8 / 1024,)},
        "",
        "",
        "",
    ),
    (
        "kda",
        OF_KDA,
        {"decay.down": (1 / 512,), "decay.up": (1 / 3 / 64,), "gate.down": (1 / 512,), "gate.up": (1 / 64,)},
        "",
        "",
        "",
    ),
    (
        "gla",
        FEW_HEADS,
        {
            **each("query key", glorot(256, 128, 2**-2.5)),
            **{"decay_in": (glorot(256, 16, 2**-2.5),), "decay_out": (glorot(16, 128, 2**-2.5),)},
            **each("value gate", 1 / 256),
            "out": (2 / 8 / 256,),
        },
        "query key decay_in decay_out",
        "decay_out.bias norm.scale",
        "",
    ),
    (
        "hgrn",
        LAYERS | {"width": 64, "recurrent_width": 256},
        each("input forget gate", 1 / 64),
        "",
        "lower_bound norm.scale",
        "",
    ),
    (
        "hgrn2",
        LAYERS | {"width": 256, "key_width": 128},
        each("query forget value", 1 / 256) | {"out": (2 / 8 / 256,)},
        "",
        "lower_bound norm.scale",
        "",
    ),
    ("lightning", FEW_HEADS, each("query key value gate", 1 / 256) | {"out": (2 / 8 / 256,)}, "", "", ""),
    (
        "linear_attention",
        FEW_HEADS | {"feature_map": "rebased"},
        each("query key value", 1 / 256) | {"out": (2 / 8 / 256,)},
        "",
        "query_map.bias",
        "query_map.scale",
    ),
    (
        "mamba",
        OF_MAMBA,
        each("value gate", 1 / 3 / 256)
        | {"selection": (1 / 3 / 2048,), "time_step": (1 / 3 / 16,), "out": (1 / 3 / 8 / 2048,)},
        "",
        "",
        "D",
    ),
    ("mamba", LOW_RANK, {"time_step": (1 / 3 / 200,)}, "", "", ""),  # the rank is the fan-in
    ("longhorn", LOW_RANK, {"time_step": (1 / 3 / 200,)}, "", "dt_bias", ""),
    (
        "mamba2",
        OF_MAMBA2,
        each("gate value key query time_step", 1 / 3 / 256) | {"out": (1 / 3 / 8 / 2048,)},
        "",
        "norm.scale",
        "D",
    ),
    (
        "retention",
        {"width": 256, "num_heads": 4},
        {
            **each("query key", glorot(256, 256, 2**-2.5)),
            **each("value gate", glorot(256, 512, 2**-2.5)),
            "out": (glorot(512, 256),),
        },
        "query key value gate",
        "",
        "",
    ),
    (
        "rg_lru",
        {"width": 256, "recurrent_width": 512, "num_heads": 4, "num_layers": 8},
        {
            **each("input gate", 1 / 256),
            **each("rg_lru.recurrence_kernel rg_lru.input_kernel", 1 / 128),
            **{"out": (2 / 8 / 512,), "convolution_kernel": (0.01 / 4,)},
        },
        "",
        "input.bias gate.bias out.bias convolution_bias rg_lru.input_bias",
        "",
    ),
]


@functools.cache
def _values(mixer, changes):
    made = mixers.find(mixer)(small.config(**dict(changes)), rngs=nnx.Rngs(0))
    return numerics.wide(by_name(nnx.to_pure_dict(nnx.state(made))))


def at_the_start(mixer, changes):
    return _values(mixer, tuple(changes.items()))


@pytest.mark.parametrize(
    "mixer, changes, variances, uniform, zeros, ones",
    VALUES,
    ids=[f"{mixer}-{changes}" for mixer, changes, *_ in VALUES],
)
def test_the_parameters_at_the_start(mixer, changes, variances, uniform, zeros, ones):
    values = at_the_start(mixer, changes)
    for name, (variance,) in variances.items():
        deviation = variance**0.5
        assert np.std(values[name]) == pytest.approx(deviation, rel=0.05), name
        assert abs(np.mean(values[name])) < 0.1 * deviation, name
        if name in uniform.split():
            limit = 3**0.5 * deviation
            assert np.abs(values[name]).max() == pytest.approx(limit, rel=0.02), name
            assert np.abs(values[name]).max() <= limit * (1 + 1e-6), name
    for name in zeros.split():
        assert not values[name].any(), name
    for name in ones.split():
        assert (values[name] == 1).all(), name


def test_hedgehog_begins_as_the_identity():
    kernel = Hedgehog(3, 4, rngs=nnx.Rngs(0)).kernel[...]
    assert np.array_equal(kernel, np.broadcast_to(np.eye(4), (3, 4, 4)))


TENTHS = np.linspace(0.1, 0.9, 9)


@pytest.mark.parametrize(
    "mixer, changes, low, near, tolerance",
    [
        ("gated_delta_net", MANY_HEADS | {"key_width": 1}, 0, 0.2, 0.07),
        ("kda", OF_KDA, 1, 0.2, 0.07),
        ("mamba2", OF_MAMBA2, 1, 0.1, 0.05),
    ],
)
def test_rates_are_uniform(mixer, changes, low, near, tolerance):
    """Up to 16, in 512 or 1,024 heads."""
    rate = np.exp(at_the_start(mixer, changes)["A_log"])
    assert low < rate.min() < low + near and 16 - near < rate.max() <= 16 + 1e-5
    numerics.assert_close(np.quantile(rate, TENTHS), low + (16 - low) * TENTHS, tolerance)


def test_rates_of_mamba_are_the_same_in_every_channel():
    found = np.exp(at_the_start("mamba", OF_MAMBA)["A_log"])
    numerics.assert_close(found, np.broadcast_to(np.arange(1.0, 17), (2048, 16)), 1e-6)


@pytest.mark.parametrize(
    "mixer, changes, count, tolerance",
    [
        ("gated_delta_net", MANY_HEADS | {"key_width": 1}, 512, 0.05),
        ("kda", OF_KDA, 1024, 0.03),  # one for each key channel
        ("mamba", OF_MAMBA, 2048, 0.03),
        ("mamba2", OF_MAMBA2, 1024, 0.03),
    ],
)
def test_time_steps_are_log_uniform(mixer, changes, count, tolerance):
    """In 0.001 .. 0.1."""
    dt = oracles.softplus(at_the_start(mixer, changes)["dt_bias"])
    assert dt.shape == (count,) and 1e-3 - 1e-8 < dt.min() < 1.02e-3 and 0.098 < dt.max() < 0.1 + 1e-6
    numerics.assert_close(np.quantile(np.log10(dt), TENTHS), -3 + 2 * TENTHS, tolerance)


SILU = 0.356  # the mean square of silu of a normal number


@pytest.mark.parametrize(
    "mixer, changes, square",
    [
        ("delta_net", {"num_heads": 4, "output_gate": "none"}, 2 / 8),
        ("delta_net", {"num_heads": 4, "output_gate": "silu"}, SILU * 2 / 8),
        ("gated_delta_net", {"num_heads": 4}, SILU * 2 / 8),
        ("kda", {"num_heads": 4}, 0.54**2 * 2 / 8),  # the sigmoid of about a normal number
        ("gateloop", {"recurrent_width": 256, "recurrent_heads": 4}, SILU * 2 / 8),
        ("hgrn", {"recurrent_width": 256}, SILU * 2 / 8),
        ("mamba2", {"recurrent_width": 128, "value_width": 16, "key_width": 16}, 1 / 3 / 8),
    ],
    ids=str,
)
def test_the_outputs_at_the_start(mixer, changes, square):
    """On tokens of variance 1: the gate's mean square times the variance of the last kernel."""
    made = mixers.find(mixer)(small.config(width=64, num_layers=8, **changes), rngs=nnx.Rngs(0))
    y, _ = numerics.jit(made)(jax.random.normal(jax.random.key(1), (4, 32, 64)))
    assert np.var(y) == pytest.approx(square, rel=0.19)
