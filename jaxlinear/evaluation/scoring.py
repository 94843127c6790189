"""Log-likelihoods of continuations. A context shared by several is read once, and each continues from the state there."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, stages
from jax.sharding import NamedSharding, PartitionSpec

from jaxlinear.errors import UserError
from jaxlinear.evaluation.run import Run
from jaxlinear.parallel import compiler, operations, sharding

Tokens = tuple[int, ...]
Pair = tuple[Tokens, Tokens]  # a context, which is not empty, and its continuation

_CHUNK = 1024  # tokens of a document that are read at a time
_SHORTEST = 16  # contexts are padded to 16, 24, 32, 48, ..., so that few lengths are compiled


class Scorer:
    """Scores with the model of a run, whose devices share the rows of a batch of about ``batch_tokens`` tokens. Greedy
    decoding takes the tokenizer's ``vocab_size`` tokens, by default all that the model has."""

    def __init__(self, run: Run, batch_tokens: int, vocab_size: int | None = None):
        if run.mesh.shape["sequence"] > 1:
            raise UserError("devices share the rows here, not the time of each row; leave --mesh=sequence out")
        self._run, self._batch_tokens = run, batch_tokens
        self._vocab_size = np.int32(vocab_size or run.config.model.vocab_size)
        self._groups = sharding.parts_on(run.mesh.shape, "batch")
        self._context = run.architecture.config.context if "attention" in run.architecture.config.layers else None
        self._rows = NamedSharding(run.mesh, PartitionSpec(sharding.RULES["batch"]))
        self._prefix, self._continuations, self._next = run.program("scoring", lambda: _programs(run))

    def score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """For each pair, the continuation's log-probability in nats, and whether greedy decoding gives it."""
        by_context: dict[Tokens, list[int]] = {}
        for i, (context, continuation) in enumerate(pairs):
            self._check_length(len(context) + len(continuation))
            by_context.setdefault(context, []).append(i)
        scores: list[tuple[float, bool]] = [(math.nan, False)] * len(pairs)
        for contexts in self._batches(sorted(by_context, key=len), _padded):
            length = _padded(len(contexts[-1]))
            tokens, segment_ids = np.zeros((2, self.many(len(contexts)), length), np.int32)
            for row, context in enumerate(contexts):  # padded on the left, so that every row's state is that at its end
                tokens[row, length - len(context) :] = context
                segment_ids[row, length - len(context) :] = 1
            last, state = self._prefix(self._run.parameters, *self._place(tokens, segment_ids))
            asked = [(row, i) for row, context in enumerate(contexts) for i in by_context[context]]
            asked.sort(key=lambda item: len(pairs[item[1]][1]))
            for some in self._batches(asked, _rounded, lambda item: len(pairs[item[1]][1])):
                self._score_some(scores, pairs, some, last, state)
        _check_finite([score for score, _ in scores])
        return scores

    def _score_some(self, scores, pairs: Sequence[Pair], some: list[tuple[int, int]], last, state) -> None:
        count, length = self.many(len(some)), _rounded(max(len(pairs[i][1]) for _, i in some))
        rows, tokens, due = (
            np.zeros(count, np.int32),
            np.zeros((count, length), np.int32),
            np.zeros((count, length), bool),
        )
        for n, (row, i) in enumerate(some):
            continuation = pairs[i][1]
            rows[n], tokens[n, : len(continuation)], due[n, : len(continuation)] = row, continuation, True
        placed = self._place(rows, tokens, due)
        nll, greedy = self._continuations(self._run.parameters, last, state, *placed, self._vocab_size)
        for (_, i), loss, same in zip(some, np.asarray(nll), np.asarray(greedy), strict=False):
            scores[i] = (-float(loss), bool(same))

    def whole(self, documents: Sequence[Tokens]) -> list[float]:
        """For each document, the log-probability in nats of all its tokens but the first, however many there are."""
        losses = [0.0] * len(documents)
        order = sorted(range(len(documents)), key=lambda i: len(documents[i]))
        for some in self._batches(order, _padded, lambda i: min(len(documents[i]), _CHUNK)):
            count, longest = self.many(len(some)), max(len(documents[i]) for i in some)
            self._check_length(longest)
            state = self._run.architecture.bind(self._run.parameters).init_state(count)
            for begin in range(0, longest - 1, _CHUNK):
                length = min(_CHUNK, _padded(longest - 1 - begin))
                tokens, targets = np.zeros((2, count, length), np.int32)
                due = np.zeros((count, length), bool)
                for row, i in enumerate(some):
                    part = documents[i][begin : begin + length + 1]
                    n = max(len(part) - 1, 0)
                    tokens[row, :n], targets[row, :n], due[row, :n] = part[:n], part[1 : n + 1], True
                nll, state = self._next(self._run.parameters, state, *self._place(tokens, targets, due))
                for i, loss in zip(some, np.asarray(nll), strict=False):
                    losses[i] += float(loss)
        _check_finite(losses)
        return [-loss for loss in losses]

    def _batches(self, items: Sequence[Any], padded, length=len) -> Iterator[list[Any]]:
        """The items, sorted by length, in runs of at most a batch's tokens."""
        some: list[Any] = []
        for item in items:
            if some and (len(some) + 1) * padded(length(item)) > self._batch_tokens:
                yield some
                some = []
            some.append(item)
        if some:
            yield some

    def many(self, count: int) -> int:
        """Rows of the batch that holds ``count``: few sizes are compiled, and every device has equally many rows."""
        return math.ceil(_rounded(count) / self._groups) * self._groups

    def _place(self, *arrays: np.ndarray) -> list[jax.Array]:
        return [jax.device_put(array, self._rows) for array in arrays]

    def _check_length(self, length: int) -> None:
        if self._context is not None and length > self._context:
            raise UserError(
                f"a text of {length} tokens is longer than model.context={self._context}, which attention remembers; "
                "leave the longest questions out, or raise model.context"
            )


def _programs(run: Run) -> tuple[stages.Wrapped, ...]:
    """The functions below for the run's architecture, taking parameters instead of the model."""
    architecture, mesh, choices = run.architecture, run.mesh, dict(run.config.parallel)

    def on_mesh(function):
        def program(parameters, *arguments):
            with sharding.use_mesh(mesh, **choices):
                return function(architecture.bind(parameters), *arguments)

        return jax.jit(program, compiler_options=compiler.sequence_options(mesh))

    return tuple(on_mesh(function) for function in (_prefix, _continuations, _next_chunk))


def _prefix(model, tokens, segment_ids):
    """The last hidden values ``[B, D]`` and the state after the contexts ``[B, T]``, which are padded on the left."""
    hidden, state, _ = model.hidden(tokens, segment_ids)
    return hidden[:, -1], state


def _continuations(model, last, state, rows, tokens, due, vocab_size):
    """For continuations ``[N, T]``, padded on the right, of the contexts ``rows`` [N]: the losses ``[N]``, and whether
    every token is the likeliest of the first ``vocab_size``: the model may have more, which stand for nothing."""
    hidden = last[rows][:, None]
    if tokens.shape[1] > 1:
        past = {key: _take(state[key], rows, _batch_axis(model, key)) for key in state}
        more, _, _ = model.hidden(tokens[:, :-1], _ids(due[:, :-1]), past)
        hidden = jnp.concatenate([hidden, more], axis=1)

    def one(column):  # the logits of one column of tokens at a time
        x, target = column
        logits = model.logits(x[:, None])[:, 0]
        chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        of_tokens = jnp.where(jnp.arange(logits.shape[1])[None] < vocab_size, logits, -jnp.inf)
        return jax.nn.logsumexp(logits, axis=-1) - chosen, jnp.argmax(of_tokens, axis=-1) == target

    nll, same = lax.map(one, (jnp.swapaxes(hidden, 0, 1), tokens.T))
    return jnp.sum(jnp.where(due.T, nll, jnp.zeros((), nll.dtype)), axis=0), jnp.all(same | ~due.T, axis=0)


def _next_chunk(model, state, tokens, targets, due):
    """The losses ``[B]`` of a chunk of documents, and the state after it."""
    hidden, state, _ = model.hidden(tokens, _ids(due), state)
    nll = operations.token_losses(hidden, model.output_embedding, targets, soft_cap=model.config.logit_soft_cap)
    return jnp.sum(jnp.where(due, nll, jnp.zeros((), nll.dtype)), axis=1), state


def _ids(due):
    """1, as in contexts, and 2 for the padding after them: a document of its own, which may outgrow ``model.context``."""
    return jnp.where(due, 1, 2).astype(jnp.int32)


def _check_finite(scores: Sequence[float]) -> None:
    """Refuses scores that are not finite: a NaN would count as the largest in comparisons."""
    wrong = sum(not math.isfinite(score) for score in scores)
    if wrong:
        raise UserError(f"the scores of {wrong} of {len(scores)} texts are not finite: the model's own values are not")


def _take(tree, rows, axis: int):
    return jax.tree.map(lambda x: jnp.take(x, rows, axis), tree)


def _batch_axis(model, key: str) -> int:
    """The batch axis of the arrays in a part of the state: stacked layers have the repetitions first."""
    return 1 if model.is_stacked and key == "stacks" else 0


def _rounded(n: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, ..."""
    whole = 1 << (n - 1).bit_length()
    return whole * 3 // 4 if whole >= 4 and n <= whole * 3 // 4 else whole


def _padded(n: int) -> int:
    return max(_rounded(n), _SHORTEST)
