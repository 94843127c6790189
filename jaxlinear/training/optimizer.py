"""The optimisers, all from optax, with decoupled weight decay on matrices."""

from typing import Any

import jax
import optax
from ml_collections import config_dict

from jaxlinear.models.parameters import Architecture
from jaxlinear.training import muon
from jaxlinear.training.schedule import make_schedule

Tree = Any


def make_optimizer(config: config_dict.ConfigDict, architecture: Architecture) -> optax.GradientTransformation:
    """Clipping by the global norm, then the optimiser named by ``config.optimizer.name``, on its schedule."""
    options = config.optimizer
    multiplier = make_schedule(config)

    def schedule(top: float) -> optax.Schedule:
        return lambda step: top * multiplier(step)

    decayed = decay_mask(architecture)
    if options.name == "adamw":
        update = optax.adamw(
            schedule(options.learning_rate),
            b1=options.beta1,
            b2=options.beta2,
            eps=options.epsilon,
            weight_decay=options.weight_decay,
            mask=decayed,
        )
    elif options.name == "adafactor":
        update = optax.chain(
            _one_by_one(optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)), architecture),
            optax.scale_by_learning_rate(schedule(options.learning_rate)),
            _decay(schedule(options.learning_rate), options.weight_decay, decayed),
        )
    else:
        matrices = _muon_matrices(architecture)
        rates = schedule(options.muon_learning_rate), schedule(options.learning_rate)
        update = optax.chain(
            # The chain and its names, and so its state, are those of optax.contrib.muon.
            optax.partition(
                {
                    "muon": optax.chain(
                        muon.scale_by_muon(architecture, options.epsilon),
                        muon.scale_by_shape(),
                        optax.identity(),
                        optax.scale_by_learning_rate(rates[0]),
                    ),
                    "adam": optax.adamw(
                        rates[1],
                        b1=options.beta1,
                        b2=options.beta2,
                        eps=options.epsilon,
                        weight_decay=0.0,
                        nesterov=True,
                    ),
                },
                jax.tree.map(lambda taken: "muon" if taken else "adam", matrices),
            ),
            _decay(rates[1], options.weight_decay, decayed),
        )
    clip = optax.clip_by_global_norm(options.clip_norm) if options.clip_norm else optax.identity()
    return optax.chain(clip, update)


def decay_mask(architecture: Architecture) -> Tree:
    """True for matrices: parameters with two or more axes, not counting that of layers stacked by the scan; but not for the
    biases of experts, ``[E, F]``, nor for Mamba's rates, ``[R, N]``, which would all be drawn to -1."""
    no_matrices = "bias", "A_log"
    return _map(
        architecture, lambda path, axes, stacked: len(axes) - stacked >= 2 and not path[-1].endswith(no_matrices)
    )


def _muon_matrices(architecture: Architecture) -> Tree:
    """True for parameters that map activations to activations (no embedding, router, filter or vector: AdamW updates
    those); their last two axes are those of a matrix."""
    return _map(
        architecture,
        lambda path, axes, stacked: path[-1].endswith("kernel") and not path[-1].startswith("convolution"),
    )


def _one_by_one(of_matrices: optax.GradientTransformation, architecture: Architecture) -> optax.GradientTransformation:
    """Applies the transformation to the parameters of each layer and each expert separately. They are stored stacked, and
    the transformation would otherwise take a stack for one matrix."""

    repeats = [stack.repeats for stack in architecture.config.stacks]

    def stacked(path: tuple, axes: tuple, layers: int) -> str:
        depth = str(layers + axes.count("expert"))
        # Parameters that are mapped over together have equally many layers. Checkpoints omit that of the first stack.
        size = repeats[int(path[1])] if layers else repeats[0]
        return depth if size == repeats[0] else f"{depth}_of_{size}"

    stacks = _map(architecture, stacked)
    by_stacks = {}
    for name in sorted(set(jax.tree.leaves(stacks))):  # in the same order on every process, as their programs must be
        init, update = of_matrices.init, of_matrices.update
        for _ in range(int(name.partition("_")[0])):
            init, update = jax.vmap(init), jax.vmap(update)
        by_stacks[name] = optax.GradientTransformation(init, update)
    return optax.partition(by_stacks, stacks)


def _map(architecture: Architecture, function) -> Tree:
    """``function(path, axes, number of stacked axes)`` for each parameter."""

    def at(path, _, axes):
        names = tuple(str(entry.key) for entry in path)
        return function(names, axes, int(names[0] == "stacks"))

    return jax.tree_util.tree_map_with_path(at, architecture.shapes, architecture.axes)


def _decay(schedule: optax.Schedule, weight_decay: float, mask: Tree) -> optax.GradientTransformation:
    """Decoupled weight decay for updates that already include their sign and learning rate."""
    return optax.add_decayed_weights(lambda step: -weight_decay * schedule(step), mask=mask)
