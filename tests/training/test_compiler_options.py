"""What the training and evaluation steps ask of the compilers."""

import pathlib

import jax
import pytest

from jaxlinear import config as configs
from jaxlinear.costs import hlo, targets
from jaxlinear.evaluation import scoring
from jaxlinear.evaluation.run import Run
from jaxlinear.parallel import mesh as meshes
from jaxlinear.training import ahead_of_time
from jaxlinear.training import step as steps
from jaxlinear.training.optimizer import make_optimizer
from jaxlinear.training.task_evaluation import TaskEvaluator
from tests.training import tiny

NO_LOOPS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}
APART = {
    "xla_gpu_dot_merger_threshold_mb": 0,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 4 << 20,
    "xla_disable_hlo_passes": "dynamic-slice-copy-fusion-async-wrapper",
}


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("target, expected", [("v5p:2x2x1", NO_LOOPS), ("v5e:2x2", NO_LOOPS), ("h100:4", APART)])
def test_products_are_no_loops_on_tpu_and_stay_apart_on_gpu(target, expected, monkeypatch):
    config, architecture = tiny.config(), tiny.architecture(("sliding_window",), 1)
    mesh = meshes.make_mesh(tiny.ONES | {"fsdp": 4}, targets.find(target).devices)
    jit, given = jax.jit, []

    def recording(*args, **options):
        given.append(options.get("compiler_options"))
        return jit(*args, **options)

    monkeypatch.setattr(jax, "jit", recording)
    steps.make_train_step(config, architecture, make_optimizer(config, architecture), mesh)
    steps.make_loss_step(config, architecture, mesh)
    TaskEvaluator(config, architecture, mesh, batch_tokens=64)
    scoring._programs(Run(pathlib.Path(), 0, config, architecture, {}, mesh))  # three functions
    assert given == [expected] * 6


@pytest.mark.usefixtures("optimised")
@pytest.mark.slow
@pytest.mark.slow(but_nth=2)
@pytest.mark.parametrize("dtype, name", [("float32", "f32"), ("bfloat16", "bf16")])
def test_gradients_leave_a_layer_in_parts_on_gpu(dtype, name):
    """A sum of several over two devices leaves at most 4 MiB on each, not a whole layer. There are no copies of slices,
    which JAX 0.11 would make asynchronous, that take away the work that should overlap with it."""
    config = configs.default()
    config.model.update({"preset": "gla_6m", "num_layers": 2, "width": 1024, "vocab_size": 256})
    config.model.update({"num_heads": 4, "remat": "full"})
    configs.forget_unread(config, ["model.preset"])
    config.training.batch_size, config.training.sequence_length = 2, 256
    config.mesh.update({"data": 1, "fsdp": 2})
    config.parallel.gradient_dtype = dtype
    text = ahead_of_time.trace(config, targets.find("h100:2").devices).compile().as_text()
    found = [line for lines in hlo.parse(text).computations.values() for line in lines]
    operands = {line.name: line for line in found}
    assert not any(line.opcode == "fusion-start" for line in found)
    sums = [line for line in found if line.opcode == "reduce-scatter-start" and name in line.shape]
    sizes = [[hlo.size(operands[operand].shape) for operand in line.operands] for line in sums]
    # An MLP's gradient in float32 is more by itself.
    assert max(sum(size) for size in sizes if len(size) > 1 or dtype == "bfloat16") <= 2 * (4 << 20)
    assert sum(map(sum, sizes)) > 3 * (4 << 20)
