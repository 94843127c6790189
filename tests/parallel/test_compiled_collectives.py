"""What the training step exchanges over the axis ``sequence``, from programs that the TPU and GPU compilers made.

Each recurrent layer makes one all-gather per pass: of (M, C) forward and of D backward, with the number of bytes that its
formula gives, whatever T is and under every remat policy. Otherwise, this axis carries only:

- permutes of what a shard sees of those before it: the inputs of a convolution, the keys and values of a window, segment
  ids; of no more positions than the shard sees;
- sums of the gradients of parameters, which all shards of time share, and of scalars: as many bytes as the parameters
  have in float32, less what ``parallel.gradient_dtype=bfloat16`` saves.

The device computes while a gather is under way, except on v5p and v6e: there, libtpu 0.0.48 refuses to fuse all-gathers
with other work ("incorrect results, hang"), and 0.0.42 does it only when asked to. Compiling takes long, so
``make test-all`` runs this file; CI takes some of its cases.
"""

import math

import pytest

from jaxlinear import config as configs
from jaxlinear.costs import programs, targets
from jaxlinear.parallel.exchanges import LANES
from jaxlinear.training import ahead_of_time

pytestmark = [pytest.mark.slow, pytest.mark.slow(but_nth=12), pytest.mark.usefixtures("optimised")]

B, D, HEADS, LAYERS, WINDOW, SHARDS = 2, 1024, 8, 2, 24, 8
LENGTH, LONG = 256, 16 * 256
TPU, GPU = "v5e:2x4", "h100:8"

# The numbers that a shard sends forward, (M, C), and backward, D; and the positions of a halo, with their bytes per row.
# RG-LRU: a [D] product and a [D] state. S5 and the LRU: a flag and D / 2 or D complex states, each of two numbers. GLA: K
# and K x V per head. Delta rule: K x K and K x V per head.
KEY = {"gla": D // 2 // HEADS, "delta_net": D // HEADS, "gated_delta_net": 3 * D // 4 // HEADS, "kda": D // HEADS}
VALUE = {"gla": D // HEADS, "delta_net": D // HEADS, "gated_delta_net": 2 * KEY["gated_delta_net"], "kda": D // HEADS}
EXCHANGED = {
    "hawk": (2 * D, D),
    "griffin": (2 * D, D),
    "s5": (2 + D, D),
    "lru": (2 + 2 * D, 2 * D),
    "gla": (HEADS * KEY["gla"] * (1 + VALUE["gla"]), HEADS * KEY["gla"] * VALUE["gla"]),
    **{
        name: (HEADS * KEY[name] * (KEY[name] + VALUE[name]), HEADS * KEY[name] * VALUE[name])
        for name in ("delta_net", "gated_delta_net", "kda")
    },
}
BFLOAT16, INT32 = 2, 4
CONVOLUTION = 3 * (2 * KEY["gated_delta_net"] + VALUE["gated_delta_net"]) * HEADS  # the most channels of any model
HALO = B * max(CONVOLUTION * BFLOAT16, (WINDOW - 1) * 2 * D // HEADS * BFLOAT16 + WINDOW * INT32)


def program(
    model, target, length, mesh=None, remat="elementwise", rows=B, microbatches=1, gradient_dtype="float32", **changes
):
    """The training step of a narrow model compiled for a target, and the number of its parameters."""
    config = configs.default()
    config.model.update(
        {
            "preset": f"{model}_6m",
            "num_layers": 3 * LAYERS if model == "griffin" else LAYERS,
            "width": D,
            "recurrent_width": D,
            "num_heads": HEADS,
            "vocab_size": 256,
            "window": WINDOW,
            "tied_embeddings": False,
            "channel_mixer": "none",
            "remat": remat,
        }
        | changes
    )
    configs.forget_unread(config, ["model.preset"])
    config.training.update({"batch_size": rows, "sequence_length": length, "microbatches": microbatches})
    config.parallel.update({"exchange": "all_gather", "gradient_dtype": gradient_dtype})
    config.mesh.data = 1
    config.mesh.update(mesh or {"sequence": SHARDS})
    made = ahead_of_time.trace(config, targets.find(target).devices)
    return programs.read(made.compile(), made.mesh), made.architecture.num_parameters


def check(model, compiled, parameters, rows=B, gradient_bytes=4):
    """Asserts the rule above. Returns the gathers, forward and backward."""
    over = [c for c in compiled.collectives if "sequence" in c.axes]
    assert all(c.runs is not None for c in over)
    kinds = {kind: [c for c in over if c.kind == kind] for kind in programs.KINDS}

    forward, backward = (math.ceil(rows * n / LANES) * LANES * 4 for n in EXCHANGED[model])
    gathers = [[c for c in kinds["all-gather"] if ("transpose(jvp" in c.operation) == back] for back in (False, True)]
    layers = 2 * LAYERS if model == "griffin" else LAYERS
    for found, size in zip(gathers, (forward, backward), strict=True):
        assert [c.bytes for c in found] == [size] * len(found)
        assert sum(c.runs for c in found) == layers

    halos = kinds["collective-permute"]
    assert halos
    assert max(c.bytes for c in halos) <= HALO * rows // B

    reduced = sum(c.bytes * c.runs for kind in ("all-reduce", "reduce-scatter") for c in kinds[kind])
    least, most = (0.9, 1) if gradient_bytes == 4 else (1, 1.2)  # of bfloat16, the embedding and vectors are float32
    assert least * gradient_bytes * parameters < reduced <= most * gradient_bytes * parameters + 64
    assert not kinds["all-to-all"]
    assert not kinds["ragged-all-to-all"]
    return gathers


def overlap(gathers):
    """Whether the device computes between the start and the end of each."""
    body = "closed_call", "eval_jaxpr"  # the name of a layer in the loop over layers, in JAX 0.10 and 0.11
    return all(c.asynchronous and any(name in o for o in c.during for name in body) for c in gathers)


def has_products(gathers):
    """Whether it computes matrix products meanwhile: those within chunks or, if a kernel computes these, projections."""
    return all(any(o.endswith(("dot_general", "pallas_call")) for o in c.during) for c in gathers)


# Forward, a kernel that needs the state before it leaves only projections to compute meanwhile. S5 and the LRU have none
# that do not need the recurrence: there, the device waits for some kilobytes.
@pytest.mark.parametrize("model", ["gla", "hawk", "s5", "lru", "delta_net", "gated_delta_net", "kda", "griffin"])
def test_on_tpu(model):
    forward, backward = check(model, *program(model, TPU, LENGTH))
    assert overlap(backward)
    assert has_products(backward)
    if model not in ("s5", "lru"):
        assert overlap(forward)
        assert has_products(forward)


@pytest.mark.parametrize("target", ["v5p:2x2x2", "v6e:2x4"])
@pytest.mark.parametrize("model", ["gla", "hawk", "delta_net"])
def test_on_other_tpus(model, target):
    for gathers in check(model, *program(model, target, LENGTH)):
        assert not any(gather.asynchronous for gather in gathers)


@pytest.mark.parametrize("model", ["gla", "hawk", "gated_delta_net"])
def test_on_gpu(model):
    # Two chunks a shard: with one, XLA gathers D as bfloat16, before converting it to float32.
    forward, backward = check(model, *program(model, GPU, 4 * LENGTH))
    assert overlap(forward)
    # The delta rule's D takes all the work within chunks; what remains after it waits for G.
    if model != "gated_delta_net":
        assert overlap(backward)
    if model == "gla":
        assert has_products(forward)
        assert has_products(backward)


@pytest.mark.parametrize("model", ["hawk", "gla", "delta_net"])
def test_sixteen_times_the_tokens_are_the_same_bytes(model):
    check(model, *program(model, TPU, LONG))


@pytest.mark.parametrize("remat", ["none", "products", "full"])
def test_nothing_is_exchanged_again_whatever_is_computed_again(remat):
    check("gla", *program("gla", TPU, LENGTH, remat=remat))


@pytest.mark.parametrize("target", [TPU, GPU])
def test_gradients_summed_in_bfloat16(target):
    length = 4 * LENGTH if target == GPU else LENGTH
    check("gla", *program("gla", target, length, gradient_dtype="bfloat16"), gradient_bytes=BFLOAT16)


def test_beside_fsdp():
    """A shard has half the rows and half the parameters, apart from norms and the like, and exchanges half the bytes."""
    compiled, parameters = program("gla", TPU, LENGTH, mesh={"fsdp": 2, "sequence": 4})
    check("gla", compiled, 1.01 * parameters / 2, rows=B // 2)


@pytest.mark.parametrize("target", [TPU, GPU])
def test_copies_sum_their_gradients_once_a_step(target):
    """However many microbatches there are: each parameter in float32, and some scalars. A copy is spread over four devices,
    each with a quarter of it apart from norms and the like."""
    mesh = {"data": 2, "fsdp": 4}
    compiled, parameters = program("gla", target, LENGTH, mesh=mesh, rows=32, microbatches=4)
    over = [c for c in compiled.collectives if "data" in c.axes]
    assert {c.kind for c in over} == {"all-reduce"}
    assert {c.runs for c in over} == {1}
    summed = sum(c.bytes for c in over)
    assert parameters <= summed <= 1.01 * parameters  # 4 bytes each, a quarter on each device
