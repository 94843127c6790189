"""generation.py: decoding matches the parallel pass, and rows are independent. How a token is drawn: test_sampling.py."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlinear import generation
from jaxlinear.data import load_tokenizer
from jaxlinear.errors import UserError
from jaxlinear.generation import Sampling, generate, stream
from jaxlinear.models import ModelConfig, mixers
from jaxlinear.models.layers import by_outputs, round_for_decoding
from jaxlinear.models.parameters import describe
from jaxlinear.parallel import mesh as meshes
from tests import numerics, small
from tests.training import tiny

VOCAB, WINDOW = 61, 8


@pytest.fixture(autouse=True, scope="module")
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


SIZES = {"num_layers": 2, "vocab_size": VOCAB, "width": 32, "recurrent_width": 32, "num_heads": 4, "dtype": "float32"}


def bound(moved=0.0, **changes):
    """A model of these sizes. If it is ``moved``, its biases and decays are perturbed, so that every parameter matters."""
    architecture, random = describe(ModelConfig(**(SIZES | changes))), np.random.default_rng(0)
    initial = numerics.jit(architecture.initialise)(jax.random.key(0))
    move = lambda x: x + moved * random.standard_normal(x.shape).astype(np.float32)  # noqa: E731
    return architecture.bind(jax.tree.map(move, initial) if moved else initial)


def _model(num_layers):
    return bound(0.2, pattern=("rg_lru", "sliding_window"), num_layers=num_layers, window=WINDOW)


@pytest.fixture(scope="module")
def deep():
    """Two periods and a remainder."""
    return _model(5)


@pytest.fixture(scope="module")
def model():
    """A period and a remainder."""
    return _model(3)


@functools.cache
def _forward(model):
    return numerics.jit(lambda *arguments: model(*arguments))


@functools.cache
def _laid_out(model, layout):
    return model if layout == "stacked" else getattr(model, layout)()


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, shape).astype(np.int32)


@pytest.mark.parametrize("layout", ["stacked", "unstacked", "for_decoding"])
@pytest.mark.parametrize("prompt", [3, 3 * WINDOW - 1])
def test_decoding_is_one_pass(deep, layout, prompt):
    """A prompt after padding, then one token, then five at once, then one at a time past the window."""
    text, pad = tokens(2, 40), 5
    forward = _forward(_laid_out(deep, layout))
    expected, _ = forward(text)
    padded = np.concatenate([tokens(2, pad, seed=1), text[:, :prompt]], axis=1)
    segment_ids = np.repeat([[0, 1]], [pad, prompt], axis=1).astype(np.int32)
    logits, state = forward(padded, np.repeat(segment_ids, 2, axis=0))
    parts, size = [logits[:, pad:]], jax.tree.map(jnp.shape, state)
    for start, stop in itertools.pairwise([prompt, prompt + 1, *range(prompt + 6, 41)]):
        logits, state = forward(text[:, start:stop], None, state)
        parts.append(logits)
        assert jax.tree.map(jnp.shape, state) == size
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("length", [2, WINDOW - 1, WINDOW, 2 * WINDOW + 3])
def test_state_after_packed_documents(model, length):
    """The state belongs to the row's last document, wherever that began; another id begins with an empty state."""
    forward, text = _forward(model), tokens(1, length + 6, seed=2)
    before = tokens(1, 2 * WINDOW + 8 - length % 8, seed=3)
    segment_ids = np.repeat([[1, 2]], [before.size, length], axis=1).astype(np.int32)
    _, state = forward(np.concatenate([before, text[:, :length]], axis=1), segment_ids)
    expected, _ = forward(text)
    another = np.full((1, 1), 7, np.int32)
    for i, ids in [*((i, None) for i in range(length, length + 6)), (0, another), (1, another)]:
        logits, state = forward(text[:, i : i + 1], ids, state)
        np.testing.assert_allclose(logits[:, 0], expected[:, i], rtol=0, atol=2e-5)


def test_kernels_by_output_are_those_of_the_model(deep):
    """Laid out once: a second ``for_decoding`` returns the same model, and the original is unchanged."""
    turned = deep.for_decoding()
    assert turned.by_output and not deep.by_output and turned.for_decoding() is turned
    before, after = (model.unstacked().stacks[0][1].blocks[0].mlp.gate.kernel for model in (deep, turned))
    np.testing.assert_array_equal(after[...], before[...].T)
    assert before.get_metadata("axes") == ("embed", "mlp") and after.get_metadata("axes") == ("mlp", "embed")


@pytest.mark.slow(but=[*small.SOME_MIXERS])
@pytest.mark.parametrize("mixer", mixers.names())
def test_a_model_for_decoding_is_the_same_model(mixer):
    """Including square kernels, whose shape does not show which way they are laid out."""
    model = bound(pattern=(mixer,), num_layers=1, key_width=8, value_width=8)
    (expected, state), (logits, turned) = (_forward(x)(tokens(2, 5)) for x in (model, model.for_decoding()))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)
    for ours, theirs in zip(jax.tree.leaves(turned), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(ours, np.reshape(theirs, ours.shape), rtol=1e-5, atol=2e-5)


@pytest.mark.slow(but=["attention", "kda", "mamba", "rg_lru", "experts"])
@pytest.mark.parametrize("mixer", [*mixers.names(), "experts"])
def test_parameters_that_are_rounded_for_decoding_are_only_read_so(mixer):
    """They are rounded to bfloat16, in which they are used: outputs are equal to the last bit. They are most of the
    parameters."""
    experts = {"channel_mixer": "mixture_of_experts", "experts": 4, "experts_per_token": 2, "expert_width": 16}
    layers = {"pattern": ("gla",), **experts} if mixer == "experts" else {"pattern": (mixer,)}
    model = bound(0.1, num_layers=1, key_width=8, value_width=8, **(layers | {"dtype": "bfloat16"}))
    rounded = nnx.clone(model)
    round_for_decoding(rounded, jnp.bfloat16)
    as_written = {"xla_allow_excess_precision": False}  # else XLA drops a rounding that float32 follows
    expected, found = (
        jax.jit(lambda x, made=made: made(x), compiler_options=as_written)(tokens(2, 5)) for made in (model, rounded)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    sizes = [(x.size, x.dtype) for x in jax.tree.leaves(nnx.to_pure_dict(nnx.split(rounded)[1]))]
    kept = sum(size for size, dtype in sizes if dtype == jnp.float32)
    assert kept < 0.15 * sum(size for size, _ in sizes)


def test_a_model_for_decoding_is_rounded_but_not_what_it_was_made_of(deep):
    model = describe(dataclasses.replace(deep.config, dtype="bfloat16")).bind(nnx.to_pure_dict(nnx.split(deep)[1]))
    made = model.for_decoding()
    assert made.for_decoding() is made and not model.is_for_decoding
    assert made.embedding[...].dtype == made.stacks[0][1].blocks[0].mlp.gate.kernel[...].dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(nnx.split(model)[1])} == {jnp.dtype("float32")}
    rows = generate(made, [tokens(5), tokens(9)], max_tokens=8, temperature=0.0)
    assert rows == generate(model, [tokens(5), tokens(9)], max_tokens=8, temperature=0.0)


def test_an_empty_past_goes_on_as_none_does(model):
    """With ids of 0, as a sequence has by default."""
    text, ids = tokens(2, 6), np.zeros((2, 3), np.int32)
    forward = _forward(model)
    _, state = forward(text[:, :3], None, model.init_state(2))
    np.testing.assert_array_equal(state["segment"], [0, 0])
    logits, _ = forward(text[:, 3:], ids, state)
    np.testing.assert_allclose(logits, forward(text)[0][:, 3:], rtol=0, atol=2e-5)


@pytest.mark.parametrize("rows", [1, 8, 33])
def test_products_by_output(rows):
    random = np.random.default_rng(rows)
    x, kernel = random.standard_normal((rows, 1, 24)), random.standard_normal((40, 24))
    y = by_outputs(jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32))
    np.testing.assert_allclose(y, x @ kernel.T, rtol=0, atol=2e-5)
    narrow = by_outputs(jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel, jnp.bfloat16), jnp.float32)
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, x @ kernel.T, rtol=0, atol=0.2)


@pytest.mark.parametrize("pattern", [("attention",), ("sliding_window", "rg_lru")])
def test_attention_has_room_for_the_text_alone(pattern, monkeypatch):
    """There is no room for its whole context or window; the text is the same."""
    model = bound(pattern=pattern, window=64, context=64)
    prompts, rooms, prefill = [tokens(5), tokens(9)], [], generation._prefill

    def seen(*arguments):
        carry, first = prefill(*arguments)
        rooms.append({tuple(x.shape) for x in jax.tree.leaves(carry["state"]) if x.ndim == 4})
        return carry, first

    monkeypatch.setattr(generation, "_prefill", seen)
    whole = generate(model, prompts, max_tokens=24, seed=3)  # 128 tokens at least, so all 64
    monkeypatch.setattr(generation, "_FEWEST_REMEMBERED", 8)
    for most in (24, 8, 9):  # the last makes 17 tokens, one too many
        assert generate(model, prompts, max_tokens=most, seed=3) == [row[:most] for row in whole]
    assert rooms == [{(2, 1, 64, 8)}, {(2, 1, 32, 8)}, {(2, 1, 16, 8)}, {(2, 1, 32, 8)}]


def test_greedy_is_the_argmax_of_full_passes(model):
    prompt, made = tokens(5).tolist(), 2 * WINDOW + 2
    expected = list(prompt)
    for _ in range(made):
        text = np.zeros((1, 32), np.int32)
        text[0, : len(expected)] = expected
        expected.append(int(np.argmax(_forward(model)(text)[0][0, len(expected) - 1])))
    assert len(set(expected[5:])) > 2
    assert generate(model, [prompt], max_tokens=made, temperature=0.0) == [expected[5:]]
    assert generate(model, [prompt], max_tokens=made, top_k=1) == [expected[5:]]


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}])
def test_rows_do_not_depend_on_each_other(model, options):
    """Nor on the padding, whose length depends on the longest prompt."""
    first, second = tokens(5, seed=4), tokens(40, seed=5)
    alone = generate(model, [first], max_tokens=12, **options)[0]
    assert generate(model, [first, second], max_tokens=12, **options)[0] == alone
    assert generate(model, [first, first], max_tokens=12, **options)[0] == alone


def test_chunks_do_not_change_the_text(model):
    prompt = tokens(6, seed=6)
    whole = generate(model, [prompt], max_tokens=20, seed=1)[0]
    assert len(whole) == 20
    pieces = list(stream(model, prompt, max_tokens=20, seed=1, chunk=8))
    assert [len(piece) for piece in pieces] == [1, 8, 8, 3]
    assert list(itertools.chain(*pieces)) == whole
    assert generate(model, [prompt], max_tokens=7, seed=1)[0] == whole[:7]


def test_seeds_and_rows_draw_differently(model):
    prompt = tokens(6, seed=6)
    again, other = (generate(model, [prompt, prompt], max_tokens=20, seed=seed) for seed in (1, 2))
    assert again == generate(model, [prompt, prompt], max_tokens=20, seed=1)
    assert len({tuple(row) for row in again + other}) == 4


def test_draws_are_independent_of_each_other(model):
    """If all 61 tokens are equally likely, one draw in 61 equals another: that of the next token, row or seed, also if they
    are shifted against each other."""
    options = {"max_tokens": 24, "temperature": 1e6}
    found = np.concatenate([generate(model, [tokens(6)] * 8, seed=seed, **options) for seed in (1, 2, 3)])
    assert found.shape == (24, 24) and len(np.unique(found)) == VOCAB
    for i, j in itertools.combinations(range(24), 2):
        assert np.mean(found[:, i] == found[:, j]) < 0.3, (i, j)
    for one, other in itertools.permutations(found, 2):
        assert np.mean(one == other) < 0.25 and np.mean(one[1:] == other[:-1]) < 0.25


def test_a_single_row_is_decoded_beside_a_copy_of_it(model, monkeypatch):
    """All devices but CPUs do this; the output is the same."""
    prompt, prefill, rows = tokens(6, seed=6), generation._prefill, []
    expected = generate(model, [prompt], max_tokens=7, seed=1)
    monkeypatch.setitem(generation._FEWEST_ROWS, "cpu", 2)
    monkeypatch.setattr(generation, "_prefill", lambda *given: (rows.append(len(given[5])), prefill(*given))[1])
    assert generate(model, [prompt], max_tokens=7, seed=1) == expected
    assert list(itertools.chain(*stream(model, prompt, max_tokens=7, seed=1))) == expected[0]
    assert rows == [2, 2]


def test_how_many_rows_are_added():
    mesh = meshes.make_mesh(tiny.ONES | {"data": 4}, jax.devices()[:4])
    assert [generation._more_rows(n, "cpu", None) for n in (1, 2)] == [0, 0]
    assert [generation._more_rows(n, "tpu", None) for n in (0, 1, 2, 3)] == [0, 1, 0, 0]
    # Four rows are one per device; three rows, or one, do not divide among four devices: each has all.
    assert [generation._more_rows(n, "gpu", mesh) for n in (1, 3, 4, 8)] == [1, 0, 4, 0]


def test_rows_are_drawn_by_their_numbers(model):
    """Thus a subset of the prompts continues as it does among all of them."""
    prompts = [tokens(6, seed=6), tokens(9, seed=7), tokens(6, seed=6)]
    whole = generate(model, prompts, max_tokens=20, seed=1)
    pieces = generation.chunks(model, prompts[1:], Sampling(seed=1), 20, numbers=[1, 2])
    assert np.concatenate(list(pieces)).T.tolist() == whole[1:]


def test_stop_token(model):
    prompt, options = tokens(6, seed=6), {"max_tokens": 20, "seed": 1}
    whole = generate(model, [prompt, prompt], **options)
    first, stop, both = whole[0][0], whole[0][9], [whole[0][9], whole[0][4]]
    until = lambda row, *stops: row[: min([row.index(x) for x in stops if x in row], default=20)]  # noqa: E731
    assert len(until(whole[0], stop)) <= 9
    assert generate(model, [prompt, prompt], **options, stop_token=stop) == [until(row, stop) for row in whole]
    for given, stops in ((both, both), (np.array(stop), [stop]), ((), []), (first, [first])):
        assert generate(model, [prompt], **options, stop_token=given) == [until(whole[0], *stops)]
    for given, stops in ((stop, [stop]), (both, both)):
        pieces = stream(model, prompt, **options, stop_token=given, chunk=8)
        assert list(itertools.chain(*pieces)) == until(whole[0], *stops)
        # An empty prompt begins with the first of them.
        empty, begun = (generate(model, [prompt], max_tokens=9, stop_token=given) for prompt in ([], [stop]))
        assert empty == begun


def test_tokens_beyond_the_vocabulary_are_never_drawn(model):
    rows = generate(model, [tokens(4) % 7] * 4, max_tokens=20, temperature=5.0, vocab_size=7)
    assert {token for row in rows for token in row} == set(range(7))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5"),
        *(({"top_k": value}, f"top_k is {value}") for value in (1.5, float("inf"), -1)),
        *(({"vocab_size": value}, f"vocab_size is {value}; .* at least 1") for value in (0, 2.5)),
        ({"stop_token": 2.5}, "stop_token is 2.5"),
        *(({"seed": value}, f"seed is {value}") for value in (0.5, -1)),
        *(({"temperature": value}, f"temperature is {value}") for value in (-0.1, float("nan"))),
        ({"temperature": 1e-40}, "temperature is 1e-40; .* at least 1e-30"),
        *(({"top_p": value}, f"top_p is {value}") for value in (0.0, 1.1)),
        ({"prompts": [[1.7, 2.2]]}, r"a prompt is \[1.7, 2.2\]"),
        ({"prompts": [1, 2]}, "a prompt is 1; .* several prompts"),
        ({"prompts": [[[1, 2], [3, 4]]]}, r"a prompt is \[\[1, 2\], \[3, 4\]\]"),
        ({"prompts": ["text"]}, "a prompt is 'text'"),
        ({"prompts": []}, "no prompt"),
        ({"prompts": [[1], []]}, "a prompt is empty"),
        ({"prompts": [[1, VOCAB]]}, "tokens from 1 to 61; the model's tokens are 0 to 60"),
        ({"prompts": [[1, VOCAB]], "vocab_size": VOCAB + 9}, "tokens from 1 to 61; the model's .* 0"),
        ({"prompts": [[-1]]}, "tokens from -1"),
    ],
)
def test_refusals(model, options, message):
    with pytest.raises(UserError, match=message):
        generate(model, **({"prompts": [[1]], "max_tokens": 3} | options))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("row", [5, 7])
def test_logits_that_are_not_finite_name_no_token(model, temperature, row):
    """With the prompt or with a token that is generated."""
    broken = nnx.clone(model)
    broken.embedding[...] = broken.embedding[...].at[row].set(jnp.nan)
    with pytest.raises(UserError, match="the model's logits are not finite"):
        generate(broken, [[5, 1], [1, 2]], max_tokens=3, temperature=temperature)


def test_full_attention_generates_within_its_context():
    """It is refused beyond that, whatever the prompts' padding; a window of the same size continues."""
    make = functools.partial(bound, context=20, window=20)
    model, prompts = make(pattern=("sliding_window", "attention")), [tokens(5), tokens(9)]
    rows = generate(model, prompts, max_tokens=11, temperature=0.0)
    text = np.concatenate([prompts[1], rows[1]])[None].astype(np.int32)
    assert np.asarray(_forward(model)(text)[0][0, 8:-1]).argmax(axis=-1).tolist() == rows[1]
    with pytest.raises(UserError, match=r"9 tokens and max_tokens=12 exceed model.context=20, .*; max_tokens=11 fits"):
        generate(model, prompts, max_tokens=12)
    with pytest.raises(UserError, match="the prompt alone is too long"):
        list(stream(model, tokens(20), max_tokens=1))
    assert len(generate(make(pattern=("sliding_window", "rg_lru")), prompts, max_tokens=12)[0]) == 12


def test_writer(tiny_run):
    writer = generation.Writer.open(tiny_run)
    options = {"max_tokens": 40, "seed": 5}
    texts = writer.write(["for é", ""], **options)
    assert texts[0].startswith("for é") and len(texts[0]) > 5
    pieces = list(writer.stream("for é", **options))
    assert pieces[0] == "for é" and len(pieces) > 3 and "".join(pieces) == texts[0]
    assert load_tokenizer(tiny_run).vocab_size == 257 < writer.model.config.vocab_size


def test_a_writer_stops_and_draws_as_its_tokenizer_says(tiny_run):
    """At a temperature that makes all tokens equally likely, it gives only tokens of the vocabulary, up to the document
    token."""
    writer, tokenizer = generation.Writer.open(tiny_run), load_tokenizer(tiny_run)
    prompts, options = [chr(97 + i) for i in range(8)], {"max_tokens": 96, "temperature": 1e6, "seed": 0}
    encoded = [[256, *tokenizer.encode(prompt).tolist()] for prompt in prompts]
    rows = generate(writer.model, encoded, stop_token=256, vocab_size=257, **options)
    assert min(map(len, rows)) < 96 == max(map(len, rows))
    decoded = [tokenizer.decode(np.array([*ids, *row])) for ids, row in zip(encoded, rows, strict=True)]
    assert writer.write(prompts, **options) == decoded


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir={run}", "--prompt=a", "--step=7"], "has no checkpoint of step 7; it has 1, 2"),
        (["--workdir={run}/none", "--prompt=a"], "is not the work directory of a run"),
        (["--workdir={run}", "--prompt=a", "--top_p=0"], "top_p is 0.0; it must be in (0, 1]"),
        (["--workdir={run}", "--prompt=a\udcff"], "a prompt is not UTF-8 text: surrogates not allowed at character 1"),
    ],
)
def test_program_refuses(start, tiny_run, arguments, message):
    done = start("generate", *[argument.format(run=tiny_run) for argument in arguments])
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and message in done.stderr, done.stderr


def test_program(tiny_run):
    done = tiny.run("launch/generate.py", f"--workdir={tiny_run}", "--prompt=for x", "--max_tokens=10", "--seed=5")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == generation.Writer.open(tiny_run).write(["for x"], max_tokens=10, seed=5)[0] + "\n"


def test_a_prompt_spread_over_devices_goes_on_the_same(tiny_run):
    """300 tokens over 8 devices: greedy and sampled."""
    prompts = ["for x in range ( ) : print " * 12, "def "]
    one, eight = generation.Writer.open(tiny_run), generation.Writer.open(tiny_run, mesh=["sequence=8"])
    for temperature in (0.0, 1.0):
        options = {"max_tokens": 12, "temperature": temperature}
        assert eight.write(prompts, **options) == one.write(prompts, **options)
