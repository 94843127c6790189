"""What ``launch/compile.py`` says about a run: it describes the step that trains, and its figures are right."""

import dataclasses
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.errors import JaxRuntimeError

from jaxlinear import config as configs
from jaxlinear.costs import devices, programs, targets, traced
from jaxlinear.costs.programs import Collective
from jaxlinear.errors import UserError
from jaxlinear.launching import roofline, search, sizing, sizing_text
from jaxlinear.models import flops
from jaxlinear.training import ahead_of_time, loop
from jaxlinear.training import step as steps

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimised")]

B, T, D, LAYERS, VOCABULARY = 8, 64, 128, 2, 256
BATCH = ("data", "fsdp", "expert")
REPOSITORY = pathlib.Path(__file__).parents[2]


def config(model={}, **mesh):  # noqa: B006 (it is not changed)
    config = configs.default()
    sizes = {"num_layers": LAYERS, "width": D, "recurrent_width": D, "num_heads": 2, "window": 16}
    layers = {"preset": "griffin_6m", "pattern": ("rg_lru", "sliding_window"), "vocab_size": VOCABULARY}
    config.model.update(layers | sizes | model)
    config.training.update({"batch_size": B, "sequence_length": T, "steps": 1000})
    config.mesh.update(mesh)
    return config


@pytest.fixture(scope="module")
def target():
    return targets.find("v5e:2x2")


@pytest.fixture(scope="module")
def sized(target):
    return sizing.size(config(data=2, fsdp=2), target)


@pytest.fixture
def refused(monkeypatch):
    """The compiler refuses every program."""

    def refuse(made):
        raise JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 23.04G of 15.75G hbm.")

    monkeypatch.setattr(ahead_of_time.TracedStep, "compile", refuse)


def test_memory_is_the_compilers(sized, target):
    assert sized.memory.total == sized.memory_analysis.total == sized.memory_analysis.peak
    architecture = ahead_of_time.trace(config(data=2, fsdp=2), target.devices).architecture
    # Each device holds half of every matrix, and all of the norms and biases.
    assert 2 * architecture.num_parameters <= sized.memory.parameters < 2.2 * architecture.num_parameters
    assert sized.memory.optimizer == pytest.approx(2 * sized.memory.parameters, rel=0.001)  # two moments
    assert sized.memory.batch == 3 * 4 * B * T // 4
    assert sized.fits and sized.too_much == sized.memory.total - target.memory_bytes


def test_time_is_the_least_that_the_rates_leave(sized):
    by_formula = flops.training_flops_per_token(configs.model_config(configs.resolve(config())), T)
    assert sized.flops == pytest.approx(B * T * by_formula)
    assert by_formula * B * T < sized.executed_flops < 2 * by_formula * B * T
    assert sized.time.products == pytest.approx(sized.executed_flops / 4 / 197e12)
    hidden = sized.time.exchanges - sized.time.waited
    assert sized.time.least == max(sized.time.products, sized.time.memory, hidden) + sized.time.waited
    assert 0 < sized.time.waited < sized.time.exchanges
    kept = sized.memory.activations + sized.memory.parameters + sized.memory.optimizer
    assert sized.time.memory == pytest.approx((2 * kept + sized.memory.batch) / 819e9)
    assert sized.tokens_a_day == pytest.approx(B * T * 86_400 / sized.time.least)
    assert sized.days == pytest.approx(1000 * sized.time.least / 86_400)
    assert 0 < sized.mfu_bound < 1


@pytest.mark.parametrize("topology", ["h100:4", "v5e:2x2"])
@pytest.mark.parametrize("mesh", [{"data": 4}, {"data": 2, "expert": 2}])
def test_products_of_experts_are_those_of_the_formula(topology, mesh):
    """Whatever computes them (on GPU, a number of blocks that is not known in advance), and wherever the experts are."""
    experts = {"channel_mixer": "mixture_of_experts", "experts": 4, "experts_per_token": 2, "expert_width": 256}
    layers = {"num_layers": 1, "pattern": ("convolution",), "remat": "none"}
    unread = {"recurrent_width": None, "num_heads": None, "window": None}
    made = ahead_of_time.trace(config(experts | layers | unread, **mesh), targets.find(topology).devices)
    formula = B * T * flops.training_flops_per_token(made.architecture.config, T)
    products = traced.products(made.traced.jaxpr.jaxpr)
    assert products.counted and products.flops == pytest.approx(formula, rel=0.02)


def test_where_products_are_not_all_counted_there_is_no_bound(sized):
    loops = dataclasses.replace(sized, time=dataclasses.replace(sized.time, products_counted=False))
    assert loops.mfu_bound is None and loops.time.most is None and loops.time.least == sized.time.least
    text = sizing_text.table(loops)
    assert f">= {sized.executed_flops:.3e} in the program's products" in text
    assert f"products >= {sized.time.products:.4f}, memory" in text
    assert f"at least {sized.time.least:.4f} s; MFU is not bounded, since products in loops of unknown trip" in text
    assert sizing_text.ranking([loops]).endswith(" -")


def test_table_and_json(sized):
    text = sizing_text.table(sized)
    assert "data 2 x fsdp 2" in text and "fits" in text and "all-gather" in text
    values = json.loads(json.dumps(sized.to_json()))
    assert values["memory"]["total"] == sized.memory.total
    assert values["time"]["least"] == sized.time.least
    assert {row["kind"] for row in values["collectives"]} >= {"all-gather", "all-reduce"}
    # The embedding is gathered once a pass, and not in each slice of the loss.
    rows = {(row.kind, row.axes): row for row in roofline.grouped(sized.collectives)}
    gathered = rows["all-gather", ("fsdp",)].bytes
    assert gathered <= 3 * 4 * sized.parameters / 2  # forward, backward and recomputation, float32 at most


def test_what_does_not_fit(target, sized):
    small = dataclasses.replace(sized, memory_limit=sized.memory.total - 2**20)
    assert not small.fits and small.too_much == 2**20
    assert "DOES NOT FIT: 0.001 GiB too much" in sizing_text.table(small)
    best = search.candidates(config(data=2, fsdp=2), target)
    assert f"would fit with {best[0].memory / 2**30:.3f} GiB" in sizing_text.advice(best)
    assert sizing_text.advice([]).startswith("by estimate, no mesh")


def test_advice_follows_from_what_was_compiled(target, sized):
    """It is not the config that does not fit; and if that takes twice its estimate, others should too."""

    def settings(one):
        return one.mesh, one.remat, one.microbatches

    whole = search.candidates(config(data=2, fsdp=2), target)
    (own,) = [one for one in whole if settings(one) == settings(sized)]
    others = [one for one in whole if one != own]
    more = sized.memory.temporaries + 2 * own.memory - sized.memory.total
    twice = dataclasses.replace(sized, memory=dataclasses.replace(sized.memory, temporaries=more))
    found = search.candidates(config(data=2, fsdp=2), target, twice)
    assert [settings(one) for one in found] == [settings(one) for one in others]
    assert [one.memory for one in found] == pytest.approx([2 * one.memory for one in others], rel=1e-3)
    (first, second) = search.search(config(data=2, fsdp=2), target, 1, compiled=sized)
    assert sized in (first, second) and settings(first) != settings(second)


@pytest.mark.parametrize(
    "message, used",
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 23.04G of 15.75G hbm. Exc", 23.04 * 2**30),
        ("the total memory required for HLO temporaries (512.00M) exceeds available HBM (15.75G).", 512 * 2**20),
    ],
)
def test_a_compiler_that_runs_out_of_memory(message, used):
    """Another refusal of the compiler is passed on."""
    assert sizing._used(JaxRuntimeError(message)) == int(used)
    with pytest.raises(UserError, match="the compiler rejects the program: INTERNAL: no"):
        sizing._used(JaxRuntimeError("INTERNAL: no\nmore"))


def a_program(topology, rows):
    """Of one device, which updates a donated array by way of eight more of its size: 4 KiB a row each."""

    def step(x, w):
        x, kept = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), x), x, length=8)
        return jax.lax.scan(lambda x, y: (x + jnp.sin(y) @ w, None), x, kept, reverse=True)[0]

    mesh = jax.sharding.Mesh(np.array(targets.find(topology).devices), ("data",))
    place = jax.NamedSharding(mesh, jax.P())
    shapes = [jax.ShapeDtypeStruct((n, 1024), jnp.float32, sharding=place) for n in (rows, 1024)]
    return programs.read(jax.jit(step, donate_argnums=0).lower(*shapes).compile(), mesh).memory


def test_a_program_that_libtpu_accepts_fits():
    memory, limit = a_program("v5e:1x1", 410_000), targets.find("v5e:1x1").memory_bytes
    assert memory.arguments + memory.outputs - memory.aliased + memory.temporaries > 1.05 * limit
    assert 0.95 * limit < memory.total <= limit


def test_what_libtpu_says_of_a_program_that_it_refuses_is_all_of_its_memory():
    """The same program, for a TPU with more memory, is counted alike."""
    with pytest.raises(JaxRuntimeError) as refused:
        a_program("v5e:1x1", 500_000)
    there = a_program("v5p:1x1x1", 500_000)
    assert there.arguments > 0.1 * there.total
    assert sizing._used(refused.value) == pytest.approx(there.total, rel=0.02)


def test_of_a_program_that_was_refused_the_exchanges_are_not_known(target, refused):
    found = sizing.size(config(data=2, fsdp=2), target)
    assert not found.fits and found.memory.total == pytest.approx(23.04 * 2**30)
    assert found.collectives is None and found.time.exchanges is None and found.time.most is None
    assert found.time.least == max(found.time.products, found.time.memory)
    assert "exchanges not known, since there is no program\n" in sizing_text.table(found)
    values = json.loads(json.dumps(found.to_json()))
    assert values["collectives"] is None and values["time"]["exchanges"] is None


def test_the_search_keeps_the_batch_and_uses_every_device(target):
    found = search.candidates(config(), target)
    assert {candidate.remat for candidate in found} == {"none", "elementwise", "products", "full"}
    for candidate in found:
        assert math.prod(candidate.mesh.values()) == 4
        batch, time = (math.prod(candidate.mesh[axis] for axis in axes) for axes in (BATCH, ("sequence",)))
        assert B // candidate.microbatches % batch == 0 and T % time == 0
    assert all(later.seconds > 0.98 * earlier.seconds for earlier, later in itertools.pairwise(found))
    (one,) = search.search(config(), target, 1)
    assert one.fits and one.mesh == found[0].mesh
    assert found[0].memory == pytest.approx(one.memory.total, rel=0.5)


@pytest.mark.slow(but_nth=2)
@pytest.mark.parametrize(
    "changes, most",
    [
        ({"pattern": ("lru",), "num_heads": 1}, 4),  # it has only channels, and nothing reads the 1
        ({"pattern": ("gla",), "num_heads": 1, "recurrent_heads": 4}, 4),
        ({"pattern": ("gla",), "num_heads": 4, "recurrent_heads": 2}, 2),
        ({"pattern": ("gla",), "num_heads": 2}, 2),
    ],
)
def test_tensor_splits_the_heads_that_there_are(target, changes, most):
    changed = config({"preset": "", "window": 1024} | changes)
    assert max(candidate.mesh["tensor"] for candidate in search.candidates(changed, target)) == most


def test_a_candidate_that_the_compiler_refuses_does_not_end_a_search(target, sized, monkeypatch):
    asked, said = [], []

    def size(candidate, _):
        asked.append(candidate)
        if len(asked) == 1:
            raise UserError("the compiler rejects the program: INTERNAL: no")
        return sized

    monkeypatch.setattr(sizing, "size", size)
    assert search.search(config(), target, 3, show=said.append) == [sized, sized]
    assert len(asked) == 3 and said.count("left out: the compiler rejects the program: INTERNAL: no") == 1


def a_collective(kind, size, devices, runs=1, during=()):
    return Collective(kind, ("data",), devices, size, runs, "", bool(during), during)


@pytest.mark.parametrize(
    "kind, size, devices, seconds",
    [
        ("all-gather", 1000_000, 4, 1e-6 + 2e-6 + 3e6 / 200e9),  # four chips may form a square: two axes, both ways
        ("all-reduce", 4000_000, 4, 1e-6 + 4e-6 + 6e6 / 200e9),
        ("all-gather", 1000_000, 2, 1e-6 + 1e-6 + 1e6 / 100e9),
        ("all-gather", 1000_000, 1, 0),
        ("collective-permute", 1000_000, 4, 2e-6 + 1e6 / 50e9),  # one hop
    ],
)
def test_a_link_that_is_crossed_by_each_kind(kind, size, devices, seconds):
    found = roofline.seconds(a_collective(kind, size, devices), roofline.device_of("TPU v5 lite"), devices)
    assert found == pytest.approx(seconds)


def test_links_between_neighbours_and_between_hosts():
    """A ring of n has n - 1 steps; a group along an outer axis reaches beyond its host."""

    def exchanges(devices, axes):
        gather = dataclasses.replace(a_collective("all-gather", 1000_000, devices), axes=axes)
        mesh = {"data": 2, "fsdp": 8}
        return roofline.times("NVIDIA H100 80GB HBM3", "bfloat16", mesh, 0.0, 0.0, [gather]).exchanges

    assert exchanges(8, ("fsdp",)) == pytest.approx(14e-6 + 7 * 1.9e-6 + 7e6 / 450e9)
    beyond = (7 * 1.9e-6 + 4e-6) / 8
    assert exchanges(2, ("data",)) == pytest.approx(14e-6 + beyond + 1e6 / 50e9)
    assert exchanges(16, ("data", "fsdp")) == pytest.approx(14e-6 + 15 * beyond + 15e6 / 400e9)


def test_the_network_between_slices():
    """Only its rate per chip counts, whatever else lies along the axis."""
    between = dataclasses.replace(a_collective("all-reduce", 1000_000, 2), between_slices=True)
    for kind, rate in (("TPU v5e", 3.125e9), ("TPU v5p", 6.25e9), ("TPU v6e", 12.5e9), ("TPU7x", 6.25e9)):
        times = roofline.times(kind, "bfloat16", {"data": 8, "fsdp": 2}, 0.0, 0.0, [between])
        assert times.exchanges == times.waited == pytest.approx(1e6 / rate)


def test_several_slices():
    """Once per step, only the sums of the gradients pass between slices; only ``data`` spans them."""
    target = targets.find("2xv5e:2x2")
    sized = sizing.size(config(data=4, fsdp=2), target)
    assert (sized.devices, sized.mesh["data"]) == (8, 4)
    (between,) = [row for row in roofline.grouped(sized.collectives) if row.between_slices]
    assert (between.kind, between.axes, between.devices) == ("all-reduce", ("data",), 2)
    # Each chip of a slice has its part of the sum: four bytes per element, and twice as many elements of what ``fsdp`` does
    # not split.
    assert 4 <= between.bytes / (sized.parameters / 4) < 5.5
    assert f"{'  all-reduce':26} {'slices':20} {2:7}" in sizing_text.table(sized)
    within = [one for one in sized.collectives if not one.between_slices]
    assert {one.axes for one in within} >= {("fsdp",), ("data",)}  # two of the four along data are in a slice
    assert all(one.devices <= 4 for one in within)
    assert sized.to_json()["collectives"][0].keys() >= {"between_slices"}
    found = search.candidates(config(), target)
    assert {candidate.mesh["data"] for candidate in found} == {2, 4, 8}
    wide = {one.mesh["data"]: one.seconds for one in reversed(found) if one.mesh["fsdp"] == 8 // one.mesh["data"]}
    alone = {one.mesh["data"]: one.seconds for one in reversed(search.candidates(config(), targets.find("v5e:2x4")))}
    assert wide[2] > alone[1]  # the same parameters per device, but their sums cross the network


@pytest.mark.parametrize(
    "kind, rates",
    [
        ("TPU v5p", {(64, 64): 600e9, (4, 64): 400e9, (2, 2): 200e9}),
        ("TPU7x", {(2, 2): 600e9, (2, 16): 200e9, (128, 128): 600e9}),  # first, the halves of a chip
        # Last, one GPU and two of each host, as in data 2 x fsdp 8.
        ("NVIDIA H100 80GB HBM3", {(8, 8): 450e9, (16, 16): 400e9, (2, 16): 50e9, (4, 16): 100e9}),
    ],
)
def test_links_that_a_group_may_use(kind, rates):
    """All axes of a torus, if the group is large enough to span them; between hosts, the ports of its devices in a host."""
    device = roofline.device_of(kind)
    assert {group: devices.most_gathering(device, *group) for group in rates} == rates


def test_what_is_waited_for_and_what_is_not_counted():
    def times(*collectives):
        return roofline.times("TPU v5e", "bfloat16", {"data": 2}, 197e12, 0.0, collectives)

    hidden = times(a_collective("all-gather", 5 * 10**10, 2, during=("dot_general",)))
    assert hidden.exchanges == pytest.approx(0.5, rel=1e-3) and hidden.least == hidden.products == 1.0
    waited = times(a_collective("all-gather", 5 * 10**10, 2))
    assert waited.least == pytest.approx(1.5, rel=1e-3) == waited.most
    unknown = times(a_collective("all-gather", 5 * 10**10, 2, runs=None))
    assert unknown.most is None and not unknown.counted and unknown.least == waited.least


def test_microbatches_do_not_move_less_of_the_activations(target, refused):
    moved = []
    for microbatches in (1, 2):
        changed = config(data=2, fsdp=2)
        changed.training.microbatches = microbatches
        sized = sizing.size(changed, target)
        moved.append(sized.time.memory - 2 * (sized.memory.parameters + sized.memory.optimizer) / 819e9)
    assert moved[1] == pytest.approx(moved[0], rel=0.02)


@pytest.mark.parametrize(
    "kind, peak, slower", [("TPU v5e", 197e12, 1), ("TPU v5 lite", 197e12, 1), ("NVIDIA H100 80GB HBM3", 989e12, 2)]
)
def test_float32_products_at_their_default_precision(kind, peak, slower):
    """TPUs round the factors to bfloat16; GPUs multiply in TF32, half as fast."""
    for dtype, factor in (("bfloat16", 1), ("float32", slower)):
        found = roofline.times(kind, dtype, {"data": 1}, 1e15, 0.0, [])
        assert found.products == pytest.approx(factor * 1e15 / peak)
        assert found.peak_flops == peak and found.least == found.products


def test_it_is_the_step_that_trains(tiny_config, tmp_path, monkeypatch):
    """It is exactly the same program: the text that ``train`` lowers."""
    texts = []

    def recorded(*arguments):
        step = steps.make_train_step(*arguments)

        class Step:
            def lower(self, *given):
                lowered = step.lower(*given)
                texts.append(lowered.as_text())
                return lowered

        return Step()

    monkeypatch.setattr(loop, "make_train_step", recorded)
    assert loop.train(tiny_config, tmp_path / "run") == loop.FINISHED
    trained = configs.from_json((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert texts == [ahead_of_time.trace(trained, jax.devices()).traced.lower().as_text()]


def test_the_program(tmp_path):
    """The environment does not say which platform JAX should use."""
    sizes = {"num_layers": 2, "width": D, "recurrent_width": D, "num_heads": 2, "vocab_size": VOCABULARY}
    changed = {
        "model": {"preset": "hawk_6m"} | sizes,
        "training": {"batch_size": B, "sequence_length": T, "steps": 200},
        "mesh": {"data": 1, "fsdp": 2},
    }
    keys = [f"--config.{section}.{key}={value}" for section, of in changed.items() for key, value in of.items()]
    output = tmp_path / "sizing.json"
    command = [sys.executable, "launch/compile.py", "--config=configs/griffin_100m.py", "--topology=h100:2", *keys]
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    given = {"cwd": REPOSITORY, "env": environment, "capture_output": True, "text": True}
    found = subprocess.run([*command, f"--json={output}"], **given)
    assert found.returncode == 0, found.stderr
    values = json.loads(output.read_text())
    assert values["fits"] and values["devices"] == 2 and values["mesh"]["fsdp"] == 2
    assert f"{values['parameters']:,} parameters on 2 devices, h100:2: fsdp 2" in found.stdout
