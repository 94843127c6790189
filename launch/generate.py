"""Continues text with a trained run: python launch/generate.py --workdir=DIR --prompt=TEXT [--prompt=TEXT ...]"""

from absl import flags

from jaxlinear import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; the newest by default.")
_PROMPT = flags.DEFINE_multi_string("prompt", None, "Text to continue; several prompts make a batch.", required=True)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "End after this many new tokens, or with the document.")
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Sampling temperature; 0 takes the likeliest token each time.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Sample from this many of the likeliest tokens; 0 means all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample from the likeliest tokens that together have this probability.")
_MESH = flags.DEFINE_list("mesh", [], "Mesh of all devices, e.g. sequence=8; by default only the first device is used.")
_SEED = flags.DEFINE_integer("seed", 0, "The same seed gives the same text.")


def main() -> None:
    cli.leave_out_warnings_of_orbax()
    from jaxlinear import generation
    from jaxlinear.errors import UserError

    sampling = {
        "temperature": _TEMPERATURE.value,
        "top_k": _TOP_K.value,
        "top_p": _TOP_P.value,
        "seed": _SEED.value,
    }
    generation.Sampling(**sampling)  # refuses bad values before a large checkpoint is read
    unread = [f"--{flag.name}" for flag in (_TOP_K, _TOP_P) if flags.FLAGS[flag.name].present]
    if _TEMPERATURE.value == 0 and unread:
        raise UserError(
            f"--temperature=0 takes the likeliest token, so that {', '.join(unread)} would do nothing; leave it out"
        )
    writer = generation.Writer.open(_WORKDIR.value, _STEP.value, _MESH.value)
    options = sampling | {"max_tokens": _MAX_TOKENS.value}
    if len(_PROMPT.value) == 1:
        for text in writer.stream(_PROMPT.value[0], **options):
            print(text, end="", flush=True)
        print()
        return
    for i, text in enumerate(writer.write(_PROMPT.value, **options)):
        print(f"--- {i + 1}\n{text}")


if __name__ == "__main__":
    cli.run(main)
