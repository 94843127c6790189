"""What the training step asks of the compilers."""

import jax
import pytest

from jaxlinear.parallel import mesh as meshes
from jaxlinear.parallel import targets
from jaxlinear.training import step as steps
from jaxlinear.training.optimizer import make_optimizer
from tests.training import tiny

NO_LOOPS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}


@pytest.mark.compiles_ahead
@pytest.mark.parametrize("target, expected", [("v5p:2x2x1", NO_LOOPS), ("v5e:2x2", NO_LOOPS), ("h100:4", None)])
def test_products_of_split_kernels_are_no_loops_on_tpu(target, expected, monkeypatch):
    config, architecture = tiny.config(), tiny.architecture(("sliding_window",), 1)
    mesh = meshes.make_mesh(tiny.ONES | {"fsdp": 4}, targets.find(target).devices)
    jit, given = jax.jit, []

    def recording(*args, **options):
        given.append(options.get("compiler_options"))
        return jit(*args, **options)

    monkeypatch.setattr(jax, "jit", recording)
    steps.make_train_step(config, architecture, make_optimizer(config, architecture), mesh)
    assert given[-1] == expected
