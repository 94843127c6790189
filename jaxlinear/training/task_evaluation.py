"""How many answers of a synthetic task a model gets right: on held-out examples, during training and afterwards."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import config_dict

from jaxlinear.data import tasks
from jaxlinear.errors import UserError
from jaxlinear.models.parameters import Architecture
from jaxlinear.parallel import compiler, feeding, sharding
from jaxlinear.parallel import mesh as meshes


def check_length(length: int, mesh: Mesh) -> None:
    """Raises ``UserError`` unless the mesh divides examples of ``length`` tokens."""
    shards = _devices(mesh, "time")
    if length % shards:
        raise UserError(f"examples of {length} tokens cannot be spread over mesh.sequence={shards}; set it to 1")


def _devices(mesh: Mesh, axis: str) -> int:
    """The number of devices over which an axis of a batch is spread."""
    return sharding.parts_on(mesh.shape, axis)


class TaskEvaluator:
    """Measures models of one architecture on a mesh. One program is compiled for each shape of a task's examples.
    ``between`` is called before each batch, and may raise to end the measurement."""

    def __init__(
        self,
        config: config_dict.ConfigDict,
        architecture: Architecture,
        mesh: Mesh,
        batch_tokens: int,
        between: Callable[[], None] = lambda: None,
    ):
        self._mesh, self._batch_tokens, self._between = mesh, batch_tokens, between
        whole = NamedSharding(mesh, PartitionSpec())

        def count(parameters, batch, most: int):
            with sharding.use_mesh(mesh, **config.parallel):
                model = architecture.bind(parameters)
                hidden, _, _ = model.hidden(batch["tokens"], batch["segment_ids"])
                due = batch["targets"] >= 0
                # Only the logits of the answers, of which an example has few: the answers' places, then any others.
                places = jnp.argsort(jnp.where(due, 0, 1), axis=1, stable=True)[:, :most]
                hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)
                targets, due = (jnp.take_along_axis(x, places, axis=1) for x in (batch["targets"], due))
                logits = model.logits(hidden)
            chosen = jnp.argmax(logits, axis=-1)
            nll = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(
                logits, jnp.maximum(targets, 0)[..., None], axis=-1
            ).squeeze(-1)
            right = due & (chosen == targets)
            return {
                "answers": jnp.sum(due),
                "right": jnp.sum(right),
                "solved": jnp.sum(jnp.all(right | ~due, axis=1) & jnp.any(due, axis=1)),
                "nll": jnp.sum(jnp.where(due, nll, jnp.zeros((), nll.dtype))),
            }

        self._count = jax.jit(
            count,
            static_argnums=2,
            in_shardings=(architecture.shardings(mesh), meshes.batch_sharding(mesh)),
            out_shardings=whole,
            compiler_options=compiler.sequence_options(mesh),
        )

    def measure(
        self, parameters: dict[str, Any], asked: Sequence[tasks.Task], *, examples: int, seed: int
    ) -> dict[str, Any]:
        """Measures so many held-out examples of one difficulty or several of one length:

        ``accuracy`` of the answers, each predicted from the true tokens before it, answers included; ``solved``, the
        fraction of examples whose answers are all right; ``loss`` in nats per answer; and how many examples and answers
        there were. If the loss is NaN, so are the other two: the largest of logits that are NaN is none.
        """
        length = asked[0].length
        rows, batches = self.plan(length, examples)
        place = meshes.batch_sharding(self._mesh)
        local = feeding.local_rows(place, (rows, length))
        made = tasks.TaskBatches(asked, batch_size=rows, seed=seed, split="heldout", rows=local)
        most = min(max(task.max_targets for task in asked), length)
        totals = {"answers": 0.0, "right": 0.0, "solved": 0.0, "nll": 0.0}

        def counts():
            for i in range(batches):
                self._between()
                asked_for = (i * rows + np.asarray(local) < examples)[:, None]  # of the last batch perhaps not all
                batch = made[i]
                batch["targets"] = np.where(asked_for, batch["targets"], tasks.NO_TARGET)
                yield self._count(parameters, feeding.place(batch, place, rows), most)

        for counted in feeding.one_behind(counts()):
            totals = {name: total + float(counted[name]) for name, total in totals.items()}
        loss = totals["nll"] / totals["answers"]
        if math.isnan(loss):
            totals |= {"right": loss, "solved": loss}
        return {
            "accuracy": totals["right"] / totals["answers"],
            "solved": totals["solved"] / examples,
            "loss": loss,
            "examples": examples,
            "answers": int(totals["answers"]),
        }

    def plan(self, length: int, examples: int) -> tuple[int, int]:
        """(rows per batch, batches). Refuses a length that the mesh does not divide."""
        check_length(length, self._mesh)
        groups = _devices(self._mesh, "batch")
        rows = min(max(self._batch_tokens // length, 1), examples)
        rows = math.ceil(rows / groups) * groups
        return rows, math.ceil(examples / rows)
