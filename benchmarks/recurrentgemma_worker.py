"""The comparison side of ``train_step.py`` and ``decode.py``: Griffin from the ``recurrentgemma`` package, step by step.

The script uses nothing from jaxlinear and runs under the Python (3.11) of its own environment:

    python3.11 -m venv RG && RG/bin/pip install -r benchmarks/recurrentgemma.txt
    yes go | head -4 | RG/bin/python benchmarks/recurrentgemma_worker.py train --batch=4 --length=1024 --scan=native
    yes go | head -4 | RG/bin/python benchmarks/recurrentgemma_worker.py decode --streams=8 --prompt=64 --tokens=64

It compiles and prints one JSON line, {"ready": true, "compile_seconds": ..., ...}. For each line "go" on standard input it
then runs one training step, or one round of ``--tokens`` tokens in each stream, waits for the result, and prints
{"seconds": ..., "tokens": ..., ...}. The first go is also the first execution (it faults the memory in), so leave it out of
reported figures. Only these lines go to standard output; everything else goes to standard error.

The package runs unchanged on the CPU, in float32 (parameters, activations, scan), as the preset ``griffin_6m``: 6 layers
(recurrent, recurrent, attention) x 2, tied embeddings, 5.9 M parameters; no logit cap and no embedding scale, as in the
package's preset of the Griffin paper.
  * ``scan_type`` by --scan: native is LINEAR_NATIVE (``lax.scan``; what the package's AUTO picks on a CPU), associative is
    ASSOCIATIVE_NATIVE (``lax.associative_scan``).
  * ``gradient_checkpointing`` is True in the package and False here, where memory is not scarce.
  * training asks for no cache (``return_cache=False``).
  * decoding is the package's own ``Sampler``: its jitted prompt processing, then its jitted sampling, a ``while_loop`` of
    single-token steps on a donated state, greedy, not stopping at EOS. The prompt is processed anew in each round and
    reported separately ("prefill_seconds"). The attention window is cut to the length of the sequence where that is
    shorter, which is what the package's ``max_sequence_length`` does (same tokens, less to attend over).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported

import jax
import jax.numpy as jnp
import optax
from recurrentgemma import jax as recurrentgemma

WIDTH, LAYERS, HEADS, EXPANSION, WINDOW, VOCABULARY, SEED = 256, 6, 4, 3, 512, 4096, 0

SCANS = {
    "native": recurrentgemma.ScanType.LINEAR_NATIVE,
    "associative": recurrentgemma.ScanType.ASSOCIATIVE_NATIVE,
}

Record = dict[str, Any]


class Vocabulary:
    """The part of a SentencePiece vocabulary that `Sampler` uses on token numbers, in place of a model file."""

    def pad_id(self) -> int:
        return 0

    def eos_id(self) -> int:
        return 1

    def bos_id(self) -> int:
        return 2


def build(scan: str, window: int) -> recurrentgemma.Griffin:
    """The Griffin of the comparison."""
    recurrent, attention = recurrentgemma.TemporalBlockType.RECURRENT, recurrentgemma.TemporalBlockType.ATTENTION
    pattern = itertools.cycle([recurrent, recurrent, attention])
    config = recurrentgemma.GriffinConfig(
        vocab_size=VOCABULARY,
        width=WIDTH,
        mlp_expanded_width=EXPANSION * WIDTH,
        num_heads=HEADS,
        block_types=tuple(itertools.islice(pattern, LAYERS)),
        embeddings_scale_by_sqrt_dim=False,
        attention_window_size=window,
        logits_soft_cap=0.0,
        lru_width=WIDTH,
        scan_type=SCANS[scan],
    )
    return recurrentgemma.Griffin(config, gradient_checkpointing=False, dtype=jnp.float32, param_dtype=jnp.float32)


def initial(model: recurrentgemma.Griffin) -> tuple[Any, int]:
    """The model's parameters and how many there are."""
    tokens = jnp.zeros((1, 8), jnp.int32)
    positions = jnp.arange(8, dtype=jnp.int32)[None]
    params = jax.jit(model.init)(jax.random.key(SEED), tokens, positions)["params"]
    leaves = jax.tree.leaves(params)
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)
    return jax.block_until_ready(params), sum(leaf.size for leaf in leaves)


def compile_timed(function: Any, *arguments: Any) -> tuple[Callable[..., Any], Record]:
    """`function.lower(...).compile()`, and how long both together and the lowering (tracing included) alone took."""
    start = time.perf_counter()
    lowered = function.lower(*arguments)
    lowering = time.perf_counter() - start
    compiled = lowered.compile()
    return compiled, {"compile_seconds": time.perf_counter() - start, "lower_seconds": lowering}


def prepare_train(options: argparse.Namespace) -> tuple[Record, Callable[[], Record]]:
    """Compiles the training step; returns what "ready" reports and a function that runs one timed step."""
    model = build(options.scan, WINDOW)
    params, parameters = initial(model)
    optimizer = optax.adamw(1e-3, b1=0.9, b2=0.95, weight_decay=0.1)
    shape = (options.batch, options.length)
    tokens = jax.random.randint(jax.random.key(SEED + 1), (shape[0], shape[1] + 1), 0, VOCABULARY, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)

    def loss_of(params: Any, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        logits, _ = model.apply({"params": params}, tokens[:, :-1], positions, return_cache=False)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def step(state: Any, tokens: jax.Array, positions: jax.Array) -> tuple[Any, jax.Array]:
        params, moments = state
        loss, gradients = jax.value_and_grad(loss_of)(params, tokens, positions)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    state = jax.block_until_ready((params, jax.jit(optimizer.init)(params)))
    compiled, times = compile_timed(jax.jit(step, donate_argnums=0), state, tokens, positions)

    def go() -> Record:
        nonlocal state
        start = time.perf_counter()
        state, loss = jax.block_until_ready(compiled(state, tokens, positions))
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": options.batch * options.length, "loss": float(loss)}

    return {**times, "parameters": parameters}, go


def prepare_decode(options: argparse.Namespace) -> tuple[Record, Callable[[], Record]]:
    """Compiles the package's sampler; returns what "ready" reports and a function that runs one timed round."""
    window = min(WINDOW, options.prompt + options.tokens)
    model = build(options.scan, window)
    params, parameters = initial(model)
    sampler = recurrentgemma.Sampler(model, Vocabulary(), params)
    shape = (options.streams, options.prompt)
    prompts = jax.random.randint(jax.random.key(SEED + 1), shape, 0, VOCABULARY, jnp.int32)
    steps = options.tokens + 1  # the first token comes from the prompt, the others from the timed loop

    # The sampler donates the prompts too, so each round hands it a copy.
    def prompt_arguments() -> tuple[Any, ...]:
        return params, jnp.copy(prompts), None, jnp.full(shape[0], shape[1], jnp.int32)

    # Not `sampler(...)`, which does the same and also handles a tokenizer and the text.
    prefill, prefill_times = compile_timed(sampler.prompt_processing_fn, *prompt_arguments(), steps, False, False)
    leaves, structure = jax.tree.flatten(prefill(*prompt_arguments()))

    # The state is passed as leaves: the package checks the types of its fields, and refuses those that `lower` passes.
    def loop(params: Any, leaves: list[jax.Array]) -> list[jax.Array]:
        return jax.tree.leaves(sampler.sample_fn(params, jax.tree.unflatten(structure, leaves), False))

    sample, times = compile_timed(jax.jit(loop, donate_argnums=1), params, leaves)

    def go() -> Record:
        arguments = jax.block_until_ready(prompt_arguments())
        start = time.perf_counter()
        leaves = jax.block_until_ready(jax.tree.leaves(prefill(*arguments)))
        middle = time.perf_counter()
        leaves = jax.block_until_ready(sample(params, leaves))
        end = time.perf_counter()
        assert jax.tree.unflatten(structure, leaves).step == options.tokens
        tokens = options.streams * options.tokens
        return {"seconds": end - middle, "tokens": tokens, "prefill_seconds": middle - start}

    told = {**times, "prefill_compile_seconds": prefill_times["compile_seconds"]}
    return {**told, "parameters": parameters, "window": window}, go


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command, numbers in (("train", ("batch", "length")), ("decode", ("streams", "prompt", "tokens"))):
        added = commands.add_parser(command)
        added.add_argument("--scan", choices=sorted(SCANS), default="native")
        for name in numbers:
            added.add_argument(f"--{name}", type=int, required=True)
    return parser.parse_args()


def main() -> None:
    options = parse()
    # Standard output carries JSON alone: anything that a library prints, from Python or below, goes to standard error.
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(record: Record) -> None:
        print(json.dumps(record), file=lines, flush=True)

    jax.config.update("jax_enable_compilation_cache", False)  # so that compile_seconds measures a compilation
    told, go = (prepare_train if options.command == "train" else prepare_decode)(options)
    versions = {name: importlib.metadata.version(name) for name in ("recurrentgemma", "flax", "jax")}
    tell({"ready": True, **told, "scan": options.scan, "device": jax.devices()[0].platform, "versions": versions})
    for line in sys.stdin:
        if line.strip() != "go":
            sys.exit(f"expected the line 'go', found {line.strip()!r}")
        tell(go())


if __name__ == "__main__":
    main()
