"""The learning rate as a fraction of its peak, by step."""

import jax
import jax.numpy as jnp
import optax
from ml_collections import config_dict


def make_schedule(config: config_dict.ConfigDict) -> optax.Schedule:
    """``step -> multiplier in [0, 1]``: a linear warm-up, then ``config.schedule.name`` down to ``final_fraction``.

    ``cosine`` and ``linear`` fall from the end of the warm-up to the last step; ``wsd`` stays at 1 and falls linearly
    in the last ``decay_fraction`` of the run (warm-up, stable, decay: arXiv:2404.06395); ``constant`` stays at 1.
    """
    schedule, steps = config.schedule, config.training.steps
    warmup, final = schedule.warmup_steps, schedule.final_fraction
    begin = warmup
    if schedule.name == "wsd":
        begin = max(warmup, steps - max(1, round(steps * schedule.decay_fraction)))

    def multiplier(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum(1.0, (step + 1) / max(warmup, 1))
        if schedule.name == "constant":
            return rise
        if begin == steps - 1 >= max(warmup, 1):  # a decay of one step
            progress = (step >= begin).astype(jnp.float32)
        else:
            progress = jnp.clip((step - begin) / max(steps - 1 - begin, 1), 0.0, 1.0)
        if schedule.name == "cosine":
            fall = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        else:
            fall = 1 - (1 - final) * progress
        return rise * fall

    return multiplier
