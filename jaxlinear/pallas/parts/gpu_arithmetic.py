"""NVIDIA's instructions in programs for GPU, where Triton's own take more."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from jaxlinear.pallas.parts.target import Target


class Arithmetic(NamedTuple):
    """On float32. ``native``: with NVIDIA's instructions, which are not interpreted."""

    native: bool

    def fma(self, x, y, z):
        """``x y + z``: XLA compiles Triton's version to two instructions."""
        return _instruction("fma.rn.f32 $0, $1, $2, $3;", x, y, z) if self.native else x * y + z

    def exp2(self, x):
        """Numbers below the normal range may become 0; otherwise ptxas makes four instructions of one."""
        return _instruction("ex2.approx.ftz.f32 $0, $1;", x) if self.native else jnp.exp2(x)

    def reciprocal(self, x):
        """Triton's division takes more than one instruction."""
        return _instruction("rcp.approx.ftz.f32 $0, $1;", x) if self.native else 1 / x


def arithmetic_of(target: Target) -> Arithmetic:
    return Arithmetic(not target.interpret and (target.gpu is None or target.gpu.capability is not None))


def _instruction(text: str, *operands):
    shape = jnp.broadcast_shapes(*(x.shape for x in operands))
    (found,) = plgpu.elementwise_inline_asm(
        text,
        args=[jnp.broadcast_to(x, shape) for x in operands],
        constraints=",".join(["=f", *("f" for _ in operands)]),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)],
    )
    return found
