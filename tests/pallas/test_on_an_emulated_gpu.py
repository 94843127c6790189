"""The GPU kernels compiled for an H100, run instruction by instruction from their PTX, against the oracles: values and all
gradients.

This tests Triton's output: layouts, products of warps and of warpgroups, asynchronous copies, and barriers. The emulator
refuses what a GPU would refuse, accesses of two warps to the same memory with no barrier between them, and the use of
memory and registers that a copy or a product in flight may still use.
"""

import numpy as np
import pytest

from jaxlinear.pallas.linear_attention import blocks as linear_attention_blocks
from jaxlinear.pallas.parts import factored_decays
from jaxlinear.pallas.rg_lru import blocks as rg_lru_blocks
from tests import numerics
from tests.pallas import kernel_cases, test_delta_rule_kernel, test_elementwise_kernels, test_kernel_laws
from tests.pallas.kernel_cases import assert_as_the_recurrence, draw, ids_of
from tests.ptx import calls

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimised")]


@pytest.fixture(autouse=True)
def ran(monkeypatch, use):
    """A list of the kernels that have run."""
    use("gpu")
    return calls.emulate(monkeypatch.setattr)


EACH_WAY = {"forward", "gradient"}


# With the instructions that are written in PTX ("emulated"), as on a GPU but not in interpreted kernels.
@pytest.mark.parametrize(
    "operation, name, dtype, target, kernels",
    [
        *(
            ("linear_recurrence", *case, "gpu", None)
            for case in (("plain_reverse", "bfloat16"), ("complex", "float32"))
        ),
        *(
            (operation, *case, "emulated", EACH_WAY)
            for operation, cases in {
                "selective_scan": [("packed", "float32"), ("many_numbers", "bfloat16"), ("short", "bfloat16")],
                "short_convolution": [("narrow", "float32"), ("wide_heads", "bfloat16"), ("sums", "float32")],
                "gated_rms_norm": [("odd", "float32"), ("heads", "bfloat16"), ("sigmoid", "float32")],
            }.items()
            for case in cases
        ),
        *(
            ("linear_attention", name, "bfloat16", "gpu", {"states", "outputs", "values", "keys"})
            for name in ("short", "constant_packed", "scalar", "channel", "no_documents")
        ),
        *(
            ("delta_rule", name, "bfloat16", "gpu", {"tokens", "states", "values", "keys"})
            for name in ("short", "none", "scalar", "channel")
        ),
        *(
            ("sliding_window_attention", name, "bfloat16", "gpu", {"outputs", "queries", "keys"})
            for name in ("grouped", "more_keys_in_front", "long")
        ),
    ],
)
def test_values_and_gradients(operation, name, dtype, target, kernels, ran, use):
    use(target)
    kernel_cases.check(operation, name, dtype)
    if kernels is None:
        assert len(ran) == 2
    elif kernels is EACH_WAY:
        assert [x.name.removeprefix(operation).split("_")[1] for x in ran] == ["forward", "gradient"]
    else:
        assert {x.name.rpartition("_")[2] for x in ran} == kernels


@pytest.mark.parametrize("name", ["packed", "short"])
def test_the_map_of_a_selective_scan(name, ran, use):
    use("emulated")
    test_kernel_laws.check_without_outputs("selective_scan", name, "float32")
    assert {x.name.split("_")[2] for x in ran} == {"summary", "state"}


@pytest.mark.parametrize("name, dtype", [("last_register_in_part", "float32"), ("odd", "bfloat16")])
def test_rg_lru(small_blocks, name, dtype, ran, monkeypatch, use):
    use("emulated")
    monkeypatch.setattr(rg_lru_blocks, "GPU_TIME", 32)
    kernel_cases.check("rg_lru", name, dtype)
    kinds = ("forward", "gradient", "state_gradient", "summary")
    expected = {f"rg_lru_{kind}{'' if name == 'odd' else '_packed'}" for kind in kinds}
    assert {x.name for x in ran if "scan" not in x.name} == expected


@pytest.mark.parametrize("bias", [-200.0, -18.0, 200.0])
def test_rg_lru_at_every_decay(bias, use):
    """With powers and reciprocals of 0 and of infinity."""
    use("emulated")
    test_elementwise_kernels.check_decay("rg_lru", "separate", bias)


# Channels as models have them: products of warpgroups, several chunks in flight, states in tiles.


@pytest.mark.slow(but_nth=2)
@pytest.mark.parametrize(
    "decay, length, width, values",
    [
        *(("scalar", 200, 128, 128), ("channel", 130, 128, 128), ("none", 150, 256, 256)),
        *(("scalar", 256, 128, 128), ("constant", 256, 64, 64), ("none", 384, 128, 128), ("scalar", 70, 64, 400)),
    ],
)
def test_linear_attention_of_many_channels(decay, length, width, values):
    ids = ids_of(5, length - 30, 25) if (decay, length) != ("scalar", 256) else None
    chunk = linear_attention_blocks.gpu(length, width, decay, ids is not None, None, None).chunk
    assert chunk == {200: 64, 130: 32, 150: 64, 70: 64}.get(length, 128)
    inputs = draw("linear_attention", np.random.default_rng(0), decay, length, 2, width, values)
    assert_as_the_recurrence("linear_attention", inputs, "bfloat16", segment_ids=ids)


@pytest.mark.parametrize(
    "decay, length, width, values, packed",
    [("scalar", 128, 128, 64, False), ("scalar", 100, 64, 64, True), ("constant", 70, 32, 16, True)]
    + [("none", 64, 64, 128, False)],
)
def test_linear_attention_of_shared_keys(decay, length, width, values, packed, monkeypatch):
    """Their gradients come in two parts, of two heads and of one."""
    monkeypatch.setattr(linear_attention_blocks, "GPU_SHARED_HEADS", 2)
    q, k, *rest = draw("linear_attention", np.random.default_rng(0), decay, length, 3, width, values)
    ids = ids_of(5, length - 30, 25) if packed else None
    assert_as_the_recurrence("linear_attention", (q[:, :, :1], k[:, :, :1], *rest), "bfloat16", segment_ids=ids)


@pytest.mark.parametrize(
    "decay, length, width, values", [("scalar", 130, 128, 128), ("channel", 130, 128, 128), ("scalar", 70, 64, 400)]
)
def test_delta_rule_of_many_channels(decay, length, width, values):
    inputs = draw("delta_rule", np.random.default_rng(0), decay, length, 2, width, values)
    assert_as_the_recurrence("delta_rule", inputs, "bfloat16", segment_ids=ids_of(5, length - 30, 25))


@pytest.mark.parametrize("decay, packed, width", [("scalar", True, 64), ("none", False, 256)])
def test_delta_rule_of_negative_eigenvalues(decay, packed, width):
    test_delta_rule_kernel.check_alike("same", "2", decay, packed, width=width)


@pytest.mark.parametrize("operation, width", [("sliding_window_attention", 128), ("causal_attention", 64)])
def test_attention_of_many_channels(operation, width):
    random, options = np.random.default_rng(0), {"segment_ids": ids_of(5, 170, 25)}
    if operation == "sliding_window_attention":
        options["window"] = 70
    inputs = tuple(numerics.normal(random, 1, 200, heads, width) for heads in (4, 2, 2))
    cotangents = numerics.normal(random, *inputs[0].shape)
    found, expected = (
        numerics.run(kernel_cases.kernel(operation, **options, backend=backend), inputs, cotangents, dtype=dtype)
        for backend, dtype in (("pallas", "bfloat16"), ("chunked", "float64"))
    )
    numerics.assert_close(found, numerics.wide(expected), numerics.TOLERANCES["bfloat16"])


# Decays by channel, in float32 as in models: one product of two factors, or one product per level; a kernel has both.


def draw_in_tiles(random, length, width):
    """Three runs of 32 tokens: weak in all channels, strong in the first half of the channels, strong at a few tokens."""
    decay = -0.1 * random.random((1, length, 2, width))
    decay[:, 32:64, :, : width // 2] *= 100
    decay[:, 64:96:7] = -40
    decay[:, 80, :, 3] = -np.inf
    return numerics.representable(decay)


def with_wide_decays(operation, **options):
    at, run = 4 if operation == "delta_rule" else 3, kernel_cases.operation_of(operation)

    def with_decays(*inputs):
        return run(*inputs[:at], inputs[at].astype(np.float32), *inputs[at + 1 :], **options, backend="pallas")

    return with_decays


@pytest.mark.parametrize("operation, width", [("linear_attention", 128), ("delta_rule", 64)])
def test_weak_and_strong_decays(operation, width):
    random, options = np.random.default_rng(1), {"segment_ids": ids_of(5, 80, 25)}
    *inputs, _, state = draw(operation, random, "channel", 110, 2, width, 64)
    run = with_wide_decays(operation, **options)
    assert_as_the_recurrence(operation, (*inputs, draw_in_tiles(random, 110, width), state), "bfloat16", run, **options)


@pytest.mark.parametrize("part, products", [(0.1, "few"), (0.99, "few"), (1.01, "many"), (10, "many")])
def test_which_way_decays_go(part, products, ran):
    """``part`` is a share of the limit, in each half of the only chunk and every channel: at the limit the factors are
    largest, and products above the diagonal overflow. One product for each of five levels shows as more than one."""
    q, k, v, _, state = draw("linear_attention", np.random.default_rng(2), "channel", 32, 1, 16, 16)
    decay = numerics.representable(np.full((1, 32, 1, 16), -part * factored_decays.LIMIT / 16))
    run = with_wide_decays("linear_attention")
    assert_as_the_recurrence("linear_attention", (q, k, v, decay, state), "bfloat16", run)
    for name in ("outputs", "values", "keys"):
        (found,) = [x for x in ran if x.name.endswith(name)]
        taken = sum(warps for opcode, warps in found.counts.items() if opcode.startswith("mma"))
        # One way takes 96, 96 and 416 with JAX 0.10, the other 496, 496 and 1,312.
        assert (taken > {"outputs": 250, "values": 250, "keys": 800}[name]) == (products == "many"), (name, taken)


@pytest.mark.parametrize("decay", ["channel", "constant"])
def test_decays_that_are_not_numbers_are_seen(decay):
    """They make outputs NaN. By default, Triton's maximum of a NaN and the floor of decays is the floor."""
    inputs = draw("linear_attention", np.random.default_rng(2), decay, 32, 2, 16, 16)
    inputs[3][..., 5 if decay == "channel" else 0] = np.nan
    o, final = numerics.run(kernel_cases.plain_kernel("linear_attention"), *inputs, dtype="bfloat16")
    assert np.isnan(o[:, :, 0].astype(np.float32)).all() and np.isnan(np.asarray(final)[:, 0]).any()


def test_decays_of_the_delta_rule_that_are_not_numbers_are_seen():
    """In gradients too."""
    random = np.random.default_rng(2)
    inputs = draw("delta_rule", random, "channel", 32, 2, 16, 16)
    inputs[4][0, 7, 0, 5] = np.nan
    cotangents = numerics.normal(random, *inputs[2].shape), numerics.normal(random, *inputs[5].shape)
    (o, _), gradients = numerics.run(kernel_cases.kernel("delta_rule"), inputs, cotangents, dtype="bfloat16")
    o = np.asarray(o, np.float32)
    assert np.isnan(o[0, 8:, 0]).all() and not np.isnan(o[0, :, 1]).any()
    assert all(np.isnan(np.asarray(x, np.float32)).any() for x in gradients)


# What the tests above would find


@pytest.mark.parametrize(
    "left_out, message",
    [
        ("bar.sync", "before any barrier|nothing wrote"),
        ("fence.proxy.async", "no proxy fence follows"),
        ("cp.async.wait_group", "may still write|ends before"),
        ("wgmma.wait_group", "of a product that may not have ended"),
        ("wgmma.commit_group", "of a product that may not have ended"),
    ],
)
def test_a_kernel_without_what_orders_it(left_out, message, monkeypatch):
    """Kernels without waits between warps, fences before the matrix units read, or waits for copies and products."""
    read = calls.read
    without = lambda text: read("".join(x for x in text.splitlines(keepends=True) if left_out not in x))  # noqa: E731
    monkeypatch.setattr(calls, "read", without)
    inputs = draw("linear_attention", np.random.default_rng(0), "none", 130, 1, 64, 64)
    with pytest.raises(Exception, match=message):
        numerics.run(kernel_cases.plain_kernel("linear_attention"), *inputs, dtype="bfloat16")
