"""Which parameters are decayed and which ones Muon takes; AdamW against NumPy; every optimiser lowers a loss."""

import itertools

import jax
import numpy as np
import optax
import pytest

from jaxlinear import config as configs
from jaxlinear.training import optimizer as optimizers
from jaxlinear.training import state as states
from jaxlinear.training.optimizer import make_optimizer
from tests.training import tiny

MATRICES = {"kernel", "embedding", "convolution_kernel", "recurrence_kernel", "input_kernel"}
VECTORS = {"bias", "convolution_bias", "recurrence_bias", "input_bias", "decay", "scale"}
MUON = {"kernel", "recurrence_kernel", "input_kernel"}  # the last two have a matrix for each head


def by_path(tree):
    return {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def both():
    """Layers that are stacked, and one that is not."""
    return tiny.architecture(num_layers=3)


def configured(architecture, **options):
    """``(optimizer, parameters, update)`` with these options of the optimiser, the update compiled."""
    named = {name if "__" in name else f"optimizer__{name}": value for name, value in options.items()}
    optimizer, parameters = make_optimizer(tiny.config(**named), architecture), tiny.parameters(architecture)
    update = tiny.compiled(optimizer.update, parameters, optimizer.init(parameters), parameters)
    return optimizer, parameters, update


def test_matrices_are_decayed_and_nothing_else():
    mask = by_path(optimizers.decay_mask(both()))
    assert {path[-1] for path in mask} == MATRICES | VECTORS
    assert {path[0] for path in mask} == {"embedding", "stacks", "norm"}
    for path, decayed in mask.items():
        assert decayed == (path[-1] in MATRICES), path


def random_gradients(architecture, seed=1):
    return jax.tree.map(lambda x: x + np.float32(0.01), tiny.parameters(architecture, seed))


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
def test_adamw_is_that_of_the_paper(clip):
    """Three steps against NumPy: bias-corrected moments, and decoupled weight decay (Loshchilov and Hutter)."""
    rate, decay, beta1, beta2, epsilon = 0.1, 0.3, 0.8, 0.9, 1e-3
    options = {"learning_rate": rate, "weight_decay": decay, "beta1": beta1, "beta2": beta2, "epsilon": epsilon}
    architecture = tiny.architecture()
    optimizer, parameters, update = configured(architecture, **options, clip_norm=clip, schedule__warmup_steps=4)
    state = optimizer.init(parameters)
    expected = {path: value.astype(np.float64) for path, value in by_path(parameters).items()}
    first, second = ({path: np.zeros_like(value) for path, value in expected.items()} for _ in range(2))
    for step in range(3):
        gradients = random_gradients(architecture, seed=step + 1)
        updates, state = update(gradients, state, parameters)
        parameters = optax.apply_updates(parameters, updates)

        gradients = {path: value.astype(np.float64) for path, value in by_path(gradients).items()}
        norm = np.sqrt(sum(np.sum(gradient**2) for gradient in gradients.values()))
        assert 0.5 < norm < 1e6
        scale = min(1.0, clip / norm) if clip else 1.0
        for path, gradient in gradients.items():
            first[path] = beta1 * first[path] + (1 - beta1) * scale * gradient
            second[path] = beta2 * second[path] + (1 - beta2) * (scale * gradient) ** 2
            mean, square = first[path] / (1 - beta1 ** (step + 1)), second[path] / (1 - beta2 ** (step + 1))
            direction = mean / (np.sqrt(square) + epsilon) + decay * (path[-1] in MATRICES) * expected[path]
            expected[path] = expected[path] - rate * (step + 1) / 4 * direction
    for path, value in by_path(parameters).items():
        np.testing.assert_allclose(value, expected[path], rtol=2e-5, atol=2e-6, err_msg=str(path))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_decay_is_decoupled(name):
    """Without a gradient, a matrix shrinks by the rate times the decay, and a vector stays."""
    optimizer, parameters, update = configured(tiny.architecture(), name=name, learning_rate=0.1, weight_decay=0.3)
    updates, _ = update(jax.tree.map(np.zeros_like, parameters), optimizer.init(parameters), parameters)
    for path, value in by_path(parameters).items():
        expected = -0.1 * 0.3 * value if path[-1] in MATRICES else np.zeros_like(value)
        np.testing.assert_allclose(by_path(updates)[path], expected, rtol=1e-5, atol=1e-9, err_msg=str(path))


@pytest.mark.parametrize("name", ["adafactor", "muon"])  # for AdamW, above
def test_all_of_an_update_follows_the_schedule(name):
    """In the first of four warm-up steps it is a quarter, for matrices and vectors, including the decay."""
    architecture = tiny.architecture(pattern=("rg_lru",), num_layers=1)
    gradients, found = random_gradients(architecture), []
    for warmup in (0, 4):
        options = {"name": name, "learning_rate": 0.1, "weight_decay": 0.3, "schedule__warmup_steps": warmup}
        optimizer, parameters, update = configured(architecture, **options)
        found.append(update(gradients, optimizer.init(parameters), parameters)[0])
    tiny.assert_close(found[1], jax.tree.map(lambda whole: whole / 4, found[0]), rtol=1e-5)


def test_the_adamw_beside_muon_has_the_constants_of_the_config():
    """Two steps of a vector equal those of Adam with Nesterov momentum on clipped gradients."""
    options = {"name": "muon", "learning_rate": 0.1, "clip_norm": 0.5, "beta1": 0.6, "beta2": 0.8, "epsilon": 1e-2}
    architecture = tiny.architecture(pattern=("rg_lru",), num_layers=1)
    optimizer, parameters, update = configured(architecture, **options)
    adam = optax.scale_by_adam(b1=0.6, b2=0.8, eps=1e-2, nesterov=True)
    state, own = optimizer.init(parameters), adam.init(parameters["norm"]["scale"])
    for step in range(2):
        gradients = random_gradients(architecture, seed=step + 1)
        updates, state = update(gradients, state, parameters)
        clipped = gradients["norm"]["scale"] * (0.5 / optax.tree.norm(gradients))
        expected, own = adam.update(clipped, own)
        np.testing.assert_allclose(updates["norm"]["scale"], -0.1 * expected, rtol=1e-4)


def test_muon_takes_each_matrix_between_activations():
    """Its first update is a matrix with similar singular values, which are larger where there are more outputs than inputs
    (Jordan et al.: by the root of their ratio); AdamW's has entries of the size of the rate."""
    options = {"weight_decay": 0.0, "learning_rate": 1e-3, "muon_learning_rate": 1.0}
    optimizer, parameters, update = configured(both(), name="muon", **options)
    updates, _ = update(random_gradients(both()), optimizer.init(parameters), parameters)
    taken = set()
    for path, update in by_path(updates).items():
        if path[-1] in MUON:
            taken.add(path[-1])
            values = np.linalg.svd(update, compute_uv=False)
            assert values.ndim == update.ndim - 1
            assert np.all(values > 0.2 * values.max()) and np.median(values) > 0.5 * values.max(), path
            inputs, outputs = update.shape[-2:]
            assert 0.9 < values.max() / max(1, outputs / inputs) ** 0.5 < 1.25, path
        else:
            # The AdamW in Optax's Muon has Nesterov momentum: its first step is 0.9 / 1.9 longer than the rate.
            np.testing.assert_allclose(np.abs(update), 1e-3 * (1 + 0.9 / 1.9), rtol=1e-2, err_msg=str(path))
    assert taken == MUON


def test_adafactor_takes_each_layer_and_each_expert_by_itself():
    """When the gradients of one layer of a stack become far larger, two steps equal those of each layer alone, and so do
    those of a shorter stack next to it; matrices of 128 by 128 are factored."""
    sizes = {"num_layers": 5, "experts": 2, "experts_per_token": 1, "expert_width": 128, "width": 128}
    model = {f"model__{name}": x for name, x in (sizes | {"channel_mixer": "mixture_of_experts"}).items()}
    architecture = tiny.described(configs.model_config(tiny.config(**model)))
    options = {"learning_rate": 0.1, "weight_decay": 0.0, "clip_norm": 0.0}
    optimizer, parameters, update = configured(architecture, name="adafactor", **options, **model)
    state = optimizer.init(parameters)
    axes = by_path(jax.tree.map(lambda _, axes: ",".join(map(str, axes)), architecture.shapes, architecture.axes))
    alone = optax.adafactor(0.1, multiply_by_parameter_scale=False)
    alone_states, found_stacks = {}, set()
    for step in range(2):
        gradients = random_gradients(architecture, seed=step + 1)
        louder = np.array([1, 30**step], np.float32)  # of the two repetitions
        gradients["stacks"][0] = jax.tree.map(lambda x, by=louder: (x.T * by).T, gradients["stacks"][0])
        updates, state = update(gradients, state, parameters)
        updates, gradients = by_path(updates), by_path(gradients)
        for path, gradient in gradients.items():
            stacks = (path[0] == "stacks") + axes[path].split(",").count("expert")
            found_stacks.add(stacks)
            for place in np.ndindex(gradient.shape[:stacks]):
                past = alone_states.get((path, place)) or alone.init(gradient[place])
                expected, alone_states[path, place] = alone.update(gradient[place], past, gradient[place])
                np.testing.assert_allclose(updates[path][place], expected, rtol=1e-5, err_msg=f"{path} {place}")
    assert found_stacks == {0, 1, 2}


@pytest.mark.parametrize(
    "pattern, layers, names",
    [
        (("rg_lru", "sliding_window"), 4, {"0", "1"}),
        (("rg_lru", "rg_lru", "sliding_window"), 4, {"0", "1"}),  # a repetition, and one more layer
        (("rg_lru", "sliding_window"), 5, {"0", "1", "1_of_1"}),
    ],
)
def test_names_in_adafactors_state(pattern, layers, names):
    """Checkpoints contain the names: for stacks of one size, however many, they are the same as in earlier versions."""
    config = tiny.config(model__pattern=pattern, model__num_layers=layers, optimizer__name="adafactor")
    architecture = tiny.described(configs.model_config(config))
    state = jax.eval_shape(make_optimizer(config, architecture).init, architecture.shapes)
    assert set(next(state for state in state[1] if hasattr(state, "inner_states")).inner_states) == names


@pytest.mark.parametrize("name", ["adafactor", "muon"])  # for AdamW, test_step.py
def test_lowers_a_loss(name):
    shape = {"model__pattern": ("rg_lru",), "model__num_layers": 1}
    trainer = tiny.Trainer(tiny.config(optimizer__name=name, optimizer__learning_rate=3e-3, **shape))
    state, batch = trainer.state(), tiny.batch()
    before, losses = tiny.host(state.parameters), []
    for _ in range(12):
        state, metrics = trainer(state, batch)
        losses.append(metrics["loss"])
        assert np.isfinite(metrics["gradient_norm"]) and metrics["skips"] == 0
    assert losses[-1] < losses[0] - 0.3 and np.all(np.diff(losses[:4]) < 0), losses
    for path, value in by_path(tiny.host(state.parameters)).items():
        assert np.isfinite(value).all(), path
        assert np.any(value != by_path(before)[path]), f"{path} did not move"


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_the_state_lies_where_its_parameters_do_and_is_that_which_is_created(name):
    architecture, mesh = both(), tiny.mesh(8, fsdp=8)
    optimizer = make_optimizer(tiny.config(optimizer__name=name), architecture)
    shapes = states.structs(architecture, optimizer, mesh)
    places = by_path(architecture.shardings(mesh))
    split = [place for place in places.values() if place.spec != () and any(place.spec)]
    assert len(split) > 10
    moments = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes.optimizer):
        keys = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        keys = tuple(itertools.dropwhile(lambda key: key not in architecture.shapes, keys))
        if keys in places and leaf.shape == by_path(architecture.shapes)[keys].shape:
            moments.setdefault(keys, []).append(leaf.sharding)
        else:
            assert leaf.sharding.is_fully_replicated
            assert name == "adafactor" or leaf.size <= 3, path  # counters, and the coefficients of Muon's polynomial
    for keys, found in moments.items():
        assert all(place == places[keys] for place in found), keys
    if name != "adafactor":  # Muon's matrices have one moment
        ones = MUON if name == "muon" else ()
        assert {keys: len(found) for keys, found in moments.items()} == {
            keys: 2 - (keys[-1] in ones) for keys in places
        }
    created = jax.eval_shape(lambda: states.create(architecture, optimizer, 0))
    found = states.shapes(architecture, optimizer)
    assert jax.tree.structure(found) == jax.tree.structure(created)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(created), strict=True):
        assert (got.shape, got.dtype, got.weak_type) == (want.shape, want.dtype, want.weak_type)
