"""The whole model against the oracle: packing, states that are passed on, the scan over its periods, and its options."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlinear.errors import UserError
from jaxlinear.models import mixers
from jaxlinear.models.language_model import REMAT_POLICIES
from jaxlinear.models.parameters import describe
from jaxlinear.ops import backends
from tests import numerics, oracles, small
from tests.mixer_oracles import ORACLES

LENGTH = 13
IDS = np.array([[1] * LENGTH, [1, 2, 2, 2, 2, 2, 1, 1, 1, 2, 3, 3, 3], [7] * 6 + [8] * 7], np.int32)
TOKENS = np.random.default_rng(0).integers(0, 31, (3, LENGTH)).astype(np.int32)


@functools.cache
def model(**changes):
    """``run(tokens, ids, state) -> (logits, state)``, jitted, and the empty past of 3 rows; float32."""
    bound = small.bound(changes)[-1]
    graph, parameters = nnx.split(bound)

    @numerics.jit
    def run(tokens, ids=None, state=None):
        return nnx.merge(graph, parameters)(tokens, ids, state)

    return run, bound.init_state


@pytest.mark.parametrize("num_layers, ids", [(2, IDS), (6, None), (8, IDS)], ids=["rest", "periods_whole", "both"])
def test_logits_are_those_of_the_oracle(num_layers, ids):
    """A remainder only, periods only, and both, in float64 without rotary positions, whose angles are float32."""
    changes = {"num_layers": num_layers, "rotary_fraction": 0.0, "embedding_scale": num_layers != 6}
    config = small.config(dtype="float64", **changes)
    architecture = describe(config)
    parameters = small.parameters(architecture.shapes)
    run = numerics.jit(lambda parameters, tokens: architecture.bind(parameters)(tokens, ids)[0])
    found = numerics.run(run, parameters, TOKENS, dtype="float64")
    numerics.assert_close(found, oracles.language_model(config, parameters, TOKENS, ids, mixers=ORACLES), 1e-10)


def test_float32_is_close_to_the_oracle():
    config, parameters, _ = small.bound({})
    run, _ = model()
    found, _ = run(TOKENS, IDS)
    numerics.assert_close(found, oracles.language_model(config, parameters, TOKENS, IDS, mixers=ORACLES), 3e-5)
    assert found.dtype == jnp.float32


def test_bfloat16_is_close_to_float32():
    architecture = describe(small.config(dtype="bfloat16"))
    bound = architecture.bind(numerics.cast(small.parameters(architecture.shapes), "float32"))
    logits, state = numerics.jit(lambda tokens: bound(tokens, IDS))(TOKENS)
    assert logits.dtype == jnp.float32
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, bound.init_state(3))
    numerics.assert_close(logits, model()[0](TOKENS, IDS)[0], 0.05)


def test_logits_are_summed_in_float32():
    """In bfloat16 they would have 8 significant bits, and so would the losses of likely tokens."""
    random = np.random.default_rng(4)
    x, embedding = numerics.normal(random, 2, 3, 16), numerics.normal(random, 31, 16)
    architecture = describe(small.config(dtype="bfloat16", num_layers=1, logit_soft_cap=0.0))
    parameters = numerics.cast(small.parameters(architecture.shapes) | {"embedding": embedding}, "float32")
    for bound in (architecture.bind(parameters), architecture.bind(parameters).for_decoding()):
        numerics.assert_close(bound.logits(jnp.asarray(x, jnp.bfloat16)), x @ embedding.T, 1e-6)


def test_the_soft_cap():
    plain, _ = model(logit_soft_cap=0.0, num_layers=1)
    capped, _ = model(logit_soft_cap=5.0, num_layers=1)
    logits = numerics.wide(plain(TOKENS)[0])
    assert np.abs(logits).max() > 4
    numerics.assert_close(capped(TOKENS)[0], 5 * np.tanh(logits / 5), 1e-5)


def test_packed_documents_are_documents_alone():
    run, _ = model()
    whole, _ = run(TOKENS, IDS)
    documents = [(row, start, end) for row in range(3) for start, end in numerics.runs(IDS[row])]
    alone = np.zeros((len(documents), LENGTH), np.int32)
    for i, (row, start, end) in enumerate(documents):
        alone[i, : end - start] = TOKENS[row, start:end]
    logits, _ = run(alone)
    for i, (row, start, end) in enumerate(documents):
        numerics.assert_close(whole[row, start:end], logits[i, : end - start], 2e-5)


def test_decoding_token_by_token_is_one_pass():
    """From an empty past, and from a prompt with an id; tokens without ids continue the state's document."""
    run, init_state = model()
    whole, _ = run(TOKENS)
    for prompt in (0, 6):
        parts, state = [], init_state(3)
        if prompt:
            logits, state = run(TOKENS[:, :prompt], np.full((3, prompt), 4, np.int32), state)
            parts.append(logits)
        for t in range(prompt, LENGTH):
            logits, state = run(TOKENS[:, t : t + 1], None, state)
            parts.append(logits)
        numerics.assert_close(jnp.concatenate(parts, axis=1), whole, 2e-5)
    assert state["segment"].tolist() == [4, 4, 4]


def test_a_state_goes_on_in_its_document_and_is_forgotten_in_another():
    """Cut at 6, row 0 continues its document, and rows 1 and 2 begin another."""
    run, init_state = model()
    whole, _ = run(TOKENS, IDS)
    for cuts in ((6,), (1, 7)):
        parts, state = [], init_state(3)
        for start, end in zip((0, *cuts), (*cuts, LENGTH), strict=True):
            logits, state = run(TOKENS[:, start:end], IDS[:, start:end], state)
            parts.append(logits)
        assert state["segment"].tolist() == IDS[:, -1].tolist()
        numerics.assert_close(jnp.concatenate(parts, axis=1), whole, 2e-5)


def test_a_state_without_ids_is_of_the_document_0():
    """With an empty past as well as with none."""
    run, init_state = model(num_layers=3)
    whole, _ = run(TOKENS)
    for past in (None, init_state(3)):
        _, state = run(TOKENS[:, :6], None, past)
        assert state["segment"].tolist() == [0, 0, 0]
        goes_on, _ = run(TOKENS[:, 6:], np.zeros((3, LENGTH - 6), np.int32), state)
        numerics.assert_close(goes_on, whole[:, 6:], 2e-5)


def test_each_block_of_a_long_pattern_has_its_own_state():
    """There are more blocks than are recomputed at once."""
    run, init_state = model(pattern=("rg_lru", "sliding_window", "gla", "convolution", "rg_lru", "gla"), num_layers=6)
    whole, _ = run(TOKENS, IDS)
    _, state = run(TOKENS[:, :3], IDS[:, :3], init_state(3))
    numerics.assert_close(run(TOKENS[:, 3:], IDS[:, 3:], state)[0], whole[:, 3:], 2e-5)


# A whole pattern that is not repeated, but has repeating layers; and one that is, with more left than a remainder has.
LONG = ("gla", "rg_lru", "sliding_window", "rg_lru", "sliding_window", "rg_lru", "gla")


@pytest.mark.slow(but=["part", "repeated", "long"])
@pytest.mark.parametrize(
    "num_layers, pattern, stacks",
    [(2, small.PATTERN, 1), (8, small.PATTERN, 2), (7, LONG, 3), (19, LONG, 3)],
    ids=["part", "repeated", "long", "long_and_a_rest"],
)
def test_the_scans_are_the_blocks_one_by_one(num_layers, pattern, stacks):
    """In float64: over nineteen layers, float32 rounding errors grow past 1e-5."""
    config = small.config(num_layers=num_layers, pattern=pattern, dtype="float64")
    architecture = describe(config)

    def one_by_one(bound):
        x = bound.embedding[...][TOKENS] * config.width**0.5
        blocks = []
        for module, stack in zip(bound.stacks, config.stacks, strict=True):
            graph, stacked = nnx.split(module)
            for i in range(stack.repeats):
                blocks += nnx.merge(graph, jax.tree.map(lambda y, i=i: y[i], stacked)).blocks
        assert [type(block.mixer) for block in blocks] == [mixers.find(mixer) for mixer in config.layers]
        for block in blocks:
            x, _, _ = block(x, segment_ids=jnp.asarray(IDS))
        return bound.norm(x)

    with jax.enable_x64(True):
        bound = architecture.bind(numerics.cast(small.parameters(architecture.shapes), "float64"))
        found, state, _ = numerics.jit(bound.hidden)(jnp.asarray(TOKENS), jnp.asarray(IDS))
        expected = numerics.jit(lambda: one_by_one(bound))()
        unstacked, apart, _ = numerics.jit(bound.unstacked().hidden)(jnp.asarray(TOKENS), jnp.asarray(IDS))
    numerics.assert_close(found, expected, 1e-10)
    numerics.assert_close(unstacked, expected, 1e-10)
    assert len(state["stacks"]) == len(config.stacks) == stacks
    assert [len(states) for states in apart["stacks"]] == [stack.repeats for stack in config.stacks]


def test_no_tokens_are_refused():
    bound = small.bound({"num_layers": 3})[-1]
    tokens = jnp.asarray(TOKENS)[:, :0]
    for state in (None, bound.init_state(3)):
        with pytest.raises(UserError, match=r"^tokens \(3, 0\) have no time step; the model needs at least 1$"):
            bound(tokens, state=state)
    with pytest.raises(UserError, match=r"^tokens \(0, 8\) have no row; the model needs at least 1$"):
        bound(jnp.zeros((0, 8), jnp.int32))


def loss(architecture, parameters):
    logits, _ = architecture.bind(parameters)(jnp.asarray(TOKENS), jnp.asarray(IDS))
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(TOKENS)[..., None], axis=-1))


def test_remat_changes_no_number():
    sizes = {"pattern": ("rg_lru", "sliding_window"), "num_layers": 5}  # two periods, scanned, and one more layer
    parameters = numerics.cast(small.parameters(describe(small.config(**sizes)).shapes), "float32")
    results, activations = {}, {}
    for remat in REMAT_POLICIES:
        run = jax.value_and_grad(functools.partial(loss, describe(small.config(remat=remat, **sizes))))
        results[remat] = numerics.jit(run)(parameters)
        activations[remat] = str(jax.make_jaxpr(run)(parameters)).count("= tanh")
    for remat in set(REMAT_POLICIES) - {"none"}:
        numerics.assert_close(results[remat], results["none"], 1e-5)
        # All are recomputed, those of the last layer too, except for the soft cap of the logits.
        assert activations[remat] == 2 * activations["none"] - 1


def kept(pattern, remat):
    """Bytes besides parameters and gradients in a pass forward and back through one repetition of ``pattern``."""
    sizes = {"pattern": pattern, "num_layers": len(pattern), "width": 64, "recurrent_width": 64, "remat": remat}
    architecture = describe(small.config(**sizes))
    tokens = jnp.zeros((2, 256), jnp.int32)
    objective = lambda parameters: architecture.bind(parameters)(tokens)[0].sum()  # noqa: E731
    compiled = jax.jit(jax.grad(objective)).lower(architecture.shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_what_is_computed_again_is_not_kept_in_a_model_of_one_period():
    """XLA unrolls a scan of one period, and may then merge equal work."""
    pattern = ("rg_lru",) * 4
    assert kept(pattern, "elementwise") < 0.95 * kept(pattern, "none")


def test_what_repeats_in_a_long_pattern_is_computed_again_by_itself():
    """As in presets whose pattern is as long as the model: if recomputed at once, all of it would be in memory again."""
    pattern = ("gla", *("rg_lru",) * 11)
    assert kept(pattern, "full") < 0.5 * kept(pattern, "none")


def test_a_long_pattern_in_which_nothing_repeats_is_computed_again_four_blocks_at_a_time():
    pattern = ("gla", "rg_lru", "sliding_window", "retention", "delta_net", "attention", "hgrn2", "lru", "gateloop")
    config = small.config(pattern=pattern, num_layers=9, key_width=4, value_width=4, remat="full")
    assert len(config.stacks) == 1
    architecture = describe(config)
    passed = jax.make_jaxpr(lambda parameters: architecture.bind(parameters)(TOKENS)[0])(architecture.shapes)
    assert str(passed).count("prevent_cse=True") == 3


def test_gradients_are_those_of_finite_differences():
    """For all parameters together, in float64, with differences of the oracle."""
    config = small.config(dtype="float64", rotary_fraction=0.0)
    architecture = describe(config)
    parameters = small.parameters(architecture.shapes)
    leaves, structure = jax.tree.flatten(parameters)
    random = np.random.default_rng(1)
    weights = random.standard_normal((3, LENGTH, 31))

    def objective(*leaves):
        logits = oracles.language_model(config, structure.unflatten(leaves), TOKENS, IDS, mixers=ORACLES)
        return np.sum(weights * logits)

    def value(parameters, weights):
        return jnp.sum(weights * architecture.bind(parameters)(jnp.asarray(TOKENS), jnp.asarray(IDS))[0])

    gradients = numerics.run(numerics.jit(jax.grad(value)), parameters, weights, dtype="float64")
    directions = [random.standard_normal(y.shape) for y in leaves]
    found = sum(np.sum(d * np.asarray(g)) for d, g in zip(directions, jax.tree.leaves(gradients), strict=True))
    assert found == pytest.approx(numerics.directional_derivative(objective, leaves, directions), rel=1e-6)


def test_the_gradient_of_a_frequent_token_is_summed_in_float32():
    """10,000 equal terms: a bfloat16 sum stops growing at 256. Layers are zero: only the norm has a slope."""
    architecture = describe(small.config(num_layers=1, pattern=("rg_lru",), dtype="bfloat16", embedding_scale=False))
    parameters = numerics.cast(small.parameters(architecture.shapes), "float32")
    parameters["stacks"] = jax.tree.map(jnp.zeros_like, parameters["stacks"])  # each block returns 0

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(embedding, length):
        def total(embedding):
            model = architecture.bind(parameters | {"embedding": embedding})
            return jnp.sum(model.hidden(jnp.zeros((1, length), jnp.int32))[0][..., 0].astype(jnp.float32))

        return jax.grad(total)(embedding)[0]

    one, many = gradient(parameters["embedding"], 1), gradient(parameters["embedding"], 10_000)
    numerics.assert_close(many, 10_000 * numerics.wide(one), 2e-2)


@pytest.mark.parametrize("kind", ["forward", "gradient"])
def test_the_program_does_not_grow_with_depth(kind):
    def size(num_layers):
        architecture = describe(small.config(num_layers=num_layers))
        run = functools.partial(loss, architecture)
        return len(jax.jit(jax.grad(run) if kind == "gradient" else run).lower(architecture.shapes).as_text())

    assert size(48) == pytest.approx(size(6), rel=0.05)
    assert size(5) > 1.1 * size(3)  # the measure does see a block


def test_no_two_layers_begin_alike():
    """Neither stacked layers, nor those of one pattern or of different stacks; and each seed gives others."""
    architecture = describe(small.config(tied_embeddings=False, width=64))
    initialise = numerics.jit(architecture.initialise)
    first, second = (numerics.wide(initialise(jax.random.key(seed))) for seed in (0, 1))
    matrices = [
        row
        for parameters in (first, second)
        for path, x in jax.tree_util.tree_leaves_with_path(parameters)
        if path[-1].key.endswith(("kernel", "embedding", "head", "decay"))
        for row in (x if path[0].key == "stacks" else [x])
    ]
    assert len(matrices) == 2 * (2 + 6 * 10 + 2 * 7)
    assert len({row.tobytes() for row in matrices}) == len(matrices)
    for name in ("embedding", "head"):
        assert np.std(first[name]) == pytest.approx(64**-0.5, rel=0.05), name


def test_the_loss_at_the_start_is_that_of_a_guess():
    config = small.config(vocab_size=512, width=64, recurrent_width=64, logit_soft_cap=0.0, num_layers=3)
    architecture = describe(config)
    parameters = numerics.jit(architecture.initialise)(jax.random.key(0))
    tokens = np.random.default_rng(2).integers(0, 512, (4, 65)).astype(np.int32)
    logits, _ = numerics.jit(lambda parameters: architecture.bind(parameters)(tokens[:, :-1]))(parameters)
    losses = -np.take_along_axis(oracles.log_softmax(numerics.wide(logits)), tokens[:, 1:, None], axis=-1)
    assert math.log(512) - 0.2 < losses.mean() < math.log(512) + 1.0


def test_arrays_that_do_not_belong_to_the_tokens_are_refused():
    """Ids for one row or one token fewer would otherwise be silently broadcast or cut."""
    whole = small.bound({})[-1]
    for ids in (IDS[:, :-1], IDS[:1], IDS[0]):
        with pytest.raises(UserError, match=r"segment_ids .* must be one per token, \[B, T\] = \(3, 13\)"):
            whole(TOKENS, ids)
    with pytest.raises(UserError, match=r"tokens are \(13,\); they must be \[B, T\]"):
        whole(TOKENS[0])
    with pytest.raises(UserError, match=r"a state of 2 rows does not fit tokens \(3, 13\)"):
        whole(TOKENS, None, whole.init_state(2))


@pytest.mark.parametrize("pattern", [("rg_lru", "sliding_window"), ("gla",), ("gated_delta_net",), ("mamba",)])
def test_without_kernels(pattern):
    """``kernels=False`` removes all kernels that a TPU would get, forward and backward."""

    def kernels(allowed):
        sizes = {"width": 64, "recurrent_width": 64, "key_width": 32, "value_width": 32, "time_step_rank": 4}
        architecture = describe(small.config(pattern=pattern, num_layers=2, kernels=allowed, **sizes))
        tokens = jax.ShapeDtypeStruct((1, 256), jnp.int32)

        def loss(parameters, tokens):
            return jnp.sum(architecture.bind(parameters).hidden(tokens)[0])

        with backends.use_platform("tpu", "TPU v5 lite"):
            return str(jax.make_jaxpr(jax.grad(loss))(architecture.shapes, tokens)).count("pallas_call[")

    assert kernels(True) >= 2
    assert kernels(False) == 0
