"""The delta rule as a family of recurrences: by chunks of matrix products, and by its kernels."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlinear.ops import decay, dtypes, matrix_states, protocol, triangular
from jaxlinear.ops.matrix_states import flat, turned
from jaxlinear.pallas.delta_rule import gpu, tpu
from jaxlinear.pallas.delta_rule.plan import Arguments, Plan


class Inputs(NamedTuple):
    """The inputs of a run, arrays ``[B, T, ...]``. If a token makes J updates, k, v and beta have an axis J after H."""

    q: jax.Array  # [B, T, H, K]
    k: jax.Array  # [B, T, H, K] or [B, T, H, J, K]
    v: jax.Array  # [B, T, H, V] or [B, T, H, J, V]
    beta: jax.Array  # [B, T, H] or [B, T, H, J]
    log_decay: jax.Array | None  # [B, T, H] or [B, T, H, K]
    starts: jax.Array | None  # [B, T] bool, true where a document, and with it the state, begins

    @property
    def updates(self) -> int:
        """J."""
        return self.beta.shape[3] if self.beta.ndim == 4 else 1

    def by_update(self) -> "Inputs":
        """The same inputs as T J tokens of one update each: what a token does before its updates happens at the first
        of them, and it is read at the last."""
        updates = self.updates
        if self.beta.ndim == 3:
            return self

        def each(x: jax.Array) -> jax.Array:
            x = jnp.moveaxis(x, 3, 2)
            return x.reshape(x.shape[0], x.shape[1] * updates, *x.shape[3:])

        def one(x: jax.Array, place: int) -> jax.Array:
            around = ((0, 0), (0, 0), (place, updates - 1 - place), *((0, 0),) * (x.ndim - 2))
            return jnp.pad(x[:, :, None], around).reshape(x.shape[0], x.shape[1] * updates, *x.shape[2:])

        k, v, beta = each(self.k), each(self.v), each(self.beta)
        log_decay, starts = (None if x is None else one(x, 0) for x in (self.log_decay, self.starts))
        return Inputs(one(self.q, updates - 1), k, v, beta, log_decay, starts)


@dataclasses.dataclass(frozen=True)
class DeltaRuleMaps(protocol.Family):
    """The part of the family that concerns maps: a summary is ``(M [B, H, K, K], C [B, H, K, V])``."""

    def compose(self, earlier, later) -> tuple[jax.Array, jax.Array]:
        transition = dtypes.product("...kl,...lm->...km", later[0], earlier[0])
        return transition, self.advance(later, earlier[1])

    def advance(self, summary, state: jax.Array) -> jax.Array:
        return dtypes.product("...kl,...lv->...kv", summary[0], state) + summary[1]


class _Run(NamedTuple):
    """Arrays by chunk, heads before time. For the state S before the run, the run writes U - W S at its keys. It makes
    T J updates, J per token."""

    attention: jax.Array  # [B, H, T, T J], what the tokens read of each other's writes
    queries: jax.Array  # [B, H, T, K], what reads the state before the run
    keys: jax.Array  # [B, H, T J, K], decayed to the end of the run
    u: jax.Array  # [B, H, T J, V]
    w: jax.Array  # [B, H, T J, K]
    kept: jax.Array  # [B, H, K or 1], how much of the state before the run remains after it


@dataclasses.dataclass(frozen=True)
class DeltaRule(DeltaRuleMaps):
    """The family (``protocol.Family``) of these recurrences, in its WY form (Yang et al., arXiv:2406.06484).

    What token i writes at its key, x_i = beta_i (v_i - S'^T k_i), depends on the state before the run and on earlier
    writes:

        x_i + beta_i sum_{j<i} (k_i^T diag(exp(G_i - G_j)) k_j) x_j = beta_i v_i - beta_i S^T (exp(G_i) k_i),

    a triangular system whose solution is linear in S: X = U - W S. Decays are as in arXiv:2412.06464 (by head) and
    arXiv:2510.26692 (by channel). ``constants`` is None.
    """

    scale: float

    def prepare(self, inputs: Inputs, constants: None) -> _Run:
        wide = dtypes.wide(inputs.q.dtype, inputs.k.dtype, inputs.v.dtype)
        narrow = dtypes.narrow(inputs.q.dtype, inputs.k.dtype, inputs.v.dtype)
        updates, inputs = inputs.updates, inputs.by_update()
        q, k, v = (x.swapaxes(1, 2) for x in inputs[:3])
        q, k, v = q.astype(narrow), k.astype(wide), v.astype(wide)
        beta = inputs.beta.swapaxes(1, 2).astype(wide)[..., None]
        decays = matrix_states.decays_of_run(inputs.log_decay, inputs.starts, k, wide)
        attention, overlap = decay.pairwise((q, k), k, decays.log_decay)
        attention = decays.within_documents(attention)
        overlap = decays.within_documents(beta * jnp.tril(overlap, -1))
        u, w = triangular.solve(overlap, (beta * v, beta * decay.scaled(k, decays.since_start)))
        queries, keys = decay.scaled(q, decays.since_start), decay.scaled(k, decays.until_end)
        if updates > 1:  # the others have no query
            attention, queries = (x[..., updates - 1 :: updates, :] for x in (attention, queries))
        attention, keys, u, w = (x.astype(narrow) for x in (attention, keys, u, w))
        return _Run(attention, queries, keys, u, w, decays.kept)

    def summarise(self, run: _Run) -> tuple[jax.Array, jax.Array]:
        kept = run.kept[..., None] * jnp.eye(run.keys.shape[-1], dtype=run.kept.dtype)[None, None]
        replaced = dtypes.product("...tk,...tl->...kl", run.keys, run.w)
        return kept - replaced, dtypes.product("...tk,...tv->...kv", run.keys, run.u)

    def apply(self, run: _Run, state: jax.Array) -> jax.Array:
        """o ``[B, T, H, V]`` in the dtype of the products."""
        return self._read(run, state, self._written(run, state))

    def through(self, run: _Run, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Avoids M, whose gradient takes two more matrix products."""
        written = self._written(run, state)
        after = run.kept[..., None] * state + dtypes.product("...tk,...tv->...kv", run.keys, written)
        return self._read(run, state, written), after

    def _written(self, run: _Run, state: jax.Array) -> jax.Array:
        """U - W S: what the tokens write at their keys."""
        replaced = dtypes.product("...tk,...kv->...tv", run.w, state.astype(run.w.dtype))
        return (run.u.astype(replaced.dtype) - replaced).astype(run.u.dtype)

    def _read(self, run: _Run, state: jax.Array, written: jax.Array) -> jax.Array:
        inner = dtypes.product("...ij,...jv->...iv", run.attention, written)
        outer = dtypes.product("...tk,...kv->...tv", run.queries, state.astype(run.queries.dtype))
        return (self.scale * (inner + outer)).astype(written.dtype).swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class DeltaRuleKernel(matrix_states.MatrixKernels, DeltaRuleMaps):
    """The family ``DeltaRule`` by the kernels, which work within and between chunks and keep the state resident. A token
    makes one update, and ``constants`` is None. ``negative_eigenvalues``: whether beta |k|^2 may exceed 1."""

    negative_eigenvalues: bool = False

    def prepare(self, inputs: Inputs, constants: None) -> Inputs:
        narrow = dtypes.narrow(inputs.q.dtype, inputs.k.dtype, inputs.v.dtype)
        return inputs._replace(q=inputs.q.astype(narrow), k=inputs.k.astype(narrow), v=inputs.v.astype(narrow))

    def forward(self, run: Inputs, state: jax.Array, *, keep: bool):
        """``before``: ``[B, N, H, V, K]``, before each chunk, in the dtype of the products."""
        arguments = self._arguments(run, state)._replace(q=flat(run.q), v=flat(run.v))
        found = self._call("forward", run, arguments, keep=keep)
        return found["o"].reshape(run.v.shape), turned(found["final"]), found.get("before")

    def summary(self, run: Inputs) -> tuple[jax.Array, jax.Array]:
        batch, _, heads, width = run.k.shape
        none = jnp.zeros((batch, heads, width, run.v.shape[-1]), dtypes.wide(run.q.dtype))
        found = self._call("summary", run, self._arguments(run, none)._replace(v=flat(run.v)))
        return turned(found["transition"]), turned(found["final"])

    def gradient(self, run: Inputs, before: jax.Array, d_outputs: jax.Array, d_final: jax.Array):
        arguments = self._arguments(run, d_final)._replace(
            q=flat(run.q), v=flat(run.v), d_o=flat(d_outputs), before=before
        )
        found = self._call("gradient", run, arguments)

        def of(name: str) -> jax.Array:
            x = getattr(run, name)
            return found["d_" + name].reshape(x.shape).astype(x.dtype)

        d_log_decay = None if run.log_decay is None else of("log_decay")
        return Inputs(of("q"), of("k"), of("v"), of("beta"), d_log_decay, None), turned(found["d_state"])

    def state_gradient(self, run: Inputs, d_outputs: jax.Array, d_final: jax.Array) -> jax.Array:
        arguments = self._arguments(run, d_final)._replace(q=flat(run.q), d_o=flat(d_outputs))
        return turned(self._call("state_gradient", run, arguments)["d_state"])

    def _arguments(self, run: Inputs, state: jax.Array) -> Arguments:
        log_decay = matrix_states.flat_decay(run.log_decay)
        return Arguments(flat(run.k), run.beta, turned(state), log_decay=log_decay, starts=run.starts)

    def _call(self, kind: str, run: Inputs, arguments: Arguments, *, keep: bool = False) -> dict[str, jax.Array]:
        plan = Plan(
            kind=kind,
            length=run.k.shape[1],
            heads=run.k.shape[2],
            key_width=run.k.shape[3],
            value_width=run.v.shape[3],
            decay="none" if run.log_decay is None else {3: "scalar", 4: "channel"}[run.log_decay.ndim],
            packed=run.starts is not None,
            scale=self.scale,
            narrow=run.k.dtype,
            wide=arguments.state.dtype,
            chunk=self.chunk,
            keep=keep,
            negative_eigenvalues=self.negative_eigenvalues,
        )
        return (gpu if self.target.platform == "gpu" else tpu).call(plan, arguments, self.target)
