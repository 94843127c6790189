"""Reading compiled programs: texts in the forms of the three compilers, and a program that is compiled here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear.costs import hlo, programs
from jaxlinear.costs.programs import Collective

MESH = {"data": 2, "sequence": 4}

# A loop of three trips, known from what its counter is compared with, around a gather that goes on through a chain of
# fusions, as on TPU; and one of five trips, stated as such, around a gather with a start and an end, as on GPU. The last
# gather is on a SparseCore.
CHAIN = """channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}, frontend_attributes={chain_id="3"}, \
metadata={op_name="jit(step)/all_gather"}"""
TEXT = """HloModule jit_step, is_scheduled=true

%start (p.0: f32[1,256]) -> (f32[1,256], f32[4,256]) {
  %p.0 = f32[1,256]{1,0:T(1,128)} parameter(0)
  %all-gather.1 = f32[4,256]{1,0:T(1,128)} all-gather(%p.0), CHAIN
  ROOT %custom-call.1 = (f32[1,256]{1,0}, f32[4,256]{1,0}) custom-call(%all-gather.1), custom_call_target="Start"
}

%middle (p.1: f32[1,256], p.2: bf16[8,8]) -> (f32[1,256], f32[4,256], bf16[8,8]) {
  %p.1 = f32[1,256]{1,0:T(1,128)} parameter(0)
  %p.2 = bf16[8,8]{1,0} parameter(1)
  %all-gather.2 = f32[4,256]{1,0:T(1,128)} all-gather(%p.1), CHAIN
  %dot.1 = bf16[8,8]{1,0} dot(%p.2, %p.2), lhs_contracting_dims={1}, metadata={op_name="jit(step)/inside/dot_general"}
  ROOT %tuple.1 = (f32[1,256]{1,0}, f32[4,256]{1,0}, bf16[8,8]{1,0}) tuple(%p.1, %all-gather.2, %dot.1)
}

%end (p.3: f32[1,256]) -> f32[4,256] {
  %p.3 = f32[1,256]{1,0:T(1,128)} parameter(0)
  ROOT %all-gather.3 = f32[4,256]{1,0:T(1,128)} all-gather(%p.3), CHAIN
}

%body (b: (s32[], f32[1,256])) -> (s32[], f32[1,256]) {
  %b = (s32[], f32[1,256]{1,0}) parameter(0)
  %mine = f32[1,256]{1,0} get-tuple-element(%b), index=1
  %fusion.1 = (f32[1,256]{1,0}, f32[4,256]{1,0}) fusion(%mine), kind=kCustom, calls=%start
  %between = f32[8]{0} sine(%other), metadata={op_name="jit(step)/between/sin"}
  %fusion.2 = (f32[1,256]{1,0}, f32[4,256]{1,0}, bf16[8,8]{1,0}) fusion(%mine, %half), kind=kOutput, calls=%middle
  %fusion.3 = f32[4,256]{1,0} fusion(%mine), kind=kCustom, calls=%end
  ROOT %next = (s32[], f32[1,256]{1,0}) tuple(%counter, %mine)
}

%condition (c: (s32[], f32[1,256])) -> pred[] {
  %limit = s32[] constant(3)
  %c = (s32[], f32[1,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body.2 (d: (s32[], bf16[2,10])) -> (s32[], bf16[2,10]) {
  %d = (s32[], bf16[2,10]{1,0}) parameter(0)
  %own = bf16[2,10]{1,0} get-tuple-element(%d), index=1
  %all-gather-start = (bf16[2,10]{1,0}, bf16[4,10]{1,0}) all-gather-start(%own), replica_groups={{0,4},{1,5},{2,6},{3,7}}, \
dimensions={0}
  %work = f32[8]{0} cosine(%other.2), metadata={op_name="jit(step)/work/cos"}
  %all-gather-done = bf16[4,10]{1,0} all-gather-done(%all-gather-start)
  ROOT %next.2 = (s32[], bf16[2,10]{1,0}) tuple(%counter.2, %own)
}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%wrapped (w: f32[16]) -> f32[2] {
  %w = f32[16]{0} parameter(0)
  ROOT %reduce-scatter.1 = f32[2]{0} reduce-scatter(%w), replica_groups={}, dimensions={0}, to_apply=%add
}

%called_computation (s: f32[2]) -> f32[16] {
  %s = f32[2]{0} parameter(0)
  ROOT %all-gather.4 = f32[16]{0} all-gather(%s), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}, \
dimensions={0}
}

ENTRY %main (a: f32[16]) -> f32[] {
  %a = f32[16]{0} parameter(0)
  %loop = (s32[], f32[1,256]{1,0}) while(%init), condition=%condition, body=%body
  %loop.2 = (s32[], bf16[2,10]{1,0}) while(%init.2), condition=%unknown, body=%body.2, \
backend_config={"known_trip_count":{"n":"5"}}
  %two = (f32[16]{0}, f32[3]{0}) all-reduce(%a, %small), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, \
to_apply=%add
  %small = f32[3]{0} constant({1, 2, 3})
  %alone = f32[3]{0} all-reduce(%small), replica_groups=mesh['axis_0'=2,'axis_1'=4,'axis_2'=1] {'axis_2'}, to_apply=%add
  %permute = f32[16]{0} collective-permute(%a), source_target_pairs={{0,1},{1,2},{2,3},{4,5},{5,6},{6,7}}
  %async-start = ((f32[16]{0}), f32[2]{0}, u32[]) async-start(%a), calls=%wrapped
  %async-update = ((f32[16]{0}), f32[2]{0}, u32[]) async-update(%async-start)
  %later = f32[8]{0} tanh(%other.3), metadata={op_name="jit(step)/later/tanh"}
  %async-done = f32[2]{0} async-done(%async-update), calls=%wrapped
  %call-start = ((), (), s32[]) call-start(), async_execution_thread="sparsecore", to_apply=%called_computation
  %call-update = ((f32[2]{0}), f32[16]{0}) call-update(%call-start, %async-done)
  %last = f32[8]{0} cosine(%later), metadata={op_name="jit(step)/last/cos"}
  %call-done = f32[16]{0} call-done(%call-update)
  ROOT %result = f32[] constant(0)
}
""".replace("CHAIN", CHAIN)


def test_collectives():
    """Kind, axes, devices, bytes, runs, and what runs meanwhile, if anything; none is of a device with itself."""
    found = {(c.kind, c.axes): c for c in programs.collectives(TEXT, MESH)}
    gather, step = "all-gather", "jit(step)"
    during = (f"{step}/between/sin", f"{step}/inside/dot_general")
    assert list(found.values()) == [
        Collective("all-reduce", ("data",), 2, 16 * 4 + 3 * 4, 1, "", False, ()),
        Collective("collective-permute", ("sequence",), 4, 16 * 4, 1, "", False, ()),
        Collective("reduce-scatter", ("data", "sequence"), 8, 16 * 4, 1, "", True, (f"{step}/later/tanh",)),
        Collective(gather, ("data", "sequence"), 8, 2 * 4, 1, "", True, (f"{step}/last/cos",)),
        Collective(gather, ("sequence",), 4, 256 * 4, 3, f"{step}/all_gather", True, during),
        Collective(gather, ("data",), 2, 2 * 10 * 2, 5, "", True, (f"{step}/work/cos",)),
    ]


# As between slices of TPUs: what the hosts take and give back, after an all-reduce inside the slice.
ATTRIBUTES = """\
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="one",\
_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{TARGET}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}"""
BETWEEN_SLICES = """HloModule jit_step, is_scheduled=true

ENTRY %main (a: f32[16]) -> f32[16] {
  %a = f32[16]{0} parameter(0)
  %all-reduce = f32[16]{0} all-reduce(%a), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %after-all = token[] after-all()
  %send = (f32[16]{0}, u32[], token[]) send(%all-reduce, %after-all), channel_id=1, is_host_transfer=true, ATTRIBUTES
  %recv = (f32[16]{0}, u32[], token[]) recv(%after-all), channel_id=2, is_host_transfer=true, ATTRIBUTES
  %send-done = token[] send-done(%send), channel_id=1, is_host_transfer=true
  %work = f32[8]{0} cosine(%other), metadata={op_name="jit(step)/work/cos"}
  %recv-done = (f32[16]{0}, token[]) recv-done(%recv), channel_id=2, is_host_transfer=true
  %later = f32[8]{0} tanh(%other), metadata={op_name="jit(step)/later/tanh"}
  %plain = (f32[16]{0}, u32[], token[]) send(%later, %after-all), channel_id=3
  ROOT %result = f32[16]{0} get-tuple-element(%recv-done), index=0
}
""".replace("ATTRIBUTES", ATTRIBUTES)


@pytest.mark.parametrize("target, slices", [("{1,2}", 2), ("{1,2,3}", 3), ("{1:4}", 4), ("{1,3:4}", 3)])
def test_collectives_between_slices(target, slices):
    found = programs.collectives(BETWEEN_SLICES.replace("{TARGET}", target), {"data": slices, "fsdp": 4})
    between = Collective("all-reduce", ("data",), slices, 16 * 4, 1, "", True, ("jit(step)/work/cos",), True)
    assert found == (Collective("all-reduce", ("fsdp",), 4, 16 * 4, 1, "", False, ()), between)
    assert between.received == 2 * (slices - 1) / slices * 16 * 4


@pytest.mark.parametrize(
    "attributes, groups",
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]<=[2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
    ],
)
def test_groups(attributes, groups):
    assert programs._groups(f"channel_id=1, {attributes}, dimensions={{0}}", 4) == groups


# As libtpu writes a product with one side sent round: its counter goes up to 8 by 2, and each trip sends twice.
BY_TWO = """HloModule jit_step, is_scheduled=true

%body (b: (u32[], f32[4])) -> (u32[], f32[4]) {
  %two = u32[] constant(2)
  %b = (u32[], f32[4]{0}) parameter(0)
  %i = u32[] get-tuple-element(%b), index=0
  %mine = f32[4]{0} get-tuple-element(%b), index=1
  %once = f32[4]{0} collective-permute(%mine), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %twice = f32[4]{0} collective-permute(%once), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %next = u32[] add(%i, %two)
  ROOT %tuple = (u32[], f32[4]{0}) tuple(%next, %twice)
}

%condition (c: (u32[], f32[4])) -> pred[] {
  %limit = u32[] constant(8)
  %c = (u32[], f32[4]{0}) parameter(0)
  %j = u32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %loop = (u32[], f32[4]{0}) while(%init), condition=%condition, body=%body
  ROOT %result = f32[4]{0} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize("limit, trips", [(8, 4), (7, 4), (1, 1)])
def test_a_counter_that_goes_by_two(limit, trips):
    text = BY_TWO.replace("constant(8)", f"constant({limit})")
    assert [c.runs for c in programs.collectives(text, {"fsdp": 4})] == [trips, trips]


def test_cycles_by_trips():
    text = BY_TWO.replace("add(%i, %two)", 'add(%i, %two), backend_config={"estimated_cycles":"10","more":[]}')
    text = text.replace("while(%init)", 'while(%init), backend_config={"estimated_cycles":"7"}')
    assert programs.cycles(text) == 4 * 10 + 7
    assert programs.cycles(BY_TWO) is None


SCATTERED = """HloModule jit_step, is_scheduled=true

%all-reduce-scatter (input: f32[16,4]) -> f32[16,1] {
  %input = f32[16,4]{1,0} parameter(0)
  %all-reduce.1 = f32[16,4]{1,0} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = u32[] constant(0)
  %own = u32[] partition-id()
  ROOT %part = f32[16,1]{1,0} dynamic-slice(%all-reduce.1, %zero, %own), dynamic_slice_sizes={16,1}
}

%whole (input.2: f32[16,4]) -> (f32[16,4], f32[16,1]) {
  %input.2 = f32[16,4]{1,0} parameter(0)
  %all-reduce.2 = f32[16,4]{1,0} all-reduce(%input.2), replica_groups={{0,1,2,3}}, to_apply=%add
  %part.2 = f32[16,1]{1,0} dynamic-slice(%all-reduce.2, %zero.2, %own.2), dynamic_slice_sizes={16,1}
  ROOT %both = (f32[16,4]{1,0}, f32[16,1]{1,0}) tuple(%all-reduce.2, %part.2)
}

ENTRY %main (a: f32[16,4]) -> f32[] {
  %a = f32[16,4]{1,0} parameter(0)
  %fusion.1 = f32[16,1]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter
  %fusion.2 = (f32[16,4]{1,0}, f32[16,1]{1,0}) fusion(%a), kind=kCustom, calls=%whole
  ROOT %result = f32[] constant(0)
}
"""


def test_a_sum_of_which_a_device_keeps_its_part():
    """libtpu writes it as a combined all-reduce and slice: a device receives half of an all-reduce's bytes."""
    found = [(one.kind, one.bytes, one.received) for one in programs.collectives(SCATTERED, {"fsdp": 4})]
    assert found == [("reduce-scatter", 256, 192.0), ("all-reduce", 256, 384.0)]


BESIDE = """HloModule jit_step, is_scheduled=true

%update (stack: f32[96,1024], row: f32[1,8], i: s32[]) -> f32[96,1024] {
  %stack = f32[96,1024]{1,0} parameter(0)
  %row = f32[1,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %new = f32[96,1024]{1,0} dynamic-update-slice(%stack, %row, %i, %i), metadata={op_name="jit(step)/update"}
  ROOT %same = f32[96,1024]{1,0} bitcast(%new)
}

ENTRY %main (a: bf16[4096,64], b: f32[96,1024], c: f32[1,8], d: s32[]) -> f32[96,1024] {
  %a = bf16[4096,64]{1,0} parameter(0)
  %b = f32[96,1024]{1,0} parameter(1)
  %c = f32[1,8]{1,0} parameter(2)
  %d = s32[] parameter(3)
  %start = ((bf16[4096,64]{1,0}), bf16[1024,64]{1,0}) reduce-scatter-start(%a), replica_groups={{0,1,2,3}}, \
dimensions={0}, to_apply=%add
  %small = f32[1,8]{1,0} cosine(%c), metadata={op_name="jit(step)/small/cos"}
  %fusion = f32[96,1024]{1,0} fusion(%b, %c, %d), kind=kLoop, calls=%update
  %more = bf16[MORE]{0} sine(%other), metadata={op_name="jit(step)/more/sin"}
  ROOT %done = bf16[1024,64]{1,0} reduce-scatter-done(%start)
}
"""


@pytest.mark.parametrize("more, during", [(16, ()), (32768, ("small/cos", "update", "more/sin"))])
def test_a_trifle_beside_a_collective_hides_nothing(more, during):
    """For example, on GPU at the end of a layer, the sum of its gradients runs alongside updates of several small arrays.
    Alongside an array of a sixth of the bytes received, it does count as hidden."""
    (one,) = programs.collectives(BESIDE.replace("MORE", str(more)), {"fsdp": 4})
    assert (one.kind, one.asynchronous, one.received) == ("reduce-scatter", True, 4096 * 64 * 2 * 3 / 4)
    assert one.during == tuple(f"jit(step)/{name}" for name in during)


SLICED = """HloModule jit_step, is_scheduled=true

%product (rows: bf16[32,16], kernel: bf16[16,16], stack: bf16[8,32,16], i: s32[]) -> (bf16[8,32,16], s8[4096]) {
  %stack = bf16[8,32,16]{2,1,0} parameter(2)
  %rows = bf16[32,16]{1,0} parameter(0)
  %kernel = bf16[16,16]{1,0} parameter(1)
  %call = (bf16[32,16]{1,0}, s8[4096]{0}) custom-call(%rows, %kernel), custom_call_target="__cublas$lt$matmul"
  %result = bf16[32,16]{1,0} get-tuple-element(%call), index=0
  %i = s32[] parameter(3)
  %placed = bf16[8,32,16]{2,1,0} dynamic-update-slice(%stack, %result, %i)
  %scratch = s8[4096]{0} get-tuple-element(%call), index=1
  ROOT %both = (bf16[8,32,16]{2,1,0}, s8[4096]{0}) tuple(%placed, %scratch)
}

%rounded (kernels: f32[8,16,16], j: s32[]) -> bf16[16,16] {
  %kernels = f32[8,16,16]{2,1,0} parameter(0)
  %j = s32[] parameter(1)
  %same = f32[8,256]{1,0} bitcast(%kernels)
  %one = f32[1,256]{1,0} dynamic-slice(%same, %j, %j), dynamic_slice_sizes={1,256}
  ROOT %narrow = bf16[16,16]{1,0} convert(%one)
}

%summed (kernels.2: f32[8,16,16], k: s32[]) -> f32[1,16,16] {
  %kernels.2 = f32[8,16,16]{2,1,0} parameter(0)
  %k = s32[] parameter(1)
  %one.2 = f32[1,16,16]{2,1,0} dynamic-slice(%kernels.2, %k, %k, %k), dynamic_slice_sizes={1,16,16}
  %all = f32[] reduce(%kernels.2), to_apply=%add
  ROOT %sum = f32[1,16,16]{2,1,0} add(%one.2, %all)
}

ENTRY %main (a: bf16[32,16], b: f32[8,16,16], c: bf16[8,32,16], d: s32[]) -> s32[] {
  %a = bf16[32,16]{1,0} parameter(0)
  %b = f32[8,16,16]{2,1,0} parameter(1)
  %c = bf16[8,32,16]{2,1,0} parameter(2)
  %d = s32[] parameter(3)
  %fusion.1 = bf16[16,16]{1,0} fusion(%b, %d), kind=kLoop, calls=%rounded
  %fusion.2 = f32[1,16,16]{2,1,0} fusion(%b, %d), kind=kLoop, calls=%summed
  %fusion.3 = (bf16[8,32,16]{2,1,0}, s8[4096]{0}) fusion(%a, %fusion.1, %c, %d), kind=kCustom, calls=%product, \
backend_config={"fusion_backend_config":{"custom_fusion_config":{"name":"dynamic_slice_fusion"}}}
  ROOT %end = s32[] copy(%d)
}
"""


def test_of_arrays_that_are_cut_the_slices_are_moved():
    """For example, a layer's kernel, cut from those of all layers, and the place of a product's result (XLA for GPUs in JAX
    0.11). If anything else is read from an array too, all of it is moved."""
    module = hlo.parse(SLICED)
    found = [programs.moved(module, line) for line in module.computations["main"] if line.opcode == "fusion"]
    kernel, rows, index = 16 * 16, 32 * 16, 4
    assert found == [(4 + 2) * kernel + index, (8 + 1) * 4 * kernel + index, 2 * kernel + 2 * 2 * rows]


def test_sizes():
    assert hlo.size("f32[8,1,128]{2,1,0:T(1,128)S(1)}") == 8 * 128 * 4
    assert hlo.size("(bf16[3]{0}, pred[5]{0}, s32[], /*index=3*/u4[6]{0:T(8)(4,1)})") == 6 + 5 + 4 + 3
    assert [hlo.size(text) for text in ("c64[2]{0}", "f8e4m3fn[10]{0}")] == [16, 10]


def test_a_program_that_is_compiled_here():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "sequence"))
    place = jax.NamedSharding(mesh, jax.P("data", "sequence"))
    x = jax.ShapeDtypeStruct((4, 64), jnp.float32, sharding=place)

    def step(x):
        return jax.lax.with_sharding_constraint(x + jnp.sum(x, axis=1, keepdims=True), place)

    program = programs.read(jax.jit(step, donate_argnums=0).lower(x).compile(), mesh)
    assert [(c.kind, c.axes, c.devices, c.bytes, c.runs) for c in program.collectives] == [
        ("all-reduce", ("sequence",), 4, 2 * 4, 1)
    ]
    assert program.memory.arguments == program.memory.outputs == program.memory.aliased == 2 * 16 * 4
    assert program.memory.peak is None
    assert program.memory.total == program.memory.arguments + program.memory.temporaries + program.memory.code
    assert program.flops is not None
    assert program.flops >= 2 * 16


@pytest.mark.parametrize("given, kept", [(2.0, 2.0), (-54.97, None), (None, None)])
def test_an_estimate_below_zero_is_none(monkeypatch, given, kept):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    compiled = jax.jit(jnp.sum).lower(jax.ShapeDtypeStruct((4,), jnp.float32)).compile()
    monkeypatch.setattr(type(compiled), "cost_analysis", lambda _: {"flops": 3.0, "optimal_seconds": given})
    assert programs.read(compiled, mesh).seconds == kept
