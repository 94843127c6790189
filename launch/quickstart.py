"""From nothing to a language model: a corpus, a trained Griffin, its held-out loss, a sample. `make quickstart` runs it.

Started again, it resumes where it stopped; if the run is finished, it only evaluates and samples.
"""

import os
import pathlib
import shlex
import sys
import time

from absl import flags

from jaxlinear import cli, exit_status

_WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Directory of the corpus and the run.")
_PROMPT = "def "


def main() -> int:
    from jaxlinear import data, evaluation, generation
    from jaxlinear.training import loop, metrics

    path = pathlib.Path(__file__).absolute().parents[1] / "configs" / "quickstart.py"
    module = cli.load_module(path)

    begin = time.perf_counter()
    workdir = pathlib.Path(_WORKDIR.value)
    corpus = workdir / "corpus"
    if not corpus.exists():
        print("== preparing the sources of Python's standard library", flush=True)
        data.prepare("python-stdlib", corpus, tokenizer="bpe", vocab_size=module.VOCAB_SIZE, block_length=2048)
    config = module.get_config()
    config.data.path = str(corpus.absolute())
    print("== training", flush=True)
    status = loop.train(config, workdir)
    if status != exit_status.FINISHED:
        return status

    print("== evaluating the held-out split", flush=True)
    cli.leave_out_warnings_of_orbax()
    report = evaluation.evaluate(workdir, lengths=[4])["perplexity"]
    print(evaluation.perplexity.table(report))
    result = report["lengths"][-1]
    print("== a sample", flush=True)
    writer = generation.Writer.open(workdir)
    print(writer.write([_PROMPT], max_tokens=96, temperature=0.7, top_p=0.95, seed=1)[0])

    rates = sorted(line["tokens_per_second"] for line in metrics.read(workdir) if "tokens_per_second" in line)
    programs = pathlib.Path(__file__).absolute().parent
    python, train, evaluate, generate, quickstart = (
        shlex.quote(_relative(path))
        for path in (sys.executable, *(programs / f"{name}.py" for name in ("train", "evaluate", "generate")), path)
    )
    run, corpus = shlex.quote(str(workdir)), shlex.quote(str(corpus.absolute()))
    print(
        f"""
held-out loss   {result["loss"]:.3f} nats per token
bits per byte   {result["bits_per_byte"]:.3f}    gzip -9 {report["gzip_bits_per_byte"]:.3f}    \
xz -9 {report["xz_bits_per_byte"]:.3f}    (the same {report["bytes"]:,} bytes)
speed           {rates[len(rates) // 2]:,.0f} tokens per second (median)
the run         {workdir}
time            {time.perf_counter() - begin:.0f} s

next steps:
  resume, longer  {python} {train} --config={quickstart} --workdir={run} --config.data.path={corpus} \
--config.training.steps={config.training.steps * 2}
  evaluate        {python} {evaluate} --workdir={run}
  generate        {python} {generate} --workdir={run} --prompt='import ' --temperature=0.7
  TensorBoard     {python} -m pip install tensorboard && {python} -m tensorboard.main --logdir={run}"""
    )
    return 0


def _relative(path: str | os.PathLike) -> str:
    here, path = pathlib.Path.cwd(), pathlib.Path(path)
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


if __name__ == "__main__":
    cli.run(main)
