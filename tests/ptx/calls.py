"""``pallas_call`` compiled for an absent H100 and run on the CPU."""

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import pallas as pl
from jax.sharding import SingleDeviceSharding

from jaxlinear.costs import targets
from jaxlinear.ops import backends
from tests import ptxas
from tests.ptx import machine
from tests.ptx.program import Program, read

_PALLAS_CALL = pl.pallas_call


class Ran(NamedTuple):
    name: str
    counts: Counter  # warps that executed each instruction
    bytes: int  # of the arrays that it reads and writes


def emulate(set_attribute: Callable[[Any, str, Any], None]) -> list[Ran]:
    """Makes ``pallas_call`` run on the CPU from now on. Every run is added to the returned list."""
    ran: list[Ran] = []

    def pallas_call(kernel, *, out_shape, grid, name, interpret, **options):
        def call(*arguments):
            program = compiled(
                _PALLAS_CALL(kernel, out_shape=out_shape, grid=grid, name=name, **options), name, arguments
            )

            def run(*given):
                like = [np.zeros(x.shape, x.dtype) for x in jax.tree.leaves(out_shape)]
                given = [np.asarray(x) for x in given]
                found, counts = machine.run(program, grid, given, like)
                ran.append(Ran(name, counts, sum(x.nbytes for x in (*given, *found))))
                return jax.tree.unflatten(jax.tree.structure(out_shape), found)

            return jax.pure_callback(run, out_shape, *arguments)

        return call

    set_attribute(pl, "pallas_call", pallas_call)
    return ran


def compiled(call, name: str, arguments) -> Program:
    device = targets.find("h100:1").devices[0]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)) for x in arguments]
    with tempfile.TemporaryDirectory() as directory, backends.use_platform("gpu", device.device_kind):
        jax.jit(call).lower(*shapes).compile(compiler_options=ptxas.dumped_to(Path(directory)))
        programs = [x for file in Path(directory).glob("*.ptx") for x in read(file.read_text())]
    (program,) = [x for x in programs if x.name == name]
    return program
