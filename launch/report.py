"""Writes one HTML page about a run: python launch/report.py --workdir=DIR [--output=FILE] [--prompt=TEXT ...]

Config, curves, evaluations, samples and hardware, in one file that needs no network. It needs the extra ``plot``.
"""

import pathlib

from absl import flags

from jaxlinear import cli
from jaxlinear.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "File to write; by default report.html in the run's directory.")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "Also show how the newest checkpoint continues this text.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 200, "Most tokens of such a sample.", lower_bound=1)


def main() -> None:
    cli.check_output("output", _OUTPUT.value)
    cli.leave_out_warnings_of_orbax()
    from jaxlinear import generation
    from jaxlinear.evaluation import report

    if _MAX_TOKENS.present and not _PROMPT.value:
        raise UserError("--max_tokens is for the samples of --prompt; give a --prompt, or leave it out")
    samples: list[tuple[str, str]] = []
    if _PROMPT.value:
        writer = generation.Writer.open(_WORKDIR.value)
        texts = writer.write(_PROMPT.value, max_tokens=_MAX_TOKENS.value)
        samples = list(zip(_PROMPT.value, texts, strict=True))
    output = pathlib.Path(_OUTPUT.value) if _OUTPUT.value else pathlib.Path(_WORKDIR.value) / "report.html"
    output.write_text(report.page(_WORKDIR.value, samples), encoding="utf-8")
    print(output)


if __name__ == "__main__":
    cli.run(main)
