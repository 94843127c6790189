"""Which arguments every operation refuses, whichever backend would run it, and what it does with empty arrays."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear import ops
from jaxlinear.errors import UserError

_HEADS = {"q": (2, 9, 2, 3), "k": (2, 9, 2, 3), "v": (2, 9, 2, 5)}
_GROUPED = {"q": (2, 4, 4, 2), "k": (2, 4, 2, 2), "v": (2, 4, 2, 2)}
_GATES = {
    **{"x": (2, 12, 12), "recurrence_kernel": (3, 4, 4), "recurrence_bias": (12,), "input_kernel": (3, 4, 4)},
    **{"input_bias": (12,), "rate": (12,), "first": np.ones((2, 12), bool)},
}
# Arguments that fit; a tuple is the shape of ones in float32.
_FITTING = {
    "linear_recurrence": {"a": (2, 5, 3), "x": (2, 5, 3), "initial_state": (2, 3)},
    "linear_attention": _HEADS,
    "delta_rule": {**_HEADS, "beta": (2, 9, 2)},
    "selective_scan": {"x": (2, 4, 3), "dt": (2, 4, 3), "A": (3, 2), "B": (2, 4, 2), "C": (2, 4, 2)},
    "causal_convolution": {"x": (2, 12, 2), "kernel": (3, 2), "bias": (2,), "state": (2, 2, 2)},
    "causal_attention": _GROUPED,
    "sliding_window_attention": {**_GROUPED, "window": 2},
    "rg_lru_gates": _GATES,
    "rg_lru": {**_GATES, "initial_state": (2, 12)},
}
_WITH_HEADS = ("linear_attention", "delta_rule", "causal_attention", "sliding_window_attention")


def call(operation, change):
    """The operation on ``_FITTING`` with this change."""
    given = _FITTING[operation] | change
    given = {name: np.ones(x, np.float32) if isinstance(x, tuple) else x for name, x in given.items()}
    return getattr(ops, operation)(**given)


def rows_and_tokens(operation):
    return next(_FITTING[operation][name] for name in ("x", "q") if name in _FITTING[operation])[:2]


_TWO_FORMS = "has no backend 'associative'; it has 'auto', 'recurrent', 'chunked'"
_REFUSED = [
    *(
        (
            operation,
            {"segment_ids": np.zeros(shape, np.int32)},
            f"segment_ids {shape} must be one per token, [B, T] = {(batch, length)}",
        )
        for operation in _FITTING
        if operation != "rg_lru_gates"
        for batch, length in [rows_and_tokens(operation)]
        for shape in (
            (batch, length + 1),
            (batch, length - 1),
            (batch, 1),
            (1, length),
            (length,),
            (batch, length, 1),
        )
    ),
    # Outputs would be cut to whole numbers, or the imaginary part dropped.
    ("causal_convolution", {"x": np.ones((2, 12, 2), np.int32)}, "x has dtype int32; it must be real"),
    ("linear_recurrence", {"x": np.ones((2, 5, 3), np.int32)}, "x has dtype int32; it must be real"),
    *(
        (name, {"v": np.ones(_FITTING[name]["v"], dtype)}, f"v has dtype {dtype}; it must be real")
        for name in _WITH_HEADS
        for dtype in ("int32", "complex64")
    ),
    *(
        (name, {"initial_state": np.zeros((2, 2, 3, 5), np.complex64)}, "initial_state is complex")
        for name in _WITH_HEADS[:2]
    ),
    *((name, {"scale": np.ones(3, np.float32)}, "it must be one number, known at trace time") for name in _WITH_HEADS),
    *(
        (
            name,
            {x: (*_FITTING[name][x][:-1], 0) for x in "qk"} | {"scale": scale, "backend": backend},
            "queries and keys have no channels",
        )
        for name in _WITH_HEADS
        for scale in (None, 0.5)
        for backend in ("recurrent", "chunked", "auto")
    ),
    ("linear_recurrence", {"backend": "chunked"}, "has no backend 'chunked'; it has 'auto', 'rec"),
    ("linear_recurrence", {"a": (2, 5, 1)}, "a (2, 5, 1) does not fit x (2, 5, 3); it must be [B, T, ...] or [...]"),
    ("linear_recurrence", {"a": (5, 3)}, "a (5, 3) does not fit"),
    ("linear_recurrence", {"a": (2,)}, "a (2,) does not fit"),
    ("linear_recurrence", {"initial_state": (1, 3)}, "initial state is (1, 3), not [B, ...] = (2, 3)"),
    ("linear_recurrence", {"initial_state": np.full((2, 3), 1j)}, "initial state is complex, a and x are real"),
    ("linear_attention", {"backend": "associative"}, _TWO_FORMS),
    ("linear_attention", {"k": (2, 9, 2, 5)}, "do not have the shape of the queries"),
    ("linear_attention", {"v": (2, 9, 1, 5)}, "do not fit queries"),
    ("linear_attention", {"log_decay": (9,)}, "log_decay (9,) does not fit"),
    ("linear_attention", {"initial_state": (2, 2, 5, 3)}, "the initial state is"),
    *(
        (name, {"chunk_size": 4, "backend": "recurrent"}, "chunk_size=4 is for backend='chunked'")
        for name in ("linear_attention", "delta_rule", "selective_scan")
    ),
    *(
        (name, {"chunk_size": size}, f"chunk_size={size} must be a whole number of tokens, at least 1")
        for name, sizes in (("linear_attention", (0, -1, 2.5)), ("delta_rule", (0,)), ("selective_scan", (0,)))
        for size in sizes
    ),
    ("delta_rule", {"backend": "associative"}, _TWO_FORMS),
    ("delta_rule", {"beta": (2, 9, 2, 1)}, "beta (2, 9, 2, 1) does not fit queries"),
    ("delta_rule", {"log_decay": (2,)}, "log_decay (2,) does not fit"),
    ("delta_rule", {"k": (2, 9, 2, 4)}, "keys (2, 9, 2, 4) do not have the shape of the queries"),
    (
        "delta_rule",
        {"k": (2, 9, 2, 2, 3), "v": (2, 9, 2, 2, 4), "beta": (2, 9, 2, 3)},
        "beta (2, 9, 2, 3) differ in the number of updates per token",
    ),
    ("delta_rule", {"k": (2, 9, 2, 0, 3)}, "differ in the number of updates per token"),
    ("delta_rule", {"initial_state": (2, 2, 3, 3)}, "the initial state is (2, 2, 3, 3), not [B, H, K, V]"),
    ("selective_scan", {"backend": "associative"}, _TWO_FORMS),
    ("selective_scan", {"x": (4, 3)}, "x is (4, 3); it must be [B, T, D]"),
    ("selective_scan", {"dt": (2, 4, 1)}, "dt (2, 4, 1) does not have the shape of x (2, 4, 3)"),
    ("selective_scan", {"B": (2, 5, 2)}, "B (2, 5, 2) does not fit x (2, 4, 3); it must be [B, T, N]"),
    ("selective_scan", {"C": (2, 4, 3)}, "C (2, 4, 3) does not have the shape of B (2, 4, 2)"),
    ("selective_scan", {"A": (2, 3)}, "A is (2, 3), not [D, N] = (3, 2)"),
    ("selective_scan", {"A": np.ones((3, 2), np.complex64)}, "A has dtype complex64; it must be real"),
    ("selective_scan", {"initial_state": (2, 2, 3)}, "initial state is (2, 2, 3), not [B, D, N] = (2, 3, 2)"),
    *(
        (name, change, message)
        for name in ("causal_attention", "sliding_window_attention")
        for change, message in (
            ({"backend": "associative"}, _TWO_FORMS),
            ({"q": (4, 4, 2)}, "q is (4, 4, 2); it must be [B, T, H, K]"),
            ({"k": (2, 4, 2), "v": (2, 4, 2)}, "k is (2, 4, 2); it must be [B, T, G, K]"),
            ({"k": (2, 4, 3, 2), "v": (2, 4, 3, 2)}, "3 key heads do not divide 4 query heads"),
            ({"k": (2, 3, 2, 2), "v": (2, 3, 2, 2)}, "do not fit queries"),
            ({"k": (1, 4, 2, 2), "v": (1, 4, 2, 2)}, "do not fit queries"),
            ({"k": (2, 4, 2, 3)}, "do not fit queries"),
            ({"v": (2, 5, 2, 2)}, "do not fit queries"),
        )
    ),
    ("causal_attention", {"q": (2, 2, 4, 2), "offset": 9}, "offset is 9; with 2 queries on 4 keys it must be 0 to 2"),
    ("sliding_window_attention", {"window": 0}, "the window is 0; it must be at least 1"),
    ("sliding_window_attention", {"window": 2.5}, "the window is 2.5; it must be a whole number of tokens"),
    ("causal_convolution", {"kernel": (3, 1)}, "kernel (3, 1) does not fit x (2, 12, 2); it must be [width, D]"),
    ("causal_convolution", {"kernel": (2,)}, "kernel (2,) does not fit"),
    ("causal_convolution", {"kernel": (0, 2)}, "kernel (0, 2) does not fit"),
    ("causal_convolution", {"bias": (1,)}, "bias (1,) does not fit"),
    ("causal_convolution", {"bias": (1, 2)}, "bias (1, 2) does not fit"),
    ("causal_convolution", {"state": (2, 3, 2)}, "state is (2, 3, 2), not [B, width-1, D] = (2, 2, 2)"),
    ("causal_convolution", {"state": (1, 2, 2)}, "state is (1, 2, 2), not"),
    *(
        ("causal_convolution", {name: np.ones(shape, np.complex64)}, f"the {name} is complex, x is real")
        for name, shape in (("kernel", (3, 2)), ("bias", (2,)), ("state", (2, 2, 2)))
    ),
    ("rg_lru_gates", {"backend": "chunked"}, "has no backend 'chunked'; it has 'auto', 'products', 'pallas'"),
    ("rg_lru_gates", {"x": (2, 12)}, "x is (2, 12); it must be [B, T, R]"),
    ("rg_lru_gates", {"x": np.ones((2, 12, 12), np.int32)}, "x has dtype int32; it must be real"),
    ("rg_lru_gates", {"recurrence_kernel": (2, 4, 4)}, "for x (2, 12, 12) it must be [N, K, K] with N K = 12"),
    ("rg_lru_gates", {"input_kernel": (4, 3, 3)}, "input_kernel (4, 3, 3) does not have recurrence_kernel's shape"),
    ("rg_lru_gates", {"input_bias": (1,)}, "input_bias is (1,), not [R] = (12,)"),
    ("rg_lru_gates", {"first": np.ones((2, 12), np.int32)}, "first is int32 (2, 12), not bool [B, T] = (2, 12)"),
    ("rg_lru_gates", {"first": np.ones((2, 1), bool)}, "first is bool (2, 1), not bool"),
    ("rg_lru", {"backend": "chunked"}, "has no backend 'chunked'; it has 'auto', 'separate', 'pallas'"),
    *(
        ("rg_lru", {**change, "backend": backend}, message)
        for backend in ("separate", "pallas")
        for change, message in (
            ({"initial_state": (2, 11)}, "the initial state is (2, 11), not [B, "),
            ({"segment_ids": np.ones((2, 11), np.int32)}, "segment_ids"),
            ({"first": np.ones((2, 11), bool)}, "first is bool (2, 11), not bool [B, T] = (2, 12)"),
        )
    ),
]


@pytest.mark.parametrize("operation, change, message", _REFUSED)
def test_what_does_not_fit_is_refused(operation, change, message):
    prefix = "(rg_lru|rg_lru_gates|linear_recurrence)" if operation == "rg_lru" else operation  # it calls the others
    with pytest.raises(UserError, match=rf"^{prefix}\b.*{re.escape(message)}"):
        call(operation, change)


@pytest.mark.parametrize("operation", _WITH_HEADS)
def test_a_scale_is_a_number(operation):
    run = lambda scale: jax.tree.leaves(call(operation, {"scale": scale}))[0]  # noqa: E731
    np.testing.assert_allclose(run(jnp.float32(0.25)), run(0.25), rtol=1e-6)
    with pytest.raises(UserError, match=f"{operation}: scale is .*it must be one number, known at trace time"):
        jax.grad(lambda scale: run(scale).sum())(jnp.float32(0.25))


@pytest.mark.parametrize("backend", ["recurrent", "chunked", "auto"])
@pytest.mark.parametrize("operation", ["linear_attention", "delta_rule"])
def test_a_recurrence_of_nothing_leaves_its_state(operation, backend):
    for batch, length, heads in ((0, 9, 2), (1, 0, 2), (2, 9, 0)):
        change = {name: (batch, length, heads, *shape[3:]) for name, shape in _FITTING[operation].items()}
        state = np.ones((batch, heads, 3, 5), np.float32)
        o, final = call(operation, change | {"initial_state": state, "backend": backend})
        assert o.shape == change["v"]
        np.testing.assert_array_equal(final, state)


def test_values_without_channels_are_none_in_the_outputs():
    for operation in _WITH_HEADS:
        v = (*_FITTING[operation]["v"][:-1], 0)
        for backend in ("recurrent", "chunked", "pallas") if operation in _WITH_HEADS[2:] else ("chunked",):
            o = jax.tree.leaves(call(operation, {"v": v, "backend": backend}))[0]
            assert o.shape == (*_FITTING[operation]["q"][:-1], 0)


def test_no_tokens_rows_or_channels_leave_the_state():
    state = np.ones((2, 2, 2), np.float32)
    runs = [
        *(
            ("causal_convolution", {"x": (2, 0, 2), "state": state, "segment_ids": ids})
            for ids in (None, np.zeros((2, 0), np.int32))
        ),
        *(
            (
                "linear_recurrence",
                {"a": a, "x": (2, 0, 3), "initial_state": state[:, 0, :1].repeat(3, 1), "reverse": way},
            )
            for a in ((2, 0, 3), np.float32(0.5))
            for way in (False, True)
        ),
        *(
            (
                "selective_scan",
                {"x": x, "dt": x, "A": (x[2], 2), "B": (*x[:2], 2), "C": (*x[:2], 2)}
                | {"initial_state": np.ones((x[0], x[2], 2), np.float32)},
            )
            for x in ((0, 4, 3), (1, 0, 3), (2, 4, 0))
        ),
    ]
    for operation, given in runs:
        y, final = call(operation, given)
        assert y.shape == given["x"]
        np.testing.assert_array_equal(final, given.get("initial_state", state))
