"""Checks the kernels on this device: python launch/check.py --config=configs/NAME.py

Each operation that the config's model calls in training runs on the first device, with a kernel and without one, and in
float32 on the CPU, with gradients, on inputs of the model's shapes. The output shows how far each is off and how long it
takes. The check is one process and takes minutes. The exit status is 1 if a kernel is wrong.
"""

import dataclasses
import json
import pathlib

from absl import flags
from ml_collections import config_flags

from jaxlinear import cli
from jaxlinear.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", help_string="The config to check: a file in configs/.")
_LENGTH = flags.DEFINE_integer("length", None, "Tokens per row; by default those of training, up to 2,048.")
_ROWS = flags.DEFINE_integer("rows", 2, "Rows per batch.", lower_bound=1)
_INTERPRET = flags.DEFINE_boolean("interpret", False, "Without a TPU or GPU, interpret the kernels, which is slow.")
_JSON = flags.DEFINE_string("json", None, "Also write the result to this file.")
flags.mark_flag_as_required("config")


def main() -> int:
    cli.check_output("json", _JSON.value)
    import jax

    from jaxlinear.launching import device_check, device_check_text
    from jaxlinear.ops import backends
    from jaxlinear.parallel import distributed

    distributed.use_gpu_memory()
    device = jax.devices()[0]
    if device.platform not in backends.COMPILED and not _INTERPRET.value:
        raise UserError(
            f"this machine has no TPU or GPU, only {device.device_kind}; --interpret checks kernels without one"
        )
    print(f"{device.device_kind}\n{device_check_text.HEADER}", flush=True)
    found = []
    for checked in device_check.check(_CONFIG.value, device, length=_LENGTH.value, rows=_ROWS.value):
        print(device_check_text.line(checked), flush=True)
        found.append(checked)
    print(device_check_text.verdict(found))
    if _JSON.value:
        result = {"device": device.device_kind, "checked": [dataclasses.asdict(checked) for checked in found]}
        pathlib.Path(_JSON.value).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if all(checked.is_right for checked in found) else 1


if __name__ == "__main__":
    cli.run(main)
