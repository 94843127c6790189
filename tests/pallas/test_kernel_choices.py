"""Which arrays the kernels take: where ``auto`` chooses a kernel, what it says where it does not, and what is refused."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import pytest

from jaxlinear import log_once, ops
from jaxlinear.errors import UserError
from jaxlinear.ops import backends
from jaxlinear.ops.attention import op as attention
from jaxlinear.ops.convolution import short
from jaxlinear.ops.delta_rule import op as delta_rule
from jaxlinear.ops.diagonal import op as diagonal
from jaxlinear.ops.gated_rms_norm import choose as choose_norm
from jaxlinear.ops.linear_attention import op as linear_attention
from jaxlinear.ops.selective_scan import op as selective_scan
from jaxlinear.parallel import operations, sharding
from tests import numerics
from tests.shards import make_mesh

CHOOSE = {
    "causal_attention": attention.choose,
    "linear_attention": linear_attention.choose,
    "delta_rule": delta_rule.choose,
    "linear_recurrence": diagonal.choose,
    "selective_scan": selective_scan.choose,
    "gated_rms_norm": choose_norm,
    "short_convolution": short.choose,
}
V5E, H100, EVERY = {"tpu": "TPU v5 lite"}, {"gpu": "NVIDIA H100 80GB HBM3"}, {"tpu": "TPU v5 lite", "gpu": "some kind"}


def x(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct((1, *shape), dtype)


def heads(length=9, count=2, key=32, value=None, dtype="bfloat16"):
    q = x(length, count, key, dtype=dtype)
    return q, q, x(length, count, value or key, dtype=dtype)


def scan(length=9, states=3, dtype="float32", rates=True):
    y, B = x(length, 2, dtype=dtype), x(length, states, dtype="float32")
    return y, x(length, 2, dtype="float32"), jax.ShapeDtypeStruct((2, states), "float32") if rates else None, B, B


def norm(channels, count=1, dtype="float32"):
    y = x(9, channels, dtype=dtype)
    return y, y, jax.ShapeDtypeStruct((channels // count,), "float32")


def taps(channels, count=4, dtype="float32"):
    return x(9, channels, dtype=dtype), jax.ShapeDtypeStruct((count, channels), "float32")


def by_channel(count=2, key=16, value=None, dtype="float32"):
    return *heads(9, count, key, value, dtype), None, x(9, count, key, dtype="float32")


# Operation, where, arrays and options, the form that auto takes, and, where it says so and ``pallas`` is refused, why.
CHOSEN = [
    ("causal_attention", {"cpu": ""}, heads(256, 4, 64), {}, "chunked", None),
    ("causal_attention", EVERY, (x(256, 4, 64), *[x(256, 1, 64)] * 2), {}, "pallas", None),
    ("causal_attention", V5E, (x(1, 4, 64), *[x(256, 1, 64)] * 2), {}, "chunked", None),  # one token: decoding
    ("causal_attention", V5E, heads(256, 4, 64), {"offset": 0}, "chunked", "takes no offset"),
    ("causal_attention", H100, heads(256, dtype="float32"), {}, "chunked", "for GPU takes bfloat16, not float32"),
    ("causal_attention", V5E, heads(256, dtype="float16"), {}, "chunked", "not float16"),
    ("causal_attention", H100, heads(256, value=288), {}, "chunked", "256 channels per head, not 288"),
    ("causal_attention", V5E, heads(256, value=520), {}, "chunked", "512 channels per head, not 520"),
    ("linear_attention", {"cpu": ""}, heads(), {}, "chunked", None),
    ("linear_attention", EVERY, heads(), {}, "pallas", None),
    ("linear_attention", EVERY, heads(length=8), {}, "recurrent", None),
    ("linear_attention", V5E, heads(dtype="float32"), {}, "pallas", None),
    ("linear_attention", H100, heads(dtype="float32"), {}, "chunked", "takes bfloat16, not float32"),
    (
        "linear_attention",
        EVERY,
        heads(key=512, value=32),
        {},
        "chunked",
        "K from 16 to 256 and V of at least 16, not K",
    ),
    ("linear_attention", EVERY, heads(value=8), {}, "chunked", "V of at least 16, not V = 8"),
    ("linear_attention", V5E, heads(dtype="float16"), {}, "chunked", "not float16"),
    ("linear_attention", V5E, heads(dtype="float64"), {}, "chunked", "not float64"),
    ("linear_attention", V5E, heads(20, 12, 32, 1002), {}, "chunked", "at most 8 heads at a time, and 12 heads"),
    ("linear_attention", V5E, heads(20), {"chunk_size": 64}, "chunked", "takes chunks of 128 tokens, not of 64"),
    ("linear_attention", EVERY, heads(20), {"chunk_size": 48}, "chunked", "chunks of "),
    ("delta_rule", {"cpu": ""}, heads(), {}, "chunked", None),
    ("delta_rule", EVERY, heads(), {}, "pallas", None),
    ("delta_rule", V5E, heads(dtype="float32"), {"chunk_size": 64}, "pallas", None),
    ("delta_rule", V5E, heads(length=8), {}, "recurrent", None),
    ("delta_rule", V5E, heads(dtype="float64"), {}, "chunked", "not float64"),
    ("delta_rule", H100, heads(dtype="float32"), {}, "chunked", "takes bfloat16, not float32"),
    ("delta_rule", H100, heads(), {"chunk_size": 128}, "chunked", "16 to 64 tokens, not of 128"),
    ("delta_rule", V5E, by_channel(), {"chunk_size": 48}, "chunked", "16 to 128 tokens, not of 48"),
    ("delta_rule", V5E, by_channel(), {"chunk_size": 256}, "chunked", "16 to 128 tokens, not of 256"),
    ("delta_rule", V5E, by_channel(2, 8, 16), {}, "chunked", "V of at least 16, not K = 8"),
    ("delta_rule", V5E, by_channel(2, 16, 257), {}, "chunked", "parts of at most 256, and V = 257"),
    ("delta_rule", V5E, by_channel(64, 20), {}, "chunked", "16 heads at a time, and 64 heads"),
    ("delta_rule", V5E, heads(count=40, key=16), {}, "pallas", None),  # in several blocks
    # What VMEM holds depends on the decay.
    ("delta_rule", V5E, heads(count=16, key=248, dtype="float32"), {}, "pallas", None),
    ("delta_rule", V5E, by_channel(16, 248, dtype="bfloat16"), {}, "pallas", None),
    ("delta_rule", V5E, by_channel(16, 248), {}, "chunked", "64 MiB of VMEM and would need about 70"),
    ("linear_recurrence", {"cpu": ""}, [x(5, 2)] * 2, {}, "recurrent", None),
    ("linear_recurrence", EVERY, (x(5, 2, dtype="float32"), x(5, 2)), {}, "pallas", None),
    ("linear_recurrence", EVERY, [x(1, 2)] * 2, {}, "recurrent", None),
    ("linear_recurrence", EVERY, [x(5, 2, dtype="float64")] * 2, {}, "associative", "complex64, not in float64"),
    ("linear_recurrence", V5E, [x(5, 2, dtype="float16")] * 2, {}, "associative", "not float16"),
    ("selective_scan", {"cpu": ""}, scan(), {}, "chunked", None),
    ("selective_scan", EVERY, scan(dtype="bfloat16"), {}, "pallas", None),
    ("selective_scan", EVERY, scan(length=1, rates=False), {}, "recurrent", None),
    ("selective_scan", EVERY, scan(dtype="float64"), {}, "chunked", "not float64"),
    ("selective_scan", EVERY, scan(), {"chunk_size": 4}, "chunked", "takes no chunk_size=4"),
    ("selective_scan", EVERY, scan(states=300, rates=False), {}, "chunked", "takes N up to 128, not 300"),
    ("gated_rms_norm", V5E, norm(400), {}, "separate", "registers of 128 channels, not of 400"),
    ("gated_rms_norm", V5E, norm(2**15), {}, "separate", "has no room in VMEM for 32768 channels"),
    ("gated_rms_norm", V5E, norm(128, dtype="float16"), {}, "separate", "not float16"),
    ("gated_rms_norm", H100, norm(2**15), {}, "separate", "heads of up to 5120 channels, not 32768"),
    ("gated_rms_norm", H100, norm(2**16, 2**16), {}, "separate", "takes up to 65535 heads, not 65536"),
    ("short_convolution", V5E, taps(4, 1), {}, "separate", "takes 2 to 9 taps, not 1"),
    ("short_convolution", V5E, taps(4, 10), {}, "separate", "takes 2 to 9 taps, not 10"),
    ("short_convolution", V5E, taps(9000), {"head_width": 2250}, "separate", "no room in VMEM for 9000 channels"),
    ("short_convolution", V5E, taps(0), {}, "separate", "takes no empty arrays"),
    ("short_convolution", H100, taps(514), {"head_width": 257}, "separate", "heads of up to 256 channels, not 257"),
    ("short_convolution", H100, taps(8, dtype="float16"), {}, "separate", "not float16"),
    ("short_convolution", V5E, taps(256), {"activation": "none"}, "pallas", None),
    ("short_convolution", H100, taps(256), {"activation": "none"}, "separate", None),  # XLA moves no more bytes
]


@pytest.mark.parametrize("operation, where, arrays, options, form, reason", CHOSEN)
def test_what_is_chosen(operation, where, arrays, options, form, reason, caplog):
    """``auto`` says once why it takes no kernel; ``pallas`` is refused for the same reason."""
    choose = functools.partial(numerics.form, CHOOSE[operation])
    for platform, kind in where.items():
        log_once._logged.clear()
        caplog.clear()
        with backends.use_platform(platform, kind), caplog.at_level(logging.INFO, logger="jaxlinear"):
            assert choose("auto", *arrays, **options) == choose("auto", *arrays, **options) == form
            said = f"{operation} runs as {form!r}, not as a kernel: "
            assert [line.startswith(said) and reason in line for line in caplog.messages] == [True] * bool(reason)
            if reason:
                assert choose(form, *arrays, **options) == form
                with pytest.raises(UserError, match=f"^{operation}: .*{re.escape(reason)}.*; use backend={form!r}"):
                    choose("pallas", *arrays, **options)


_NORM = {"x": (1, 9, 8), "gate": (1, 9, 8), "scale": (4,)}
_TAPS = {"x": (1, 9, 4), "kernel": (4, 4)}


@pytest.mark.parametrize(
    "operation, shapes, options, reason",
    [
        ("gated_rms_norm", _NORM | {"gate": (1, 9, 4)}, {}, r"gate is \(1, 9, 4\), not \(1, 9, 8\)"),
        ("gated_rms_norm", _NORM | {"skipped": (1, 9, 8)}, {}, "takes skipped and skip together, or neither"),
        ("gated_rms_norm", _NORM | {"skipped": (1, 9, 8), "skip": (4,)}, {}, r"skip is \(4,\), not \(8,\)"),
        ("gated_rms_norm", _NORM | {"x": (9, 8)}, {}, "x"),
        ("gated_rms_norm", _NORM | {"scale": (3,)}, {}, "heads of 3 channels do not divide 8 channels"),
        ("gated_rms_norm", _NORM, {"activation": "gelu"}, "activation='gelu' must be one of silu, sigmoid"),
        ("short_convolution", _TAPS, {"head_width": 3}, "heads of 3 channels do not divide 4 channels"),
        ("short_convolution", _TAPS, {"activation": "relu"}, "activation='relu' must be one of silu, none"),
        (
            "linear_attention",
            dict.fromkeys("qkv", (1, 20, 1, 32)),
            {"chunk_size": 48},
            "from 8 to 256 tokens, not of 48",
        ),
    ],
)
def test_arguments_that_are_refused(operation, shapes, options, reason):
    options = options | ({"epsilon": 1e-6} if operation == "gated_rms_norm" else {})
    with pytest.raises(UserError, match=reason):
        getattr(ops, operation)(**{name: jnp.ones(y) for name, y in shapes.items()}, **options, backend="pallas")


_CONVOLUTION = (4, 32, 8), (4, 8)


@pytest.mark.parametrize(
    "operation, shapes, options, sizes, reason",
    [
        (
            "short_convolution",
            _CONVOLUTION,
            {},
            {"data": 4, "sequence": 2},
            "whole rows, and mesh.sequence shards them",
        ),
        (
            *("gated_rms_norm", ((4, 32, 256), (4, 32, 256), (256,)), {"channels": "heads", "epsilon": 1e-6}),
            *({"data": 4, "tensor": 2}, "whole heads, and a device has 128 channels, of heads of 256"),
        ),
    ],
)
def test_refused_on_a_mesh(operation, shapes, options, sizes, reason, caplog, monkeypatch):
    monkeypatch.setattr(log_once, "_logged", set())
    arrays = [jnp.ones(shape) for shape in shapes]
    run = functools.partial(getattr(operations, operation), **options)
    with sharding.use_mesh(make_mesh(sizes)):
        with pytest.raises(UserError, match=f"needs {reason}; use backend='separate'"):
            run(*arrays, backend="pallas")
        with backends.use_platform("tpu"), caplog.at_level("INFO", logger="jaxlinear"):
            jax.eval_shape(run, *arrays)
    assert caplog.messages == [f"{operation} runs as 'separate', not as a kernel: the kernel needs {reason}"]


# Derivatives of the kernels' gradients are refused; the backend that the message names supports them.

X = jnp.ones((1, 32, 1, 128))
_ONES = jnp.ones(128)


def _of_the_scan(x, **how):
    y = x[:, :, 0]
    return ops.selective_scan(y, y, None, y[:, :, :3], y[:, :, :3], **how)[0]


def _of_the_rg_lru(operation):
    kernel, first = jnp.ones((2, 64, 64)), jnp.zeros((1, 32), bool)
    return lambda x, **how: operation(x[:, :, 0], kernel, _ONES, kernel, _ONES, -_ONES, first, **how)[0]


TWICE = {
    "linear_recurrence": (lambda x, **how: ops.linear_recurrence(x, x, **how)[0], "associative"),
    "linear_attention": (lambda x, **how: ops.linear_attention(x, x, x, **how)[0], "chunked"),
    "delta_rule": (lambda x, **how: ops.delta_rule(x, x, x, x[..., 0], **how)[0], "chunked"),
    "causal_attention": (lambda x, **how: ops.causal_attention(x, x, x, **how), "chunked"),
    "sliding_window_attention": (lambda x, **how: ops.sliding_window_attention(x, x, x, window=8, **how), "chunked"),
    "selective_scan": (
        lambda x, **how: ops.selective_scan(*[x[:, :, 0]] * 2, None, *[x[:, :, 0, :3]] * 2, **how)[0],
        "chunked",
    ),
    "gated_rms_norm": (lambda x, **how: ops.gated_rms_norm(*[x[:, :, 0]] * 2, _ONES, epsilon=1.0, **how), "separate"),
    "short_convolution": (lambda x, **how: ops.short_convolution(x[:, :, 0], jnp.ones((4, 128)), **how)[0], "separate"),
    "rg_lru": (_of_the_rg_lru(ops.rg_lru), "separate"),
    "rg_lru_gates": (_of_the_rg_lru(ops.rg_lru_gates), "products"),
}


def of_gradient(operation):
    return jax.grad(lambda x: jnp.sum(operation(x) ** 2))


def reverse(operation):
    return jax.grad(lambda x: jnp.sum(of_gradient(operation)(x)))


def forward(operation):
    return lambda x: jax.jvp(of_gradient(operation), (x,), (x,))


def of_cotangents(operation):
    """The derivative of the gradient with respect to the output's cotangents, at fixed inputs."""

    def gradient(cotangents):
        _, pullback = jax.vjp(operation, X)
        return jnp.sum(pullback(cotangents)[0])

    return jax.grad(lambda x: gradient(x.reshape(operation(X).shape)))


@pytest.mark.parametrize("derivative", [reverse, forward, of_cotangents])
@pytest.mark.parametrize("target", ["tpu", "gpu"])
@pytest.mark.parametrize("name", TWICE)
def test_derivatives_of_gradients_are_refused(name, target, derivative, use):
    use(target)
    operation, instead = TWICE[name]
    message = f"the kernel (backend='pallas') has no second derivatives; use backend='{instead}'"
    with pytest.raises(UserError, match=re.escape(message)):
        jax.eval_shape(derivative(functools.partial(operation, backend="pallas")), X)


@pytest.mark.parametrize("name", TWICE)
def test_the_backend_that_is_named_has_them(name):
    operation, instead = TWICE[name]
    assert jax.eval_shape(reverse(functools.partial(operation, backend=instead)), X) == jax.eval_shape(lambda x: x, X)


@pytest.mark.parametrize("name", ["linear_recurrence", "linear_attention"])
def test_they_are_differences_of_gradients(name):
    """They are taken along a line."""
    operation, instead = TWICE[name]
    gradient = of_gradient(functools.partial(operation, backend=instead))
    x, direction = (jax.random.normal(key, (1, 32, 1, 16)) / 4 for key in jax.random.split(jax.random.key(0)))
    along = jax.jit(lambda t: jnp.vdot(gradient(x + t * direction), direction))
    found, differences = jax.jit(jax.grad(along))(0.0), (along(1e-2) - along(-1e-2)) / 2e-2
    assert abs(differences) > 0.01
    assert found == pytest.approx(float(differences), rel=2e-2)
