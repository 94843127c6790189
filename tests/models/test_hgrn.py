"""HGRN: its gates when saturated, and a model's lower bounds, whose laws are in
test_hgrn2.py. Its outputs: test_mixers.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlinear.models.mixers.hgrn import HGRN
from jaxlinear.models.parameters import describe
from tests import numerics, oracles, small
from tests.mixer_oracles import ORACLES

SHUT, OPEN = -200.0, 200.0


@pytest.mark.parametrize("bound", [0.0, 0.5])
@pytest.mark.parametrize("gates", [[SHUT, OPEN, OPEN, SHUT, OPEN, SHUT], [OPEN] * 6, [SHUT] * 6], ids=str)
def test_a_gate_that_is_shut_or_open(gates, bound):
    """Shut, it keeps the bound's share of the state and writes the rest of the input; open, it keeps all and writes none.
    Values and gradients, including that of the state, stay finite."""
    graph, parameters = small.module(lambda rngs: HGRN(small.config(), rngs=rngs))
    random = np.random.default_rng(1)
    x, past = numerics.normal(random, 1, 6, 16), numerics.normal(random, 1, 24)
    x[..., 0] = gates
    parameters["forget"]["kernel"] = np.zeros((16, 24))
    parameters["forget"]["kernel"][0] = 1
    for name in ("input", "gate"):
        parameters[name]["kernel"][0] = 0
    parameters["lower_bound"] = np.full(24, bound)
    inner, gate = (oracles.silu(oracles.linear(parameters[name], x)) for name in ("input", "gate"))
    h = [past]
    for t, logit in enumerate(gates):
        h.append(h[-1] if logit == OPEN else bound * h[-1] + (1 - bound) * inner[:, t])
    expected = oracles.linear(parameters["out"], oracles.rms_norm(parameters["norm"], np.stack(h[1:], 1)) * gate)

    def run(parameters, x, past):
        y, state = nnx.merge(graph, parameters)(x, state={"h": past})
        return y, state["h"]

    run = numerics.with_gradients(run)
    (found, last), gradients = numerics.run(
        run, (parameters, x, past), (np.ones(x.shape), np.ones(past.shape)), dtype="float32"
    )
    numerics.assert_close(found, expected, 1e-5)
    numerics.assert_close(last, h[-1], 1e-6)
    assert all(jnp.isfinite(y).all() for y in jax.tree.leaves(gradients))


def test_what_is_written_is_exact_where_next_to_nothing_is_forgotten():
    """At sigmoid(20), where 1 - f is 2e-9 and f is 1 in float32."""
    graph, parameters = small.module(lambda rngs: HGRN(small.config(), rngs=rngs))
    x = numerics.normal(np.random.default_rng(2), 1, 1, 16)
    x[..., 0] = 20
    parameters["forget"]["kernel"] = np.zeros((16, 24))
    parameters["forget"]["kernel"][0] = 1
    parameters["lower_bound"] = np.full(24, 0.25)
    inner = oracles.silu(oracles.linear(parameters["input"], x))
    _, state = numerics.run(lambda p, x: nnx.merge(graph, p)(x), parameters, x, dtype="float32")
    numerics.assert_close(state["h"], 0.75 / (1 + np.exp(20.0)) * inner[:, 0], 3e-6)


def test_a_model_has_the_lower_bounds_of_its_layers():
    """They depend only on HGRN layers: those of HGRN2 have their own softmax."""
    config = small.config(pattern=("hgrn", "hgrn2"), num_layers=6, key_width=8, dtype="float64")
    architecture = describe(config)
    parameters = small.parameters(architecture.shapes)
    tokens = np.random.default_rng(3).integers(0, 31, (2, 9)).astype(np.int32)
    bounded = jax.tree.map(np.copy, parameters)
    for block in bounded["stacks"][0]["blocks"].values():
        shares = np.exp(block["mixer"]["lower_bound"])
        shares /= shares.sum(axis=0)
        block["mixer"]["lower_bound"] = np.stack([0 * shares[0], shares[1], shares[1] + shares[2]])
    expected = oracles.language_model(config, bounded, tokens, mixers=ORACLES)
    run = numerics.jit(lambda parameters: architecture.bind(parameters)(tokens)[0])
    numerics.assert_close(numerics.run(run, parameters, dtype="float64"), expected, 1e-10)


def test_a_model_too_short_for_the_hgrn_of_its_pattern():
    """No layer is HGRN, and none has a lower bound."""
    architecture = describe(small.config(pattern=("rg_lru", "hgrn"), num_layers=1))
    tokens = np.zeros((2, 5), np.int32)
    logits = jax.eval_shape(lambda parameters: architecture.bind(parameters)(tokens)[0], architecture.shapes)
    assert logits.shape[:2] == tokens.shape
