"""``calls.record``: which operations a program calls."""

import jax
import jax.numpy as jnp

from jaxlinear import ops
from jaxlinear.ops import calls
from jaxlinear.ops.calls import Call


def test_calls_are_recorded_while_a_program_is_traced():
    """With shapes and options, but without the backend; of an operation that calls others, only the call to it is."""
    x = jax.ShapeDtypeStruct((1, 20, 4), jnp.bfloat16)
    heads = jax.ShapeDtypeStruct((1, 20, 2, 4), jnp.float32)

    def program(x, heads):
        ops.selective_scan(x, x, None, x, x, backend="chunked")
        return ops.sliding_window_attention(heads, heads, v=heads, window=3)

    with calls.record() as found:
        jax.eval_shape(program, x, heads)
    assert found == [
        Call("selective_scan", (("x", x), ("dt", x), ("A", None), ("B", x), ("C", x))),
        Call("sliding_window_attention", (("q", heads), ("k", heads), ("v", heads), ("window", 3))),
    ]
    assert found[0].arrays == dict.fromkeys(("x", "dt", "B", "C"), x) and found[0].options == {"A": None}
    jax.eval_shape(program, x, heads)
    assert len(found) == 2  # later traces are not recorded
