"""What ``launch/check.py`` prints."""

from collections.abc import Sequence

from jaxlinear.launching.device_check import Checked

HEADER = f"{'operation':25} {'inputs':7} {'worst array':25} {'off by':>8} {'without':>8} {'ms':>10} {'without':>10}"


def line(checked: Checked) -> str:
    """The result of one operation with inputs of one kind. "without" means without a kernel."""
    name = f"{checked.operation:25} {checked.inputs:7}"
    if checked.refused is not None:
        return f"{name} no kernel: {checked.refused}"
    worst = checked.worst
    text = f"{name} {worst.array:25} {worst.kernel:8.1e} {worst.without:8.1e}"
    if checked.milliseconds is not None:
        text += " {:10.3f} {:10.3f}".format(*checked.milliseconds)
    return text if checked.is_right else f"{text}  WRONG: at most {worst.allowed:.1e} is allowed"


def verdict(found: Sequence[Checked]) -> str:
    """The last line."""
    if wrong := dict.fromkeys(checked.operation for checked in found if not checked.is_right):
        return (
            f"wrong on this device: the kernels of {', '.join(wrong)}; --config.model.kernels=False trains without any"
        )
    if right := dict.fromkeys(checked.operation for checked in found if checked.refused is None):
        return f"right on this device: the kernels of {', '.join(right)}"
    return "no operation of this model is a kernel on this device"
