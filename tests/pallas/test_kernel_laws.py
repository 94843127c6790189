"""What every kernel promises: values and gradients of the oracle, interpreted for TPU and for GPU; the map of a run and the
gradient of its state alone; a run in pieces; one kernel each way; decays at the limits; and states in float32.

What a kernel alone promises is in its own file.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear import ops
from jaxlinear.errors import UserError
from jaxlinear.ops import backends, protocol, segments
from jaxlinear.ops.delta_rule import family as delta_family
from jaxlinear.ops.diagonal.family import DiagonalKernel
from jaxlinear.ops.linear_attention import family as linear_family
from jaxlinear.ops.selective_scan import family as scan_family
from tests import numerics
from tests.ops import test_selective_scan as scans
from tests.pallas import kernel_cases
from tests.pallas.kernel_cases import OF_OPERATIONS, PLATFORMS, RECURRENCES, case

pytestmark = pytest.mark.usefixtures("small_blocks")

# By operation, target and dtype, the cases; after @, tokens per chunk. A tilde: slow. A star, or any other after a plus:
# for ``make test-all``, not for CI.
RUNS = {
    "linear_recurrence": {
        "tpu float64": "one_token short_reverse plain complex whole_blocks_reverse +",
        "gpu float64": "one_token_reverse whole_groups plain_reverse blocks groups_reverse +",
        "tpu bfloat16": "blocks plain_reverse*",
        "gpu bfloat16": "blocks* plain_reverse",
        "tpu float32": "complex",
        "gpu float32": "complex",
    },
    "selective_scan": {
        "tpu float64": "one_token~ blocks_of_keys +",
        "gpu float64": "short many_numbers +",
        "tpu bfloat16": "blocks",
        "gpu bfloat16": "blocks~",
        "tpu float32": "short*",
        "gpu float32": "short*",
        "simulated float32": "packed* blocks_of_keys",
    },
    "linear_attention": {
        "tpu float64": "one_token none constant_packed no_documents +",
        "gpu float64": "short constant channel +",
        "tpu float32": "scalar* channel~",
        "gpu float32": "scalar channel*",
        "tpu bfloat16": "scalar channel~",
        "gpu bfloat16": "scalar channel",
        "simulated float32": "short channel_whole_chunks",
    },
    # Chunks of 16 tokens are one block of the inverse, chunks of 64 take two steps of doubling. By channel, there is a
    # program for each way of the decays, which XLA compiles slowly in longer chunks.
    "delta_rule": {
        "tpu float64": "one_token short@64 none@16 none_long scalar@128 channel",
        "gpu float64": "one_token short@64* none_long@16 scalar@64 channel",
        "tpu float32": "scalar_whole~",
        "tpu bfloat16": "none@64 scalar@64 channel@16~",
        "gpu bfloat16": "none scalar* channel",
        "simulated float32": "short_channel",
    },
    "sliding_window_attention": {
        "tpu float32": "one_token multi_head fewer_keys_in_front long +",
        "gpu float32": "multi_query one_head window_1 +",
        "tpu bfloat16": "grouped* more_keys_in_front",
        "gpu bfloat16": "grouped more_keys_in_front*",
        "simulated float32": "long",
    },
    "causal_attention": {
        "tpu float32": "grouped keys_in_front* whole* long",
        "gpu float32": "grouped* keys_in_front* whole long*",
    },
    "rg_lru": {
        "tpu float64": "one_token griffin~ whole_blocks last_register_in_part odd +",
        "gpu float64": "one_token whole_blocks odd +",
        "tpu float32": "several_in_a_register~ between_registers*",
        "gpu float32": "several_in_a_register* between_registers*",
        "tpu bfloat16": "several_in_a_register* between_registers",
        "gpu bfloat16": "several_in_a_register between_registers*",
        "simulated float32": "between_registers* last_register_in_part",
    },
    "rg_lru_gates": {
        "tpu float64": "one_token several_in_a_register between_registers griffin last_register_in_part odd +",
        "tpu float32": "several_in_a_register between_registers*",
        "tpu bfloat16": "several_in_a_register* between_registers",
        "simulated float32": "between_registers* last_register_in_part",
    },
    "gated_rms_norm": {
        "tpu float64": "one_token blocks_of_time no_skip heads wide_heads gate_first_by_head sigmoid sigmoid_first",
        "gpu float64": "blocks_of_time heads gate_first_by_head sigmoid sigmoid_first narrow odd pieces +",
        "tpu float32": "blocks_of_time heads* sigmoid*",
        "gpu float32": "blocks_of_time* heads sigmoid*",
        "tpu bfloat16": "blocks_of_time* heads sigmoid*",
        "gpu bfloat16": "blocks_of_time* heads* sigmoid",
        "simulated float32": "blocks_of_time* heads",
    },
    "short_convolution": {
        "tpu float64": "one_token narrow groups most_taps two_taps heads_share_a_register heads_between_registers sums +",
        "gpu float64": "one_token narrow groups most_taps heads_between_registers wide_heads sums_in_heads +",
        "tpu float32": "groups* heads_between_registers sums*",
        "gpu float32": "groups* heads_between_registers* sums*",
        "tpu bfloat16": "groups* heads_between_registers* sums",
        "gpu bfloat16": "groups* heads_between_registers sums*",
        "simulated float32": "groups* heads_between_registers sums*",
    },
}


def rows_of(tables):
    """Each operation, how it runs, and each case. Simulated TPUs are slow."""
    rows = []
    for operation, runs in tables.items():
        for how, names in runs.items():
            names = names.split()
            if names[-1] == "+":
                said = {name.rstrip("~") for name in names}
                names[-1:] = [f"{name}*" for name in kernel_cases.names(operation) if name not in said]
            for name in names:
                row = operation, *how.split(), name.rstrip("*~")
                marks = [pytest.mark.slow] if name.endswith("~") or how.startswith("simulated") else []
                marks += [pytest.mark.slow(cases=["-".join(row)])] if name.endswith("*") else []
                rows.append(pytest.param(*row, id="-".join(row), marks=marks))
    return rows


@pytest.mark.parametrize("operation, target, dtype, name", rows_of(RUNS))
def test_values_and_gradients(operation, target, dtype, name, use):
    use(target)
    name, _, chunk = name.partition("@")
    kernel_cases.check(operation, name, dtype, **({"chunk_size": int(chunk)} if chunk else {}))


# Families of kernels


def of_family(operation, inputs, ids):
    """The family of the operation's kernels, and the inputs and constants of a run."""
    *arrays, _ = inputs
    target, starts = backends.target(), None if ids is None else segments.starts(jnp.asarray(ids))
    if operation == "linear_recurrence":
        return DiagonalKernel(target), (*arrays, starts), None
    if operation == "selective_scan":
        x, dt, A, B, C = arrays
        return (
            scan_family.SelectiveScanKernel(target),
            scan_family.Inputs(x, dt, B[:, :, None], C[:, :, None], starts),
            A,
        )
    scale = arrays[0].shape[-1] ** -0.5
    if operation == "delta_rule":
        return delta_family.DeltaRuleKernel(scale, None, target), delta_family.Inputs(*arrays, starts), None
    return linear_family.LinearAttentionKernel(scale, None, target), linear_family.Inputs(*arrays, starts, None), None


def check_without_outputs(operation, name, dtype):
    """The map of a run, on the state and on zeros, and the gradient of the state alone."""
    inputs, options, cotangents, (outputs, gradients) = case(operation, name)
    without = *inputs[:-1], np.zeros_like(inputs[-1])
    recurrent = numerics.jit(functools.partial(getattr(ops, operation), **options | {"backend": "recurrent"}))
    added = numerics.wide(numerics.run(recurrent, *without, dtype="float64")[1])

    @numerics.jit
    def found(inputs, cotangents):
        family, *given = of_family(operation, inputs, options["segment_ids"])
        run, state = family.prepare(*given), inputs[-1].astype(cotangents[1].dtype)
        kept = family.summary(run)
        return (
            family.advance(kept, state),
            family.advance(kept, jnp.zeros_like(state)),
            family.state_gradient(run, *cotangents),
        )

    found = numerics.run(found, inputs, cotangents, dtype=dtype)
    numerics.assert_close(found, (outputs[1], added, gradients[-1]), numerics.TOLERANCES[dtype])


MAPS = {
    "linear_recurrence": {"tpu": "short complex blocks* packed", "gpu": "short* complex* blocks packed"},
    "selective_scan": {"tpu": "blocks short many_numbers*", "gpu": "blocks* short many_numbers"},
    "linear_attention": {
        "tpu": "none constant_packed* no_documents* channel",
        "gpu": "none* constant_packed no_documents* channel*",
    },
    "delta_rule": {"tpu": "none_long channel", "gpu": "none_long scalar channel"},
}


@pytest.mark.parametrize("operation, target, name", rows_of(MAPS))
def test_a_run_without_its_outputs(operation, target, name, use):
    use(target)
    check_without_outputs(operation, name, "float64")


@pytest.mark.parametrize(
    "operation, target, name, pieces",
    [
        ("linear_recurrence", "tpu", "blocks", 70),
        ("delta_rule", "tpu", "short", 4),
        ("selective_scan", "tpu", "packed", 50),
        ("selective_scan", "gpu", "packed", 50),
    ],
)
@pytest.mark.slow(cases=["selective_scan-tpu-packed-50"])
def test_the_family_of_the_kernel_in_pieces(operation, target, name, pieces, use):
    """Runs in sequence, and their gradients; that of the state is from the kernel that computes nothing else."""
    use(target)
    inputs, options, cotangents, expected = case(operation, name)

    def run(*inputs):
        family, given, constants = of_family(operation, inputs, options["segment_ids"])
        return protocol.chunked(family, pieces, given, constants, inputs[-1])

    found = numerics.run(numerics.with_gradients(run), inputs, cotangents, dtype="float64")
    numerics.assert_close(found, expected, 1e-12)


@pytest.mark.parametrize("operation", RECURRENCES)
def test_the_map_of_a_run_has_no_gradient(operation, use):
    use("tpu")
    inputs, options, *_ = case(operation, "short")

    def objective(x):
        family, *given = of_family(operation, (x, *inputs[1:]), options["segment_ids"])
        return jnp.sum(family.summarise(family.prepare(*given))[1])

    with jax.enable_x64(True), pytest.raises(UserError, match="the kernel has no gradient for the map of a run"):
        jax.eval_shape(jax.grad(objective), inputs[0])


@pytest.mark.parametrize(
    "operation, shapes, kernels, of_state",
    [
        ("linear_recurrence", [(6, 2)] * 2, "forward gradient_reverse", "forward state_gradient_reverse"),
        ("linear_attention", [(130, 2, 4)] * 3, "forward gradient", "forward state_gradient"),
        ("delta_rule", [(40, 1, 4)] * 3 + [(40, 1)], "forward gradient", "forward state_gradient"),
        ("delta_rule", [(40, 1, 4)] * 3 + [(40, 1), (40, 1, 4)], None, "forward_channel state_gradient_channel"),
        (
            "selective_scan",
            [(16, 2), (16, 2), "A", (16, 3), (16, 3)],
            "forward_keep gradient",
            "forward state_gradient",
        ),
        ("selective_scan", [(16, 2), (16, 2), None, (16, 3), (16, 3)], None, "forward_of_keys state_gradient_of_keys"),
    ],
)
def test_one_kernel_each_way(operation, shapes, kernels, of_state):
    """For the state's gradient alone, nothing as long as the sequence is kept or written."""
    inputs = [x and (-jnp.ones((2, 3)) if x == "A" else jnp.ones((1, *x))) for x in shapes]
    state = {"linear_recurrence": (1, 2), "selective_scan": (1, 2, 3), "linear_attention": (1, 2, 4, 4)}

    def objective(*x, state=None):
        return jnp.sum(getattr(ops, operation)(*x, initial_state=state, backend="pallas")[0] ** 2)

    of_inputs = jax.grad(objective, [i for i, x in enumerate(inputs) if x is not None])
    of_the_state = jax.grad(lambda state: objective(*inputs, state=state))
    name = {"linear_recurrence": "scan"}.get(operation, operation)
    for expected, made in (
        (kernels, lambda: jax.make_jaxpr(of_inputs)(*inputs)),
        (of_state, lambda: jax.make_jaxpr(of_the_state)(jnp.ones(state.get(operation, (1, 1, 4, 4))))),
    ):
        if expected:
            assert re.findall(rf" name={name}_(\w+)", str(made())) == expected.split()


# Inputs at the limits


@functools.cache
def in_float32(operation, target, packed):
    return kernel_cases.kernel(operation, segment_ids=np.arange(100)[None] if packed else None)


def assert_right_in_float32(operation, target, inputs, packed=False, tolerance=1e-5):
    random = np.random.default_rng(3)
    cotangents = numerics.normal(random, *inputs[2].shape), numerics.normal(random, *inputs[-1].shape)
    expected = numerics.run(OF_OPERATIONS[operation].reference(packed), inputs, cotangents, dtype="float64")
    found = numerics.run(in_float32(operation, target, packed), inputs, cotangents, dtype="float32")
    numerics.assert_close(found, expected, tolerance)


@pytest.mark.slow(
    cases=["linear_attention-constant-tpu", "linear_attention-constant-gpu", "linear_attention-scalar-gpu"]
)
@pytest.mark.parametrize("target", PLATFORMS)
@pytest.mark.parametrize(
    "operation, kind",
    [
        *(("linear_attention", kind) for kind in ("constant", "scalar", "channel")),
        *(("delta_rule", kind) for kind in ("scalar", "channel")),
    ],
)
def test_hard_decays(operation, kind, target, use):
    """Decays strong and weak in one chunk, equal for all, or weak only at a chunk's end."""
    use(target)
    hard = [
        lambda random, shape: random.choice([-50.0, -1e4, -1e-7, -1e-3, 0.0], shape),
        *(lambda _, shape, value=value: np.full(shape, value) for value in (-1e-7, -50.0, -np.inf, -50.0)),
    ]
    every = [OF_OPERATIONS[operation].at_the_limits(kind, draw) for draw in hard]
    if kind != "constant":
        every[-1][-2][:, 50:] = -0.01
    for inputs in every:
        assert_right_in_float32(operation, target, inputs)


@pytest.mark.slow(cases=["linear_attention-channel-tpu"])
@pytest.mark.parametrize(
    "operation, kind, target",
    [
        *(("linear_attention", *how) for how in (("scalar", "tpu"), ("channel", "tpu"), ("channel", "gpu"))),
        ("delta_rule", "channel", "tpu"),
    ],
)
def test_one_document_a_token(operation, kind, target, use):
    use(target)
    inputs = OF_OPERATIONS[operation].at_the_limits(kind, lambda random, shape: -random.uniform(0, 1, shape))
    assert_right_in_float32(operation, target, inputs, packed=True)


# What is not rounded to bfloat16


@pytest.mark.parametrize("target", PLATFORMS)
@pytest.mark.parametrize(
    "operation, kind",
    [
        *(("linear_attention", kind) for kind in ("none", "channel")),
        *(("delta_rule", kind) for kind in ("scalar", "channel")),
        ("selective_scan", None),
    ],
)
def test_states_of_bfloat16_are_float32(operation, kind, target, use, short_chunks):
    use(target)
    module = scans if kind is None else OF_OPERATIONS[operation]
    module.assert_states_are_float32(
        functools.partial(getattr(ops, operation), backend="pallas"), *([kind] if kind else [])
    )


RATE = 204.45 * 2**-7  # rounding to bfloat16 makes it smaller by 0.2%


@pytest.mark.parametrize(
    "operation, target", [("linear_attention", "tpu"), ("linear_attention", "gpu"), ("delta_rule", "gpu")]
)
@pytest.mark.parametrize("kind", ["scalar", "channel"])
def test_float32_decays_beside_products_in_bfloat16(operation, kind, target, use):
    """A state of ones and a first token are read after up to 31 others, as e^-51; with rounding it would be 11% more."""
    use(target)
    q, shape = jnp.ones((1, 32, 1, 16), jnp.bfloat16), (1, 32, 1, 16) if kind == "channel" else (1, 32, 1)
    k = v = q.at[:, 1:].set(0)
    beta = ()
    if operation == "delta_rule":  # the first token writes what linear attention would, plus what it replaces
        k, v, beta = k / 4, v * float(4 * (1 + np.exp(-RATE))), (jnp.ones(q.shape[:3]),)
    decay = jnp.full(shape, -RATE, jnp.float32)
    o, final = getattr(ops, operation)(q, k, v, *beta, decay, jnp.ones((1, 1, 16, 16)), backend="pallas")
    expected = np.exp(-RATE * np.arange(32)) * (1 + np.exp(-RATE))
    np.testing.assert_allclose(o[0, :, 0], np.repeat(16**0.5 * expected[:, None], 16, axis=1), rtol=1.2e-2)
    np.testing.assert_allclose(final, np.full(final.shape, expected[-1]), rtol=1.2e-2)
