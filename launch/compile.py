"""Says what a run will take before it is launched: python launch/compile.py --config=configs/NAME.py --topology=v5e:4x4

Compiles the config's training step for devices that need not be present (``pip install 'jaxlinear[aot]'``). It prints
whether the step fits, what a device holds, what is exchanged, and the least time per step at data-sheet rates. With
--search it also ranks other settings that would fit: meshes, model.remat and training.microbatches. The exit status is 1
if the config does not fit.
"""

import json
import pathlib

from absl import flags
from ml_collections import config_flags

from jaxlinear import cli
from jaxlinear.costs import targets

targets.set_environment()  # before the config file is read, as that imports JAX

_CONFIG = config_flags.DEFINE_config_file("config", help_string="The config to compile: a file in configs/.")
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Devices: v5e:4x4, v5p:4x4x4, tpu7x:4x4x4, 2xv6e:16x16 or h100:16.", required=True
)
_SEARCH = flags.DEFINE_integer(
    "search", 0, "Also compile this many of the most promising other settings.", lower_bound=0
)
_JSON = flags.DEFINE_string("json", None, "Also write the result to this file.")
flags.mark_flag_as_required("config")


def main() -> int:
    cli.check_output("json", _JSON.value)
    from jaxlinear.launching import search, sizing, sizing_text

    target = targets.find(_TOPOLOGY.value)
    sized = sizing.size(_CONFIG.value, target)
    print(sizing_text.table(sized))
    result = sized.to_json()
    if _SEARCH.value:
        found = search.search(_CONFIG.value, target, _SEARCH.value, show=print, compiled=sized)
        print(sizing_text.ranking(found))
        result["search"] = [other.to_json() for other in found]
    elif not sized.fits:
        print(sizing_text.advice(search.candidates(_CONFIG.value, target, sized)))
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if sized.fits else 1


if __name__ == "__main__":
    cli.run(main)
