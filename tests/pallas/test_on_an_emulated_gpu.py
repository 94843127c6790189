"""The GPU kernels compiled for an H100, run instruction by instruction from their PTX, against the oracles: values and all
gradients.

This tests Triton's output: layouts, products of warps and of warpgroups, asynchronous copies, and barriers. The emulator
refuses what a GPU would refuse, accesses of two warps to the same memory with no barrier between them, and the use of
memory and registers that a copy or a product in flight may still use.
"""

import functools

import numpy as np
import pytest

from jaxlinear import ops
from jaxlinear.ops import backends, delta_rule, linear_attention, sliding_window_attention
from jaxlinear.pallas.linear_attention import blocks as linear_attention_blocks
from jaxlinear.pallas.parts import factored_decays
from jaxlinear.pallas.parts.target import Target
from jaxlinear.pallas.rg_lru import blocks as rg_lru_blocks
from tests import numerics
from tests.ops import test_delta_rule as delta_operation
from tests.ops import test_sliding_window as windows
from tests.pallas import test_attention_kernel as attention
from tests.pallas import test_delta_rule_kernel as delta
from tests.pallas import test_gated_rms_norm_kernel as norm
from tests.pallas import test_linear_attention_kernel as linear
from tests.pallas import test_rg_lru_kernel as rg_lru
from tests.pallas import test_scan_kernel as scan
from tests.pallas import test_selective_scan_kernel as selective
from tests.pallas import test_short_convolution_kernel as convolution
from tests.ptx import calls

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimised")]

GPU = Target("gpu", "none", True)


@pytest.fixture(autouse=True)
def ran(monkeypatch):
    """A list of the kernels that have run."""
    return calls.emulate(monkeypatch.setattr)


def names(ran):
    return {x.name.rpartition("_")[2] for x in ran}


@pytest.mark.parametrize("name, dtype", [("plain_reverse", "bfloat16"), ("complex", "float32")])
def test_scan(name, dtype, ran):
    scan.check(name, GPU, dtype)
    assert len(ran) == 2


@pytest.mark.parametrize("name, dtype", [("packed", "float32"), ("many_numbers", "bfloat16"), ("short", "bfloat16")])
def test_selective_scan(name, dtype, ran):
    """With the instructions that are written in PTX, as on a GPU but not in interpreted kernels."""
    selective.check(name, selective.target("gpu", interpret=False), dtype)
    assert [x.name.split("_")[2] for x in ran] == ["forward", "gradient"]


@pytest.mark.parametrize("name", ["packed", "short"])
def test_the_map_of_a_selective_scan(name, ran):
    selective.check_the_map(name, selective.target("gpu", interpret=False), "float32")
    assert {x.name.split("_")[2] for x in ran} == {"summary", "state"}


@pytest.mark.parametrize("name, dtype", [("narrow", "float32"), ("wide_heads", "bfloat16"), ("sums", "float32")])
def test_short_convolution(name, dtype, ran, monkeypatch):
    monkeypatch.setattr(backends, "target", lambda: selective.target("gpu", interpret=False))
    convolution.check(name, dtype, numerics.TOLERANCES[dtype])
    assert [x.name.split("_")[2] for x in ran] == ["forward", "gradient"]


@pytest.mark.parametrize("name, dtype", [("odd", "float32"), ("heads", "bfloat16"), ("sigmoid", "float32")])
def test_gated_rms_norm(name, dtype, ran, monkeypatch):
    monkeypatch.setattr(backends, "target", lambda: selective.target("gpu", interpret=False))
    norm.check(name, dtype, numerics.TOLERANCES[dtype])
    assert [x.name.split("_")[3] for x in ran] == ["forward", "gradient"]


@pytest.mark.parametrize("name, dtype", [("last_register_in_part", "float32"), ("odd", "bfloat16")])
def test_rg_lru(name, dtype, ran, monkeypatch):
    monkeypatch.setattr(backends, "target", lambda: selective.target("gpu", interpret=False))
    monkeypatch.setattr(rg_lru_blocks, "GPU_TIME", 32)
    rg_lru.check(name, dtype, numerics.TOLERANCES[dtype])
    kinds = ("forward", "gradient", "state_gradient", "summary")
    expected = {f"rg_lru_{kind}{'' if name == 'odd' else '_packed'}" for kind in kinds}
    assert {x.name for x in ran if "scan" not in x.name} == expected


@pytest.mark.parametrize("bias", [-200.0, -18.0, 200.0])
def test_rg_lru_at_every_decay(bias, monkeypatch):
    """With powers and reciprocals of 0 and of infinity."""
    monkeypatch.setattr(backends, "target", lambda: selective.target("gpu", interpret=False))
    rg_lru.check_decay(bias)


@pytest.mark.parametrize("name", ["short", "constant_packed", "scalar", "channel", "no_documents"])
def test_linear_attention(name, ran):
    linear.check(name, "bfloat16", GPU)
    assert names(ran) == {"states", "outputs", "values", "keys"}


@pytest.mark.parametrize("name", ["short", "none", "scalar", "channel"])
def test_delta_rule(name, ran):
    delta.check(name, "bfloat16", GPU, None)
    assert names(ran) == {"tokens", "states", "values", "keys"}


@pytest.mark.parametrize("name", ["grouped", "more_keys_in_front", "long"])
def test_windows(name, ran, monkeypatch):
    monkeypatch.setattr(attention.backends, "target", lambda: GPU)
    inputs, cotangents, ids, *expected = windows.case(name)
    operation = functools.partial(
        sliding_window_attention, window=windows.CASES[name][6], segment_ids=ids, backend="pallas"
    )
    attention.check(operation, inputs, cotangents, *expected, "bfloat16")
    assert names(ran) == {"outputs", "queries", "keys"}


def documents(length):
    return np.repeat([[0, 1, 2]], [5, length - 30, 25], axis=1).astype(np.int32)


def compare(kernel, reference, inputs, cotangents):
    expected = numerics.wide(numerics.run(numerics.with_gradients(reference), inputs, cotangents, dtype="float64"))
    found = numerics.run(numerics.with_gradients(kernel), inputs, cotangents, dtype="bfloat16")
    numerics.assert_close(found, expected, numerics.TOLERANCES["bfloat16"])


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
    random, ids = np.random.default_rng(0), documents(length) if (decay, length) != ("scalar", 256) else None
    chunk = linear_attention_blocks.gpu(length, width, decay, ids is not None, None, None).chunk
    assert chunk == {200: 64, 130: 32, 150: 64, 70: 64}.get(length, 128)
    inputs = linear.draw(random, decay, length, 2, width, values)
    cotangents = numerics.normal(random, *inputs[2].shape), numerics.normal(random, *inputs[4].shape)
    reference = functools.partial(linear_attention, segment_ids=ids, backend="recurrent")
    compare(functools.partial(linear.run_kernel, ids, GPU), reference, inputs, cotangents)


@pytest.mark.parametrize(
    "decay, length, width, values, packed",
    [("scalar", 128, 128, 64, False), ("scalar", 100, 64, 64, True), ("constant", 70, 32, 16, True)]
    + [("none", 64, 64, 128, False)],
)
def test_linear_attention_of_shared_keys(decay, length, width, values, packed, monkeypatch):
    """Their gradients come in two parts, of two heads and of one."""
    monkeypatch.setattr(linear_attention_blocks, "GPU_SHARED_HEADS", 2)
    random, ids = np.random.default_rng(0), documents(length) if packed else None
    q, k, *rest = linear.draw(random, decay, length, 3, width, values)
    inputs = q[:, :, :1], k[:, :, :1], *rest
    cotangents = numerics.normal(random, *rest[0].shape), numerics.normal(random, *rest[2].shape)

    def reference(q, k, *rest):
        return linear_attention(q, k, *rest, segment_ids=ids, backend="recurrent")

    compare(functools.partial(linear.run_kernel, ids, GPU), reference, inputs, cotangents)


def draw_delta_rule(random, decay, length, width, values):
    q, k, v = (numerics.normal(random, 1, length, 2, n) for n in (width, width, values))
    k = numerics.representable(k / np.linalg.norm(k, axis=-1, keepdims=True))
    beta, state = numerics.uniform(random, 1, length, 2), numerics.normal(random, 1, 2, width, values)
    return q, k, v, beta, delta_operation.draw_decay(random, decay, 1, length, 2, width), state


@pytest.mark.parametrize(
    "decay, length, width, values", [("scalar", 130, 128, 128), ("channel", 130, 128, 128), ("scalar", 70, 64, 400)]
)
def test_delta_rule_of_many_channels(decay, length, width, values):
    random, ids = np.random.default_rng(0), documents(length)
    inputs = draw_delta_rule(random, decay, length, width, values)
    cotangents = numerics.normal(random, *inputs[2].shape), numerics.normal(random, *inputs[5].shape)
    reference = functools.partial(delta_rule, segment_ids=ids, backend="recurrent")
    compare(functools.partial(delta.run_kernel, ids, GPU), reference, inputs, cotangents)


@pytest.mark.parametrize("decay, packed, width", [("scalar", True, 64), ("none", False, 256)])
def test_delta_rule_of_negative_eigenvalues(decay, packed, width):
    delta.check_alike("same", "2", decay, packed, GPU, width=width)


@pytest.mark.parametrize("operation, width", [("sliding_window_attention", 128), ("causal_attention", 64)])
def test_attention_of_many_channels(operation, width, monkeypatch):
    monkeypatch.setattr(attention.backends, "target", lambda: GPU)
    random, ids = np.random.default_rng(0), documents(200)
    inputs = [numerics.normal(random, 1, 200, heads, width) for heads in (4, 2, 2)]
    run = functools.partial(getattr(ops, operation), segment_ids=ids)
    if operation == "sliding_window_attention":
        run = functools.partial(run, window=70)
    cotangents = numerics.normal(random, *inputs[0].shape)
    compare(functools.partial(run, backend="pallas"), functools.partial(run, backend="chunked"), inputs, cotangents)


# Decays by channel, in float32 as in models: one product of two factors, or one product per level; a kernel has both.


def draw_in_tiles(random, length, width):
    """Three runs of 32 tokens: weak in all channels, strong in the first half of the channels, strong at a few tokens."""
    decay = -0.1 * random.random((1, length, 2, width))
    decay[:, 32:64, :, : width // 2] *= 100
    decay[:, 64:96:7] = -40
    decay[:, 80, :, 3] = -np.inf
    return numerics.representable(decay)


def in_float32(kernel, at):
    def run(*inputs):
        return kernel(*inputs[:at], inputs[at].astype(np.float32), *inputs[at + 1 :])

    return run


def test_linear_attention_of_weak_and_strong_decays():
    random, ids = np.random.default_rng(1), documents(110)
    q, k, v, _, state = linear.draw(random, "channel", 110, 2, 128, 64)
    inputs = q, k, v, draw_in_tiles(random, 110, 128), state
    cotangents = numerics.normal(random, *v.shape), numerics.normal(random, *state.shape)
    reference = functools.partial(linear_attention, segment_ids=ids, backend="recurrent")
    compare(in_float32(functools.partial(linear.run_kernel, ids, GPU), 3), reference, inputs, cotangents)


@pytest.mark.parametrize("part, products", [(0.1, "few"), (0.99, "few"), (1.01, "many"), (10, "many")])
def test_which_way_decays_go(part, products, ran):
    """``part`` is a share of the limit, in each half of the only chunk and every channel: at the limit the factors are
    largest, and products above the diagonal overflow. One product for each of five levels shows as more than one."""
    random = np.random.default_rng(2)
    q, k, v, _, state = linear.draw(random, "channel", 32, 1, 16, 16)
    decay = numerics.representable(np.full((1, 32, 1, 16), -part * factored_decays.LIMIT / 16))
    reference = functools.partial(linear_attention, backend="recurrent")
    cotangents = numerics.normal(random, *v.shape), numerics.normal(random, *state.shape)
    inputs = q, k, v, decay, state
    compare(in_float32(functools.partial(linear.run_kernel, None, GPU), 3), reference, inputs, cotangents)
    for name in ("outputs", "values", "keys"):
        (found,) = [x for x in ran if x.name.endswith(name)]
        taken = sum(warps for opcode, warps in found.counts.items() if opcode.startswith("mma"))
        # One way takes 96, 96 and 416 with JAX 0.10, the other 496, 496 and 1,312.
        assert (taken > {"outputs": 250, "values": 250, "keys": 800}[name]) == (products == "many"), (name, taken)


@pytest.mark.parametrize("decay", ["channel", "constant"])
def test_decays_that_are_not_numbers_are_seen(decay):
    """They make outputs NaN. By default, Triton's maximum of a NaN and the floor of decays is the floor."""
    q, k, v, log_decay, state = linear.draw(np.random.default_rng(2), decay, 32, 2, 16, 16)
    log_decay[..., 5 if decay == "channel" else 0] = np.nan
    inputs = q, k, v, log_decay, state
    o, final = numerics.run(functools.partial(linear.run_kernel, None, GPU), *inputs, dtype="bfloat16")
    assert np.isnan(o[:, :, 0].astype(np.float32)).all() and np.isnan(np.asarray(final)[:, 0]).any()


def test_decays_of_the_delta_rule_that_are_not_numbers_are_seen():
    """In gradients too."""
    random = np.random.default_rng(2)
    inputs = draw_delta_rule(random, "channel", 32, 16, 16)
    inputs[4][0, 7, 0, 5] = np.nan
    cotangents = numerics.normal(random, *inputs[2].shape), numerics.normal(random, *inputs[5].shape)
    run = numerics.with_gradients(functools.partial(delta.run_kernel, None, GPU))
    (o, _), gradients = numerics.run(run, inputs, cotangents, dtype="bfloat16")
    assert (
        np.isnan(np.asarray(o[0, 8:, 0], np.float32)).all() and not np.isnan(np.asarray(o[0, :, 1], np.float32)).any()
    )
    assert all(np.isnan(np.asarray(x, np.float32)).any() for x in gradients)


def test_delta_rule_of_weak_and_strong_decays():
    random, ids = np.random.default_rng(1), documents(110)
    q, k, v, beta, _, state = draw_delta_rule(random, "channel", 110, 64, 64)
    inputs = q, k, v, beta, draw_in_tiles(random, 110, 64), state
    cotangents = numerics.normal(random, *v.shape), numerics.normal(random, *state.shape)
    reference = functools.partial(delta_rule, segment_ids=ids, backend="recurrent")
    compare(in_float32(functools.partial(delta.run_kernel, ids, GPU), 4), reference, inputs, cotangents)


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
    inputs = linear.draw(np.random.default_rng(0), "none", 130, 1, 64, 64)
    with pytest.raises(Exception, match=message):
        numerics.run(functools.partial(linear.run_kernel, None, GPU), *inputs, dtype="bfloat16")
