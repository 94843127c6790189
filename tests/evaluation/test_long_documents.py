"""Losses of rows whose time is spread over devices: they equal those of whole rows, and no device holds an array as long
as the row."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear import config as configs
from jaxlinear import evaluation
from jaxlinear.errors import UserError
from jaxlinear.models.parameters import describe
from jaxlinear.parallel import mesh as meshes
from jaxlinear.training.step import make_loss_step


def test_spread_over_time_the_losses_are_the_same(tiny_run):
    """One row is enough for all devices; if they split rows, a batch has at least as many as there are devices."""
    kinds = {8: None, 1: ["sequence=8"], 4: ["sequence=2", "fsdp=2", "data=2"]}
    options = {"step": 1, "lengths": [4], "batch_tokens": 128, "batches": 8}
    rows = {
        least: evaluation.evaluate(tiny_run, mesh=mesh or [], **options)["perplexity"]["lengths"][0]
        for least, mesh in kinds.items()
    }
    for least, found in rows.items():
        assert (found["length"], found["batch_size"], found["tokens"]) == (128, least, 8 * 128)
        np.testing.assert_allclose(found["loss"], rows[8]["loss"], rtol=1e-5)
        for part, expected in zip(found["by_position"], rows[8]["by_position"], strict=True):
            assert part["tokens"] == expected["tokens"]
            if part["tokens"]:
                np.testing.assert_allclose(part["loss"], expected["loss"], rtol=1e-5)


def test_a_million_tokens_fit_where_an_eighth_fits(tiny_config):
    """In the program compiled for one document of 2^20 tokens over 8 devices, no array has that length, and it takes no
    more memory than the same program for an eighth of the document on one device."""
    config = configs.resolve(tiny_config)
    config.model.vocab_size = 384
    architecture = describe(configs.model_config(config))

    def compiled(length, devices):
        sizes = {**dict.fromkeys(meshes.AXES, 1), "sequence": devices}
        mesh = meshes.make_mesh(sizes, jax.devices()[:devices])
        row = jax.ShapeDtypeStruct((1, length), jnp.int32)
        batch = dict.fromkeys(("tokens", "targets", "segment_ids"), row)
        return make_loss_step(config, architecture, mesh).lower(architecture.shapes, batch).compile()

    million, eighth = compiled(1 << 20, 8), compiled(1 << 17, 1)
    shapes = re.findall(r"\w\d+\[([\d,]+)\]", million.as_text())
    longest = max(int(size) for shape in shapes for size in shape.split(","))
    assert longest < 1 << 18, longest
    assert million.memory_analysis().temp_size_in_bytes < 1.1 * eighth.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "mesh, message",
    [
        (["sequence=3"], "mesh.sequence=3 does not divide the 8 available devices"),
        (["time=8"], "'time=8' is not a part of a mesh; write AXIS=SIZE, where the axes are data, fsdp, sequence"),
        (["sequence=all"], "'sequence=all' is not a part of a mesh"),
        (["sequence=²"], "'sequence=²' is not a part of a mesh"),
        (["sequence=2", "sequence=8"], "sequence is given twice in the mesh sequence=2,sequence=8; leave one out"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(tiny_run, mesh, message):
    with pytest.raises(UserError, match=message):
        evaluation.evaluate(tiny_run, mesh=mesh)
