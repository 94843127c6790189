"""A mixer from another package, named by its import path: the one that docs/mixers.md shows."""

import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear import config as configs
from jaxlinear import models
from jaxlinear.errors import UserError
from jaxlinear.models import flops, mixers
from jaxlinear.models.parameters import describe
from jaxlinear.parallel import mesh as meshes
from jaxlinear.training.loop import FINISHED, train
from tests import small

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "mixers.md"
NAME = "my_lab.MovingAverage"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a module that Python can import."""
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda text, name="my_lab": (tmp_path / f"{name}.py").write_text(text)
    for name in [name for name in sys.modules if name.startswith("my_lab")]:
        del sys.modules[name]


@pytest.fixture
def moving_average(write):
    write(re.search(r"```python\n(\"\"\"my_lab\.py.*?)```", DOCS.read_text(), re.DOTALL)[1])
    return small.config(pattern=(NAME,), num_layers=2, vocab_size=32, width=16, recurrent_width=24)


def test_it_is_its_equation(moving_average):
    """It equals its equation in two documents and from a state; and its own formula gives its FLOPs."""
    architecture = describe(moving_average)
    parameters = small.parameters(architecture.shapes)
    mixer = architecture.bind(parameters)
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 32)
    segments = jnp.array([[1] * 5 + [2] * 7] * 2)
    whole, _ = mixer(tokens, segment_ids=segments)
    for begin, end in ((0, 5), (5, 12)):
        alone, state = mixer(tokens[:, begin:end], segment_ids=segments[:, begin:end])
        np.testing.assert_allclose(whole[:, begin:end], alone, atol=1e-5)
    last = mixer(tokens[:, 5:6], segment_ids=segments[:, 5:6])
    for t in range(6, 12):
        last = mixer(tokens[:, t : t + 1], segment_ids=segments[:, t : t + 1], state=last[1])
    np.testing.assert_allclose(last[0][:, 0], whole[:, -1], atol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), last[1], state)
    assert flops.forward_flops_per_token(moving_average, 12, logits=False) == 2 * (
        3 * 2 * 16 * 24 + 4 * 24 + flops.gated_mlp(moving_average)
    )


def test_over_a_mesh_it_gives_the_same(moving_average):
    architecture = describe(moving_average)
    parameters = small.parameters(architecture.shapes)
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 32)
    expected = architecture.bind(parameters)(tokens)[0]
    sizes = dict.fromkeys(meshes.AXES, 1) | {"fsdp": 2, "sequence": 4}
    with jax.set_mesh(meshes.make_mesh(sizes, jax.devices()[:8])):
        found = jax.jit(lambda parameters, tokens: architecture.bind(parameters)(tokens)[0])(parameters, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_run_of_it(moving_average, tiny_config, tmp_path):
    """It is trained, and loaded again by its name alone."""
    config = tiny_config.copy_and_resolve_references()
    config.model.update({"pattern": (NAME,), "num_layers": 1, "recurrent_width": 24})
    configs.forget_unread(config, ["model.pattern"])
    assert train(config, tmp_path / "run") == FINISHED
    logits, state = models.load(tmp_path / "run")(jnp.zeros((1, 4), jnp.int32))
    assert logits.shape == (1, 4, 384) and state["stacks"][0][0]["h"].shape == (1, 1, 24)
    config.model.key_width = 8
    with pytest.raises(UserError, match=r"model\.key_width=8 does nothing for model\.pattern=my_lab\.MovingAverage:"):
        configs.resolve(config)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("my_lab_1.Mine", None, r"there is no module 'my_lab_1'; install it, or add its directory to PYTHONPATH$"),
        ("my_lab_2.part.Mine", "", r"there is no module 'my_lab_2\.part'; install it"),
        ("my_lab_3.Mine", "Mine = 3", r"my_lab_3\.py has no nnx\.Module Mine$"),
        ("my_lab_4.Mine", "from flax import nnx\nclass Mine(nnx.Module): ...", "has no init_state and no flops; docs"),
        (
            "my_lab_5.Mine",
            "from flax import nnx\nclass Mine(nnx.Module):\n    init_state = flops = None\n    READS = ('windows',)",
            "READS has 'windows', which is not a key that only some mixers read; did you mean 'window'?",
        ),
    ],
)
def test_what_is_no_mixer_is_refused(write, name, text, message):
    if text is not None:
        write(text, name.split(".")[0])
    with pytest.raises(UserError, match=f"^the mixer '{re.escape(name)}'.*{message}"):
        mixers.find(name)


def test_a_defect_of_the_module_keeps_its_traceback(write):
    write("import nothing_of_this_name")
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
        mixers.find(NAME)
