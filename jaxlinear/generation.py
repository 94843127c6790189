"""Text generation: the prompts in parallel, then one token at a time from a state of constant size."""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax, stages
from jax.sharding import Mesh

from jaxlinear.data import Tokenizer, load_tokenizer
from jaxlinear.errors import UserError
from jaxlinear.models import LanguageModel, ModelConfig, load
from jaxlinear.ops import backends
from jaxlinear.parallel import compiler, sharding
from jaxlinear.parallel import mesh as meshes

CHUNK = 64  # tokens that the device generates before the host looks at them
_SHORTEST_PROMPT = 16  # prompts are padded to at least this length
_FEWEST_REMEMBERED = 128  # least number of tokens that attention's state has room for, unless its window is smaller
# Fewest rows that a device decodes, by platform. On others XLA computes products with one row element by element, in
# several times the cycles of two rows (benchmarks/decode_compiled.py --streams=1).
_FEWEST_ROWS = {"cpu": 1}
_FEWEST_ELSEWHERE = 2
_LEAST_PART = 1e-30  # of the probability; the likeliest token has that much, and less may round to 0 and keep no token
_NO_TOKEN = -1
_BITS = 30  # bits of a float32 in [0, 1] that can be set


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits. The draws for row r are a function of (seed, r, index of the token) alone.

    ``temperature`` 0 takes the likeliest token. Otherwise the logits are divided by it, only the ``top_k`` likeliest are
    kept (0 keeps all), and of those the fewest that hold at least ``top_p`` of their probability. Tokens as likely as the
    last one kept are kept too.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 1e-30 <= self.temperature < float("inf"):  # logits are divided by it
            raise UserError(
                f"the temperature is {self.temperature}; it must be 0 (the likeliest token) or at least 1e-30"
            )
        if self.top_k < 0 or self.top_k % 1 != 0:  # for infinity the remainder is NaN
            raise UserError(f"top_k is {self.top_k}; it must be a number of tokens, or 0 for all")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be in (0, 1]")
        if not 0 <= self.seed < 2**32 or self.seed % 1 != 0:
            raise UserError(f"the seed is {self.seed}; it must be a whole number in [0, 2**32)")

    @property
    def filters(self) -> tuple[bool, bool, bool]:
        """The static part, which is compiled in: (sample rather than take the likeliest, by top_k, by top_p)."""
        return self.temperature > 0, self.top_k > 0, self.top_p < 1

    @property
    def values(self) -> dict[str, Any]:
        """The values that may change without recompiling."""
        return {
            "temperature": np.float32(self.temperature),
            "top_k": np.float32(self.top_k),
            "top_p": np.float32(max(self.top_p, _LEAST_PART)),
            "seed": np.uint32(self.seed),
        }


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_token: int | Sequence[int] | None = None,
    vocab_size: int | None = None,
    mesh: Mesh | None = None,
) -> list[list[int]]:
    """Continues every prompt by at most ``max_tokens`` tokens. A row ends before its first ``stop_token`` (or the first
    of several).

    An empty prompt begins with the (first) stop token, which is the one between documents. Tokens from ``vocab_size`` on,
    which mean nothing when the embedding has more rows than the tokenizer has tokens, are never drawn. A row's tokens
    depend not on the other rows but on its position among them (see ``Sampling``). If ``mesh`` is given, the model's
    parameters must be on it, and the time axis of the prompts is sharded over its axis ``sequence``.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    rows: list[list[int]] = [[] for _ in prompts]
    for tokens in chunks(model, prompts, sampling, max_tokens, stop_token, vocab_size, CHUNK, mesh):
        for row, new in zip(rows, tokens.T.tolist(), strict=True):
            row.extend(new)
    return [until(row, _stops(stop_token)) for row in rows]


def stream(
    model: LanguageModel,
    prompt: Sequence[int] | np.ndarray,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_token: int | Sequence[int] | None = None,
    vocab_size: int | None = None,
    chunk: int = 8,
    mesh: Mesh | None = None,
) -> Iterator[list[int]]:
    """The tokens of ``generate(model, [prompt], ...)[0]``, up to ``chunk`` at a time, as they are generated."""
    sampling = Sampling(temperature, top_k, top_p, seed)
    for tokens in chunks(model, [prompt], sampling, max_tokens, stop_token, vocab_size, chunk, mesh):
        yield until(tokens[:, 0].tolist(), _stops(stop_token))


@dataclasses.dataclass(frozen=True)
class Writer:
    """A trained run that continues text. A prompt is the beginning of a document; its text ends where the document ends."""

    model: LanguageModel
    tokenizer: Tokenizer
    mesh: Mesh | None = None

    @classmethod
    def open(cls, workdir: str | os.PathLike, step: int | None = None, mesh: Sequence[str] = ()) -> "Writer":
        """Opens the run at its newest checkpoint or at ``step``, on the first device or on a ``mesh`` of all devices (see
        ``mesh.from_text``)."""
        devices = meshes.from_text(mesh) if mesh else None
        model = load(workdir, step, mesh=devices).for_decoding()
        return cls(model, load_tokenizer(workdir), devices)

    def write(self, prompts: Sequence[str], **options: Any) -> list[str]:
        """Each prompt with its continuation. ``options`` are passed to ``generate``."""
        encoded = [self._encode(prompt) for prompt in prompts]
        rows = generate(self.model, encoded, **self._options(options))
        return [prompt + self._text(ids, row) for prompt, ids, row in zip(prompts, encoded, rows, strict=True)]

    def stream(self, prompt: str, **options: Any) -> Iterator[str]:
        """The prompt, then its continuation in pieces as they are generated; joined, they equal ``write([prompt])[0]``."""
        ids, row = self._encode(prompt), []
        written = ""
        for i, new in enumerate(stream(self.model, ids, **self._options(options))):
            if i == 0:
                yield prompt
            row += new
            text = self._text(ids, row).rstrip("\ufffd")  # the last bytes of a character may still be missing
            if len(text) > len(written) and text.startswith(written):
                yield text[len(written) :]
                written = text
        yield self._text(ids, row)[len(written) :]

    def _text(self, ids: np.ndarray, row: list[int]) -> str:
        # Decoded together with the prompt, since some tokenizers drop a leading space.
        return self.tokenizer.decode(np.append(ids, row).astype(np.int64))[len(self.tokenizer.decode(ids)) :]

    def _encode(self, prompt: str) -> np.ndarray:
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:  # command-line bytes that are not UTF-8 arrive as lone surrogates
            raise UserError(f"a prompt is not UTF-8 text: {error.reason} at character {error.start}") from None
        return np.append(self.tokenizer.document_token, self.tokenizer.encode(prompt))

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        own = {"stop_token": self.tokenizer.stop_tokens, "vocab_size": self.tokenizer.vocab_size, "mesh": self.mesh}
        return own | options


def until(tokens: list[int], stops: Sequence[int]) -> list[int]:
    """The tokens before the first one in ``stops``."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in stops), len(tokens))]


def _stops(stop_token: int | Sequence[int] | None) -> tuple[int, ...]:
    stops = () if stop_token is None else tuple(np.ravel(stop_token).tolist())
    if not all(isinstance(stop, int) for stop in stops):
        raise UserError(f"stop_token is {stop_token!r}; it must be a token id or several")
    return stops


def chunks(
    model: LanguageModel,
    prompts: Sequence[Sequence[int] | np.ndarray],
    sampling: Sampling,
    max_tokens: int,
    stop_token: int | Sequence[int] | None = None,
    vocab_size: int | None = None,
    chunk: int = CHUNK,
    mesh: Mesh | None = None,
    numbers: Sequence[int] | None = None,
) -> Iterator[np.ndarray]:
    """Arrays ``[n, B]`` of new tokens as they are generated: one token with the prompts, then up to ``chunk`` at a time.

    The iterator ends after ``max_tokens`` in all, or when every row has met a stop token; the caller must drop what a row
    has after it. ``numbers`` are the row numbers to sample with (see ``Sampling``), for prompts that are part of a larger
    set; by default 0, 1, ...
    """
    if not isinstance(max_tokens, int | np.integer) or max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens!r}; it must be a whole number, at least 1")
    if vocab_size is not None and (vocab_size < 1 or vocab_size % 1 != 0):
        raise UserError(f"vocab_size is {vocab_size}; it must be a whole number, at least 1")
    if chunk < 1:
        raise UserError(f"chunk is {chunk}; it must be at least 1")
    vocab_size = min(vocab_size or model.config.vocab_size, model.config.vocab_size)
    stops = _stops(stop_token)
    platform = next(iter(jnp.asarray(model.embedding[...]).devices())).platform
    count, more = len(prompts), _more_rows(len(prompts), platform, mesh)
    given, numbers = list(prompts), list(range(count) if numbers is None else numbers)
    prompts, numbers = given + given[-1:] * more, numbers + numbers[-1:] * more
    tokens, segment_ids = _batch(
        prompts, vocab_size, stops[0] if stops else None, 1 if mesh is None else mesh.shape["sequence"]
    )
    longest = int(segment_ids.sum(axis=1).max())
    _check_context(model.config, longest, max_tokens)
    remembered = _padded(longest + max_tokens - 1, _FEWEST_REMEMBERED)  # the last token is never read
    values = sampling.values | {"stop": np.array(stops or (-1,), np.int32)}
    values["vocab_size"] = np.int32(vocab_size)
    graph, parameters = nnx.split(model.for_decoding())
    rows, decode = np.asarray(numbers, np.int32), _decoder(platform)
    carry, first = _prefill(graph, remembered, sampling.filters, mesh, parameters, tokens, segment_ids, rows, values)
    yield _checked(np.asarray(first)[None, :count])
    left = max_tokens - 1
    while left > 0 and not np.asarray(carry["done"]).all():
        carry, new, made = decode(
            graph, remembered, sampling.filters, mesh, chunk, parameters, carry, values, np.int32(min(left, chunk))
        )
        new = _checked(np.asarray(new)[: int(made), :count])
        left -= len(new)
        yield new


def _checked(tokens: np.ndarray) -> np.ndarray:
    if (tokens == _NO_TOKEN).any():
        raise UserError("the model's logits are not finite, so they name no token: its own values are not")
    return tokens


def _more_rows(count: int, platform: str, mesh: Mesh | None) -> int:
    """Copies of the last row that are decoded as well, only for speed."""
    with _on(mesh):
        devices = sharding.parts("batch")
    each = count if count % devices else count // devices  # rows that do not divide evenly are replicated
    few = 0 < each < _FEWEST_ROWS.get(platform, _FEWEST_ELSEWHERE)
    return count if few else 0


def _batch(prompts, vocab_size: int, stop_token: int | None, shards: int) -> tuple[np.ndarray, np.ndarray]:
    """The prompts ``[B, T]``, padded on the left, and their segment ids: 0 for padding, 1 for the prompt."""
    if not prompts:
        raise UserError("there is no prompt")
    rows = [_tokens(prompt) for prompt in prompts]
    if stop_token is None and not all(map(len, rows)):
        raise UserError("a prompt is empty, and there is no stop token for it to begin with")
    rows = [row if len(row) else np.array([stop_token]) for row in rows]
    for row in rows:
        if row.min() < 0 or row.max() >= vocab_size:
            raise UserError(
                f"a prompt has tokens from {row.min()} to {row.max()}; the model's tokens are 0 to {vocab_size - 1}"
            )
    longest = max(map(len, rows))
    length = math.ceil(_padded(longest, _SHORTEST_PROMPT) / shards) * shards
    tokens = np.zeros((len(rows), length), np.int32)
    segment_ids = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :] = row
        segment_ids[i, length - len(row) :] = 1
    return tokens, segment_ids


def _tokens(prompt: Any) -> np.ndarray:
    row = np.asarray(prompt)
    if row.ndim != 1 or (len(row) and not np.issubdtype(row.dtype, np.integer)):
        raise UserError(
            f"a prompt is {prompt!r}; it must be a list of token ids, and several prompts a list of such lists"
        )
    return row.astype(np.int64)


def _padded(tokens: int, least: int) -> int:
    """The smallest power of two, at least ``least``, that has room for the tokens, so that few lengths are compiled."""
    return max(least, 1 << (tokens - 1).bit_length())


def _check_context(config: ModelConfig, prompt: int, max_tokens: int) -> None:
    """Raises ``UserError`` if full attention, whose state has room for ``model.context`` tokens, would forget some."""
    if "attention" in config.layers and prompt + max_tokens > config.context:
        most = config.context - prompt
        advice = f"max_tokens={most} fits" if most > 0 else "the prompt alone is too long"
        raise UserError(
            f"a prompt of {prompt} tokens and max_tokens={max_tokens} exceed model.context={config.context}, the "
            f"number of tokens that the model's attention remembers; {advice}"
        )


def _on(mesh: Mesh | None):
    return contextlib.nullcontext() if mesh is None else sharding.use_mesh(mesh)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _prefill(graph, remembered, filters, mesh, parameters, tokens, segment_ids, rows, values):
    """The state after the prompts, and the first new tokens ``[B]``; ``rows`` ``[B]`` are the row numbers."""
    model = nnx.merge(graph, parameters)
    model.remember(remembered)
    with _on(mesh):
        tokens, segment_ids = (sharding.constrain(x, "batch", "time") for x in (tokens, segment_ids))
        hidden, state, _ = model.hidden(tokens, segment_ids)
        keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(values["seed"])))(rows)
        first = sample(model.logits(hidden[:, -1:])[:, 0], _fold(keys, 0), values, filters)
    carry = {"state": state, "token": first, "keys": keys, "index": jnp.int32(1), "done": _is_stop(first, values)}
    return carry, first


@functools.cache
def _decoder(platform: str) -> stages.Wrapped:
    """``_decode``, compiled for a platform."""
    options = compiler.DECODING.get(platform)
    return jax.jit(_decode, static_argnums=(0, 1, 2, 3, 4), donate_argnums=6, compiler_options=options)


def _decode(graph, remembered, filters, mesh, chunk, parameters, carry, values, limit):
    """Up to ``limit`` <= ``chunk`` more tokens: the carry, the tokens ``[chunk, B]``, and how many there are."""
    model = nnx.merge(graph, parameters)
    model.remember(remembered)

    def unfinished(loop):
        i, carry, _ = loop
        return (i < limit) & ~jnp.all(carry["done"])

    def step(loop):
        i, carry, new = loop
        with _on(mesh):
            logits, state = model(carry["token"][:, None], state=carry["state"])
            token = sample(logits[:, 0], _fold(carry["keys"], carry["index"]), values, filters)
        carry = {
            "state": state,
            "token": token,
            "keys": carry["keys"],
            "index": carry["index"] + 1,
            "done": carry["done"] | _is_stop(token, values),
        }
        return i + 1, carry, lax.dynamic_update_index_in_dim(new, token, i, axis=0)

    new = jnp.zeros((chunk, len(carry["token"])), jnp.int32)
    count, carry, new = lax.while_loop(unfinished, step, (jnp.int32(0), carry, new))
    return carry, new, count


def _is_stop(token, values):
    return jnp.any(token[:, None] == values["stop"][None], axis=1)


def _fold(keys, index):
    return jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)


def sample(logits: jax.Array, keys: jax.Array, values: dict[str, Any], filters: tuple[bool, bool, bool]) -> jax.Array:
    """One token per row, ``[B]`` int32, from logits ``[B, vocab]`` float32, by ``Sampling``, with one key per row;
    ``_NO_TOKEN`` if the largest logit is not finite, as it is if any is NaN."""
    draw, by_count, by_mass = filters
    absent = lax.broadcasted_iota(jnp.int32, logits.shape, 1) >= values["vocab_size"]
    logits = jnp.where(absent, -jnp.inf, logits)
    largest = jnp.max(logits, axis=-1, keepdims=True)

    def best(scores):
        return jnp.where(jnp.isfinite(largest[:, 0]), jnp.argmax(scores, axis=-1), _NO_TOKEN).astype(jnp.int32)

    if not draw:
        return best(logits)
    logits = (logits - largest) / values["temperature"]
    p = jnp.exp(logits)
    if by_count:
        p = _keep(p, (p > 0).astype(p.dtype), jnp.full((len(p), 1), values["top_k"]))
    if by_mass:
        p = _keep(p, p, values["top_p"] * jnp.sum(p, axis=-1, keepdims=True))
    logits = jnp.where(p > 0, logits, -jnp.inf)
    # In the other mode it is never above 16, so that rare tokens of a large vocabulary come too seldom.
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], logits.dtype, mode="high"))(keys)
    return best(logits + noise)


def _keep(p: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """p ``[B, vocab]`` in [0, 1] with 0 for all but its largest entries: the fewest whose weights reach ``target``.

    Non-negative floats are ordered as their bits are, so the bits of the smallest entry to keep are found one after
    another, exactly and without a sort: in 30 passes over p on a CPU, in 10 elsewhere, where a pass takes about as long
    with seven sums as with one.
    """
    bits = lax.bitcast_convert_type(p, jnp.int32)
    at_once = 1 if backends.platform() == "cpu" else 3
    passes = _BITS // at_once

    def find(i, low):  # the weight from `low` on reaches the target
        shift, found = _BITS - at_once * (i + 1), jnp.zeros_like(low)
        for digit in range(1, 1 << at_once):
            weight = jnp.sum(jnp.where(bits >= low + (digit << shift), weights, 0.0), axis=-1, keepdims=True)
            found = jnp.where(weight >= target, digit, found)
        return low + (found << shift)

    low = lax.fori_loop(0, passes, find, jnp.zeros((len(p), 1), jnp.int32))
    return jnp.where(bits >= low, p, 0.0)
