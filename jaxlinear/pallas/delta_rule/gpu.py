"""The delta rule for GPU, through Triton: first what follows from the tokens of each chunk alone, then the states in time;
backward the same, and finally the gradients of the tokens of each chunk.

Intermediate arrays are by head, ``[B, H, N c, ...]``, with channels padded to a power of two.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxlinear.pallas.delta_rule import blocks
from jaxlinear.pallas.delta_rule import gpu_gradients as gradients
from jaxlinear.pallas.delta_rule import gpu_states as states
from jaxlinear.pallas.delta_rule import gpu_tokens as tokens
from jaxlinear.pallas.delta_rule.plan import Arguments, Plan, size_of
from jaxlinear.pallas.parts import head_sums
from jaxlinear.pallas.parts.gpu_layout import Layout, power_of_two
from jaxlinear.pallas.parts.target import Target

Arrays = dict[str, jax.Array]

# What is computed from the tokens of a chunk; and in addition, for a decay by channel and for others.
_OF_TOKENS = {
    "forward": ("attention", "w", "whole", "u"),
    "summary": ("w", "whole", "u"),
    "state_gradient": ("attention", "w", "whole"),
    "gradient": ("attention", "w", "whole", "inverse", "overlap"),
}
_BY_CHANNEL = {
    "forward": ("queries", "ends"),
    "summary": ("ends",),
    "state_gradient": ("queries", "ends"),
    "gradient": ("queries", "ends", "keys"),
}
_BY_HEAD = {
    "forward": ("since_start", "until_end"),
    "summary": ("until_end",),
    "state_gradient": ("since_start", "until_end"),
    "gradient": ("since_start", "until_end"),
}

_IN_TIME = ("o", "d_q", "d_k", "d_v", "d_beta", "d_log_decay")  # outputs [B, T, ...]


def call(plan: Plan, arguments: Arguments, target: Target) -> Arrays:
    """The outputs by name, as those of ``delta_rule_tpu.call``, but ``before`` has its own layout here.

    If T ends within a chunk, arrays are padded with tokens that change nothing: a kernel that checks where they end has no
    register left for that.
    """
    more = -plan.length % _layout(plan, target).chunk
    given = {name: x for name, x in arguments._asdict().items() if x is not None and name not in ("state", "before")}
    given = {name: jnp.pad(x, ((0, 0), (0, more), *((0, 0),) * (x.ndim - 2))) for name, x in given.items()}
    found = _Call(plan, arguments._replace(**given), target).run()
    return {name: x[:, : plan.length] if name in _IN_TIME else x for name, x in found.items()}


def _layout(plan: Plan, target: Target) -> Layout:
    keys, values = power_of_two(plan.key_width), power_of_two(plan.value_width)
    block = blocks.gpu(plan.length, keys, plan.decay == "channel", plan.chunk, target.gpu, plan.terms)
    tiles = min(block.keys, keys), min(block.values, values), min(block.states, values), min(block.gradients, keys)
    return Layout(plan, block.chunk, keys, values, *tiles, min(block.gradient_values, values))


def _with_decays(plan: Plan) -> bool:
    """Whether what queries read from the state, or keys leave in it, is multiplied by decays or by document masks."""
    return plan.decay == "scalar" or (plan.packed and plan.decay == "none")


class _Call:
    def __init__(self, plan: Plan, arguments: Arguments, target: Target):
        self.plan, self.target, self.layout = plan, target, _layout(plan, target)
        self.batch = arguments.k.shape[0]
        self.arguments = arguments

    def run(self) -> Arrays:
        plan, given = self.plan, self._given()
        found = self._tokens(given)
        if plan.kind == "forward":
            more: dict[str, Any] = {"o": given["v"]}
            if plan.keep:
                more["before"] = self._states()
            done = self._in_time(states.forward_kernel, found, more, "final", self.arguments.state)
            return {**done, "o": done["o"].reshape(self.arguments.v.shape)}
        if plan.kind == "summary":
            done = self._in_time(states.forward_kernel, found, {}, "final", self.arguments.state)
            return {"final": done["final"], "transition": self._transition(found)}
        found["d_o"] = self._by_head(self.arguments.d_o)
        if plan.kind == "state_gradient":
            return self._in_time(states.backward_kernel, found, {}, "d_state", self.arguments.state)
        return self._gradients(given, found)

    def _given(self) -> Arrays:
        """Small arrays by head; the others unchanged."""
        plan, given = self.plan, self.arguments
        arrays = {name: self._by_head(x) for name in ("q", "k", "v") if (x := getattr(given, name)) is not None}
        arrays["beta"] = self._in_chunks(given.beta)
        if plan.decay == "channel":
            arrays["log_decay"] = self._by_head(given.log_decay)
        elif plan.decay == "scalar":
            sums = head_sums.coarse_and_fine(self._chunked(self._in_chunks(given.log_decay)))
            arrays["coarse"], arrays["fine"] = map(self._flat, sums)
        if given.starts is not None:
            arrays["runs"] = self._flat(jnp.cumsum(self._chunked(given.starts), axis=-1, dtype=jnp.int32))
        return arrays

    def _tokens(self, given: Arrays) -> Arrays:
        plan, layout, names = self.plan, self.layout, _OF_TOKENS[self.plan.kind]
        if plan.decay == "channel":
            names += _BY_CHANNEL[plan.kind]
        elif _with_decays(plan):
            names += _BY_HEAD[plan.kind]
        square, keys, values = (self._temporary(n) for n in (layout.chunk, layout.keys, layout.values))
        solve = self._temporary(plan.terms * layout.chunk)
        whole, time = layout.keys if plan.decay == "channel" else 1, layout.chunks * layout.chunk
        shapes = {"attention": square, "inverse": solve, "overlap": solve}
        shapes |= {name: keys for name in ("queries", "keys", "ends", "w")}
        shapes |= {name: self._shape(plan.wide, self.batch, plan.heads, time) for name in _BY_HEAD["gradient"]}
        shapes |= {"u": values, "whole": self._shape(plan.wide, self.batch, plan.heads, layout.chunks, whole)}
        if "attention" not in names:
            given = {name: x for name, x in given.items() if name != "q"}
        if "u" not in names:
            given = {name: x for name, x in given.items() if name != "v"}
        found = self._run(
            tokens.tokens_kernel, "tokens", given, {name: shapes[name] for name in names}, self._of_chunks
        )
        if plan.decay != "channel":  # these are read unchanged
            found |= {name: given[name] for name in ("q", "k") if name in given}
        return found

    def _in_time(self, kernel, found: Arrays, more: dict[str, Any], last: str, state: jax.Array) -> Arrays:
        """The states in time, from ``state`` ``[B, H, V, K]``; ``last`` is the name of the last one."""
        plan, layout = self.plan, self.layout
        padding = (0, layout.values - plan.value_width), (0, layout.keys - plan.key_width)
        given = {name: found[name] for name in found if name not in ("keys", "inverse", "overlap")}
        if kernel is states.forward_kernel and "o" not in more:
            of_outputs = "attention", "queries", "q", "d_o"
            given = {name: x for name, x in given.items() if name not in of_outputs}
        given["state"] = jnp.pad(state, ((0, 0), (0, 0), *padding))
        outputs = {**more, last: given["state"]}
        grid = layout.values // layout.states_tile, plan.heads, self.batch
        done = self._run(kernel, "states", given, outputs, grid)
        return {**done, last: done[last][..., : plan.value_width, : plan.key_width]}

    def _transition(self, found: Arrays) -> jax.Array:
        """M, transposed: what the run makes of each row of the identity, with nothing written."""
        plan, layout = self.plan, self.layout
        square = dataclasses.replace(plan, value_width=plan.key_width)
        other = _Call(square, self.arguments, self.target)
        other.layout = dataclasses.replace(layout, values=layout.keys, states_tile=min(layout.states_tile, layout.keys))
        identity = jnp.broadcast_to(
            jnp.eye(plan.key_width, dtype=plan.wide), (self.batch, plan.heads, plan.key_width, plan.key_width)
        )
        without = {name: x for name, x in found.items() if name != "u"}
        return other._in_time(states.forward_kernel, without, {}, "final", identity)["final"]

    def _gradients(self, given: Arrays, found: Arrays) -> Arrays:
        plan, layout = self.plan, self.layout
        values, square = self._temporary(layout.values), self._temporary(layout.chunk)
        of_overlap = self._temporary(plan.terms_of_decays * layout.chunk)
        before = {"before": self.arguments.before}
        backward = self._in_time(
            states.backward_kernel,
            found,
            {"d_written": values, "d_after": self._states()},
            "d_state",
            self.arguments.state,
        )
        by_head = self._shape(plan.wide, *given["beta"].shape)
        names = "beta", "runs", "coarse", "fine", "log_decay", "q", "k", "v"
        shared = {name: given[name] for name in names if name in given}
        of_values = self._run(
            gradients.values_kernel,
            "values",
            {
                **{name: shared[name] for name in ("beta", "runs", "v") if name in shared},
                **{name: found[name] for name in ("inverse", "overlap", "d_o")},
                **{name: found[name] for name in ("keys", "k", "since_start") if name in found},
                **before,
                "d_written": backward["d_written"],
            },
            {
                "d_v": given["v"],
                "d_beta": by_head,
                "d_attention": square,
                "d_overlap": of_overlap,
                "written": values,
            },
            self._of_chunks,
        )
        outputs: dict[str, Any] = {"d_q": given["q"], "d_k": given["k"]}
        tiles = layout.keys // layout.gradient_tile
        if plan.decay == "channel":
            outputs["d_log_decay"] = given["log_decay"]
        elif plan.decay == "scalar":
            outputs["d_sums"] = self._shape(plan.wide, tiles, *by_head.shape)
            outputs["d_total"] = self._shape(plan.wide, tiles, self.batch, plan.heads, layout.chunks, 1)
        of_keys = self._run(
            gradients.keys_kernel,
            "keys",
            {
                **{name: x for name, x in shared.items() if name not in ("beta", "v")},
                **{name: of_values[name] for name in ("d_attention", "d_overlap", "written", "d_v")},
                "d_o": found["d_o"],
                "d_after": backward["d_after"],
                **before,
            },
            outputs,
            (layout.chunks, tiles, plan.heads * self.batch),
        )
        done = {"d_state": backward["d_state"], "d_v": of_values["d_v"], "d_q": of_keys["d_q"], "d_k": of_keys["d_k"]}
        done["d_beta"] = self._in_time_first(of_values["d_beta"])
        if plan.decay == "channel":
            done["d_log_decay"] = of_keys["d_log_decay"]
        elif plan.decay == "scalar":
            sums = head_sums.from_last(self._chunked(jnp.sum(of_keys["d_sums"], axis=0)))
            d = sums + jnp.sum(of_keys["d_total"], axis=0)
            done["d_log_decay"] = self._in_time_first(self._flat(d))
        return done

    def _warps(self, name: str) -> int:
        """The smallest number with which no kernel spills registers."""
        plan = self.plan
        if name == "tokens":
            return 4
        if name != "states":
            return 8
        backward = plan.kind in ("gradient", "state_gradient")
        return 8 if self.layout.keys > 128 or (backward and _with_decays(plan)) else 4

    def _stages(self, name: str) -> int:
        """Stages of loads in flight: two where time is traversed, except for kernels that then run out of registers."""
        full = self.plan.reverse and self.plan.terms > 1 and self.layout.keys > 128
        return 2 if name == "states" and not full else 1

    def _run(self, kernel, name: str, given: Arrays, outputs: dict[str, Any], grid: tuple[int, ...]) -> Arrays:
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs.values()]
        share = {"tokens": 0.5, "states": 0.5, "values": 0.3, "keys": 0.4}[name]
        flops = share * self.batch * self.plan.length * self.plan.heads * self.plan.products(self.layout.chunk)
        layout = {"keys": self.layout.of_gradients, "values": self.layout.of_values}.get(name, self.layout)
        found = pl.pallas_call(
            functools.partial(kernel, layout, (*given, *outputs)),
            grid=grid,
            out_shape=shapes,
            compiler_params=plgpu.CompilerParams(num_warps=self._warps(name), num_stages=self._stages(name)),
            cost_estimate=pl.CostEstimate(
                flops=int(flops), transcendentals=0, bytes_accessed=size_of((list(given.values()), shapes))
            ),
            name=f"{self.plan.name}_{name}",
            interpret=self.target.interpret,
        )(*given.values())
        return dict(zip(outputs, found, strict=True))

    @property
    def _of_chunks(self) -> tuple[int, int, int]:
        return self.layout.chunks, self.plan.heads, self.batch

    def _by_head(self, x: jax.Array) -> jax.Array:
        """``[B, T, H K]`` -> ``[B, T, H, K]``"""
        return x.reshape(*x.shape[:2], self.plan.heads, -1)

    def _in_chunks(self, x: jax.Array) -> jax.Array:
        """``[B, T, H]`` -> ``[B, H, N c]``"""
        return x.astype(self.plan.wide).swapaxes(1, 2)

    def _in_time_first(self, x: jax.Array) -> jax.Array:
        """``[B, H, N c]`` -> ``[B, T, H]``"""
        return x.swapaxes(1, 2)

    def _chunked(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.layout.chunks, self.layout.chunk)

    def _flat(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-2], math.prod(x.shape[-2:]))

    def _temporary(self, width: int) -> jax.ShapeDtypeStruct:
        layout = self.layout
        return self._shape(self.plan.narrow, self.batch, self.plan.heads, layout.chunks * layout.chunk, width)

    def _states(self) -> jax.ShapeDtypeStruct:
        layout = self.layout
        return self._shape(self.plan.narrow, self.batch, layout.chunks, self.plan.heads, layout.values, layout.keys)

    def _shape(self, dtype, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)
