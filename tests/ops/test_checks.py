"""Which arguments every operation refuses, whichever backend would run it, and what it does with empty arrays."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear import ops
from jaxlinear.errors import UserError

_B, _T, _H, _K, _V = 2, 12, 2, 4, 6


def _arrays():
    random = np.random.default_rng(0)
    normal = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    q, k, v = normal(_B, _T, _H, _K), normal(_B, _T, _H, _K), normal(_B, _T, _H, _V)
    beta = np.full((_B, _T, _H), 0.5, np.float32)
    return q, k, v, beta


_Q, _KEYS, _VALUES, _BETA = _arrays()

# Each as a function of its v or x.
_OPERATIONS = {
    "linear_recurrence": lambda x=_VALUES, **options: ops.linear_recurrence(0.5, x, **options),
    "linear_attention": lambda x=_VALUES, **options: ops.linear_attention(_Q, _KEYS, x, **options),
    "delta_rule": lambda x=_VALUES, **options: ops.delta_rule(_Q, _KEYS, x, _BETA, **options),
    "causal_attention": lambda x=_VALUES, **options: ops.causal_attention(_Q, _KEYS, x, **options),
    "sliding_window_attention": lambda x=_VALUES, **options: ops.sliding_window_attention(
        _Q, _KEYS, x, window=4, **options
    ),
    "causal_convolution": lambda x=_VALUES[..., 0], **options: ops.causal_convolution(
        x, np.ones((3, _H), np.float32), **options
    ),
}
_IDS = np.repeat([[1, 2, 3]], _T // 3, axis=1).repeat(_B, axis=0)


@pytest.mark.parametrize("operation", _OPERATIONS)
@pytest.mark.parametrize("shape", [(_B, _T + 1), (_B, _T - 1), (_B, 1), (1, _T), (_T,), (_B, _T, 1)])
def test_segment_ids_that_are_not_one_a_token_are_refused(operation, shape):
    ids = np.resize(_IDS, shape)
    message = re.escape(f"{operation}: segment_ids {shape} must be one per token, [B, T] = {(_B, _T)}")
    with pytest.raises(UserError, match=message):
        _OPERATIONS[operation](segment_ids=ids)


@pytest.mark.parametrize("operation", _OPERATIONS)
def test_segment_ids_may_be_lists(operation):
    first = lambda outputs: outputs[0] if isinstance(outputs, tuple) else outputs  # noqa: E731
    listed = first(_OPERATIONS[operation](segment_ids=_IDS.tolist()))
    np.testing.assert_array_equal(listed, first(_OPERATIONS[operation](segment_ids=jnp.asarray(_IDS))))


@pytest.mark.parametrize("operation", _OPERATIONS)
def test_whole_numbers_are_refused_since_outputs_would_be_cut_to_them(operation):
    x = np.ones((_B, _T, _H) if operation == "causal_convolution" else _VALUES.shape, np.int32)
    with pytest.raises(UserError, match=rf"{operation}: [vx] has dtype int32; it must be real"):
        _OPERATIONS[operation](x)


@pytest.mark.parametrize(
    "operation", ["linear_attention", "delta_rule", "causal_attention", "sliding_window_attention"]
)
def test_complex_numbers_are_refused_where_the_imaginary_part_would_be_dropped(operation):
    with pytest.raises(UserError, match=f"{operation}: v has dtype complex64; it must be real"):
        _OPERATIONS[operation](_VALUES.astype(np.complex64))
    if operation in ("linear_attention", "delta_rule"):
        with pytest.raises(UserError, match=f"{operation}: initial_state is complex"):
            _OPERATIONS[operation](initial_state=np.zeros((_B, _H, _K, _V), np.complex64))


@pytest.mark.parametrize(
    "operation", ["linear_attention", "delta_rule", "causal_attention", "sliding_window_attention"]
)
def test_a_scale_is_a_number(operation):
    run = lambda scale: jax.tree.leaves(_OPERATIONS[operation](scale=scale))[0]  # noqa: E731
    np.testing.assert_allclose(run(jnp.float32(0.25)), run(0.25), rtol=1e-6)
    message = f"{operation}: scale is .*it must be one number, known at trace time"
    with pytest.raises(UserError, match=message):
        run(np.ones(_V, np.float32))
    with pytest.raises(UserError, match=message):
        jax.grad(lambda scale: run(scale).sum())(jnp.float32(0.25))


@pytest.mark.parametrize("backend", ["recurrent", "chunked", "auto"])
@pytest.mark.parametrize("empty", ["batch", "time", "heads"])
def test_a_recurrence_of_nothing_leaves_its_state(backend, empty):
    cut = {"batch": np.s_[:0], "time": np.s_[:, :0], "heads": np.s_[:, :, :0]}[empty]
    shape = (0 if empty == "batch" else _B, 0 if empty == "heads" else _H, _K, _V)
    state = jnp.ones(shape, jnp.float32)
    for o, final in (
        ops.linear_attention(_Q[cut], _KEYS[cut], _VALUES[cut], None, state, backend=backend),
        ops.delta_rule(_Q[cut], _KEYS[cut], _VALUES[cut], _BETA[cut], None, state, backend=backend),
    ):
        assert o.shape == _VALUES[cut].shape
        np.testing.assert_array_equal(final, state)


@pytest.mark.parametrize("backend", ["recurrent", "chunked", "auto"])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_no_channels_are_refused(backend, scale):
    q, k = _Q[..., :0], _KEYS[..., :0]
    options = {"backend": backend, "scale": scale}
    for run in (
        lambda: ops.linear_attention(q, k, _VALUES, **options),
        lambda: ops.delta_rule(q, k, _VALUES, _BETA, **options),
        lambda: ops.causal_attention(q, k, _VALUES, **options),
        lambda: ops.sliding_window_attention(q, k, _VALUES, window=3, **options),
    ):
        with pytest.raises(UserError, match="queries and keys have no channels"):
            run()


def test_values_without_channels_are_none_in_the_outputs():
    v, options = _VALUES[..., :0], {"backend": "chunked"}
    assert ops.linear_attention(_Q, _KEYS, v, **options)[0].shape == v.shape
    assert ops.delta_rule(_Q, _KEYS, v, _BETA, **options)[0].shape == v.shape
    for backend in ("recurrent", "chunked", "pallas"):
        assert ops.causal_attention(_Q, _KEYS, v, backend=backend).shape == v.shape
        assert ops.sliding_window_attention(_Q, _KEYS, v, window=3, backend=backend).shape == v.shape


def test_a_convolution_of_no_tokens_leaves_its_state():
    state = np.ones((_B, 2, _H), np.float32)
    for ids in (None, np.zeros((_B, 0), np.int32)):
        y, final = ops.causal_convolution(
            _VALUES[:, :0, :, 0], np.ones((3, _H), np.float32), None, state, segment_ids=ids
        )
        assert y.shape == (_B, 0, _H)
        np.testing.assert_array_equal(final, state)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_diagonal_recurrence_of_no_tokens_leaves_its_state(reverse):
    state = jnp.ones((_B, _V), jnp.float32)
    for a in (np.full((_B, 0, _V), 0.5, np.float32), np.float32(0.5)):
        h, final = ops.linear_recurrence(a, np.ones((_B, 0, _V), np.float32), state, reverse=reverse)
        assert h.shape == (_B, 0, _V)
        np.testing.assert_array_equal(final, state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((_Q[0], _KEYS, _VALUES), r"q is (12, 2, 4); it must be [B, T, H, K]"),
        ((_Q, _KEYS[:, :, 0], _VALUES[:, :, 0]), r"k is (2, 12, 4); it must be [B, T, G, K]"),
        ((_Q, _KEYS[:1], _VALUES[:1]), "do not fit queries"),
        ((_Q, _KEYS[..., :3], _VALUES), "do not fit queries"),
        ((_Q[..., :0], _KEYS[..., :0], _VALUES), "queries and keys have no channels"),
    ],
)
def test_attention_refuses_shapes_that_do_not_fit(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        ops.causal_attention(*arguments)
    with pytest.raises(UserError, match=re.escape(message)):
        ops.sliding_window_attention(*arguments, window=3)


def test_a_window_and_an_offset_are_whole_numbers_in_their_bounds():
    with pytest.raises(UserError, match=r"the window is 2\.5; it must be a whole number of tokens"):
        ops.sliding_window_attention(_Q, _KEYS, _VALUES, window=2.5)
    with pytest.raises(UserError, match="offset is 9; with 4 queries on 12 keys it must be 0 to 8"):
        ops.causal_attention(_Q[:, :4], _KEYS, _VALUES, offset=9)


@pytest.mark.parametrize(
    ("kernel", "bias", "state", "message"),
    [
        ((3, 1), None, None, r"the kernel (3, 1) does not fit x (2, 12, 2); it must be [width, D]"),
        ((2,), None, None, "the kernel (2,) does not fit"),
        ((0, 2), None, None, "the kernel (0, 2) does not fit"),
        ((3, 2), (1,), None, "the bias (1,) does not fit"),
        ((3, 2), (1, 2), None, "the bias (1, 2) does not fit"),
        ((3, 2), None, (2, 3, 2), "the state is (2, 3, 2), not [B, width-1, D] = (2, 2, 2)"),
        ((3, 2), None, (1, 2, 2), "the state is (1, 2, 2), not"),
    ],
)
def test_a_convolution_refuses_shapes_that_do_not_fit(kernel, bias, state, message):
    bias, state = (None if shape is None else np.ones(shape, np.float32) for shape in (bias, state))
    with pytest.raises(UserError, match=re.escape(message)):
        ops.causal_convolution(_VALUES[..., 0], np.ones(kernel, np.float32), bias, state)
