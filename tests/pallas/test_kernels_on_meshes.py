"""Kernels on a mesh, interpreted: each device runs them on its part, with time whole or sharded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear import ops
from jaxlinear.parallel import operations, sharding
from tests import numerics
from tests.ops import test_rg_lru_recurrence, test_selective_scan
from tests.pallas import kernel_cases
from tests.shards import EIGHT, FOUR, IDS, TWO, T, make_mesh

MESHES = {
    "rows": {"data": 4, "tensor": 2},
    "fsdp": {"fsdp": 4, "tensor": 2},
    "tensor": {"fsdp": 2, "tensor": 4},
    "both": {"sequence": 2, "tensor": 4},
    **{"eight": EIGHT, "four": FOUR, "two": TWO},
}
B, H, K, V = 4, 2, 3, 5
PLAIN = {
    "gated_rms_norm": "separate",
    "short_convolution": "separate",
    "rg_lru": "separate",
    "rg_lru_gates": "products",
}
# Operation, mesh, what else it has, and targets; those with a star are only for ``make test-all``.
CASES = [
    ("linear_recurrence", "rows", "reverse packed", "tpu gpu*"),
    ("linear_recurrence", "tensor", "constant", "tpu* gpu*"),
    ("linear_recurrence", "four", "packed", "tpu* gpu"),
    ("linear_recurrence", "two", "complex constant packed", "tpu gpu*"),
    ("selective_scan", "rows", "rates packed", "tpu gpu*"),
    ("selective_scan", "tensor", "of_keys", "tpu* gpu*"),
    ("selective_scan", "four", "rates packed", "tpu* gpu"),
    ("selective_scan", "two", "of_keys packed", "tpu gpu*"),
    ("linear_attention", "rows", "scalar packed", "tpu"),
    ("linear_attention", "fsdp", "constant", "tpu*"),
    ("linear_attention", "four", "channel packed", "tpu gpu"),
    ("linear_attention", "eight", "scalar packed", "tpu*"),
    ("linear_attention", "two", "constant packed", "tpu"),
    ("linear_attention", "two", "none", "tpu*"),
    ("delta_rule", "rows", "scalar packed", "tpu gpu"),
    ("delta_rule", "fsdp", "none", "tpu*"),
    ("delta_rule", "four", "channel packed", "tpu"),
    ("delta_rule", "eight", "scalar packed", "tpu* gpu"),
    ("delta_rule", "two", "none packed", "tpu"),
    ("delta_rule", "rows", "updates scalar packed", "tpu*"),
    ("delta_rule", "two", "updates scalar packed", "tpu"),
    ("sliding_window_attention", "rows", "1 packed", "tpu*"),
    ("sliding_window_attention", "fsdp", "2 packed", "tpu*"),
    ("sliding_window_attention", "eight", "2 packed", "tpu"),
    ("sliding_window_attention", "four", "1 packed", "tpu*"),
    ("sliding_window_attention", "two", "2 packed", "tpu gpu"),
    ("causal_attention", "rows", "2 packed", "tpu gpu*"),
    ("gated_rms_norm", "four", "1", "tpu gpu"),
    ("gated_rms_norm", "tensor", "4", "tpu gpu*"),
    ("gated_rms_norm", "fsdp", "4", "tpu* gpu"),
    ("short_convolution", "rows", "", "tpu"),
    ("short_convolution", "rows", "heads", "tpu*"),
    ("short_convolution", "rows", "sums", "tpu"),
    ("short_convolution", "tensor", "", "tpu*"),
    ("short_convolution", "tensor", "heads", "tpu"),
    ("short_convolution", "tensor", "sums", "tpu*"),
    ("rg_lru", "rows", "packed", "tpu gpu*"),
    ("rg_lru", "rows", "", "tpu*"),
    ("rg_lru", "tensor", "packed", "tpu* gpu"),
    ("rg_lru", "tensor", "", "tpu"),
    *(("rg_lru_gates", name, "", "tpu") for name in ("rows", "tensor", "four", "both")),
]


def cases():
    rows = []
    for operation, mesh, kinds, targets in CASES:
        for target in targets.split():
            row = operation, mesh, kinds, target.rstrip("*")
            name = "-".join(row).replace(" ", "_")
            rows.append(pytest.param(*row, id=name, marks=[pytest.mark.slow(cases=[name])] * target.endswith("*")))
    return rows


def draw(operation, kinds):
    """Inputs, and options of the operation and of the one on a mesh."""
    random = np.random.default_rng(0)
    normal = functools.partial(numerics.normal, random)
    if operation == "linear_recurrence":
        shape = (8,) if "constant" in kinds else (B, T, 8)
        a = random.uniform(0, 1, shape) * (np.exp(1j * random.uniform(0, 6, shape)) if "complex" in kinds else 1)
        x, state = (normal(*s, complex_="complex" in kinds) for s in ((B, T, 8), (B, 8)))
        return (a, x, state), {"reverse": "reverse" in kinds}, {}
    if operation == "selective_scan":
        return test_selective_scan.draw(random, B, T, 8, 3, "rates" in kinds), {}, {}
    if operation in ("causal_attention", "sliding_window_attention"):
        inputs = tuple(normal(B, T, heads, 3) for heads in (4, int(kinds[0]), int(kinds[0])))
        return inputs, {"window": 7} if operation == "sliding_window_attention" else {}, {}
    if operation == "gated_rms_norm":
        shapes = (B, T, 512), (B, T, 512), (512 // int(kinds),), (B, T, 512), (512,)
        options = {"epsilon": 1e-6, "norm_before_gate": kinds == "4"}
        return tuple(normal(*shape) for shape in shapes), options, {"channels": "heads"}
    if operation == "short_convolution":
        inputs = tuple(normal(*shape) for shape in ((B, T, 12), (4, 12), (12,), (B, 3, 12)))
        options = {"head_width": 3 if kinds == "heads" else None, "activation": "none" if kinds == "sums" else "silu"}
        return inputs, options | {"segment_ids": IDS}, {"channels": "heads"}
    if operation.startswith("rg_lru"):
        inputs, first, ids = test_rg_lru_recurrence.draw(B, T, 4, 3)
        if operation == "rg_lru_gates":
            return inputs[:-1], {"first": first}, {}
        packed = "packed" in kinds
        return inputs if packed else (*inputs[:-1], None), {"first": first, "segment_ids": ids if packed else None}, {}
    updates = (2,) if "updates" in kinds else ()
    shapes = (B, T, H, K), (B, T, H, *updates, K), (B, T, H, *updates, V), (B, H, K, V)
    q, k, v, state = (random.standard_normal(shape) for shape in shapes)
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    beta = (random.uniform(0, 1, (B, T, H, *updates)),) if operation == "delta_rule" else ()
    decays = {"none": None, "constant": (H,), "scalar": (B, T, H), "channel": q.shape}
    (shape,) = (decays[kind] for kind in kinds.split() if kind in decays)
    log_decay = None if shape is None else -3 * random.uniform(0, 1, shape)
    return (q, k, v, *beta, log_decay, state), {"scale": 0.7}, {}


@pytest.mark.parametrize("operation, mesh, kinds, target", cases())
def test_the_kernel_on_a_mesh(small_blocks, short_chunks, use, operation, mesh, kinds, target):
    use(target)
    inputs, options, of_mesh = draw(operation, kinds)
    if "packed" in kinds and not operation.startswith("rg_lru"):
        options["segment_ids"] = IDS
    plain = {**options, "backend": PLAIN.get(operation, "recurrent")}
    reference = functools.partial(kernel_cases.operation_of(operation), **plain)
    on_mesh = kernel_cases.operation_of(operation, operations)
    run = functools.partial(on_mesh, **options, **of_mesh, backend="pallas")
    with jax.enable_x64(True):
        cotangents = numerics.cotangents_like(np.random.default_rng(1), jax.eval_shape(reference, *inputs))
    expected = numerics.run(numerics.with_gradients(reference), inputs, cotangents, dtype="float64")
    softmax = operation.endswith("attention") and operation != "linear_attention"  # JAX's kernel has no float64
    with sharding.use_mesh(make_mesh(MESHES[mesh])):
        dtype, tolerance = ("float32", 1e-5) if softmax else ("float64", 1e-12)
        found = numerics.run(numerics.with_gradients(run), inputs, cotangents, dtype=dtype)
    numerics.assert_close(found, numerics.wide(expected), tolerance)


@pytest.mark.parametrize("mesh", ["rows", "four"])
def test_negative_eigenvalues_on_a_mesh(short_chunks, mesh):
    """With keys that are alike in bfloat16: on each device's rows, and by the maps of parts of time. Kernels that are not
    told of negative eigenvalues are off by far more."""
    random = np.random.default_rng(0)
    q, v, one, state = (random.standard_normal(s) for s in (*[(B, T, H, 16)] * 2, (B, 1, H, 16), (B, H, 16, 16)))
    k = np.broadcast_to(one / np.linalg.norm(one, axis=-1, keepdims=True), q.shape)
    given = *(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), jnp.full((B, T, H), 2.0, jnp.float32)
    recurrent = functools.partial(ops.delta_rule, backend="recurrent")
    expected = numerics.run(recurrent, *numerics.wide(given), None, state, dtype="float64")
    errors = []
    for negative in (True, False):
        run = functools.partial(operations.delta_rule, backend="pallas", negative_eigenvalues=negative)
        with sharding.use_mesh(make_mesh(MESHES[mesh])):
            found = numerics.jit(run)(*given, None, jnp.asarray(state, jnp.float32))
        pairs = zip(numerics.wide(found), numerics.wide(expected), strict=True)
        errors.append([np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in pairs])
    assert max(errors[0]) < 0.02 and max(errors[1]) > 2 * max(errors[0]), errors
