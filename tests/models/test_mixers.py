"""What holds for every mixer: it is one function whether tokens come at once, in parts, one by one, or packed."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlinear import ops
from jaxlinear.errors import UserError
from jaxlinear.models import mixers
from jaxlinear.parallel import operations
from tests import numerics, small
from tests.mixer_oracles import ORACLES

LENGTH = 13
# name: mixer, changes of the config
MIXERS = {
    "rg_lru": ("rg_lru", {}),
    "rg_lru_no_convolution": ("rg_lru", {"convolution_width": 1}),
    "window_4": ("sliding_window", {"window": 4}),
    "window_1": ("sliding_window", {"window": 1}),
    "window_beyond": ("sliding_window", {"window": 40}),
    "window_grouped": ("sliding_window", {"window": 5, "num_heads": 4, "key_value_heads": 2, "rotary_base": 100.0}),
    "attention": ("attention", {"num_heads": 4, "key_value_heads": 2, "context": 24}),
    "multi_head": ("attention", {"key_value_heads": 2, "context": 24, "bias": False, "rotary_base": 100.0}),
    "rotary_scaling": ("attention", {"context": 24, "rotary_base": 100.0, "rotary_scaling": 4.0, "rotary_context": 20}),
    "convolution": ("convolution", {"convolution_width": 3}),
    "mamba2": ("mamba2", {"key_width": 6, "value_width": 8}),
    "mamba": ("mamba", {"key_width": 5}),
    "mamba_rank": ("mamba", {"key_width": 5, "time_step_rank": 3}),
    "falcon_mamba": (
        "mamba",
        {"key_width": 5, "time_step_rank": 3, "selection_norm": True, "selection_norm_epsilon": 0.25},
    ),
    "falcon_mamba_epsilon": ("mamba", {"key_width": 5, "selection_norm": True, "norm_epsilon": 0.125}),
    "longhorn": ("longhorn", {"key_width": 5}),
    "longhorn_rank": ("longhorn", {"key_width": 5, "time_step_rank": 3}),
    "delta_net": ("delta_net", {"key_width": 5, "value_width": 9, "recurrent_heads": 3}),
    "delta_net_negative": (
        "delta_net",
        {"key_width": 5, "value_width": 9, "recurrent_heads": 3, "negative_eigenvalues": True},
    ),
    "delta_net_gate": (
        "delta_net",
        {"key_width": 5, "value_width": 9, "recurrent_heads": 3, "output_gate": "silu"},
    ),
    "delta_product": ("delta_net", {"key_width": 5, "value_width": 9, "recurrent_heads": 3, "householders": 3}),
    "gated_delta_net": ("gated_delta_net", {}),
    "gated_delta_net_no_gate": ("gated_delta_net", {"output_gate": "none"}),
    "gated_delta_product": ("gated_delta_net", {"householders": 2, "negative_eigenvalues": True}),
    "kda": ("kda", {"key_width": 6}),
    "kda_product": ("kda", {"key_width": 6, "householders": 3}),
    "kda_bias": ("kda", {"key_width": 6, "gate_bias": True}),
    "gla": ("gla", {"key_width": 9, "value_width": 5, "recurrent_heads": 3}),
    "hgrn": ("hgrn", {}),
    "hgrn2": ("hgrn2", {"key_width": 8}),
    "hgrn2_epsilon": ("hgrn2", {"key_width": 8, "output_norm_epsilon": 0.25}),
    "lightning": ("lightning", {"recurrent_heads": 4}),
    "retention": ("retention", {}),
    "retention_rms": ("retention", {"head_norm": "rms"}),
    "linear_attention": ("linear_attention", {"recurrent_heads": 4}),
    "elu": ("linear_attention", {"feature_map": "elu"}),
    "relu": ("linear_attention", {"feature_map": "relu"}),
    "taylor": ("linear_attention", {"feature_map": "taylor", "key_width": 5}),
    "rebased": ("linear_attention", {"feature_map": "rebased", "key_width": 5}),
    "hedgehog": ("linear_attention", {"feature_map": "hedgehog"}),
    "lru": ("lru", {}),
    "s5": ("s5", {}),
    "s5_bilinear": ("s5", {"discretization": "bilinear", "recurrent_heads": 4}),
    "gateloop": ("gateloop", {"recurrent_heads": 3}),
}
# The laws about tokens hold for these if they hold for the mixer's other cases: the difference is a function of one token
# or of its place. gated_delta_product stands for all with several updates per token.
ONE_TOKEN = (
    "rotary_scaling",
    "relu",
    "taylor",
    "rebased",
    "hedgehog",
    "hgrn2_epsilon",
    "mamba_rank",
    "falcon_mamba_epsilon",
    "longhorn_rank",
    "retention_rms",
    "delta_net_negative",
    "gated_delta_net_no_gate",
    "kda_bias",
    "delta_product",
    "kda_product",
)
LAWS = [name for name in MIXERS if name not in ONE_TOKEN]
IDS = np.array([[1] * LENGTH, [1, 2, 2, 2, 2, 2, 1, 1, 1, 2, 3, 3, 3], [7] * 6 + [8] * 7], np.int32)


@functools.cache
def mixer(name):
    """``run(parameters, x, ids, state) -> (y, state)``, jitted, its parameters, and the empty past of 3 rows."""
    kind, changes = MIXERS[name]
    config = small.config(**changes)
    graph, parameters = small.module(lambda rngs: mixers.find(kind)(config, rngs=rngs))
    parameters = numerics.cast(parameters, "float32")

    @numerics.jit
    def run(x, ids=None, state=None):
        return nnx.merge(graph, parameters)(x, segment_ids=ids, state=state)

    return run, nnx.merge(graph, parameters).init_state


@pytest.mark.parametrize("name", MIXERS)
def test_what_is_no_array_can_be_hashed(name):
    """Generation caches programs by these parts."""
    kind, changes = MIXERS[name]
    config = small.config(**changes)
    graphs = [small.module(lambda rngs: mixers.find(kind)(config, rngs=rngs))[0] for _ in range(2)]
    assert hash(graphs[0]) == hash(graphs[1])


def tokens(seed=0, rows=3, length=LENGTH):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((rows, length, 16)), jnp.float32)


@pytest.mark.slow(but_nth=2)  # each dtype once
@pytest.mark.parametrize("dtype", numerics.TOLERANCES)
@pytest.mark.parametrize("ids", [None, IDS], ids=["whole", "packed"])
@pytest.mark.parametrize("name", [name for name in MIXERS if name not in ("rg_lru_no_convolution", "window_1")])
def test_values_are_those_of_the_oracle(name, ids, dtype):
    """With rotary positions, which are float32 and so are turned off for float64."""
    kind, changes = MIXERS[name]
    fraction = 0.0 if dtype == "float64" else 0.5
    config = small.config(dtype=dtype, rotary_fraction=fraction, **changes)
    graph, parameters = small.module(lambda rngs: mixers.find(kind)(config, rngs=rngs))
    parameters = jax.tree.map(numerics.representable, parameters)  # in bfloat16 they are rounded
    x = numerics.normal(np.random.default_rng(0), 3, LENGTH, 16)
    expected = ORACLES[kind](parameters, x, ids, config)
    run = numerics.jit(lambda parameters, x: nnx.merge(graph, parameters)(x, segment_ids=ids))
    with jax.enable_x64(dtype == "float64"):
        y, _ = run(numerics.cast(parameters, "float64" if dtype == "float64" else "float32"), numerics.cast(x, dtype))
    numerics.assert_close(y, expected, numerics.TOLERANCES[dtype])
    assert y.dtype == dtype


@pytest.mark.parametrize("name", LAWS)
def test_packed_documents_are_documents_alone(name):
    """In their outputs and in the state that they leave: continued with the same tokens, both give the same."""
    run, _ = mixer(name)
    x, more = np.asarray(tokens()), tokens(1, 1, 5)
    whole, state = run(x, jnp.asarray(IDS))
    documents = [(row, start, end) for row in range(3) for start, end in numerics.runs(IDS[row])]
    alone = np.zeros((len(documents), LENGTH, 16), np.float32)
    for i, (row, start, end) in enumerate(documents):
        alone[i, : end - start] = x[row, start:end]
    alone_y, _ = run(alone)
    for i, (row, start, end) in enumerate(documents):
        numerics.assert_close(whole[row, start:end], alone_y[i, : end - start], 1e-5)

    _, alone_state = run(x[1:2, -3:])
    state = jax.tree.map(lambda y: y[1:2], state)
    numerics.assert_close(run(more, None, state)[0], run(more, None, alone_state)[0], 1e-5)


@pytest.mark.slow(but_nth=2)
@pytest.mark.parametrize("name", LAWS)
def test_decoding_token_by_token_is_one_pass(name):
    """From an empty past, and from a prompt."""
    run, init_state = mixer(name)
    x = tokens()
    whole, whole_state = run(x)
    for prompt in (0, 6):
        parts, state = [], init_state(3)
        if prompt:
            y, state = run(x[:, :prompt])
            parts.append(y)
        for t in range(prompt, LENGTH):
            y, state = run(x[:, t : t + 1], None, state)
            parts.append(y)
        numerics.assert_close(jnp.concatenate(parts, axis=1), whole, 1e-5)
        more = tokens(1, 3, 5)
        numerics.assert_close(run(more, None, state)[0], run(more, None, whole_state)[0], 1e-5)


@pytest.mark.slow(but_nth=3)
@pytest.mark.parametrize("cuts", [(1, 2, 7), (6,)], ids=str)
@pytest.mark.parametrize("name", LAWS)
def test_packed_chunks_are_one_pass(name, cuts):
    """The state belongs to the document that continues: rows whose document ends at a cut begin with an empty state."""
    run, init_state = mixer(name)
    x = tokens()
    whole, _ = run(x, jnp.asarray(IDS))
    parts, state = [], init_state(3)
    for start, end in zip((0, *cuts), (*cuts, LENGTH), strict=True):
        if start:
            goes_on = IDS[:, start] == IDS[:, start - 1]
            keep = lambda old, new: jnp.where(goes_on.reshape(-1, *(1,) * (old.ndim - 1)), old, new)  # noqa: E731, B023
            state = jax.tree.map(keep, state, init_state(3))
        y, state = run(x[:, start:end], jnp.asarray(IDS[:, start:end]), state)
        parts.append(y)
    numerics.assert_close(jnp.concatenate(parts, axis=1), whole, 1e-5)


@pytest.mark.parametrize("name", LAWS)
def test_an_empty_past_is_none(name):
    run, init_state = mixer(name)
    numerics.assert_close(run(tokens(), None, init_state(3))[0], run(tokens())[0], 1e-6)


@pytest.mark.slow(but_nth=2)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LAWS)
def test_the_state_does_not_grow(name, dtype):
    """Nor does it change its structure, shapes or dtypes, so that a program that takes it can be reused. What accumulates
    over time is float32 whatever the activations are; stored inputs keep the activations' dtype."""
    kind, changes = MIXERS[name]
    config = small.config(dtype=dtype, **changes)
    graph, parameters = small.module(lambda rngs: mixers.find(kind)(config, rngs=rngs))
    made = nnx.merge(graph, numerics.cast(parameters, "float32"))
    like = lambda state: jax.tree.map(lambda x: (x.shape, x.dtype), state)  # noqa: E731
    empty = like(made.init_state(3))
    for length in (1, 2, LENGTH):
        x, ids = jax.ShapeDtypeStruct((3, length, 16), dtype), IDS[:, :length]
        assert like(jax.eval_shape(made, x)[1]) == empty
        run = lambda x, state, ids=ids: made(x, segment_ids=ids, state=state)  # noqa: E731
        assert like(jax.eval_shape(run, x, made.init_state(3))[1]) == empty
    for key, (_, found) in empty.items():
        counts = {"position": "int32", "seen": "int32", "started": "bool"}
        sums = {"memory": "float32", "h": "complex64" if kind in ("lru", "s5", "gateloop") else "float32"}
        assert found == (counts | sums).get(key, dtype), key


@pytest.mark.parametrize("name", LAWS)
def test_the_future_and_other_rows_are_not_seen(name):
    run, _ = mixer(name)
    x = tokens()
    before, _ = run(x)
    after, _ = run(x.at[1, 7].add(1.0))
    changed = jnp.any(before != after, axis=-1)
    assert changed[1, 7] and not changed[1, :7].any() and not changed[0].any() and not changed[2].any()


@pytest.mark.parametrize(
    "name",
    [
        "mamba",
        "falcon_mamba",
        "longhorn",
        "mamba2",
        "delta_net",
        "delta_net_gate",
        "delta_product",
        "gated_delta_net",
        "gated_delta_product",
        "kda",
        "kda_product",
        "lru",
        "s5",
        "s5_bilinear",
        "gateloop",
        "gla",
        "hgrn",
        "hgrn2",
        "elu",
        "taylor",
        "rebased",
        "hedgehog",
    ],
)
def test_gradients_are_those_of_finite_differences(name):
    """For every parameter and for x, with differences of the oracle."""
    kind, changes = MIXERS[name]
    config = small.config(dtype="float64", **changes)
    graph, parameters = small.module(lambda rngs: mixers.find(kind)(config, rngs=rngs))
    random, ids = np.random.default_rng(3), IDS[:2, :7]
    x, weights = random.standard_normal((2, 2, 7, 16))
    run = numerics.with_gradients(lambda parameters, x: nnx.merge(graph, parameters)(x, segment_ids=ids)[0])
    _, gradients = numerics.run(run, (parameters, x), weights, dtype="float64")
    (paths, structure), found = jax.tree.flatten_with_path((parameters, x)), jax.tree.leaves(gradients)

    def objective(*leaves):
        return np.sum(weights * ORACLES[kind](*jax.tree.unflatten(structure, leaves), ids, config))

    inputs = [leaf for _, leaf in paths]
    for i, (path, _) in enumerate(paths):
        directions = [random.standard_normal(y.shape) * (i == j) for j, y in enumerate(inputs)]
        expected = numerics.directional_derivative(objective, inputs, directions)
        assert np.sum(directions[i] * np.asarray(found[i])) == pytest.approx(expected, rel=1e-5), path


# Which arguments of the recurrence are float32 when activations are bfloat16, and what they are.
WIDE = {
    "rg_lru": {0: "a", 1: "its input"},
    "lru": {0: "a"},
    "s5": {0: "a"},
    "s5_bilinear": {0: "a"},
    "gateloop": {0: "a"},
    "mamba": {1: "dt"},
    "falcon_mamba": {1: "dt", 3: "B", 4: "C"},
    "longhorn": {1: "dt"},
    "mamba2": {3: "log_decay"},
    "gla": {3: "log_decay"},
    "hgrn": {0: "a", 1: "its input"},
    "hgrn2": {3: "log_decay"},
    "lightning": {3: "log_decay"},
    "retention": {3: "log_decay"},
    "delta_net": {3: "beta"},
    "gated_delta_net": {3: "beta", 4: "log_decay"},
    "kda": {3: "beta", 4: "log_decay"},
}


@pytest.mark.parametrize("name", WIDE)
def test_what_decays_is_not_rounded_to_bfloat16(name, monkeypatch):
    """Each token selects one row of each matrix, so that products are exact in every dtype: decays and gates equal those of
    float64 to float32 accuracy, since their rounding would add up over time. And the state is what the recurrence left."""
    kind, changes = MIXERS[name]
    calls, finals = [], []

    def recorded(operation):
        def run(*arguments, **options):
            results = operation(*arguments, **options)
            calls.append(arguments)
            finals.append(results[1])
            return results

        return run

    for operation in ("linear_recurrence", "selective_scan", "linear_attention", "delta_rule"):
        monkeypatch.setattr(operations, operation, recorded(getattr(operations, operation)))
    # The RG-LRU calls its recurrence itself.
    part = lambda spec: recorded(spec.operation) if spec is ops.SPECS["linear_recurrence"] else spec.operation  # noqa: E731
    monkeypatch.setattr(operations, "rg_lru", functools.partial(ops.rg_lru, call=part))

    def run(dtype):
        config = small.config(dtype=dtype, rotary_fraction=0.0, **changes)
        graph, parameters = small.module(lambda rngs: mixers.find(kind)(config, rngs=rngs))
        parameters = jax.tree.map_with_path(_exact, parameters)
        if kind == "rg_lru":
            parameters["input"]["kernel"] = np.eye(*parameters["input"]["kernel"].shape)
            parameters["convolution_bias"] *= 0
        if kind in ("mamba", "longhorn"):  # large, so that SiLU is the identity
            parameters["value"]["kernel"] = 32 * np.eye(*parameters["value"]["kernel"].shape)
            parameters["value_convolution"]["convolution_bias"] *= 0
            parameters["selection"]["kernel"] /= 32
        if kind == "kda":
            parameters["decay"]["down"]["kernel"] = np.eye(*parameters["decay"]["down"]["kernel"].shape)

        @numerics.jit
        def results(parameters, x):
            calls.clear(), finals.clear()
            _, state = nnx.merge(graph, parameters)(x)
            return calls[0], finals[0], state

        with jax.enable_x64(dtype == "float64"):
            x = numerics.cast(np.eye(16)[None, :LENGTH], dtype)
            return results(numerics.cast(parameters, "float64" if dtype == "float64" else "float32"), x)

    (found, final, state), (expected, _, _) = run("bfloat16"), run("float64")
    for place, what in WIDE[name].items():
        assert found[place].dtype in (jnp.float32, jnp.complex64), what
        numerics.assert_close(found[place], expected[place], 3e-6)
    assert np.array_equal(state["h" if "h" in state else "memory"], final)


def _exact(path, x):
    """Parameters for which products and filters pass a single entry through bfloat16 unchanged."""
    name = path[-1].key
    if name == "convolution_kernel":
        return np.eye(len(x))[-1][:, None] * np.ones_like(x)
    if name.endswith("kernel"):
        return numerics.representable(x)
    return 0 * x if name == "bias" else x


@pytest.mark.parametrize("name", ["mamba3", ".", "a.", ".Mixer", "a..Mixer", "a-b.Mixer"])
def test_an_unknown_mixer_is_refused(name):
    with pytest.raises(
        UserError, match=rf"there is no mixer '{re.escape(name)}'; the mixers are .*rg_lru, .*sliding_window"
    ):
        mixers.find(name)
