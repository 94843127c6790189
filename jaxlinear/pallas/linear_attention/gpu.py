"""Chunked linear attention for GPU, through Triton: one kernel carries the states through time, by tiles, and one works on
all chunks at once. Backward is the same, plus one kernel for the gradients of queries, keys and decays.

The states before each chunk are kept for the backward pass, in the dtype of products.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxlinear.pallas.linear_attention import blocks
from jaxlinear.pallas.linear_attention import gpu_kernels as kernels
from jaxlinear.pallas.linear_attention.plan import Arguments, Plan
from jaxlinear.pallas.parts import head_sums
from jaxlinear.pallas.parts.gpu_layout import Layout, power_of_two
from jaxlinear.pallas.parts.target import Target

Arrays = dict[str, Any]


def call(plan: Plan, arguments: Arguments, target: Target) -> list[jax.Array]:
    """The outputs that ``Plan`` names, in its order, but ``before`` has its own layout here, and a summary gives no
    decay."""
    return _Call(plan, arguments, target).run()


class _Call:
    def __init__(self, plan: Plan, arguments: Arguments, target: Target):
        keys, values = power_of_two(plan.key_width), power_of_two(plan.value_width)
        shared_by = values if plan.shared else None
        block = blocks.gpu(plan.length, keys, plan.decay, plan.packed, plan.chunk, target.gpu, shared_by)
        tiles = min(block.keys, keys), min(block.values, values), min(block.outputs, values), min(block.gradients, keys)
        self.layout = layout = Layout(plan, block.chunk, keys, values, *tiles, min(block.gradient_values, values))
        self.of_states = dataclasses.replace(layout, value_tile=min(block.states, values))
        self.of_gradients = layout.of_gradients.of_values
        self.plan, self.target, self.given = plan, target, arguments
        self.batch = arguments.keys.shape[0]
        self.shared = self._decays()

    def run(self) -> list[jax.Array]:
        given, kind = self.given, self.plan.kind
        widths = self.plan.key_width, self.plan.value_width
        keys, values = self._by_head(given.keys, widths[0]), self._by_head(given.values, widths[1])
        if kind == "summary":
            return [self._in_time({"k": keys, "v": values})["final"]]
        if kind == "state_gradient":
            return [self._in_time({"q": keys, "d_o": values})["final"]]
        tokens = {"q": self._by_head(given.queries, widths[0]), "k": keys, "v": values}
        if kind == "forward":
            found = self._in_time({"k": keys, "v": values}, states=True)
            inputs = {**tokens, "states": found["states"]}
            o = self._outputs("outputs", inputs, values)
            before = [found["states"]] if self.plan.keep else []
            return [o.reshape(given.values.shape), *before, found["final"]]
        tokens["d_o"] = self._by_head(given.d_o, widths[1])
        found = self._in_time({"q": tokens["q"], "d_o": tokens["d_o"]}, states=True)
        inputs = {**{name: tokens[name] for name in ("q", "k", "d_o")}, "states": found["states"]}
        d_v = self._outputs("values", inputs, values)
        of_keys = self._of_keys({**tokens, "states": found["states"], "before": given.before})
        of_tokens = [of_keys["d_q"], of_keys["d_k"], d_v, *self._of_decays(of_keys)]
        return [*of_tokens, found["final"]]

    def _in_time(self, tokens: Arrays, *, states: bool = False) -> Arrays:
        """The states in time, and what follows from them after the last step."""
        plan, layout = self.plan, self.of_states
        padding = (0, layout.values - plan.value_width), (0, layout.keys - plan.key_width)
        state = jnp.pad(self.given.state, ((0, 0), (0, 0), *padding))
        outputs: Arrays = {}
        if states:
            shape = self.batch, layout.chunks, plan.heads, layout.values, layout.keys
            outputs["states"] = jax.ShapeDtypeStruct(shape, plan.narrow)
        tiles = (layout.values // layout.value_tile) * (layout.keys // layout.key_tile)
        outputs["final"], grid = state, (tiles, plan.heads, self.batch)
        found = self._run(kernels.states_kernel, "states", {**tokens, "state": state}, outputs, grid)
        return {**found, "final": found["final"][..., : plan.value_width, : plan.key_width]}

    def _outputs(self, name: str, inputs: Arrays, like: jax.Array) -> jax.Array:
        layout = self.layout
        grid = layout.chunks * self.batch, layout.values // layout.states_tile, self.plan.heads
        return self._run(kernels.outputs_kernel, name, inputs, {"out": like}, grid)["out"]

    def _of_keys(self, inputs: Arrays) -> Arrays:
        plan, layout, parts = self.plan, self.of_gradients, self.plan.heads
        if plan.shared:
            parts = -(-plan.heads // blocks.GPU_SHARED_HEADS)
        of_parts = jax.ShapeDtypeStruct((self.batch, plan.length, parts, plan.key_width), plan.narrow)
        outputs: Arrays = {"d_q": of_parts, "d_k": of_parts}
        tiles = layout.keys // layout.key_tile
        by_head = tiles, self.batch, plan.heads
        if plan.decay == "channel":
            outputs["d_log_decay"] = self.shared["log_decay"]
        elif plan.decay != "none":
            if plan.decay == "scalar":
                outputs["d_sums"] = jax.ShapeDtypeStruct((*by_head, layout.chunks * layout.chunk), plan.wide)
            outputs["d_total"] = jax.ShapeDtypeStruct((*by_head, layout.chunks, 1), plan.wide)
        found = self._run(kernels.keys_kernel, "keys", inputs, outputs, (layout.chunks, tiles, parts * self.batch))
        if plan.shared and parts > 1:
            for name in ("d_q", "d_k"):
                found[name] = jnp.sum(found[name].astype(plan.wide), axis=2).astype(plan.narrow)
        return found

    def _of_decays(self, found: Arrays) -> list[jax.Array]:
        plan = self.plan
        if plan.decay == "none":
            return []
        if plan.decay == "channel":
            return [found["d_log_decay"]]
        if plan.decay == "constant":
            return [jnp.sum(found["d_total"], axis=(0, 1, 3, 4))]
        d_sums = jnp.sum(found["d_sums"], axis=0)
        d = head_sums.from_last(self._chunked(d_sums)) + jnp.sum(found["d_total"], axis=0)
        return [d.reshape(d_sums.shape)[:, :, : plan.length].swapaxes(1, 2)]

    def _decays(self) -> Arrays:
        """Decays and documents, in the form that all kernels take."""
        plan, given, shared = self.plan, self.given, {}
        padding = self.layout.chunks * self.layout.chunk - plan.length
        if plan.decay == "channel":
            shared["log_decay"] = self._by_head(given.log_decay, plan.key_width)
        elif plan.decay == "constant":
            shared["log_decay"] = given.log_decay.astype(plan.wide)
        elif plan.decay == "scalar":
            by_head = jnp.pad(given.log_decay.astype(plan.wide).swapaxes(1, 2), ((0, 0), (0, 0), (0, padding)))
            coarse, fine = head_sums.coarse_and_fine(self._chunked(by_head))
            shared.update(coarse=coarse.reshape(by_head.shape), fine=fine.reshape(by_head.shape))
        if plan.packed:
            starts = jnp.pad(given.starts.astype(jnp.int32), ((0, 0), (0, padding)))
            shared["runs"] = jnp.cumsum(self._chunked(starts), axis=-1, dtype=jnp.int32).reshape(starts.shape)
        return shared

    def _run(self, kernel, name: str, inputs: Arrays, outputs: Arrays, grid: tuple[int, ...]) -> Arrays:
        inputs = {**inputs, **self.shared}
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs.values()]
        plan, tokens = self.plan, self.batch * self.plan.length * self.plan.heads
        share = {"states": 0.25, "outputs": 0.75, "values": 0.25, "keys": 0.5}[name]
        layout = {"states": self.of_states, "keys": self.of_gradients}.get(name, self.layout)
        found = pl.pallas_call(
            functools.partial(kernel, layout, (*inputs, *outputs)),
            grid=grid,
            out_shape=shapes,
            compiler_params=plgpu.CompilerParams(num_warps=self._warps(name), num_stages=2 if name == "states" else 1),
            cost_estimate=pl.CostEstimate(
                flops=int(share * tokens * plan.products(self.layout.chunk)),
                transcendentals=0,
                bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in (*inputs.values(), *shapes)),
            ),
            name=f"{plan.name}_{name}",
            interpret=self.target.interpret,
        )(*inputs.values())
        return dict(zip(outputs, found, strict=True))

    def _warps(self, name: str) -> int:
        """The smallest number with which no kernel spills registers."""
        plan, layout = self.plan, self.layout
        if name == "states" or (plan.decay == "channel" and name != "keys"):
            return 4
        many = layout.chunk > 64 or max(layout.keys, layout.values) > 128 or (plan.shared and name == "keys")
        return 8 if plan.decay == "channel" or many else 4

    def _by_head(self, x: jax.Array, width: int) -> jax.Array:
        """``[B, T, H K]`` -> ``[B, T, H, K]``; one head if all heads share it."""
        return x.reshape(*x.shape[:2], -1, width)

    def _chunked(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.layout.chunks, self.layout.chunk)
