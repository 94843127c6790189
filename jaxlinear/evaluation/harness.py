"""The EleutherAI harness (lm_eval) on a run: its tasks, scored by ``scoring.Scorer``. Needs the extra ``eval``.

A task is ``harness:NAME`` or ``harness:FILE.yaml``, followed by options: ``:limit=200`` questions, ``:fewshot=5``, and
``:data=FILE`` (JSON lines or Arrow) instead of the dataset that the task would download.
"""

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlinear import generation, specs
from jaxlinear.data import load_tokenizer
from jaxlinear.errors import UserError
from jaxlinear.evaluation.options import Options
from jaxlinear.evaluation.run import Run
from jaxlinear.evaluation.scoring import Scorer

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise UserError(f"harness tasks need lm_eval: pip install 'jaxlinear[eval]' ({error})") from None

_OPTIONS = {"limit": int, "fewshot": int, "data": str}
_LEAST = {"limit": 1, "fewshot": 0}
_BUILDERS = {".jsonl": "json", ".json": "json", ".arrow": "arrow", ".parquet": "parquet"}


class HarnessModel(TemplateLM):
    """A run wrapped as a model of the harness. A context is the beginning of a document, as in training."""

    def __init__(self, run: Run, batch_tokens: int):
        super().__init__()
        self._tokens = load_tokenizer(run.workdir)
        self._run, self._scorer = run, Scorer(run, batch_tokens, self._tokens.vocab_size)
        self._batch_tokens = batch_tokens

    @property
    def eot_token_id(self) -> int:
        return self._tokens.document_token

    @property
    def tokenizer_name(self) -> str:
        return self._tokens.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of the text alone."""
        return self._tokens.encode(string).tolist()

    def _begun(self, tokens: Sequence[int]) -> tuple[int, ...]:
        document = self._tokens.document_token
        return tuple(tokens) if len(tokens) and tokens[0] == document else (document, *tokens)

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probabilities of continuations, and whether each is greedy."""
        for context, continuation in (request.args for request in requests):
            if not context:  # lm_eval looks at the first token of what follows
                _check_left(context, continuation, self.tok_encode(continuation))
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests, **_: Any) -> list[tuple[float, bool]]:
        pairs = []
        for (context, continuation), before, after in requests:
            _check_left(context, continuation, after)
            pairs.append((self._begun(before), tuple(after)))
        scores = self._scorer.score(pairs)
        for (texts, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, score)
        return scores

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts, each including its first token."""
        texts = [request.args[0] for request in requests]
        scores = self._scorer.whole([self._begun(self.tok_encode(text)) for text in texts])
        for text, score in zip(texts, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), score)
        return scores

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The texts that follow, each up to the first of its ``until``. A text is sampled by the index of its request, so
        repeats of a question are sampled independently and the batching makes no difference."""
        made = [""] * len(requests)
        prompts = [self._begun(self.tok_encode(request.args[0])) for request in requests]
        model = self._run.architecture.bind(self._run.parameters).for_decoding()
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        for group in groups.values():
            group.sort(key=lambda i: len(prompts[i]))
            until, limit, sampling = _sampling(requests[group[0]].args[1])
            for some in self._by_length(prompts, group):
                texts = self._generate(model, [prompts[i] for i in some], some, until, limit, sampling)
                for i, text in zip(some, texts, strict=True):
                    made[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return made

    def _by_length(self, prompts: list[tuple[int, ...]], group: list[int]) -> list[list[int]]:
        """The group, sorted by length, in batches of at most ``batch_tokens``, counted as the prompts are padded."""
        batches: list[list[int]] = [[]]
        for i in group:
            if batches[-1] and (len(batches[-1]) + 1) * len(prompts[i]) > self._batch_tokens:
                batches.append([])
            batches[-1].append(i)
        return batches

    def _generate(
        self, model, prompts, numbers: list[int], until: list[str], limit: int, sampling: generation.Sampling
    ) -> list[str]:
        """Ends when every row has one of ``until``, has reached the end of its document, or has ``limit`` tokens."""
        stops = self._tokens.stop_tokens
        more = self._scorer.many(len(prompts)) - len(prompts)  # copies of the last row
        asked, drawn_by = [*prompts, *prompts[-1:] * more], [*numbers, *numbers[-1:] * more]
        before = [self._tokens.decode(np.array(prompt)) for prompt in prompts]
        rows: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        done = [False] * len(prompts)
        mesh = self._run.mesh if self._run.mesh.size > 1 else None
        for new in generation.chunks(
            model, asked, sampling, limit, stops, self._tokens.vocab_size, mesh=mesh, numbers=drawn_by
        ):
            for i, tokens in enumerate(new.T[: len(prompts)].tolist()):
                if done[i]:
                    continue
                kept = generation.until(tokens, stops)
                ended = len(kept) < len(tokens)
                rows[i] += kept
                whole = self._tokens.decode(np.array([*prompts[i], *rows[i]]))[len(before[i]) :]
                texts[i], stopped = _truncated(whole, until)
                done[i] = ended or stopped
            if all(done):
                break
        return texts


def _check_left(context: str, continuation: str, tokens: Sequence[int]) -> None:
    """Raises ``UserError`` if a continuation has no tokens after its context."""
    if not tokens:
        raise UserError(f"the tokenizer leaves nothing of {continuation!r} after {context[-40:]!r}")


def _sampling(arguments: dict[str, Any]) -> tuple[list[str], int, generation.Sampling]:
    """``until``, the maximum number of tokens, and the sampling, from the arguments of a harness request. As in lm_eval,
    ``do_sample`` samples, by default at temperature 1, and so does a temperature alone. Null means not given."""
    known = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}
    if unknown := sorted(set(arguments) - known):
        raise UserError(f"generation with {unknown[0]} is not supported; the options are {', '.join(sorted(known))}")
    given = {name: value for name, value in arguments.items() if value is not None}

    def number(name: str, default: float) -> float:
        try:
            return float(given.get(name, default))
        except (TypeError, ValueError):
            raise UserError(f"generation with {name}: {given[name]!r} is not a number") from None

    draws = given.get("do_sample")
    temperature = 0.0 if draws is False else number("temperature", 1.0 if draws else 0.0)
    sampling = (
        generation.Sampling(temperature, int(number("top_k", 0)), number("top_p", 1.0))
        if temperature
        else generation.Sampling(temperature=0.0)
    )
    until = given.get("until", [])
    return [until] if isinstance(until, str) else list(until), int(number("max_gen_toks", 256)), sampling


def _truncated(text: str, until: Sequence[str]) -> tuple[str, bool]:
    """The text before the first of ``until``, and whether there is one."""
    ends = [place for end in until if end and (place := text.find(end)) >= 0]
    return (text[: min(ends)], True) if ends else (text, False)


def prepare(run: Run, spec: str, options: Options) -> Callable[[], dict[str, Any]]:
    """A function that measures the metrics of a harness task, as the harness reports them. Data are read or downloaded
    here."""
    name, given = _split(spec)
    model = HarnessModel(run, run.batch_tokens(options.batch_tokens))
    manager, tasks = _load(name, given.get("data"))
    _check(spec, manager.load(tasks)["tasks"], given.get("fewshot"))

    def measure() -> dict[str, Any]:
        found = lm_eval.simple_evaluate(
            model,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=given.get("fewshot"),
            limit=given.get("limit"),
            bootstrap_iters=1000,
            log_samples=False,
        )
        assert found is not None  # it is None on all processes but the first
        return {"lm_eval": lm_eval.__version__, "tasks": {task: _metrics(found, task) for task in found["results"]}}

    return measure


def _metrics(found: dict[str, Any], task: str) -> dict[str, Any]:
    values = {
        key.removesuffix(",none"): value
        for key, value in found["results"][task].items()
        if isinstance(value, int | float)
    }
    samples = found.get("n-samples", {}).get(task, {})
    return {"samples": samples.get("effective"), "of": samples.get("original")} | values


def _error(name: str) -> str:
    """The key of the standard error of a metric, which is ``METRIC`` or ``METRIC,FILTER``."""
    metric, comma, filtering = name.partition(",")
    return f"{metric}_stderr{comma}{filtering}"


def _scores(values: dict[str, Any]) -> dict[str, float]:
    """The metrics among the values of a task, without their errors and the question counts."""
    errors = {_error(name) for name in values}
    return {name: value for name, value in values.items() if isinstance(value, float) and name not in errors}


def scalars(report: dict[str, Any]) -> dict[str, float]:
    """The numbers plotted over a run's steps."""
    return {
        f"{name}, {task}": value for task, values in report["tasks"].items() for name, value in _scores(values).items()
    }


def table(report: dict[str, Any]) -> str:
    """A report of ``evaluate`` as readable text."""
    lines = [f"lm_eval {report['lm_eval']}"]
    for task, values in report["tasks"].items():
        shown = [
            f"{name} {value:.4f}" + (f" ± {values[error]:.4f}" if (error := _error(name)) in values else "")
            for name, value in _scores(values).items()
        ]
        lines.append(f"{task}: {', '.join(shown)}; {values['samples']} of {values['of']} questions")
    return "\n".join(lines)


def _split(spec: str) -> tuple[str, dict[str, Any]]:
    """The task's name and its options, as values."""
    name, texts = specs.split(spec, prefix="harness:")
    if not name or spec == "harness":
        raise UserError(
            f"{spec!r} does not name a task; write harness:NAME, such as harness:piqa, or harness:FILE.yaml"
        )
    return name, {option: _value(spec, option, text) for option, text in texts.items()}


def _value(spec: str, option: str, text: str) -> Any:
    if option not in _OPTIONS:
        raise UserError(f"{spec!r}: there is no option {option!r}; the options are {', '.join(_OPTIONS)}")
    try:
        value = _OPTIONS[option](text)
    except ValueError:
        raise UserError(f"{spec!r}: {option} must be a whole number, not {text!r}") from None
    if option in _LEAST and value < _LEAST[option]:
        raise UserError(f"{spec!r}: {option}={text} must be at least {_LEAST[option]}")
    return value


def _load(name: str, data: str | None) -> tuple[TaskManager, list[Any]]:
    """The tasks of that name. A single task's file is found directly: the manager would read all task files."""
    file = Path(name) if name.endswith((".yaml", ".yml")) else _find(name)
    if file is None:
        if data is not None:
            raise UserError(f"{name!r} is not a single task file of lm_eval, so data={data} cannot replace its data")
        manager = TaskManager()
        if name not in manager.all_tasks:
            raise UserError(f"lm_eval has no task {name!r}; `lm-eval ls tasks` lists its tasks")
        loaded = _loaded(manager, name, name)
        return manager, [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())
    if not file.is_file():
        raise UserError(f"there is no task file {file}")
    manager = TaskManager(include_defaults=False)
    if data is None:
        return manager, list(_loaded(manager, name, file)["tasks"].values())
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(folder) / "task.yaml"
        changed.write_text(_with_data(file, Path(data)), encoding="utf-8")
        return manager, list(_loaded(manager, name, changed)["tasks"].values())


def _loaded(manager: TaskManager, name: str, found: str | Path) -> Any:
    """What lm_eval loads for a name or file, by name under ``tasks`` and ``groups``. It may download data."""
    try:
        return manager.load([str(found)])
    except Exception as error:  # anything: from the network, the data, the task's file, or packages that it needs
        raise UserError(f"lm_eval cannot load the task {name!r}: {'; for '.join(_reasons(error))}") from error


def _reasons(error: BaseException | None) -> Iterator[str]:
    """The error and its causes: the datasets library's own message says only that there was one."""
    while error is not None:
        yield f"{type(error).__name__}: {error}"
        error = error.__cause__


def _check(spec: str, tasks: dict[str, Any], fewshot: int | None) -> None:
    """Raises ``UserError`` for tasks that have more than text or need unsupported kinds of generation, and for more
    few-shot examples than there are. Otherwise these would fail with a traceback, or only after the work."""
    for name, task in tasks.items():
        for attribute, reason in (
            ("UNSAFE_CODE", "runs code that the model writes"),
            ("MULTIMODAL", "uses more than text"),
        ):
            if getattr(task, attribute, False):
                raise UserError(f"{spec!r}: {name} {reason}, which is not supported")
        if not isinstance(task, ConfigurableTask):
            continue  # a task class of its own, which exposes less
        if task.OUTPUT_TYPE == "generate_until":
            _sampling(task.config.generation_kwargs or {})
        shots = task.config.num_fewshot
        if fewshot is not None and shots != 0:  # lm_eval keeps a task's own 0
            shots = fewshot
        if shots:
            examples = task.sampler.fewshot_docs() if hasattr(task, "sampler") else []
            most = len(examples) - (task.fewshot_cfg.split == task.config.test_split)  # without the question itself
            if shots > most:
                raise UserError(
                    f"{spec!r}: {name} does not have {shots} examples per question; the largest possible is "
                    f"fewshot={max(most, 0)}"
                )


def _find(name: str) -> Path | None:
    """The file of a task that ships with lm_eval."""
    folder = Path(lm_eval.__file__).parent / "tasks"
    line = re.compile(rf"^task: *[\"']?{re.escape(name)}[\"']? *$", re.MULTILINE)
    nearest = [path for path in folder.rglob(f"{name}.yaml") if line.search(path.read_text(encoding="utf-8"))]
    if nearest:
        return nearest[0]
    return next(
        (path for path in sorted(folder.rglob("*.yaml")) if line.search(path.read_text(encoding="utf-8"))), None
    )


def _with_data(file: Path, data: Path) -> str:
    """A task file like ``file`` that takes its questions and few-shot examples from ``data``, as a single test split, in
    which the harness excludes a question from its own examples."""
    if data.suffix not in _BUILDERS:
        raise UserError(f"data={data}: its name must end in {', '.join(_BUILDERS)}")
    if not data.is_file():
        raise UserError(f"data={data}: the file does not exist")
    path = str(data.absolute()).replace("'", "''")
    return f"""include: '{str(file.absolute()).replace("'", "''")}'
dataset_path: {_BUILDERS[data.suffix]}
dataset_name: null
dataset_kwargs:
  data_files:
    validation: '{path}'
training_split: null
validation_split: null
test_split: validation
fewshot_split: validation
"""
