"""Checks whether a device computes the operations of a model as they are defined.

Each operation that the model calls in training, or would call if a mesh spread time, runs on the device as a kernel and
without one, and in float32 on the host's CPU, with gradients, on inputs with the model's shapes.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict

from jaxlinear import config as configs
from jaxlinear import ops
from jaxlinear.errors import UserError
from jaxlinear.launching import check_inputs
from jaxlinear.models import parameters
from jaxlinear.ops import backends, calls
from jaxlinear.ops.calls import Call
from jaxlinear.training.step import make_objective

# A kernel may be off by this multiple of the error without a kernel, plus what rounding may add: ten times as much in the
# gradient of an argument that is the same for all tokens, a sum over tokens that may nearly cancel.
_TIMES = 3.0
_ROUNDING = {"bfloat16": 1e-2, "float32": 1e-4}
_OF_SUMS = 10.0
_LENGTH = 2048  # tokens per row, if training has more
_RAGGED = 37  # so many tokens fewer for some inputs, so that no block divides them
_REPEATS = 5  # runs, of which the median time is taken


@dataclasses.dataclass(frozen=True)
class Error:
    """The error of an array, relative to float32, at its worst token (for a state, its worst head or channel): the norm of
    the difference there, divided by the root mean square of the float32 array's own such norms."""

    array: str
    kernel: float
    without: float  # as XLA computes the operation, on the same device and in the same dtype
    allowed: float

    @property
    def is_small(self) -> bool:
        return self.kernel <= self.allowed  # false for NaN


@dataclasses.dataclass(frozen=True)
class Checked:
    """An operation with inputs of one kind (of ``check_inputs.KINDS``). ``refused``: why it has no kernel on the device;
    nothing else is then set. ``milliseconds``: of a call with its gradients, as a kernel and without; None if kernels are
    interpreted."""

    operation: str
    shapes: dict[str, str]
    inputs: str
    refused: str | None = None
    errors: tuple[Error, ...] = ()
    milliseconds: tuple[float, float] | None = None

    @property
    def is_right(self) -> bool:
        return all(error.is_small for error in self.errors)

    @property
    def worst(self) -> Error:
        """The array that is closest to its limit, or furthest beyond it."""
        return max(self.errors, key=lambda error: (not error.is_small, error.kernel / error.allowed))


def check(
    config: config_dict.ConfigDict, device: jax.Device, *, length: int | None = None, rows: int = 2
) -> Iterator[Checked]:
    """Checks the operations that the model of a config calls in training, one after another.

    Args:
      config: what to train; only the keys of ``model`` and ``training.sequence_length`` matter. Heads and channels are
        those of the whole model: a device has fewer under ``mesh.tensor``.
      device: where kernels run. If it is not a TPU or GPU they are interpreted, which is slow.
      length: tokens per row; by default as in training, up to 2,048.
      rows: rows per batch.

    Raises:
      UserError: the config cannot work, no operation of its model may be a kernel, or JAX sees no CPU.
    """
    config = configs.resolve(config)
    length = min(config.training.sequence_length, _LENGTH) if length is None else length
    if length < 2 * _RAGGED:
        raise UserError(f"{length} tokens are too few to check kernels; use {2 * _RAGGED} or more")
    host = _host()
    lengths = {kind: length - _RAGGED if kind == check_inputs.MIXED else length for kind in check_inputs.KINDS}
    found = {tokens: _calls(config, device, rows, tokens) for tokens in set(lengths.values())}
    if not found[length]:
        raise UserError(f"no operation of {'+'.join(config.model.pattern)} can be a kernel: there is nothing to check")
    for i, call in enumerate(found[length]):
        for kind in check_inputs.kinds_of(call):
            yield (checked := _check(found[lengths[kind]][i], kind, device, host))
            if checked.refused is not None:
                break


def _host() -> jax.Device:
    try:
        return jax.devices("cpu")[0]
    except RuntimeError as error:
        raise UserError(
            f"the check needs the CPU as well as the device, so JAX_PLATFORMS must not leave it out: {error}"
        ) from None


def _calls(config: config_dict.ConfigDict, device: jax.Device, rows: int, length: int) -> list[Call]:
    """The distinct calls, in the order of the model's layers, and then those of the operations' ``Spec.parts``."""
    config = config.copy_and_resolve_references()
    config.model.vocab_size = config.model.vocab_size or 256  # which no operation reads
    architecture = parameters.describe(configs.model_config(config))
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "segment_ids"), tokens)
    weights = jax.ShapeDtypeStruct(tokens.shape, jnp.float32)

    def recorded() -> list[Call]:
        with calls.record() as found:
            jax.eval_shape(make_objective(config, architecture), architecture.shapes, batch, weights)
        return list(dict.fromkeys(found))

    with backends.use_device(device), jax.numpy_dtype_promotion("standard"):
        found = recorded()
        if operations := {name for call in found for name in ops.SPECS[call.operation].parts}:
            with backends.use_kernels(False):
                found += [call for call in recorded() if call.operation in operations and call not in found]
    return found


def _check(call: Call, kind: str, device: jax.Device, host: jax.Device) -> Checked:
    described = {name: f"{x.dtype}{list(x.shape)}" for name, x in call.arrays.items()}
    try:
        with backends.use_device(device):
            shapes = jax.eval_shape(outputs_of(call, "pallas"), call.arrays)
    except UserError as error:
        return Checked(call.operation, described, kind, refused=str(error))
    spec, random = ops.SPECS[call.operation], np.random.default_rng(0)
    inputs = check_inputs.draw(call, kind, random)
    if "last state" in spec.outputs:  # with a state, which here is also given
        inputs["initial_state"] = check_inputs.normal(shapes[1], random)
    cotangents = tuple(check_inputs.normal(y, random) for y in shapes)

    without = spec.plain
    as_kernel = _compiled(call, "pallas", device, inputs, cotangents)
    as_chunks = _compiled(call, without, device, inputs, cotangents)
    expected = _compiled(call, without, host, *jax.tree.map(_in_float32, (inputs, cotangents)))()
    narrow = any(x.dtype == jnp.bfloat16 for x in inputs.values())
    rounding = _ROUNDING["bfloat16" if narrow else "float32"]
    sums = {f"gradient of {name}" for name in check_inputs.constants(call)}
    errors = []
    for (name, want), got, other in zip(expected.items(), as_kernel().values(), as_chunks().values(), strict=True):
        off, off_without = _off(got, want), _off(other, want)
        allowed = _TIMES * off_without + rounding * (_OF_SUMS if name in sums else 1)
        errors.append(Error(name, off, off_without, allowed))
    times = None
    if device.platform in backends.COMPILED:
        times = _milliseconds(as_kernel), _milliseconds(as_chunks)
    return Checked(call.operation, described, kind, None, tuple(errors), times)


def outputs_of(call: Call, backend: str) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """The call as a function of its arrays, by name."""

    def run(arrays):
        outputs = ops.SPECS[call.operation].operation(**call.options | arrays, backend=backend)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    return run


def with_gradients(run: Callable) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Of ``run(arrays by name)``: a function of these arrays and the outputs' cotangents, which returns the outputs and, by
    name, the gradients of the arrays that have some."""

    def both(arrays, cotangents):
        numbers = {name: x for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
        outputs, pullback = jax.vjp(lambda numbers: run(arrays | numbers), numbers)
        (gradients,) = pullback(jax.tree.map(lambda d, y: d.astype(y.dtype), cotangents, outputs))
        return outputs, gradients

    return both


def _compiled(call: Call, backend: str, device: jax.Device, inputs, cotangents) -> Callable[[], dict[str, jax.Array]]:
    """A function that computes the outputs and gradients, by name, of arrays that are on the device."""
    arguments = jax.device_put((inputs, cotangents), device)
    with backends.use_device(device), backends.use_kernels(backend == "pallas"):
        compiled = jax.jit(with_gradients(outputs_of(call, backend))).lower(*arguments).compile()

    def run():
        outputs, gradients = jax.block_until_ready(compiled(*arguments))
        named = dict(zip(ops.SPECS[call.operation].outputs, outputs, strict=True))
        return named | {f"gradient of {name}": x for name, x in gradients.items()}

    return run


def _in_float32(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32) if x.dtype == jnp.bfloat16 else x


def _off(x: jax.Array, expected: jax.Array) -> float:
    """The error as defined in ``Error``."""
    wide = np.complex128 if np.iscomplexobj(expected) else np.float64
    want = np.asarray(expected).astype(wide)
    within = tuple(range(min(2, want.ndim - 1), want.ndim))
    norm = lambda y: np.sqrt(np.sum(np.abs(y) ** 2, axis=within))  # noqa: E731
    difference, size = norm(np.asarray(x).astype(wide) - want), norm(want)
    scale = np.sqrt(np.mean(size**2))
    return float(np.max(difference) / scale) if scale else float(np.max(difference))


def _milliseconds(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)
