"""Decoding speed in tokens per second over all streams, excluding prompts and compilation; greedy, float32.

    python benchmarks/decode.py --model=griffin_6m --streams=8 --prompt=64 --tokens=64 [--json=FILE]
    python benchmarks/decode.py --against=RG/bin/python        # the same model in the recurrentgemma package

With --against, the named Python runs benchmarks/recurrentgemma_worker.py (which says how to make its environment), and
the two take turns, so that both see the same machine. The weights are random, since the speed does not depend on them. The
package cuts its attention window to the length of the text, as ours does.
"""

import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import common
from absl import flags

from jaxlinear import cli
from jaxlinear.errors import UserError

_MODEL = flags.DEFINE_string("model", "griffin_6m", "A preset; --against supports griffin_6m only.")
_STREAMS = flags.DEFINE_integer("streams", 8, "Prompts continued together, B.", lower_bound=1)
_PROMPT = flags.DEFINE_integer("prompt", 64, "Tokens of each prompt.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 64, "Tokens decoded per stream in a round.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds, after one warm-up round.", lower_bound=1)
_AGAINST = flags.DEFINE_string("against", None, "The Python of an environment with the recurrentgemma package.")
common.define_json()


def main() -> None:
    if _AGAINST.value and _MODEL.value != "griffin_6m":
        raise UserError(f"--against supports the model griffin_6m only, not {_MODEL.value}")
    shape = {"streams": _STREAMS.value, "prompt": _PROMPT.value, "tokens": _TOKENS.value}
    parts, worker = {"jaxlinear": _ours()}, None
    with contextlib.ExitStack() as stack:
        if _AGAINST.value:
            worker = stack.enter_context(common.Worker(_AGAINST.value, "decode", **shape))
            parts["recurrentgemma"] = worker.tokens_per_second
        rates = common.alternate(parts, _ROUNDS.value)
    result: dict[str, Any] = {"model": _MODEL.value, **shape, "load_average": os.getloadavg()[0]}
    for name, values in rates.items():
        result[name] = {"tokens_per_second": statistics.median(values), "rounds": values}
    if worker:
        result["recurrentgemma"]["worker"] = worker.told
        result["ratio"] = statistics.median(
            ours / theirs for ours, theirs in zip(rates["jaxlinear"], rates["recurrentgemma"], strict=True)
        )
    print(json.dumps(result, indent=2))
    common.write(result)


def _ours() -> Callable[[], float]:
    """A compiled function that decodes one round and returns its tokens per second."""
    import jax
    import numpy as np

    from jaxlinear import generation
    from jaxlinear.models import ModelConfig, parameters, presets

    architecture = parameters.describe(ModelConfig(**presets.find(_MODEL.value), dtype="float32"))
    model = architecture.bind(jax.jit(architecture.initialise)(jax.random.key(0))).for_decoding()
    random = np.random.default_rng(1)
    prompts = list(random.integers(0, model.config.vocab_size, (_STREAMS.value, _PROMPT.value)))

    def go() -> float:
        rounds = generation.chunks(model, prompts, generation.Sampling(temperature=0.0), _TOKENS.value + 1)
        next(rounds)  # the first token comes from the prompt
        begin = time.perf_counter()
        made = sum(tokens.size for tokens in rounds)
        seconds = time.perf_counter() - begin
        assert made == _STREAMS.value * _TOKENS.value
        return made / seconds

    go()
    return go


if __name__ == "__main__":
    cli.run(main)
