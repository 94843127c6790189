"""The kernels that ``auto`` chooses, compiled for absent TPUs and GPUs, forward and backward.

On TPU there is one kernel each way, and no array as long as the sequence is copied around them: kernels take the layout
that arrays have, as ``[B, T, H K]`` from a product. On GPU, ptxas reports each kernel's registers: none is spilled.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding

from jaxlinear import ops
from jaxlinear.costs import targets
from jaxlinear.errors import UserError
from jaxlinear.ops import backends
from jaxlinear.ops.selective_scan.op import choose
from jaxlinear.parallel import mesh as meshes
from jaxlinear.parallel import operations, sharding
from tests import compiled_text, gpus, numerics, ptxas

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimised")]

TRITON = "__gpu$xla.gpu.triton"


def pytest_generate_tests(metafunc):
    """The cases of each class. Those with a star are only for ``make test-all``, not for CI."""
    tables = {name: names.split() for name, names in getattr(metafunc.cls, "ON", {}).items()}
    on_h100, name = tables.pop("h100:1", []), metafunc.function.__name__
    if name not in ("test_tpu", "test_h100"):
        return
    rows = (
        on_h100 if name == "test_h100" else [f"{target}-{case}" for target, cases in tables.items() for case in cases]
    )
    cases = []
    for row in rows:
        *target, case = (own := row.rstrip("*")).split("-")
        marks = [pytest.mark.slow(cases=[own])] if row.endswith("*") else []
        cases.append(pytest.param(*target, case, id=own, marks=marks))
    metafunc.parametrize("name" if name == "test_h100" else "target, name", cases)


def array(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def ids_of(batch, length, packed=True):
    return array(batch, length, dtype="int32") if packed else None


def compiled(device, operation, given, inputs, remat=False, **options):
    """The outputs of ``operation(given, *inputs)`` and the gradients of ``inputs``."""
    if remat:
        operation = jax.checkpoint(operation, policy=jax.checkpoint_policies.save_only_these_names(*ops.SAVED))

    def both(cotangents, given, *inputs):
        outputs, pullback = jax.vjp(functools.partial(operation, given), *inputs)
        return outputs, pullback(cotangents)

    with backends.use_device(device):
        arguments = jax.eval_shape(operation, given, *inputs), given, *inputs
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device))  # noqa: E731
        return jax.jit(both).lower(*jax.tree.map(place, arguments)).compile(**options)


def over_a_mesh(target, sizes, operation, *arrays):
    """The text of the gradient of a sum of squared outputs; ``arrays``: each shape, axes and dtype."""
    mesh = meshes.make_mesh({axis: sizes.get(axis, 1) for axis in meshes.AXES}, targets.find(target).devices)

    def objective(*inputs):
        return jnp.sum(jax.tree.leaves(operation(*inputs))[0].astype(jnp.float32) ** 2)

    with sharding.use_mesh(mesh):
        inputs = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, sharding.spec(axes, shape, mesh)))
            for shape, axes, dtype in arrays
        ]
        return jax.jit(jax.grad(objective, range(len(inputs)))).lower(*inputs).compile().as_text()


class Kernel:
    """What every kernel promises."""

    NAME = ""  # with which its kernels' names begin
    CASES, ON = {}, {}
    REGISTERS = 0, 255  # more than the first, and at most the second
    moved = staticmethod(compiled_text.copies)

    def compiled(self, device, name, remat=False, **options):
        return compiled(device, *self.program(*self.CASES[name]), remat=remat, **options)

    def on_gpu(self, device, name, directory, **options):
        """The program's text, and each kernel's registers."""
        text = self.compiled(device, name, compiler_options=ptxas.dumped_to(directory), **options).as_text()
        return text, ptxas.registers(directory, f"{self.NAME}_")

    def kernels(self, text):
        return compiled_text.kernels(text, self.NAME)

    def names_on_gpu(self, name):
        return self.names(*self.CASES[name])

    def smallest(self, *case):
        """The elements of the smallest array as long as the sequence; None where XLA is free to move arrays."""

    def test_tpu(self, target, name):
        case = self.CASES[name]
        text = self.compiled(targets.find(target).devices[0], name).as_text()
        assert self.kernels(text) == self.names(*case)
        if elements := self.smallest(*case):
            assert not self.moved(text, elements)

    def check_on_gpu(self, text, name, directory):
        assert text.count(TRITON) == len(self.names_on_gpu(name))


class OnGPU:
    def test_h100(self, name, tmp_path, record_property):
        text, used = self.on_gpu(targets.find("h100:1").devices[0], name, tmp_path)
        record_property("registers", used)
        assert sorted(used) == self.names_on_gpu(name)
        assert all(self.REGISTERS[0] < count <= self.REGISTERS[1] for count in used.values())
        self.check_on_gpu(text, name, tmp_path)


class Saved:
    """Outputs are saved where a layer is recomputed, so that the forward kernel runs once."""

    SAVED = "v5e:1x1", ""  # a device and a case

    def test_remat_runs_the_forward_kernel_once(self):
        target, name = self.SAVED
        text = self.compiled(targets.find(target).devices[0], name, remat=True).as_text()
        assert self.kernels(text) == self.names(*self.CASES[name])


class OverTime:
    """Time over 4 devices, channels or heads over 2. Forward: the map of a shard and its outputs; backward: the gradient
    of a shard's first state, the states of its blocks again, and the gradients. No map is computed twice."""

    OVER_TIME = ["forward", "forward", "gradient", "state_gradient", "summary"]

    def test_over_a_mesh_of_tpus(self, target="v5e:2x4", **options):
        arrays = self.arrays_on_a_mesh(**options)
        text = over_a_mesh(target, {"sequence": 4, "tensor": 2}, getattr(operations, self.OPERATION), *arrays)
        assert self.kernels(text) == [f"{self.NAME}_{kind}" for kind in self.OVER_TIME]


class TestScan(Kernel, OnGPU, Saved, OverTime):
    NAME, OPERATION, SAVED = "scan", "linear_recurrence", ("v5e:1x1", "griffin")
    REGISTERS = 32, 200
    OVER_TIME = ["forward", "forward", "gradient_reverse", "state_gradient_reverse", "summary"]
    # name: B, T, D, dtype, what else it has
    CASES = {
        "griffin": (2, 2048, 2560, "float32", "packed"),
        "widest": (1, 4096, 8192, "float32", "constant"),
        "longest": (1, 131_072, 8192, "bfloat16", ""),
        "odd": (3, 1000, 300, "bfloat16", "reverse packed"),
        "shortest": (2, 7, 100, "float32", "packed"),
        "complex": (2, 1000, 1024, "complex64", "packed constant"),
        "complex_in_time": (2, 4096, 512, "complex64", "reverse"),
        "over_4_gib": (4, 131_072, 8192, "bfloat16", "packed"),  # on GPU, where offsets have 64 bits then
    }
    ON = {
        "v5e:1x1": "griffin widest longest odd shortest complex complex_in_time",
        "v5p:2x2x1": "griffin longest complex",
        "v6e:1x1": "griffin longest complex",
        "tpu7x:2x2x1": "griffin",
        "h100:1": "griffin longest odd complex over_4_gib",
    }

    def program(self, batch, length, width, dtype, kinds):
        x, state = array(batch, length, width, dtype=dtype), "complex64" if dtype == "complex64" else "float32"
        a = array(width, dtype=dtype) if "constant" in kinds else x
        operation = lambda ids, *x: ops.linear_recurrence(*x, segment_ids=ids, reverse="reverse" in kinds)  # noqa: E731
        return operation, ids_of(batch, length, "packed" in kinds), (a, x, array(batch, width, dtype=state))

    def names(self, batch, length, width, dtype, kinds):
        marks = [mark for mark in ("constant", "packed") if mark in kinds]
        number, ways = ["complex"] * (dtype == "complex64"), ([], ["reverse"])
        forward, backward = ways[::-1] if "reverse" in kinds else ways
        kernels = ["forward", *number, *forward], ["gradient", *number, *backward]
        return ["_".join(["scan", *words, *marks]) for words in kernels]

    def smallest(self, batch, length, width, dtype, kinds):
        """Complex numbers are split; and XLA is free in the layout of what does not fill registers."""
        return batch * length * width if dtype != "complex64" and width % 128 == 0 else None

    def arrays_on_a_mesh(self):
        return [((2, 2048, 1024), ("batch", "time", "recurrent"), "float32")] * 2


class TestSelectiveScan(Kernel, OnGPU, Saved, OverTime):
    NAME = OPERATION = "selective_scan"
    REGISTERS, SAVED = (64, 255), ("v5e:1x1", "mamba")
    OVER_TIME = ["forward", "forward_keep", "gradient", "state_gradient", "summary"]
    # name: B, T, D, N, dtype of x, what else it has. All else is float32, as in models.
    CASES = {
        "mamba": (2, 2048, 4096, 16, "bfloat16", "packed"),
        "longhorn": (2, 2048, 4096, 16, "bfloat16", "of_keys"),
        "longest": (1, 131_072, 2048, 16, "bfloat16", ""),
        "float32": (1, 4096, 512, 8, "float32", "of_keys packed"),
        "states_64": (1, 2048, 2560, 64, "bfloat16", "packed"),
        "states_128": (1, 2048, 2560, 128, "bfloat16", ""),
        "most_of_128": (2, 512, 9984, 128, "float32", "packed"),
        "most_of_16": (2, 1024, 90_112, 16, "float32", "packed"),
        "odd": (3, 1000, 300, 5, "bfloat16", "packed"),
        "part_of_a_block": (1, 640, 512, 16, "bfloat16", "packed"),
        "shortest": (2, 9, 100, 16, "float32", ""),
        "over_4_gib": (8, 131_072, 4096, 16, "bfloat16", "packed"),  # on GPU, where offsets have 64 bits then
    }
    ON = {
        "v5e:1x1": "mamba longhorn longest float32* states_64 states_128 most_of_128 most_of_16* odd part_of_a_block* "
        "shortest",
        "v5p:2x2x1": "mamba states_128*",
        "v6e:1x1": "mamba longhorn* most_of_128*",
        "tpu7x:2x2x1": "mamba* most_of_128* most_of_16",
        "h100:1": "mamba longhorn float32 states_64 states_128 odd shortest over_4_gib",
    }

    def program(self, batch, length, width, states, dtype, kinds):
        x, dt, state = (
            array(batch, length, width, dtype=dtype),
            array(batch, length, width),
            array(batch, width, states),
        )
        rates = () if "of_keys" in kinds else (array(width, states),)

        def operation(ids, x, dt, B, C, state, *rates):
            return ops.selective_scan(x, dt, rates[0] if rates else None, B, C, state, segment_ids=ids)

        B = array(batch, length, states)
        return operation, ids_of(batch, length, "packed" in kinds), (x, dt, B, B, state, *rates)

    def names(self, *case):
        of_keys, packed = (f"_{kind}" if kind in case[-1] else "" for kind in ("of_keys", "packed"))
        return [f"selective_scan_forward{of_keys}_keep{packed}", f"selective_scan_gradient{of_keys}{packed}"]

    def smallest(self, batch, length, width, *_):
        return batch * length * width if width % 128 == 0 else None

    def check_on_gpu(self, text, name, directory):
        """Nothing goes through shared memory, as it would if the layout over lanes changed."""
        super().check_on_gpu(text, name, directory)
        kernels = [text for text in (x.read_text() for x in directory.glob("*.ptx")) if ".entry selective" in text]
        assert len(kernels) == 2
        assert name == "odd" or not any(".shared." in text or "bar.sync" in text for text in kernels)

    def arrays_on_a_mesh(self):
        x = (2, 2048, 1024), ("batch", "time", "recurrent"), "float32"
        B = (2, 2048, 16), ("batch", "time", None), "float32"
        return x, x, ((1024, 16), ("recurrent", None), "float32"), B, B

    def test_a_state_that_vmem_has_no_room_for_is_refused(self):
        """The message gives the limit, in channels per device, and a remedy; ``most`` is about the largest."""
        devices = targets.find("v5e:2x4").devices
        for states, most in ((16, 90_112), (64, 28_416), (128, 9984)):
            for width in (most, most + 1):
                x, A, B = array(1, 16, width), array(width, states), array(1, 16, states)
                with backends.use_device(devices[0]):
                    assert numerics.form(choose, "auto", x, x, A, B, B) == ("pallas" if width == most else "chunked")
        message = r"up to 9,984 channels of 128 numbers per device, .* not 19,968; mesh.tensor splits them; .*'chunked'"
        x, A, B = jnp.ones((2, 16, 19_968)), jnp.ones((19_968, 128)), jnp.ones((2, 16, 128))
        with backends.use_device(devices[0]), pytest.raises(UserError, match=message):
            ops.selective_scan(x, x, A, B, B, backend="pallas")
        for sizes in ({"tensor": 2, "fsdp": 4}, {"tensor": 2, "sequence": 4}):
            with sharding.use_mesh(meshes.make_mesh({axis: sizes.get(axis, 1) for axis in meshes.AXES}, devices)):
                text = jax.jit(lambda *y: operations.selective_scan(*y)[0]).trace(x, x, A, B, B).jaxpr
            assert "name=selective_scan_forward" in str(text)


def marked(name, kinds, decay, packed):
    marks = ([decay] if decay != "none" else []) + (["packed"] if packed else [])
    return ["_".join([name, kind, *marks]) for kind in kinds]


def heads_apart(x, heads):
    return x.reshape(*x.shape[:2], heads, -1)


class TestLinearAttention(Kernel, OnGPU, Saved, OverTime):
    NAME = OPERATION = "linear_attention"
    SAVED = "v5e:1x1", "none_64"
    # name: B, T, H, K, V, dtype, decay, packed, and the heads of queries and keys if they are fewer
    CASES = {
        "none_64": (2, 2048, 4, 64, 64, "bfloat16", "none", True),
        "scalar_128": (1, 4096, 4, 128, 128, "bfloat16", "scalar", True),
        "channel_128": (1, 4096, 4, 128, 128, "bfloat16", "channel", False),
        "constant_256": (1, 2048, 2, 256, 256, "bfloat16", "constant", False),
        "channel_256": (1, 1024, 2, 128, 256, "float32", "channel", True),
        "wide_256": (1, 2048, 2, 256, 256, "float32", "scalar", True),
        "wide_values": (1, 1024, 2, 256, 512, "bfloat16", "channel", False),  # as in GLA 1.3B
        "longest": (1, 131_072, 2, 128, 128, "bfloat16", "scalar", False),
        "odd": (3, 1000, 3, 48, 32, "float32", "scalar", True),
        "wide_blocks": (1, 1024, 8, 240, 256, "float32", "scalar", False),  # 8 heads at once
        "wide_fours": (1, 1024, 4, 224, 224, "float32", "scalar", False),
        "fullest": (8, 4096, 4, 160, 160, "float32", "channel", True),  # the arrays are not in VMEM as a whole
        "in_turns": (8, 4096, 8, 248, 248, "float32", "channel", True),
        "shorter_chunks": (8, 4096, 8, 240, 240, "float32", "scalar", True),  # on v6e
        "narrow": (1, 200, 16, 16, 16, "bfloat16", "channel", True),
        "ragged_heads": (1, 256, 5, 64, 128, "bfloat16", "constant", False),
        # As in Based: without zeros that fill them up, 128 heads would have to be in one block, and GPUs spill registers.
        "odd_widths": (1, 8192, 16, 153, 113, "bfloat16", "none", True),
        "odd_channels": (1, 1024, 16, 72, 65, "float32", "channel", False),
        "sharing": (1, 2048, 16, 128, 64, "bfloat16", "scalar", True, 1),  # as in Mamba-2: 8 heads at once
        # On GPU
        "packed_channel_64": (1, 1024, 2, 64, 64, "bfloat16", "channel", True),
        "packed_channel_256": (1, 1024, 2, 256, 256, "bfloat16", "channel", True),
        "odd_128": (1, 1000, 2, 128, 128, "bfloat16", "channel", True),
        "scalar_256": (1, 1024, 2, 256, 256, "bfloat16", "scalar", True),
        "constant_packed": (1, 1024, 2, 128, 128, "bfloat16", "constant", True),
        "few_values": (1, 1024, 2, 64, 16, "bfloat16", "scalar", True),
        "odd_scalar": (1, 1000, 2, 128, 128, "bfloat16", "scalar", True),
        "scalar_unpacked": (1, 2048, 2, 128, 128, "bfloat16", "scalar", False),
        "narrow_channel": (1, 1000, 2, 32, 128, "bfloat16", "channel", True),
        "wide_keys": (1, 1000, 2, 256, 64, "bfloat16", "channel", True),
        # Offsets have 64 bits. With documents 8 bytes spill, for decays by head with JAX 0.10, or 12, by channel with 0.12.
        "over_4_gib": (8, 131_072, 24, 128, 128, "bfloat16", "channel", False),
        "over_4_gib_packed": (8, 131_072, 24, 128, 128, "bfloat16", "constant", True),
        "mamba2": (1, 2048, 64, 128, 64, "bfloat16", "scalar", False, 1),
        "mamba2_packed": (1, 2048, 64, 128, 64, "bfloat16", "scalar", True, 1),
        "odd_sharing": (1, 1000, 10, 64, 64, "bfloat16", "scalar", True, 1),
        "odd_values_sharing": (1, 1000, 10, 256, 32, "bfloat16", "scalar", True, 1),
        "few_values_sharing": (1, 1000, 10, 128, 16, "bfloat16", "scalar", True, 1),
        "constant_sharing": (1, 1000, 10, 128, 128, "bfloat16", "constant", True, 1),
        "wide_sharing": (1, 2048, 10, 256, 256, "bfloat16", "none", False, 1),
        "narrow_keys_sharing": (1, 1000, 10, 16, 512, "bfloat16", "scalar", True, 1),
    }
    ON = {
        "v5e:1x1": "none_64 scalar_128 channel_128 constant_256 channel_256 wide_256 wide_values* longest odd wide_blocks* "
        "wide_fours* fullest* in_turns* shorter_chunks* narrow ragged_heads odd_widths* odd_channels* sharing",
        "v5p:2x2x1": "scalar_128 channel_128",
        "v6e:1x1": "none_64 scalar_128 channel_128 constant_256 wide_256* odd* wide_blocks* wide_fours* ragged_heads "
        "shorter_chunks sharing",
        "tpu7x:2x2x1": "channel_128*",
        "h100:1": "none_64 scalar_128 channel_128 constant_256 wide_values narrow odd_widths* packed_channel_64 "
        "packed_channel_256 odd_128* scalar_256* constant_packed* few_values odd_scalar* scalar_unpacked narrow_channel "
        "wide_keys* over_4_gib over_4_gib_packed mamba2 mamba2_packed odd_sharing* odd_values_sharing few_values_sharing* "
        "constant_sharing* wide_sharing narrow_keys_sharing*",
    }

    def program(self, batch, length, heads, key, value, dtype, decay, packed, key_heads=None):
        key_heads = key_heads or heads

        def operation(ids, q, k, v, log_decay, state):
            q, k, v = heads_apart(q, key_heads), heads_apart(k, key_heads), heads_apart(v, heads)
            log_decay = heads_apart(log_decay, heads) if decay == "channel" else log_decay
            o, final = ops.linear_attention(q, k, v, log_decay, state, segment_ids=ids)
            return o.reshape(batch, length, -1), final

        q, v = (array(batch, length, width, dtype=dtype) for width in (key_heads * key, heads * value))
        decays = {
            "none": None,
            "constant": array(heads),
            "scalar": array(batch, length, heads),
            "channel": array(batch, length, heads * key),  # as models have them
        }
        return operation, ids_of(batch, length, packed), (q, q, v, decays[decay], array(batch, heads, key, value))

    def names(self, *case):
        return marked(self.NAME, ["forward", "gradient"], *case[6:8])

    def names_on_gpu(self, name):
        """Forward: the states and the outputs; backward: the gradients of states, of values, and of queries and keys."""
        forward, gradient = self.names(*self.CASES[name])
        parts = [*((forward, x) for x in ("outputs", "states")), *((gradient, x) for x in ("keys", "states", "values"))]
        return ["_".join(part) for part in parts]

    def smallest(self, batch, length, heads, key, value, *_):
        return batch * length * heads * min(key, value) if heads * key % 128 == heads * value % 128 == 0 else None

    def arrays_on_a_mesh(self, key_heads=4):
        axes = "batch", "time", "heads", None
        return [((1, 1024, heads, 64), axes, "bfloat16") for heads in (key_heads, key_heads, 4)]

    @pytest.mark.parametrize("target, key_heads", [("v6e:2x4", 4), ("v5e:2x4", 1)])
    def test_over_other_meshes_of_tpus(self, target, key_heads):
        """Where heads have their own queries and keys, or share them."""
        self.test_over_a_mesh_of_tpus(target, key_heads=key_heads)


class TestDeltaRule(Kernel, OnGPU, Saved, OverTime):
    NAME = OPERATION = "delta_rule"
    REGISTERS, SAVED = (32, 255), ("v5e:1x1", "none_64")
    # name: B, T, H, K, V, dtype, decay, packed, and whether eigenvalues may be negative
    CASES = {
        "none_64": (2, 2048, 4, 64, 64, "bfloat16", "none", True),
        "scalar_128": (1, 4096, 4, 128, 256, "bfloat16", "scalar", True),
        "channel_128": (1, 4096, 2, 128, 128, "bfloat16", "channel", False),
        "channel_256": (1, 1024, 1, 256, 256, "bfloat16", "channel", True),
        "none_256": (1, 2048, 2, 256, 256, "float32", "none", False),
        "wide_values": (1, 1024, 9, 200, 400, "bfloat16", "scalar", False),  # as in Gated DeltaNet 1.3B
        # Arrays that are not in VMEM as a whole: blocks of them are, and not much else fits; 13 heads take two turns.
        "fullest": (8, 4096, 8, 256, 256, "float32", "channel", True),
        "in_turns": (8, 4096, 13, 24, 24, "float32", "channel", True),
        "most_states": (8, 4096, 16, 248, 248, "float32", "none", True),  # in turns in the forward pass, too
        "in_turns_by_channel": (8, 4096, 9, 200, 400, "bfloat16", "channel", True),
        "more_forward": (8, 4096, 24, 160, 160, "float32", "channel", True),  # 12 heads at once, and 4 in the gradient
        "registers_shared": (
            8,
            4096,
            16,
            64,
            64,
            "float32",
            "channel",
            True,
        ),  # 16 heads at once, and 8 in the gradient
        "longest": (1, 131_072, 2, 128, 128, "bfloat16", "scalar", False),
        "odd": (3, 1000, 3, 48, 32, "float32", "scalar", True),
        "narrow": (1, 200, 9, 16, 16, "bfloat16", "none", True),
        "shortest": (1, 9, 2, 64, 64, "bfloat16", "channel", False),
        # On GPU
        "scalar_64": (1, 1024, 2, 64, 64, "bfloat16", "scalar", True),
        "odd_64": (1, 1000, 2, 64, 64, "bfloat16", "scalar", True),
        "odd_channel": (1, 1000, 2, 128, 128, "bfloat16", "channel", True),
        "channel_16": (1, 1000, 2, 16, 16, "bfloat16", "channel", True),
        "channel_64": (1, 1000, 2, 64, 64, "bfloat16", "channel", True),
        "narrow_channel": (1, 1000, 2, 32, 128, "bfloat16", "channel", True),
        "many_keys": (1, 1000, 2, 256, 64, "bfloat16", "none", False),
        "scalar_256": (1, 1024, 2, 256, 256, "bfloat16", "scalar", True),
        "none_packed_256": (1, 1024, 2, 256, 256, "bfloat16", "none", True),
        "few_chunks": (1, 200, 2, 128, 128, "bfloat16", "none", False),
        "over_4_gib": (8, 131_072, 24, 128, 128, "bfloat16", "channel", True),  # offsets have 64 bits
    }
    for _name in ("none_64", "scalar_128", "channel_128", "channel_256", "wide_values"):
        CASES[f"negative_{_name}"] = *CASES[_name], True
    # The largest blocks take a minute or two each: ``more_forward`` stays. ``wide_values`` is in a published step.
    ON = {
        "v5e:1x1": "none_64 scalar_128 channel_128 channel_256 none_256 wide_values* fullest* in_turns* most_states* "
        "in_turns_by_channel* more_forward registers_shared* longest odd narrow shortest negative_none_64 "
        "negative_channel_256",
        "v5p:2x2x1": "scalar_128 negative_scalar_128",
        "v6e:1x1": "none_64 scalar_128 negative_scalar_128",
        "tpu7x:2x2x1": "scalar_128",
        "h100:1": "scalar_64 odd_64* odd_channel channel_16* channel_64 narrow_channel* many_keys* scalar_256 "
        "none_packed_256 few_chunks* over_4_gib none_64 scalar_128 channel_128 channel_256 wide_values narrow shortest* "
        "negative_none_64 negative_scalar_128 negative_channel_128 negative_wide_values",
    }

    def program(self, batch, length, heads, key, value, dtype, decay, packed, negative=False):
        def operation(ids, q, k, v, beta, log_decay, state):
            q, k, v = (heads_apart(x, heads) for x in (q, k, v))
            log_decay = heads_apart(log_decay, heads) if decay == "channel" else log_decay
            more = {"segment_ids": ids, "negative_eigenvalues": negative}
            o, final = ops.delta_rule(q, k, v, beta, log_decay, state, **more)
            return o.reshape(batch, length, -1), final

        q, v = (array(batch, length, heads * width, dtype=dtype) for width in (key, value))
        beta, state = array(batch, length, heads), array(batch, heads, key, value)
        log_decay = {"none": None, "scalar": beta, "channel": array(*q.shape)}[decay]
        return operation, ids_of(batch, length, packed), (q, q, v, beta, log_decay, state)

    def names(self, *case):
        return marked(self.NAME, ["forward", "gradient"], *case[6:8])

    def names_on_gpu(self, name):
        forward, gradient = self.names(*self.CASES[name])
        parts = [
            (forward, "states"),
            (forward, "tokens"),
            *((gradient, x) for x in ("keys", "states", "tokens", "values")),
        ]
        return ["_".join(part) for part in parts]

    def smallest(self, batch, length, heads, key, value, *_):
        whole = heads * key % 128 == heads * value % 128 == length % 128 == 0
        return batch * length * heads * min(key, value) if whole else None

    def arrays_on_a_mesh(self):
        axes = "batch", "time", "heads", None
        return *[((1, 1024, 4, 64), axes, "bfloat16")] * 3, ((1, 1024, 4), axes[:3], "float32")

    @pytest.mark.parametrize("tensor, kernel", [(1, False), (2, True)])
    def test_a_device_has_its_part_of_the_heads(self, tensor, kernel):
        """20 heads of 153 channels are too many for one block; 10 are not."""
        sizes = {axis: 1 for axis in meshes.AXES} | {"fsdp": 8 // tensor, "tensor": tensor}
        x, beta = jnp.zeros((8, 32, 20, 153), jnp.bfloat16), jnp.zeros((8, 32, 20))
        with sharding.use_mesh(meshes.make_mesh(sizes, targets.find("v5e:2x4").devices)):
            text = str(jax.jit(lambda *y: operations.delta_rule(*y)[0]).trace(x, x, x, beta).jaxpr)
        assert ("name=delta_rule_forward" in text) == kernel


class TestAttention(Kernel, OnGPU):
    NAME, REGISTERS = "attention", (32, 255)
    # name: B, T, H, G, K, window, dtype, packed
    CASES = {
        "griffin": (1, 8192, 8, 1, 128, 2048, "bfloat16", True),
        "recurrent_gemma": (2, 4096, 4, 1, 256, 2048, "bfloat16", False),
        "grouped_64": (2, 2048, 8, 4, 64, 512, "float32", True),
        "longest": (1, 131_072, 2, 1, 64, 1024, "bfloat16", True),
        "odd": (1, 1000, 3, 3, 48, 100, "bfloat16", True),
        "all_tokens": (1, 4096, 4, 4, 128, None, "bfloat16", True),
        # Arrays that are not in VMEM as a whole: blocks of them are, and nearly fill it.
        "largest_blocks": (8, 4096, 4, 1, 256, None, "bfloat16", True),
        "largest_in_float32": (8, 4096, 4, 4, 192, None, "float32", True),
        "widest": (8, 4096, 4, 4, 512, None, "bfloat16", True),
        "widest_in_float32": (8, 4096, 4, 4, 512, None, "float32", True),
        "over_4_gib": (8, 131_072, 24, 8, 128, None, "bfloat16", True),  # on GPU, where offsets have 64 bits then
    }
    ON = {
        "v5e:1x1": "griffin recurrent_gemma grouped_64 longest odd all_tokens largest_blocks largest_in_float32* widest* "
        "widest_in_float32",
        "v5p:2x2x1": "griffin",
        "v6e:1x1": "griffin recurrent_gemma*",
        "tpu7x:2x2x1": "griffin*",
        "h100:1": "griffin recurrent_gemma longest odd all_tokens largest_blocks over_4_gib",
    }

    def program(self, batch, length, heads, groups, width, window, dtype, packed):
        operation = ops.causal_attention
        if window is not None:
            operation = functools.partial(ops.sliding_window_attention, window=window)
        q, k = (array(batch, length, n, width, dtype=dtype) for n in (heads, groups))
        return lambda ids, *x: operation(*x, segment_ids=ids), ids_of(batch, length, packed), (q, k, k)

    def compiled(self, device, name, **options):
        """The outputs are saved, so that the forward kernel runs once."""
        return super().compiled(device, name, remat=True, **options)

    def kernels(self, text):
        assert " while(" not in text
        return sorted(re.findall(r"%\w*?splash\w*?_(fwd|dq|dkv)\w*[.\d]* = .*custom-call\(", text))

    def names(self, *_):
        return ["dkv", "dq", "fwd"]

    def names_on_gpu(self, name):
        return ["attention_keys", "attention_outputs", "attention_queries"]

    def check_on_gpu(self, text, name, directory):
        super().check_on_gpu(text, name, directory)
        assert " while(" not in text

    @pytest.mark.parametrize("target", ["v5e:2x4", "h100:8"])
    @pytest.mark.parametrize("sizes", [{"data": 4, "tensor": 2}, {"sequence": 4, "tensor": 2}], ids=str)
    def test_over_a_mesh(self, sizes, target):
        """Each device computes its rows and heads, or its part of time, preceded by a window of earlier tokens."""
        operation = functools.partial(operations.sliding_window_attention, window=100)
        x = (4, 1024, 4, 64), ("batch", "time", "heads", None), "bfloat16"
        text = over_a_mesh(target, sizes, operation, x, x, x)
        if target.startswith("h100"):
            assert text.count(TRITON) == 3
        else:
            assert self.kernels(text) == self.names()
        assert "all-gather" not in text and "all-to-all" not in text


class Rewritten(Kernel):
    """Nor is an array as long as the sequence written in another layout, with other axes or repeated."""

    moved = staticmethod(compiled_text.rearrangements)

    def smallest(self, batch, length, channels, *_):
        return batch * length * channels if channels % 128 == length % 128 == 0 else None

    def check_on_gpu(self, text, name, directory):
        batch, length, channels = self.CASES[name][:3]
        assert not compiled_text.rearrangements(text, batch * length * channels)
        assert self.NAME == "rg_lru" or text.count(TRITON) == 2  # there are scans beside it


class TestRGLRU(Rewritten, OnGPU, Saved):
    NAME, SAVED = "rg_lru", ("v5e:1x1", "recurrentgemma_9b")
    # name: B, T, R, N, dtype, packed
    CASES = {
        "griffin_1b3": (2, 2048, 2560, 16, "bfloat16", True),
        "griffin_7b": (1, 4096, 5632, 32, "bfloat16", False),
        "recurrentgemma_9b": (1, 4096, 4096, 16, "bfloat16", True),
        "float32": (1, 1024, 5632, 32, "float32", True),
        "longest": (1, 131_072, 4096, 16, "bfloat16", False),
        "half_a_register": (1, 1024, 704, 4, "bfloat16", True),  # Griffin 7B's over 8 devices
        "small": (3, 1000, 300, 20, "float32", True),
        "largest_block": (1, 4096, 1152, 1, "bfloat16", True),
        "many_rows": (16, 1024, 2560, 16, "bfloat16", True),
        "many_long_rows": (8, 131_072, 4096, 16, "bfloat16", False),  # over 4 GiB: offsets have 64 bits
    }
    ON = {
        "v5e:1x1": "griffin_1b3* griffin_7b recurrentgemma_9b float32* longest half_a_register* small largest_block*",
        "v5p:2x2x1": "recurrentgemma_9b",
        "v6e:1x1": "griffin_1b3",
        "tpu7x:2x2x1": "recurrentgemma_9b",
        "h100:1": "griffin_1b3 griffin_7b* float32 longest small* many_rows* many_long_rows",
    }

    def program(self, batch, length, width, count, dtype, packed=None):
        kernel, vector = array(count, width // count, width // count), array(width)
        inputs = array(batch, length, width, dtype=dtype), kernel, vector, kernel, vector, vector, array(batch, width)

        def operation(given, *inputs):
            *of_gates, state = inputs
            return ops.rg_lru(*of_gates, given[0], state, segment_ids=given[1])

        return operation, (array(batch, length, dtype=bool), ids_of(batch, length, packed)), inputs

    def names(self, *case):
        return marked(self.NAME, ["forward", "gradient"], "none", case[-1])

    def names_on_gpu(self, name):
        kinds = ["forward", "gradient"]
        if not name.startswith("many"):  # these occupy a GPU; otherwise programs divide time
            kinds += ["state_gradient", "summary"]
        return marked(self.NAME, kinds, "none", self.CASES[name][-1])

    def test_remat_runs_the_forward_kernel_once_on_gpu(self, tmp_path):
        text, _ = self.on_gpu(targets.find("h100:1").devices[0], "many_rows", tmp_path, remat=True)
        assert text.count(TRITON) == 2


class TestGatesOfTheRGLRU(Rewritten):
    NAME = "rg_lru_gates"
    # name: B, T, R, N, dtype
    CASES = {
        name: TestRGLRU.CASES[name][:5]
        for name in ("griffin_1b3", "recurrentgemma_9b", "longest", "half_a_register", "small", "largest_block")
    } | {"float32": (1, 1024, 2560, 16, "float32")}
    ON = {
        "v5e:1x1": "griffin_1b3* float32* longest half_a_register* small largest_block*",
        "v5p:2x2x1": "recurrentgemma_9b",
        "v6e:1x1": "recurrentgemma_9b",
    }

    def program(self, *case):
        _, (first, _), (*inputs, _) = TestRGLRU().program(*case)
        return lambda first, *inputs: ops.rg_lru_gates(*inputs, first), first, inputs

    def names(self, *_):
        return ["rg_lru_gates_forward", "rg_lru_gates_gradient"]


class TestGatedRMSNorm(Rewritten, OnGPU):
    NAME = "gated_rms_norm"
    # name: B, T, D, heads, whether there is a skip, whether the norm comes first, the dtype, and the activation unless SiLU
    CASES = {
        "mamba2_1b3": (2, 2048, 4096, 1, True, False, "bfloat16"),
        "mamba2_2b7": (2, 2048, 5120, 1, True, False, "bfloat16"),
        "gla_1b3": (2, 2048, 2048, 4, False, True, "bfloat16"),
        "float32": (1, 1000, 8192, 1, True, True, "float32"),
        "kda": (2, 2048, 2048, 16, False, True, "bfloat16", "sigmoid"),
        "widest": (1, 1024, 16_384, 1, True, False, "bfloat16"),
        "short": (3, 9, 2048, 4, False, True, "bfloat16"),  # a block is longer than the sequence
        "longest": (1, 131_072, 2048, 8, False, True, "bfloat16"),
        # On GPU
        "float32_5120": (1, 1000, 5120, 1, True, True, "float32"),
        "gated_delta_net_1b3": (2, 2048, 3600, 9, False, True, "bfloat16"),
        "narrow_heads": (3, 1000, 1920, 30, False, True, "bfloat16"),
        "over_4_gib": (8, 131_072, 4096, 8, False, True, "bfloat16"),  # offsets have 64 bits
    }
    ON = {
        "v5e:1x1": "mamba2_1b3* mamba2_2b7 gla_1b3* float32* kda* widest short* longest*",
        "v5p:2x2x1": "mamba2_1b3",
        "v6e:1x1": "gla_1b3",
        "h100:1": "mamba2_1b3 mamba2_2b7 gla_1b3 kda longest float32_5120 gated_delta_net_1b3 narrow_heads over_4_gib",
    }

    def program(self, batch, length, channels, heads, skips, before, dtype, activation="silu"):
        options = {"epsilon": 1e-6, "norm_before_gate": before, "activation": activation}
        x = array(batch, length, channels, dtype=dtype)
        inputs = x, x, array(channels // heads), *([x, array(channels)] if skips else [])
        return lambda _, *inputs: ops.gated_rms_norm(*inputs, **options), None, inputs

    def names(self, *_):
        return ["gated_rms_norm_forward", "gated_rms_norm_gradient"]


class TestShortConvolution(Rewritten, OnGPU):
    NAME = "short_convolution"
    # name: B, T, D, heads, dtype and, unless there are 4, taps and, unless it is SiLU, activation
    CASES = {
        "delta_net_1b3": (2, 2048, 2048, 16, "bfloat16"),
        "gated_delta_net_1b3": (2, 2048, 1800, 9, "bfloat16"),
        "its_values": (2, 2048, 3600, None, "bfloat16"),
        "griffin_1b3": (2, 2048, 2560, None, "bfloat16", 4, "none"),
        "longest": (1, 131_072, 4096, None, "bfloat16"),
        "float32": (1, 1024, 8192, 32, "float32"),
        "narrow_heads": (1, 1024, 1024, 64, "bfloat16"),
        "small": (3, 1000, 300, 20, "float32"),
        "largest_block": (1, 1024, 8136, 9, "bfloat16"),
        # On GPU
        "widest_heads": (1, 1024, 1536, 6, "float32"),
        "most_taps": (1, 1024, 1024, 8, "float32", 9),
        "over_4_gib": (8, 131_072, 4096, 32, "bfloat16"),  # offsets have 64 bits
    }
    ON = {
        "v5e:1x1": "delta_net_1b3* gated_delta_net_1b3* its_values* griffin_1b3 longest float32* narrow_heads* small "
        "largest_block*",
        "v5p:2x2x1": "gated_delta_net_1b3 griffin_1b3*",
        "v6e:1x1": "delta_net_1b3 griffin_1b3*",
        "h100:1": "delta_net_1b3 gated_delta_net_1b3 its_values griffin_1b3 float32 small narrow_heads "
        "widest_heads most_taps over_4_gib",
    }

    def program(self, batch, length, channels, heads, dtype, width=4, activation="silu"):
        options = {"head_width": heads and channels // heads, "activation": activation}
        if activation == "none":  # on GPU, auto leaves these to XLA
            options["backend"] = "pallas"
        x, state = array(batch, length, channels, dtype=dtype), array(batch, width - 1, channels, dtype=dtype)
        operation = lambda ids, *inputs: ops.short_convolution(*inputs, segment_ids=ids, **options)  # noqa: E731
        return operation, ids_of(batch, length), (x, array(width, channels), array(channels), state)

    def names(self, *case):
        return [f"short_convolution_{kind}{'_heads' if case[3] else ''}" for kind in ("forward", "gradient")]


@pytest.mark.parametrize("gpu", ["a100", "l40"])
@pytest.mark.parametrize(
    "kernel, name",
    [(TestRGLRU, "griffin_1b3"), (TestGatedRMSNorm, "mamba2_2b7"), (TestShortConvolution, "widest_heads")],
)
def test_other_gpus(kernel, name, gpu, tmp_path):
    _, used = kernel().on_gpu(gpus.device(gpu), name, tmp_path)
    assert sorted(used) == kernel().names_on_gpu(name)


def test_copies_are_found():
    """The copies that the tests above look for do appear if an array is required in another layout."""
    device = targets.find("v5e:1x1").devices[0]
    x = jax.ShapeDtypeStruct((2, 1024, 1024), jnp.float32, sharding=SingleDeviceSharding(device))
    text = jax.jit(lambda x: jnp.swapaxes(x, 1, 2)).lower(x).compile().as_text()
    assert compiled_text.copies(text, 2 * 1024 * 1024) == ["2,1024,1024"]
