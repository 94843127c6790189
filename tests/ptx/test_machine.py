"""The PTX machine on small programs: what they compute, and the faults that incorrect ones raise."""

import numpy as np
import pytest

from tests.ptx import Fault, machine, memory, program

_HEAD = """
.visible .entry kernel(
	.param .u64 .ptr .align 16 kernel_param_0,
	.param .u64 .ptr .align 16 kernel_param_1
)
.reqntid 64, 1, 1
{
	.reg .b32 	%r<99>;
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b64 	%rd2, [kernel_param_1];
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, %ctaid.x;
	mad.lo.s32 	%r3, %r2, 64, %r1;
	mul.wide.u32 	%rd3, %r3, 4;
	add.s64 	%rd4, %rd1, %rd3;  // of the thread's number
	add.s64 	%rd5, %rd2, %rd3;
	mov.b64 	%rd6, global_smem;
	mul.wide.u32 	%rd7, %r1, 4;
	add.s64 	%rd8, %rd6, %rd7;
	xor.b64 	%rd9, %rd7, 128;  // of the thread of the other warp
	add.s64 	%rd10, %rd6, %rd9;
	ld.global.b32 	%r4, [%rd4];
"""


def run(body, blocks=2):
    (read,) = program.read(_HEAD + body + "\tst.global.b32 \t[%rd5], %r9;\n\tret;\n\n}\n")
    given = np.arange(64 * blocks, dtype=np.float32)
    (found,), counts = machine.run(read, (blocks,), [given], [np.zeros_like(given)])
    return given, found, counts


def test_each_goes_its_way():
    """Odd threads loop as often as their number modulo 4; the warps that execute each instruction are counted."""
    given, found, counts = run("""
	and.b32 	%r5, %r1, 1;
	setp.eq.b32 	%p1, %r5, 0;
	mov.b32 	%r9, 0f40000000;
	@%p1 bra 	$L__BB0_2;
	and.b32 	%r6, %r1, 3;
$L__BB0_1:
	fma.rn.f32 	%r9, %r4, 0f3F800000, %r9;
	add.s32 	%r6, %r6, -1;
	setp.ne.b32 	%p2, %r6, 0;
	@%p2 bra 	$L__BB0_1;
$L__BB0_2:
""")
    steps = np.arange(128) % 4 * (np.arange(128) % 2)
    assert np.array_equal(found, 2 + steps * given)
    assert counts["fma.rn.f32"] == 4 * 3 and counts["mov.b32"] == 4


EXCHANGE = """
	st.shared.b32 	[%rd8], %r4;
	bar.sync 	0;
	ld.shared.b32 	%r9, [%rd10];
"""


def test_warps_exchange_over_a_barrier():
    given, found, _ = run(EXCHANGE)
    assert np.array_equal(found, given.reshape(-1, 2, 32)[:, ::-1].reshape(-1))


def test_copies_beside_work():
    given, found, _ = run("""
	cp.async.ca.shared.global [ %rd8 + 0 ], [ %rd4 + 0 ], 0x4;
	cp.async.commit_group;
	cp.async.wait_group 	0;
	bar.sync 	0;
	ld.shared.b32 	%r9, [%rd10];
""")
    assert np.array_equal(found, given.reshape(-1, 2, 32)[:, ::-1].reshape(-1))


@pytest.mark.parametrize("last, zeros", [("%p1", slice(32, 64)), ("%p2", slice(0, 32)), ("%r5", slice(0, 32))])
def test_copies_that_a_predicate_or_a_size_leaves_out(last, zeros):
    """They write zeros. %r5 is 0 in the first warp and the full size in the second."""
    given, found, _ = run(f"""
	setp.ge.u32 	%p1, %r1, 32;
	setp.lt.and.u32 	%p2, %r1, 64, !%p1;
	selp.b32 	%r5, 4, 0, %p1;
	cp.async.ca.shared.global [%rd8], [%rd4], 0x4, {last};
	cp.async.commit_group;
	cp.async.wait_group 	0;
	bar.sync 	0;
	ld.shared.b32 	%r9, [%rd8];
""")
    expected = given.reshape(-1, 64).copy()
    expected[:, zeros] = 0
    assert np.array_equal(found, expected.reshape(-1))


FAULTS = {
    "no_barrier": (EXCHANGE.replace("bar.sync", "membar"), "another warp writes before any barrier"),
    "written_too_soon": (EXCHANGE + "\tst.shared.b32 \t[%rd8], %r1;\n", "another warp reads before any barrier"),
    "nothing_written": ("\tld.shared.b32 \t%r9, [%rd8];\n", "nothing wrote"),
    "copy_not_waited_for": (
        "\tcp.async.ca.shared.global [%rd8], [%rd4], 0x4;\n\tcp.async.commit_group;\n\tld.shared.b32 \t%r9, [%rd8];\n",
        "a copy may still write",
    ),
    "copy_to_what_is_read": (
        EXCHANGE.replace("ld.shared", "\tcp.async.ca.shared.global [%rd8], [%rd4], 0x4;\n\tld.shared"),
        "a copy may still write",
    ),
    "copy_to_what_is_written": (
        EXCHANGE.replace("bar.sync \t0", "cp.async.ca.shared.global [%rd10], [%rd4], 0x4"),
        "copies to where another warp writes",
    ),
    "written_over_a_copy": (
        "\tcp.async.ca.shared.global [%rd8], [%rd4], 0x4;\n\tst.shared.b32 \t[%rd8], %r4;\n\tmov.b32 \t%r9, %r4;\n",
        "where a copy may still write",
    ),
    "copy_never_ends": (
        "\tcp.async.ca.shared.global [%rd8], [%rd4], 0x4;\n\tcp.async.commit_group;\n\tmov.b32 \t%r9, %r4;\n",
        "ends before its copies",
    ),
    "beyond_the_array": ("\tld.global.b32 \t%r9, [%rd4+4];\n", "beyond an array"),
    "of_another_warp": (
        "\tmov.b32 \t%r9, %r1;\n\tst.global.b32 \t[%rd5], %r1;\n\txor.b64 \t%rd11, %rd5, 128;\n"
        "\tst.global.b32 \t[%rd11], %r9;\n",
        "another warp wrote",
    ),
    "of_no_array": ("\tld.global.b32 \t%r9, [%rd3];\n", "of no array"),
    "misaligned": ("\tld.global.b32 \t%r9, [%rd4+2];\n", "not a multiple of 4"),
    "writes_an_input": ("\tst.global.b32 \t[%rd4], %r4;\n\tmov.b32 \t%r9, %r4;\n", "what the kernel is given"),
    "reads_an_output": ("\tld.global.b32 \t%r9, [%rd5];\n", "reads what the kernel writes"),
    "not_all_written": ("\tmov.b32 \t%r9, %r4;\n\tsetp.eq.b32 \t%p1, %r1, 0;\n\t@%p1 ret;\n", "are not written"),
    "at_once": ("\tmov.b32 \t%r9, %r4;\n\tst.global.b32 \t[%rd2], %r2;\n", "two threads write different numbers"),
    "a_part_at_a_barrier": (
        "\tmov.b32 \t%r9, %r4;\n\tsetp.lt.u32 \t%p1, %r1, 32;\n\t@%p1 bar.sync \t0;\n",
        "not every warp of a block",
    ),
    "unset": ("\tadd.s32 \t%r9, %r77, 1;\n", "%r77 is read before"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name):
    body, message = FAULTS[name]
    with pytest.raises(Fault, match=message):
        run(body)


def test_blocks_that_do_not_run_together_and_write_the_same():
    """The 65th is in the second group."""
    with pytest.raises(Fault, match="another block wrote: block 64"):
        run("\tmov.b32 \t%r9, %r4;\n\tshr.u32 \t%r5, %r3, 12;\n\tst.global.b32 \t[%rd2], %r5;\n", blocks=65)


def test_an_instruction_that_is_not_known():
    with pytest.raises(NotImplementedError, match=r"vote\.sync"):
        run("\tvote.sync.any.pred \t%r9, %r4, 1;\n")


def test_what_a_product_in_flight_reads_is_not_written():
    shared, values = memory.Shared(2, strict=True), np.ones((2, 8), np.uint16)
    addresses, block = np.full(2, memory.SHARED_BASE), np.arange(2)

    def threads(epoch, of=slice(None)):
        return memory.Threads(block[of], np.zeros_like(block[of]), np.full_like(block[of], epoch), block[of])

    shared.store(addresses, values, threads(0))
    with pytest.raises(Fault, match="no proxy fence follows"):
        shared.begin_product(addresses, 16, threads(0))
    shared.fence(threads(0))
    halves = shared.begin_product(addresses, 16, threads(1))
    with pytest.raises(Fault, match="a product may still read"):
        shared.store(addresses, values, threads(2))
    shared.end_products([(halves[:1], threads(2, slice(1)))], [halves[1:]])  # of the first block only
    shared.store(addresses[:1], values[:1], threads(3, slice(1)))
    with pytest.raises(Fault, match="a product may still read: block 1"):
        shared.store(addresses, values, threads(3))


@pytest.mark.parametrize("mode, by, ends, source", [("up", 3, 0, -3), ("down", 5, 31, 5), ("idx", 7, 31, None)])
def test_lanes_give_each_other_numbers(mode, by, ends, source):
    """If the other lane does not exist, a lane gets its own."""
    given, found, _ = run(f"\tshfl.sync.{mode}.b32 \t%r9, %r4, {by}, {ends}, -1;\n")
    lane = np.arange(128) % 32
    of = np.full(128, by) if source is None else lane + source
    assert np.array_equal(found, given[np.arange(128) - lane + np.where((of < 0) | (of > 31), lane, of)])
    with pytest.raises(NotImplementedError, match="of a part of a warp"):
        run(f"\tshfl.sync.{mode}.b32 \t%r9, %r4, {by}, 7, -1;\n")


def test_what_is_not_strict_takes():
    """A register that was never written, as NaN; a product that reads what was written without a fence; and writes during
    the product."""
    (read,) = program.read(_HEAD + "\tadd.f32 \t%r9, %r4, %r77;\n\tst.global.b32 \t[%rd5], %r9;\n\tret;\n\n}\n")
    arrays = [np.arange(64, dtype=np.float32), np.zeros(64, np.float32)]
    plain = memory.Plain(arrays)
    with pytest.raises(Fault, match="%r77 is read before"):
        machine.run_in(plain, read, (1,), plain.addresses)
    machine.run_in(plain, read, (1,), plain.addresses, strict=False)
    plain.give(arrays)
    assert np.isnan(arrays[1]).all()
    shared, one = memory.Shared(1, strict=False), np.zeros(1, np.int64)
    threads = memory.Threads(one, one, one, one)
    shared.store(np.array([memory.SHARED_BASE]), np.ones((1, 8), np.uint16), threads)
    halves = shared.begin_product(np.array([memory.SHARED_BASE]), 16, threads)
    shared.store(np.array([memory.SHARED_BASE]), np.zeros((1, 8), np.uint16), threads)
    assert not shared.values(halves).any()


def test_arrays_that_are_read_and_written():
    """A kernel that adds to an array in place, by a factor given as a number."""
    (read,) = program.read(
        _HEAD
        + "\tld.param.b32 \t%r5, [kernel_param_1];\n"
        + """
	fma.rn.f32 	%r9, %r4, %r5, %r4;
	st.global.b32 	[%rd4], %r9;
	ret;
}
"""
    )
    given, other = np.arange(64, dtype=np.float32), np.ones(3, np.float32)
    plain = memory.Plain([other, given])
    counts = machine.run_in(plain, read, (1,), [plain.addresses[1], 0.5])
    plain.give([other, given])
    assert np.array_equal(given, 1.5 * np.arange(64)) and np.array_equal(other, np.ones(3))
    assert (plain.read.sum(), plain.written.sum()) == (256, 256) and counts["fma.rn.f32"] == 2
    with pytest.raises(Fault, match="of no array"):
        machine.run_in(plain, read, (1,), [plain.addresses[1] + 4, 0.5])
    with pytest.raises(Fault, match="not a multiple of 4"):
        machine.run_in(plain, read, (1,), [plain.addresses[1] - 2, 0.5])


def test_blocks_wait_for_their_own_groups():
    groups = machine._Groups(2)
    for item in "ab":
        groups.add(item, np.arange(2))
        groups.commit(np.arange(2))
    groups.add("c", np.array([1]))
    assert groups.wait(np.array([0]), 1) == [("a", [0])]
    assert groups.wait(np.arange(2), 0) == [("b", [0, 1]), ("a", [1])]
    assert groups.all() == [("c", [1])] and groups.unended()
