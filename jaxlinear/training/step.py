"""The training step: a pure function of (state, batch)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax, stages
from jax.sharding import Mesh
from ml_collections import config_dict

from jaxlinear.models.parameters import Architecture
from jaxlinear.parallel import compiler, operations, sharding
from jaxlinear.parallel import mesh as meshes
from jaxlinear.training import state as states
from jaxlinear.training.schedule import make_schedule
from jaxlinear.training.state import TrainState

Batch = dict[str, jax.Array]  # tokens, targets, segment_ids: [B, T] int32
Metrics = dict[str, jax.Array]

_NORM_DECAY = 0.98  # of the running average of gradient norms
_NORM_STEPS = 20  # applied steps before the average is trusted


def make_objective(
    config: config_dict.ConfigDict, architecture: Architecture
) -> Callable[..., tuple[jax.Array, Metrics]]:
    """``(parameters, batch, weights [B, T]) -> (objective, losses)`` for a microbatch; the weights of the tokens' losses
    sum to 1 over the whole batch."""
    training = config.training

    def objective(parameters, batch, weights):
        model = architecture.bind(parameters)
        segment_ids = batch["segment_ids"] if config.data.segment_documents else None
        hidden, _, losses = model.hidden(batch["tokens"], segment_ids)
        nll, total = operations.linear_cross_entropy(
            hidden,
            model.output_embedding,
            batch["targets"],
            weights,
            soft_cap=architecture.config.logit_soft_cap,
            z_loss=training.z_loss,
        )
        # With these weights, the cross-entropies of the microbatches add up; the losses of the layers are means of each.
        losses = {name: loss / training.microbatches for name, loss in losses.items()}
        for name, loss in losses.items():
            total += training[f"{name}_loss"] * loss
        return total, {"loss": nll, **losses}

    return objective


def make_train_step(
    config: config_dict.ConfigDict,
    architecture: Architecture,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> stages.Wrapped:
    """The jitted ``(TrainState, Batch) -> (TrainState, Metrics)`` on a mesh. The state is donated.

    Metrics are scalars, float32 but for the numbers of skipped steps: ``loss`` (nats per token), ``gradient_norm``,
    ``parameter_norm``, ``learning_rate``, ``skips``, ``skips_in_a_row``, the losses of the layers (``load_balance`` and
    ``router_z`` of a mixture of experts), and norms by group of layers if ``logging.layer_norms``.
    """
    training = config.training
    multiplier = make_schedule(config)

    objective = make_objective(config, architecture)

    def gradients(parameters, batch):
        targets = is_target(batch)
        weights = targets.astype(jnp.float32) / jnp.maximum(jnp.sum(targets), 1).astype(jnp.float32)
        gradient = jax.grad(objective, has_aux=True)
        if training.microbatches == 1:
            return gradient(parameters, batch, weights)

        def in_parts(parameters, batch_and_weights):
            def one(total, part):
                more, losses = gradient(parameters, *part)
                return jax.tree.map(jnp.add, total, more), losses

            parts = jax.tree.map(lambda x: _microbatches(x, training.microbatches), batch_and_weights)
            total, losses = lax.scan(one, jax.tree.map(jnp.zeros_like, parameters), parts)
            return total, jax.tree.map(lambda x: jnp.sum(x, axis=0), losses)

        return sharding.summed_over_copies(in_parts, parameters, (batch, weights))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with sharding.use_mesh(mesh, **config.parallel), jax.numpy_dtype_promotion("standard"):
            gradient, losses = gradients(state.parameters, batch)
            norm = optax.tree.norm(gradient)
            applied = jnp.isfinite(norm) & ~_is_spike(state, norm, training.spike_multiple)
            updates, new_optimizer = optimizer.update(gradient, state.optimizer, state.parameters)
            new_parameters = optax.apply_updates(state.parameters, updates)
            keep = lambda new, old: jnp.where(applied, new, old)  # noqa: E731
            learning_rate = config.optimizer.learning_rate * multiplier(state.step - state.skips)
            new = TrainState(
                step=state.step + 1,
                parameters=jax.tree.map(keep, new_parameters, state.parameters),
                optimizer=jax.tree.map(keep, new_optimizer, state.optimizer),
                key=state.key,
                norm_average=keep(_NORM_DECAY * state.norm_average + (1 - _NORM_DECAY) * norm, state.norm_average),
                skips=state.skips + ~applied,
                skips_in_a_row=jnp.where(applied, 0, state.skips_in_a_row + 1),
            )
            metrics = {
                **losses,
                "gradient_norm": norm,
                "parameter_norm": optax.tree.norm(new.parameters),
                "learning_rate": learning_rate,
                "skips": new.skips,
                "skips_in_a_row": new.skips_in_a_row,
            }
            if config.logging.layer_norms:
                metrics |= _group_norms("gradient_norm", gradient) | _group_norms("parameter_norm", new.parameters)
            return new, metrics

    placed = states.shardings(architecture, optimizer, mesh)
    return jax.jit(
        step,
        in_shardings=(placed, meshes.batch_sharding(mesh)),
        out_shardings=(placed, None),
        donate_argnums=0,
        compiler_options=compiler.sequence_options(mesh),
    )


def make_loss_step(config: config_dict.ConfigDict, architecture: Architecture, mesh: Mesh) -> stages.Wrapped:
    """``(parameters, batch) -> (nll [B, T] float32, is a target [B, T] bool)``, jitted: for evaluation."""

    def step(parameters, batch):
        with sharding.use_mesh(mesh, **config.parallel):
            model = architecture.bind(parameters)
            segment_ids = batch["segment_ids"] if config.data.segment_documents else None
            hidden, _, _ = model.hidden(batch["tokens"], segment_ids)
            soft_cap = architecture.config.logit_soft_cap
            nll = operations.token_losses(hidden, model.output_embedding, batch["targets"], soft_cap=soft_cap)
            targets = is_target(batch)
            return jnp.where(targets, nll, jnp.zeros((), nll.dtype)), targets

    placed = architecture.shardings(mesh), meshes.batch_sharding(mesh)
    return jax.jit(step, in_shardings=placed, compiler_options=compiler.sequence_options(mesh))


def is_target(batch: Batch) -> jax.Array:
    """``[B, T]`` bool: false in segment 0, which is padding, and for targets below 0 (tasks predict only answers)."""
    return (batch["segment_ids"] > 0) & (batch["targets"] >= 0)


def _microbatches(x: jax.Array, parts: int) -> jax.Array:
    """``[B, T]`` -> ``[parts, B / parts, T]``. Row r goes to part r % parts, so that each device keeps its rows."""
    return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)


def _is_spike(state: TrainState, norm: jax.Array, multiple: float) -> jax.Array:
    if not multiple:
        return jnp.zeros((), bool)
    applied = state.step - state.skips
    average = state.norm_average / (1 - _NORM_DECAY ** jnp.maximum(applied, 1))
    return (applied >= _NORM_STEPS) & (norm > multiple * average)


def _group_norms(name: str, tree: dict[str, Any]) -> Metrics:
    """Norms of the embedding, of each block of the stacks' patterns (over all its repetitions), and of the last norm."""
    norms = {}
    for group, subtree in tree.items():
        if group == "stacks":
            for i, stack in subtree.items():
                for position, block in stack["blocks"].items():
                    norms[f"{name}/stack_{i}_{position}"] = optax.tree.norm(block)
        else:
            norms[f"{name}/{group}"] = optax.tree.norm(subtree)
    return norms
