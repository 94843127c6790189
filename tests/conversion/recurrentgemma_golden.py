"""Logits of a small model of the ``recurrentgemma`` package, for ``test_parity.py`` to compare with.

The package cannot be installed alongside ours (it needs absl-py < 2), so its logits are kept in a file. To regenerate it:

    python3.11 -m venv RG && RG/bin/pip install -r benchmarks/recurrentgemma.txt
    RG/bin/python tests/conversion/recurrentgemma_golden.py

Only then does this file import the package, and it imports nothing of ours. With ``--check=DIR`` it reads a checkpoint of
the same model, written by ``launch/convert.py --layout=flax``, and compares the package's logits for it with the file's.
"""

import argparse
import json
import pathlib

import numpy as np

FILE = pathlib.Path(__file__).with_suffix(".npz")
# Two periods, cut short; the rows are longer than the window; sqrt(width) is not exact in bfloat16.
CONFIG = {
    "vocab_size": 31,
    "width": 24,
    "mlp_expanded_width": 40,
    "num_heads": 2,
    "lru_width": 16,
    "block_types": ["RECURRENT", "RECURRENT", "ATTENTION", "RECURRENT", "RECURRENT", "ATTENTION", "RECURRENT"],
    "embeddings_scale_by_sqrt_dim": True,
    "attention_window_size": 5,
    "logits_soft_cap": 30.0,
}
TOKENS = np.random.default_rng(1).integers(0, CONFIG["vocab_size"], (2, 19), np.int32)


def parameters(shapes):
    """Arrays by name, drawn so that every gate, bias and scale matters."""
    random = np.random.default_rng(0)
    drawn = {}
    for name, shape in shapes.items():
        size = shape[-2] ** -0.5 if len(shape) > 1 and not name.endswith(".b") else 0.3
        drawn[name] = (size * random.standard_normal(shape)).astype(np.float32)
    return drawn


def nested(flat):
    """The package's nesting: a block's key is ``blocks.N``."""
    tree = {}
    for name, x in flat.items():
        keys = name.replace("blocks.", "blocks#").split(".")
        node = tree
        for key in keys[:-1]:
            node = node.setdefault(key.replace("#", "."), {})
        node[keys[-1]] = x
    return tree


def main():
    import flax
    import jax.numpy as jnp
    from orbax.checkpoint import PyTreeCheckpointer
    from recurrentgemma import common
    from recurrentgemma import jax as package

    arguments = argparse.ArgumentParser()
    arguments.add_argument("--check")
    check = arguments.parse_args().check
    blocks = tuple(common.TemporalBlockType[name] for name in CONFIG["block_types"])
    model = package.Griffin(common.GriffinConfig(**(CONFIG | {"block_types": blocks})))
    positions = np.broadcast_to(np.arange(TOKENS.shape[1], dtype=np.int32), TOKENS.shape)

    def logits(variables):
        return np.asarray(model.apply(variables, jnp.asarray(TOKENS), jnp.asarray(positions), return_cache=False)[0])

    if check:
        # As the package reads one, except that it also places the arrays, which fails with this release of Orbax.
        found = logits(PyTreeCheckpointer().restore(pathlib.Path(check).absolute()))
        print(f"largest difference {np.abs(found - np.load(FILE)['logits']).max():.2e}")
        return
    import jax

    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(TOKENS), jnp.asarray(positions))
    flat = flax.traverse_util.flatten_dict(variables["params"], sep=".")
    shapes = {name: tuple(flat[name].shape) for name in sorted(flat)}
    found = logits({"params": nested(parameters(shapes))})
    np.savez_compressed(FILE, logits=found, shapes=json.dumps(shapes))
    print(f"{FILE}: {FILE.stat().st_size} bytes, logits up to {np.abs(found).max():.3f}")


if __name__ == "__main__":
    main()
