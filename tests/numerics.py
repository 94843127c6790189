"""Runs a function and its gradients in a chosen precision, and compares the results with a reference."""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

# Relative to the largest magnitude in the reference.
TOLERANCES = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2e-2}
_COMPLEX = {"float64": "complex128", "float32": "complex64", "bfloat16": "complex64"}


# No optimisation of machine code, most of which runs once, and no MLIR for each fusion: each about halves compile time.
_OPTIONS = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # from 0.11 on there are no other emitters
    _OPTIONS["xla_cpu_use_fusion_emitters"] = False
jit = functools.partial(jax.jit, compiler_options=_OPTIONS)


def each_dtype(names, *chosen):
    """``(name, dtype)``: every case in float64, which checks the mathematics, and those chosen also in the other dtypes."""
    names = [*names, *(name for name in chosen if name not in names)]
    return [(name, dtype) for name in names for dtype in TOLERANCES if dtype == "float64" or name in chosen]


def normal(random, *shape, complex_=False):
    """Standard normal numbers exact in every tested dtype, so that one reference serves them all."""
    if complex_:
        return normal(random, *shape) + 1j * normal(random, *shape)
    return representable(random.standard_normal(shape))


def uniform(random, *shape, low=0.0, high=1.0):
    return representable(random.uniform(low, high, shape))


def representable(x):
    return np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float64)


def cast(tree, dtype):
    """Casts the floating and complex NumPy arrays of a tree to ``dtype``; leaves the others as they are."""

    def one(x):
        if np.issubdtype(x.dtype, np.complexfloating):
            return jnp.asarray(x, _COMPLEX[dtype])
        return jnp.asarray(x, dtype) if np.issubdtype(x.dtype, np.floating) else jnp.asarray(x)

    return jax.tree.map(one, tree)


def wide(tree):
    """As float64 or complex128 NumPy arrays."""
    return jax.tree.map(lambda x: np.asarray(x).astype(np.result_type(np.asarray(x).dtype, np.float64)), tree)


def with_gradients(function):
    """``(inputs, cotangents) -> (outputs, gradients of the inputs)``, jitted once for each dtype and shape."""

    @jit
    def both(inputs, cotangents):
        outputs, pullback = jax.vjp(lambda inputs: function(*inputs), inputs)
        cotangents = jax.tree.map(lambda output, y: y.astype(output.dtype), outputs, cotangents)
        return outputs, pullback(cotangents)[0]

    return both


def run(function, *arguments, dtype):
    """Applies ``function`` to NumPy arrays cast to ``dtype``; returns jax arrays."""
    with jax.enable_x64(dtype == "float64"):
        return function(*cast(arguments, dtype))


def cotangents_like(random, outputs):
    return jax.tree.map(lambda y: normal(random, *y.shape, complex_=np.iscomplexobj(y)), outputs)


def directional_derivative(function, inputs, directions, step=1e-6):
    """Central difference of a scalar function of NumPy arrays."""
    ends = [function(*(x + sign * step * d for x, d in zip(inputs, directions, strict=True))) for sign in (1, -1)]
    return (ends[0] - ends[1]) / (2 * step)


def assert_close(actual, expected, tolerance):
    """Trees of arrays: equal structures and shapes, and no error above ``tolerance`` times the array's largest entry."""
    paths, structure = jax.tree.flatten_with_path(expected)
    leaves, actual_structure = jax.tree.flatten(actual)
    assert actual_structure == structure
    for (path, want), got in zip(paths, leaves, strict=True):
        want, got = wide(want), wide(got)
        where = jax.tree_util.keystr(path)
        assert got.shape == want.shape, f"{where}: shape {got.shape} instead of {want.shape}"
        assert np.isfinite(got).all() or not np.isfinite(want).all(), f"{where} is not finite"
        if want.size:
            error, size = np.max(np.abs(got - want)), np.max(np.abs(want))
            assert error <= tolerance * size, f"{where}: off by {error:.3g}, the largest entry being {size:.3g}"


def runs(ids):
    """``(start, end)`` of each document in one row of ids."""
    edges = [0, *(np.flatnonzero(np.diff(ids)) + 1), len(ids)]
    return list(itertools.pairwise(edges))


def form(choose, backend, *arrays, **options):
    """The name of the form that an operation's ``choose`` takes for a backend."""
    return choose(*arrays, backend=backend, **options).name
