"""The embedding's rows, and the losses of its logits, on the mesh in use."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxlinear.ops import cross_entropy
from jaxlinear.parallel import sharding
from jaxlinear.parallel.exchanges import AXIS
from jaxlinear.parallel.sequence import time_mesh
from jaxlinear.parallel.sharding import AnyMesh

_EMBEDDING = ("vocab", "embed")
_BY_TIME = PartitionSpec(None, AXIS)


def linear_cross_entropy(
    x: jax.Array,
    embedding: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    soft_cap: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """``ops.cross_entropy.linear_cross_entropy``: each shard of time computes the losses of its own tokens."""

    def local(x, embedding, whole, targets, weights):
        groups = sharding.batch_groups()
        return cross_entropy.linear_cross_entropy(
            x, embedding, targets, weights, soft_cap=soft_cap, z_loss=z_loss, groups=groups, whole=whole
        )

    mesh, whole = time_mesh("linear_cross_entropy", x.shape[1]), sharding.gather_embed(embedding, _EMBEDDING, x.dtype)
    arguments = x, sharding.place_gradient(embedding, _EMBEDDING), whole, targets, weights
    if mesh is None:
        return local(*arguments)
    return _over_time(mesh, lambda *given: lax.psum(local(*given), AXIS), 2, PartitionSpec())(*arguments)


def token_losses(x: jax.Array, embedding: jax.Array, targets: jax.Array, *, soft_cap: float = 0.0) -> jax.Array:
    """``ops.cross_entropy.token_losses``, computed on each shard of time separately."""

    def local(x, embedding, targets):
        return cross_entropy.token_losses(x, embedding, targets, soft_cap=soft_cap, groups=sharding.batch_groups())

    mesh, whole = time_mesh("token_losses", x.shape[1]), sharding.gather_embed(embedding, _EMBEDDING, x.dtype)
    return (local if mesh is None else _over_time(mesh, local, 1, _BY_TIME))(x, whole, targets)


def rows(table: jax.Array, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows ``tokens`` ``[B, T]`` of an embedding ``[vocab, D]``, in ``dtype``: ``[B, T, D]``.

    Devices that each hold some columns of the embedding look up these columns for all of their tokens and exchange the
    results. These are the bytes of one activation; the whole embedding has those of as many tokens as the vocabulary.
    """
    table, split = sharding.place_gradient(table, _EMBEDDING), table.shape[1] % sharding.parts("columns") == 0
    if split:
        # The table's columns are split like the result's: if they differ (`mesh.expert`), XLA in JAX 0.11 ends the process.
        table = sharding.constrain(table, "vocab", "columns")
        tokens = sharding.constrain(tokens, "rows", "time")
    # Looked up before the cast, so that the gradient of a frequent token is summed in float32.
    x = jnp.take(table, tokens, axis=0).astype(dtype)
    if split:
        x = sharding.constrain(x, "rows", "time", "columns")
    return sharding.constrain(x, "batch", "time", None)


def _over_time(mesh: AnyMesh, function: Callable, whole: int, out_specs: PartitionSpec) -> Callable:
    """``function(x, *others)`` on each shard of time. The first ``whole`` of the others have no time axis and stay
    whole; the other axes of the mesh are left to the compiler."""

    def run(*arguments):
        in_specs = (
            _BY_TIME,
            *(PartitionSpec() for _ in range(whole)),
            *(_BY_TIME for _ in range(len(arguments) - 1 - whole)),
        )
        mapped = jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names={AXIS}, check_vma=False
        )
        return mapped(*arguments)

    return run
