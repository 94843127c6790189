"""What the kernels' tests share: cases of each operation, and the comparison of its kernels with the oracle.

Linear attention, the delta rule and attention have the cases of their operations (``tests/ops``).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlinear import ops
from tests import naive, numerics
from tests.ops import (
    test_attention,
    test_delta_rule,
    test_linear_attention,
    test_rg_lru_recurrence,
    test_sliding_window,
)
from tests.ops import test_selective_scan as scans

OF_OPERATIONS = {
    "linear_attention": test_linear_attention,
    "delta_rule": test_delta_rule,
    "causal_attention": test_attention,
    "sliding_window_attention": test_sliding_window,
}
RECURRENCES = "linear_recurrence", "selective_scan", "linear_attention", "delta_rule"
PLATFORMS = "tpu", "gpu"

SCANS = {  # B, T, D, what else it has
    "one_token": (2, 1, 1, "packed"),
    "one_token_reverse": (1, 1, 100, "reverse complex constant"),
    "short": (2, 7, 100, "packed"),
    "short_reverse": (1, 7, 300, "reverse packed constant"),
    "whole_groups": (2, 64, 128, "reverse complex"),
    "packed": (1, 64, 1, "packed constant complex"),
    "plain": (2, 100, 150, ""),
    "plain_reverse": (1, 100, 128, "reverse packed"),
    "constant": (1, 100, 1, "constant"),
    "complex": (1, 100, 100, "complex packed"),
    "blocks": (2, 140, 128, "packed"),
    "blocks_reverse": (1, 257, 100, "reverse constant complex packed"),
    "whole_blocks_reverse": (1, 256, 1, "reverse packed"),
    "groups_reverse": (1, 144, 1, "reverse"),
}
SELECTIVE_SCANS = {  # B, T, D, N, what else it has
    "one_token": (2, 1, 1, 1, "packed"),
    "short": (2, 7, 100, 5, "packed of_keys"),
    "plain": (1, 64, 32, 16, ""),
    "of_keys": (1, 100, 3, 4, "of_keys"),
    "packed": (1, 100, 160, 3, "packed"),
    "blocks": (2, 257, 100, 2, "packed"),
    "blocks_of_keys": (1, 300, 5, 9, "packed of_keys"),
    "many_numbers": (1, 70, 40, 33, "packed"),  # several programs on GPU
}
RG_LRUS = {  # B, T, N, K, packed
    "one_token": (1, 1, 2, 3, True),
    "several_in_a_register": (2, 20, 16, 32, True),  # two groups of eight
    "between_registers": (2, 300, 4, 96, True),  # a group of four in three registers, and three blocks of time
    "griffin": (1, 17, 8, 160, False),  # two groups
    "whole_blocks": (2, 256, 2, 128, True),
    "whole_blocks_without_documents": (2, 256, 2, 64, False),
    "last_register_in_part": (2, 40, 2, 160, True),
    "odd": (1, 130, 3, 77, False),
}
GATES = {  # B, T, N, K
    **{name: RG_LRUS[name][:4] for name in ("one_token", "several_in_a_register", "griffin", "last_register_in_part")},
    "between_registers": (1, 300, 4, 96),
    "whole_registers": (2, 130, 2, 256),
    "odd": (1, 40, 3, 77),
}
NORMS = {  # B, T, D, heads, whether there is a skip, whether the norm comes first, and the activation unless it is SiLU
    "one_token": (3, 1, 128, 1, True, False),
    "blocks_of_time": (2, 150, 256, 1, True, False),  # the last in part
    "no_skip": (1, 40, 384, 1, False, False),
    "heads": (2, 70, 512, 4, False, True),
    "wide_heads": (1, 33, 1536, 2, True, True),
    "gate_first_by_head": (1, 64, 512, 2, False, False),
    "sigmoid": (1, 40, 256, 2, False, True, "sigmoid"),
    "sigmoid_first": (2, 40, 256, 1, True, False, "sigmoid"),
    # On GPU: heads that are no registers, and pieces of a head that are only partly its own.
    "narrow": (2, 19, 6, 2, True, True),
    "odd": (1, 50, 1500, 3, True, False),
    "pieces": (1, 9, 1400, 1, True, False),
}
CONVOLUTIONS = {  # B, T, D, width, heads, segments and, unless it is SiLU, activation
    "one_token": (2, 1, 3, 4, None, True),
    "narrow": (1, 130, 3, 4, None, True),  # two blocks of time, the second nearly empty
    "groups": (2, 300, 256, 3, None, True),  # two blocks of channels, three of time
    "most_taps": (1, 140, 5, 9, None, False),
    "two_taps": (1, 70, 5, 2, 1, True),
    "heads_of_registers": (1, 200, 512, 4, 2, True),
    "heads_share_a_register": (1, 140, 128, 4, 4, True),
    "heads_between_registers": (2, 135, 300, 4, 3, True),
    "wide_heads": (1, 70, 400, 4, 2, True),
    "sums": (2, 300, 256, 4, None, True, "none"),
    "sums_in_heads": (2, 135, 300, 4, 3, True, "none"),
}


def documents(random, batch, length, packed, chance=0.1):
    return np.cumsum(random.random((batch, length)) < chance, axis=1, dtype=np.int32) if packed else None


def _linear_recurrence(name):
    batch, length, width, kinds = SCANS[name]
    random, complex_ = np.random.default_rng(length + width), "complex" in kinds
    shape = (width,) if "constant" in kinds else (batch, length, width)
    a = numerics.uniform(random, *shape, low=-0.3)
    if complex_:
        a = numerics.representable(0.8 * a) + 1j * numerics.uniform(random, *shape, low=-0.5, high=0.5)
    x, state = (numerics.normal(random, *s, complex_=complex_) for s in ((batch, length, width), (batch, width)))
    ids = documents(random, batch, length, "packed" in kinds)
    return (a, x, state), {"segment_ids": ids, "reverse": "reverse" in kinds}, None


def _selective_scan(name):
    batch, length, width, states, kinds = SELECTIVE_SCANS[name]
    random = np.random.default_rng(length + width)
    inputs = scans.draw(random, batch, length, width, states, "of_keys" not in kinds)
    ids = documents(random, batch, length, "packed" in kinds)
    return inputs, {"segment_ids": ids}, functools.partial(naive.selective_scan, ids=ids)


def _rg_lru(name):
    *sizes, packed = RG_LRUS[name]
    inputs, first, ids = test_rg_lru_recurrence.draw(*sizes)
    if not packed:
        ids, first = None, first & (np.arange(first.shape[1]) == 0)
    return inputs, {"first": first, "segment_ids": ids}, test_rg_lru_recurrence.reference(first, ids)


def _rg_lru_gates(name):
    inputs, first = test_rg_lru_recurrence.test_rg_lru_gates.draw(*GATES[name])
    return inputs, {"first": first}, lambda *inputs: naive.rg_lru_gates(*inputs, first)


def _gated_rms_norm(name):
    batch, length, channels, heads, skips, before, activation = (*NORMS[name], "silu")[:7]
    random = np.random.default_rng(length)
    shapes = [(batch, length, channels)] * 2 + [(channels // heads,)] + [(batch, length, channels), (channels,)] * skips
    options = {"epsilon": 1e-2, "norm_before_gate": before, "activation": activation}
    inputs = tuple(numerics.normal(random, *shape) for shape in shapes)
    return inputs, options, functools.partial(naive.gated_rms_norm, **options)


def _short_convolution(name):
    batch, length, channels, width, heads, packed, activation = (*CONVOLUTIONS[name], "silu")[:7]
    random = np.random.default_rng(length)
    shapes = (batch, length, channels), (width, channels), (channels,), (batch, width - 1, channels)
    inputs = tuple(numerics.normal(random, *shape) for shape in shapes)
    options, ids = {"head_width": heads and channels // heads, "activation": activation}, None
    if packed:
        ids = documents(random, batch, length, True, chance=0.2) % 2
    return inputs, options | {"segment_ids": ids}, functools.partial(naive.short_convolution, **options, ids=ids)


_DRAWN = {
    "linear_recurrence": (SCANS, _linear_recurrence),
    "selective_scan": (SELECTIVE_SCANS, _selective_scan),
    "rg_lru": (RG_LRUS, _rg_lru),
    "rg_lru_gates": (GATES, _rg_lru_gates),
    "gated_rms_norm": (NORMS, _gated_rms_norm),
    "short_convolution": (CONVOLUTIONS, _short_convolution),
}


def names(operation):
    return OF_OPERATIONS[operation].CASES if operation in OF_OPERATIONS else _DRAWN[operation][0]


@functools.cache
def case(operation, name):
    """Inputs, options, cotangents, and the outputs and gradients of the oracle."""
    if operation in OF_OPERATIONS:
        inputs, cotangents, ids, outputs, gradients = OF_OPERATIONS[operation].case(name)
        window = {"window": test_sliding_window.CASES[name][6]} if operation == "sliding_window_attention" else {}
        return inputs, {"segment_ids": ids} | window, cotangents, (outputs, gradients)
    inputs, options, reference = _DRAWN[operation][1](name)
    reference = reference or functools.partial(ops.linear_recurrence, **options, backend="recurrent")
    with jax.enable_x64(True):
        cotangents = numerics.cotangents_like(np.random.default_rng(1), jax.eval_shape(reference, *inputs))
    found = numerics.run(numerics.with_gradients(reference), inputs, cotangents, dtype="float64")
    return inputs, options, cotangents, numerics.wide(found)


def operation_of(operation, module=ops):
    """``ops``' or ``parallel.operations``' function, to which the inputs of a case are passed in order."""
    function = getattr(module, operation)
    if not operation.startswith("rg_lru"):
        return function

    def of_gates(*inputs, first, **options):
        return function(*inputs[:6], jnp.asarray(first), *inputs[6:], **options)

    return of_gates


def plain_kernel(operation, **options):
    """The operation by its kernels."""
    return functools.partial(operation_of(operation), **{"backend": "pallas"} | options)


def kernel(operation, **options):
    """The same with the gradients."""
    return numerics.with_gradients(plain_kernel(operation, **options))


def check(operation, name, dtype, **more):
    """The values and gradients of the kernels for ``backends.target()``, and their dtypes."""
    inputs, options, cotangents, expected = case(operation, name)
    found = numerics.run(kernel(operation, **options, **more), inputs, cotangents, dtype=dtype)
    exact = operation not in RECURRENCES and not operation.endswith("attention")
    numerics.assert_close(found, expected, 1e-12 if exact and dtype == "float64" else numerics.TOLERANCES[dtype])
    (output, *state), gradients = map(jax.tree.leaves, found)
    wide = "float64" if dtype == "float64" else "float32"
    if np.iscomplexobj(output):
        dtype = wide = "complex128" if dtype == "float64" else "complex64"
    assert output.dtype == (wide if operation.startswith("rg_lru") else dtype)
    assert {y.dtype.name for y in state} <= {dtype if operation == "short_convolution" else wide}
    assert {y.dtype.name for y in gradients} == {dtype}


def ids_of(*lengths):
    """The ids of one row of documents of these lengths."""
    return np.repeat([np.arange(len(lengths), dtype=np.int32)], lengths, axis=1)


def draw(operation, random, decay, length, heads, keys, values, batch=1):
    """Inputs of linear attention or of the delta rule."""
    q, k = (numerics.normal(random, batch, length, heads, keys) for _ in range(2))
    v, state = (numerics.normal(random, batch, *s) for s in ((length, heads, values), (heads, keys, values)))
    beta = ()
    if operation == "delta_rule":
        k, beta = test_delta_rule.unit(k), (numerics.uniform(random, batch, length, heads),)
    return q, k, v, *beta, test_delta_rule.draw_decay(random, decay, batch, length, heads, keys), state


def assert_as_the_recurrence(operation, inputs, dtype="float64", run=None, **options):
    """The kernels' values and gradients, or those of ``run``, equal the recurrence's in float64."""
    random = np.random.default_rng(8)
    cotangents = numerics.normal(random, *inputs[2].shape), numerics.normal(random, *inputs[-1].shape)
    expected = numerics.run(
        kernel(operation, **options | {"backend": "recurrent"}), inputs, cotangents, dtype="float64"
    )
    run = numerics.with_gradients(run) if run else kernel(operation, **options)
    found = numerics.run(run, inputs, cotangents, dtype=dtype)
    numerics.assert_close(found, numerics.wide(expected), numerics.TOLERANCES[dtype])
