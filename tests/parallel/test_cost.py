"""The costs of exchanges, by hand; "auto" chooses each exchange in some case, and no choice changes the results."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from jaxlinear import log_once, ops
from jaxlinear.costs import devices, flop_annotations, traced
from jaxlinear.errors import UserError
from jaxlinear.ops.delta_rule.op import DeltaRule
from jaxlinear.ops.grouped_product import BACKENDS, grouped_product
from jaxlinear.pallas.attention import blocks
from jaxlinear.parallel import cost, operations, sharding
from jaxlinear.parallel import mesh as meshes
from jaxlinear.parallel.cost import KeysAndValues, States

H100, V5E = "NVIDIA H100 80GB HBM3", "TPU v5 lite"
RING = devices.Link("ring", 10.0, 20.0, 1.0, 0.5, True)
SWITCH = devices.Link("switch", 10.0, 10.0, 1.0, 0.5, False)
DEVICE = devices.Device("round figures", 100.0, 64000.0, 1000.0, SWITCH)


def test_collectives_by_hand():
    """8 shards of 100 bytes. A ring goes both ways, and a permute over 4 places crosses 4 links."""
    assert SWITCH.gather(8, 100) == 1 + 7 * 0.5 + 7 * 100 / 10
    assert RING.gather(8, 100) == 1 + 4 * 0.5 + 7 * 100 / 20
    assert SWITCH.permute(8, 4, 100) == 1 + 0.5 + 100 / 10
    assert RING.permute(8, 4, 100) == 1 + 4 * 0.5 + 4 * 100 / 10
    assert RING.permute(8, 7, 100) == 1 + 0.5 + 100 / 10  # the other way round


def test_costs_of_states_by_hand():
    """W = 4, m = 100, c = 200; a fold is bound by memory, (100 + 600) / 1000 s, a compose by its 200 FLOPs, 2 s."""
    costs = cost.state_costs(States(4, 100, 200, 10, 200), DEVICE, SWITCH)
    gathered = (1 + 1.5 + 3 * 300 / 10) + (1 + 1.5 + 3 * 200 / 10) + 8 * 0.7
    doubled = 2 * (2 * (1.5 + 300 / 10 + 2.0) + 1.5 + 200 / 10)
    assert costs["all_gather"] == pytest.approx((gathered, 3 * 500, 4 * 300), rel=1e-12)
    assert costs["doubling"] == pytest.approx((doubled, 4 * 300 + 400, 600), rel=1e-12)


def test_costs_of_keys_and_values_by_hand():
    costs = cost.key_value_costs(KeysAndValues(4, 100, 200), SWITCH)
    assert costs["all_gather"] == pytest.approx((2 * (2.5 + 30), 600, 1200), rel=1e-12)
    assert costs["ring"] == pytest.approx((6 * (1.5 + 10) + 5 * (1.5 + 20), 600 + 1000, 800), rel=1e-12)


MIB = 2**20
# Shards, bytes of M and of C, FLOPs of a fold and of a compose.
HAWK = functools.partial(States, transition=10240, state=10240, fold=0, compose=0)  # B=1, D=2560
GLA = functools.partial(States, transition=4096, state=2 * MIB, fold=0, compose=0)  # B=1, H=4, K=256, V=512
WIDE = functools.partial(States, transition=4096, state=16 * MIB, fold=0, compose=0)  # the same, B=8
DELTA = functools.partial(States, transition=MIB, state=MIB, fold=67 * 10**6, compose=134 * 10**6)  # H=16, K=V=128


@pytest.mark.parametrize(
    "load, kind, expected",
    [
        (HAWK(8), H100, "all_gather"),
        (GLA(8), H100, "all_gather"),
        (DELTA(8), H100, "all_gather"),
        (WIDE(8), H100, "doubling"),  # fewer bytes through the switch
        (GLA(64), H100, "doubling"),
        (HAWK(256), V5E, "all_gather"),  # on a torus, the gather is faster as long as it fits
        (GLA(64), V5E, "all_gather"),
        (GLA(256), V5E, "doubling"),  # 512 MiB held
        (DELTA(256), V5E, "doubling"),
    ],
)
def test_auto_goes_both_ways(load, kind, expected):
    assert cost.choose_exchange("auto", load, kind, load.shards) == expected
    assert {cost.choose_exchange(name, load, kind, load.shards) for name in cost.EXCHANGES} == set(cost.EXCHANGES)


def test_attention_gathers_what_fits():
    """Bfloat16 heads of 128 channels on 8 devices: 64K tokens of one head are gathered, 1M tokens of 16 heads are not."""
    short, long = KeysAndValues(8, 4 * MIB, 8 * MIB), KeysAndValues(8, 1024 * MIB, 2048 * MIB)
    choices = [cost.choose_attention(name, load, H100, 8) for name in ("auto", "all_gather") for load in (short, long)]
    assert choices == ["all_gather", "ring", "all_gather", "all_gather"]


def test_what_there_is_not_is_refused():
    with pytest.raises(UserError, match=r"^parallel.exchange is 'ring'; .* one of auto, all_gather, doubling$"):
        cost.choose_exchange("ring", HAWK(8), H100, 8)
    with pytest.raises(UserError, match=r"^parallel.attention is 'doubling'; .* one of auto, all_gather, ring$"):
        cost.choose_attention("doubling", KeysAndValues(8, 1, 1), H100, 8)


def test_products_are_counted():
    """The delta rule's M S and M2 M1, B=2, H=3, K=4, V=5."""
    family = DeltaRule(1.0)
    own = jax.ShapeDtypeStruct((2, 3, 4, 4), jnp.float32), jax.ShapeDtypeStruct((2, 3, 4, 5), jnp.float32)
    fold = 2 * 2 * 3 * 4 * 4 * 5
    assert traced.products_of(family.advance, own, own[1]) == (fold, True)
    assert traced.products_of(family.compose, own, own) == (fold + 2 * 2 * 3 * 4 * 4 * 4, True)
    assert cost.size_of(own) == 4 * 6 * (16 + 20)


def test_hosts_are_joined_by_the_network():
    device = devices.device_of(H100)
    assert devices.link_of(device, 8).name == "NVLink"
    assert devices.link_of(device, 16).bandwidth == 50e9
    assert devices.link_of(devices.device_of(V5E), 256).torus


def test_an_unknown_device_is_taken_for_another_and_said_once(caplog):
    log_once._logged.clear()
    with caplog.at_level(logging.INFO, logger="jaxlinear"):
        found = [devices.device_of("NVIDIA B999") for _ in range(2)]
    assert all(x.name.startswith("NVIDIA B999 (not in the table") for x in found)
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("the cost model has no figures of NVIDIA B999: ")


def test_the_choice_is_explained_once():
    with cost.explained() as lines:
        for _ in range(2):
            cost.choose_exchange("auto", GLA(64), V5E, 64)
        cost.choose_exchange("doubling", HAWK(8), V5E, 8)
    assert lines == [
        "states of 64 shards, M 4 KiB, C 2 MiB: all_gather (auto; at most 238.4 MiB held)",
        "  all_gather: 3694.9 us, 252.2 MiB sent per device, 128.2 MiB held",
        "  doubling: 5613.4 us, 28.05 MiB sent per device, 4.008 MiB held",
        "  estimated for TPU v5e, ICI of v5e",
        "states of 8 shards, M 10 KiB, C 10 KiB: doubling (as asked; at most 238.4 MiB held)",
        *lines[5:],
    ]
    assert len(lines) == 8


def test_auto_on_the_mesh_changes_no_result(monkeypatch):
    """States that are expensive to hold are exchanged by doubling, as the compiled program shows; outputs and gradients are
    the same."""
    mesh = meshes.make_mesh({**dict.fromkeys(meshes.AXES, 1), "sequence": 8})
    random = np.random.default_rng(0)
    inputs = {name: jnp.asarray(random.standard_normal((1, 32, 2, 4)), jnp.float32) for name in "qkv"}

    def run():
        def objective(inputs):
            with sharding.use_mesh(mesh):
                return jnp.sum(operations.linear_attention(**inputs)[0] ** 2)

        compiled = jax.jit(jax.value_and_grad(objective)).lower(inputs).compile()
        return compiled(inputs), compiled.as_text()

    gathered, text = run()
    assert " all-gather(" in text and " collective-permute(" not in text
    monkeypatch.setattr(cost, "STATES_BOUND", 1e-9)
    doubled, text = run()
    assert " all-gather(" not in text and " collective-permute(" in text
    for one, other in zip(jax.tree.leaves(gathered), jax.tree.leaves(doubled), strict=True):
        assert float(jnp.max(jnp.abs(one))) > 0.1
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(one))))


def test_products_of_loops_branches_and_shards_are_counted():
    """And it is said where a loop of unknown trips has some, which count as one trip's."""
    a, n = jax.ShapeDtypeStruct((8, 8), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    mesh = meshes.make_mesh(dict.fromkeys(meshes.AXES, 1) | {"data": 2}, jax.devices()[:2])
    one, scan, cond, times = 2 * 8 * 8 * 8, jax.lax.scan, jax.lax.cond, jax.lax.fori_loop
    rows = {"in_specs": (jax.P("data"), jax.P()), "out_specs": jax.P("data")}

    def looped(a, n):
        return times(0, n, lambda _, b: a @ b, a)

    def twice(a, n):
        return scan(lambda b, _: (looped(b, n), None), a, None, length=2)[0] @ a

    for count, known, function in (
        (5, True, lambda a, n: scan(lambda c, _: (c + a @ a, None), a, None, length=5)),
        (2, True, lambda a, n: cond(n > 0, lambda: a @ a, lambda: (a @ a) + (a @ a))),
        (1, True, jax.checkpoint(jax.jit(lambda a, n: a @ a))),
        (1, True, lambda a, n: jax.shard_map(lambda a, b: a @ b, mesh=mesh, **rows)(a, a)),
        (1, False, looped),
        (1, True, lambda a, n: times(0, n, lambda _, b: a + b, a) @ a),
        (3, False, twice),
        (2, False, lambda a, n: cond(n > 0, looped, lambda a, n: a @ a @ a, a, n)),
        (2 * 5 + 1, True, flop_annotations.jit(twice, runs=5)),
    ):
        assert traced.products_of(function, a, n) == (count * one, known)


@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_products_are_counted_by_their_rows(backend):
    """40 rows in blocks of 8, which on this platform are a loop with a step per block; and 20 of those rows in a group, as
    when experts are spread. Rematerialisation counts the forward pass twice."""
    x, kernels = jax.ShapeDtypeStruct((40, 6), jnp.float32), jax.ShapeDtypeStruct((2, 6, 10), jnp.float32)
    sizes, y = jax.ShapeDtypeStruct((2,), jnp.int32), jax.ShapeDtypeStruct((40, 10), jnp.float32)
    one = 2 * 40 * 6 * 10

    def product(x, kernels, sizes, rows=None):
        return grouped_product(x, kernels, sizes, rows=rows, backend=backend)

    def gradients(x, kernels, sizes, dy):
        again = jax.checkpoint(lambda x, kernels: jnp.sin(product(x, kernels, sizes)))
        return jax.vjp(again, x, kernels)[1](dy)

    assert traced.products_of(product, x, kernels, sizes) == (one, True)
    assert traced.products_of(functools.partial(product, rows=20), x, kernels, sizes).flops == (
        one * 3 // 5 if backend == "blocks" else one // 2  # 20 rows are 3 blocks of 8
    )
    assert traced.products_of(gradients, x, kernels, sizes, y) == (4 * one, True)


@pytest.mark.parametrize("window, visited", [(128, 4 + 3), (512, 4 + 3 + 2 + 1)])
def test_products_of_a_kernel_that_passes_over_steps_of_its_grid(window, visited):
    """Splash attention with 4 x 4 blocks of 128, on a grid of two blocks a row or of all of them. Forward, two products per
    block, for one head of each row: queries by keys and weights by values. Backward, four for the gradients of keys and
    values, including the logits again, and three for those of queries; and the sums of outputs by their gradients.
    Rematerialisation repeats the first two, unless the outputs are kept."""
    x = jax.ShapeDtypeStruct((2, 512, 1, 64), jnp.float32)
    attend = functools.partial(ops.sliding_window_attention, window=window, backend="pallas")
    one = 2 * 128 * 128 * 64
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "tpu", lambda *_: 128)
        assert traced.products_of(attend, x, x, x) == (2 * visited * 2 * one, True)
        kept = jax.checkpoint(attend, policy=jax.checkpoint_policies.save_only_these_names("attention"))
        for attention, again in ((attend, 0), (jax.checkpoint(attend), 2), (kept, 0)):
            both = lambda q, k, v, attention=attention: jax.vjp(attention, q, k, v)[1](q)  # noqa: E731
            expected = 2 * visited * (2 + 4 + 3 + again) * one + 2 * 2 * 512 * 64
            assert traced.products_of(both, x, x, x) == (expected, True)


def test_products_of_a_kernel_that_says_nothing_of_itself():
    x = jax.ShapeDtypeStruct((4, 8, 8), jnp.float32)

    def kernel(x, y):
        y[...] = x[...] @ x[...]

    block = pl.BlockSpec((None, 8, 8), lambda i: (i, 0, 0))
    squares = pl.pallas_call(kernel, grid=4, in_specs=[block], out_specs=block, out_shape=x)
    assert traced.products_of(squares, x) == (4 * 2 * 8 * 8 * 8, True)
