"""What is asked for, whatever the scheduler: a training command on a number of devices."""

import dataclasses
import difflib
import math
import re
import shlex
from collections.abc import Sequence

from jaxlinear.costs import targets
from jaxlinear.errors import UserError

# Chips per host in a TPU slice that has several hosts, and GPUs per host.
_ON_A_HOST = {"v5e": 4, "v5p": 4, "v6e": 4, "tpu7x": 4, "h100": 8, "h200": 8, "a100": 8, "gpu": 8, "cpu": 1}
PROGRAM = "launch/train.py"
_FLAGS = ("config", "workdir")  # its own; the others are set here


@dataclasses.dataclass(frozen=True)
class Request:
    """A run of ``launch/train.py``. ``arguments`` are that program's; ``shape`` is a TPU slice's, in chips, or None for
    GPUs. ``chips``, of TPUs or GPUs, and ``hosts`` are totals over all ``slices``. ``whole_hosts``: it has all GPUs of its
    hosts."""

    name: str
    kind: str
    slices: int
    shape: str | None
    chips: int
    hosts: int
    python: str
    workdir: str
    arguments: tuple[str, ...]
    whole_hosts: bool

    @property
    def platform(self) -> str:
        """``tpu``, ``gpu`` or ``cpu``."""
        return "tpu" if self.shape else "cpu" if self.kind == "cpu" else "gpu"

    @property
    def target(self) -> str:
        """As written on the command line: ``2xv5e:4x8``, ``h100:16``."""
        several = f"{self.slices}x" if self.slices > 1 else ""
        return f"{several}{self.kind}:{self.shape or self.chips}"

    @property
    def devices(self) -> int:
        """The number of devices as JAX counts them."""
        return self.chips * targets.DEVICES_A_CHIP.get(self.kind, 1)

    @property
    def chips_a_host(self) -> int:
        """TPU chips or GPUs per host."""
        return self.chips // self.hosts

    def command(self, *joining: str) -> list[str]:
        """The command of one process. It goes no further unless all processes together see the devices that they should."""
        expected = f"--expect={self.platform}:{self.devices}"
        return [self.python, PROGRAM, *self.arguments, expected, *joining]

    def line(self, *joining: str) -> str:
        """The command for a shell. ``joining`` is inserted as it is, with variables of the shell."""
        return " ".join([shlex.join(self.command()), *joining])


def check_flags(arguments: Sequence[str]) -> None:
    """Raises ``UserError`` for an argument that must not be given here; keys of the config are not checked."""
    for argument in arguments:
        name = argument.partition("=")[0].lstrip("-")
        if not argument.startswith("-") or not re.fullmatch(rf"(no)?config\..*|{'|'.join(_FLAGS)}", name):
            near = difflib.get_close_matches(name, _FLAGS, n=1, cutoff=0.0)[0]
            raise UserError(
                f"{argument!r} is not one of the options of {PROGRAM} that can be given here, --config, "
                f"--config.section.key and --workdir; did you mean --{near}=...?"
            )


def make(target: str, name: str | None, arguments: Sequence[str], *, python: str, on_a_host: int | None) -> Request:
    """``target``: ``v5e:4x8`` (v5p, v6e, tpu7x: a slice by its shape; ``2xv5e:4x8``: two of them) or ``h100:16`` (h200,
    a100, gpu, cpu: a number of them)."""
    slices, kind, size = targets.parts(target)
    if kind not in _ON_A_HOST or not targets.is_size(kind, size):
        raise UserError(
            f"there is no target {target!r}; a target is a TPU slice by its shape (v5e:2x4, v5p:4x4x4, v6e:16x16, "
            "tpu7x:4x4x4; several as 2xv6e:16x16) or a number of GPUs (h100:16; also h200, a100, or gpu for any) or of CPU "
            "devices (cpu:2)"
        )
    chips = math.prod(map(int, size.split("x")))
    if size not in (shapes := targets.SLICES.get(kind, (size,))):
        nearest = min(shapes, key=lambda one: abs(math.prod(map(int, one.split("x"))) - chips))
        raise UserError(
            f"there is no slice {kind}:{size}; the slices of {kind} are {', '.join(shapes)}, and the nearest is "
            f"{nearest}"
        )
    full = on_a_host or _ON_A_HOST[kind]
    hosts, rest = divmod(chips, full)
    if rest and hosts:
        raise UserError(
            f"{target}: more than {full} devices must fill whole hosts; --devices_a_host gives the number per host"
        )
    given = (re.fullmatch(r"--?(workdir|config)=(.*)", argument) for argument in arguments)
    values = {found[1]: found[2] for found in given if found}
    for key in ("config", "workdir"):
        if not values.get(key):
            raise UserError(f"the training command (after --) needs --{key}=...")
    name = name or re.sub(r"[^a-z0-9]+", "-", values["workdir"].rstrip("/").rpartition("/")[2].lower()).strip("-")
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise UserError(
            f"--name={name!r} is not a job name; it must be a letter, then letters, digits and -, at most 40 characters"
        )
    shape = size if kind in targets.DIMENSIONS else None
    return Request(
        name=name,
        kind=kind,
        slices=slices,
        shape=shape,
        chips=slices * chips,
        hosts=slices * max(hosts, 1),
        python=python,
        workdir=values["workdir"],
        arguments=tuple(arguments),
        whole_hosts=not rest,
    )
