"""Predicted times against hand-computed cases: no limit of a GPU may be forgotten."""

import math
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("triton")

from mocapsnet.benchmarks.shared.addresses import Kernel, sample
from mocapsnet.benchmarks.shared.compiled import parse_nvidia
from mocapsnet.benchmarks.shared.gpus import GPUS
from mocapsnet.benchmarks.shared.prediction import L2, Work, limits_of, neighbours
from mocapsnet.benchmarks.shared.schedule import Warp, executions, weights
from mocapsnet.benchmarks.shared.traffic import Traffic, mean, side_by_side, traffic

A = 1 << 40  # where the first argument lies
CACHE = 64 << 10

PTX = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u32 kernel_param_1
)
.reqntid {threads}
{{
	.reg .pred 	%p<9>;
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b32 	%r9, [kernel_param_1];
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, %ctaid.x;
	mov.b32 	%r0, global_smem;
{body}
	ret;
}}
"""


def run(body, arguments=(A, 7), program=0, cache=CACHE, threads=32):
    """Traffic of one program, and how often each instruction was executed."""
    kernel = Kernel(PTX.format(body=body, threads=threads))
    counts = [0] * len(kernel.instructions)
    return traffic(kernel.run(arguments, (5,), program, counts), cache), kernel, counts


SHARED = {  # of one warp: what its threads do, and the wavefronts that this takes
    "words side by side": ("shl.b32 %r3, %r1, 2;", "ld.shared.b32 %r4, [%r3]", 1),
    "two words of a bank": ("shl.b32 %r3, %r1, 3;", "ld.shared.b32 %r4, [%r3]", 2),
    "eight words of a bank": ("shl.b32 %r3, %r1, 5;", "st.shared.b32 [%r3 + 4], %r4", 8),
    "the same word": ("mov.b32 %r3, 64;", "ld.shared.b32 %r4, [%r3]", 1),
    "two halves of a word": ("shl.b32 %r3, %r1, 1;", "ld.shared.b16 %rs4, [%r3]", 1),
    "64 bits side by side": ("shl.b32 %r3, %r1, 3;", "ld.shared.v2.b32 {%r4, %r5}, [%r3]", 2),
    "128 bits side by side": (
        "shl.b32 %r3, %r1, 4;",
        "st.shared::cta.v4.b32 [%r3 + 0], {%r4, %r5, %r6, %r7}",
        4,
    ),
    "128 bits, four ways": (
        "shl.b32 %r3, %r1, 6;",
        "ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r3]",
        16,
    ),
    "rows of four matrices": (
        "shl.b32 %r3, %r1, 4;",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r4, %r5, %r6, %r7}, [%r3]",
        4,
    ),
    "rows below each other": (
        "shl.b32 %r3, %r1, 7;",
        "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r4, %r5}, [%r3]",
        16,
    ),
    "swizzled rows": (
        "and.b32 %r5, %r1, 7; shl.b32 %r5, %r5, 4; shl.b32 %r3, %r1, 7; xor.b32 %r3, %r3, %r5;",
        "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r3], {%r4}",
        1,
    ),
    "half of the threads": (
        "shl.b32 %r3, %r1, 7; setp.lt.s32 %p1, %r1, 16;",
        "@%p1 ld.shared.b32 %r4, [%r3]",
        16,
    ),
}


@pytest.mark.parametrize("address, access, wavefronts", SHARED.values(), ids=list(SHARED))
def test_wavefronts_of_shared_memory(address, access, wavefronts):
    found, *_ = run(f"{address}\nadd.s32 %r3, %r0, %r3;\n{access};")
    assert found.shared == wavefronts
    assert found.l1 == found.read == found.written == 0


def test_each_warp_has_wavefronts_of_its_own():
    body = "shl.b32 %r3, %r1, 3; ld.shared.b32 %r4, [%r3];"
    assert run(body, threads=128)[0].shared == 4 * 2


GLOBAL = {  # address of a thread, then sectors of 32 bytes and wavefronts of a load of 4 bytes
    "side by side": ("mul.wide.u32 %rd2, %r1, 4;", 4, 1),
    "a sector each": ("mul.wide.u32 %rd2, %r1, 32;", 32, 8),
    "a line each": ("mul.wide.s32 %rd2, %r1, 128;", 32, 32),
    "all the same": ("mul.wide.s32 %rd2, %r2, 4;", 1, 1),
    "backwards": ("neg.s32 %r3, %r1; mul.wide.s32 %rd2, %r3, 4;", 4 + 1, 1),
    "below a parameter": (
        "setp.lt.s32 %p1, %r1, %r9; selp.b32 %r3, %r1, 0, %p1; mad.wide.u32 %rd2, %r3, 128, 0;",
        7,
        7,
    ),
}


@pytest.mark.parametrize("address, sectors, wavefronts", GLOBAL.values(), ids=list(GLOBAL))
def test_sectors_and_wavefronts_of_global_memory(address, sectors, wavefronts):
    found, *_ = run(f"{address} add.s64 %rd3, %rd1, %rd2; ld.global.b32 %r4, [%rd3];")
    assert (found.asked, found.read, found.l1) == (sectors, sectors, wavefronts)
    found, *_ = run(f"{address} add.s64 %rd3, %rd1, %rd2; st.global.b32 [ %rd3 + 0 ], {{ %r4 }};")
    assert (found.written, found.read, found.l1) == (sectors, 0, wavefronts)


LOOP = """
	mov.b32 %r3, 0;
	mul.wide.u32 %rd2, %r1, 4;
	add.s64 %rd3, %rd1, %rd2;
$L__BB0_1:                              // =>This Inner Loop Header: Depth=1
	ld.global.b32 %r4, [%rd3];
	add.s64 %rd3, %rd3, {step};
	add.s32 %r3, %r3, 1;
	setp.ne.b32 %p1, %r3, %r9;
	@%p1 bra $L__BB0_1;
"""


@pytest.mark.parametrize(
    "step, cache, read",
    [
        (0, CACHE, 4),  # L1 holds it
        (128, CACHE, 7 * 4),  # other bytes in each of seven turns
        (0, 32, 7 * 4),  # an L1 of one sector holds nothing until it is asked for again
    ],
)
def test_l1_answers_what_it_holds(step, cache, read):
    found, kernel, counts = run(LOOP.format(step=step), cache=cache)
    assert (found.asked, found.read) == (7 * 4, read)
    assert [counts[start] for start, _ in kernel.loops] == [7]


@pytest.mark.parametrize(
    "step, cache, read",
    [
        (0, CACHE, 4 / 2),  # what one of two programs has read serves the other
        (128, CACHE, 7 * 4 / 2),  # in each turn again: they go in step
        (128, 4 * 32, 7 * 4 / 2),  # so L1 need not hold more than a turn
        (128, 3 * 32, 7 * 4),
    ],
)
def test_programs_side_by_side_share_l1(step, cache, read):
    kernel = Kernel(PTX.format(body=LOOP.format(step=step), threads=32))
    counts = [0] * len(kernel.instructions)
    assert side_by_side([kernel.run((A, 7), (5,), n, counts) for n in (0, 3)], cache) == read
    other = kernel.run((A + 4096, 7), (5,), 3, counts)  # the same of other bytes
    alone = 4 if step == 0 else 7 * 4
    assert side_by_side([kernel.run((A, 7), (5,), 0, counts), other], CACHE) == alone


def test_what_is_written_or_in_shared_memory_is_not_read_from_l2():
    body = """
	mul.wide.u32 %rd2, %r1, 4;
	add.s64 %rd3, %rd1, %rd2;
	st.global.b32 [ %rd3 + 0 ], { %r4 };
	ld.shared.b32 %r4, [%r0];
"""
    kernel = Kernel(PTX.format(body=body, threads=32))
    assert side_by_side([kernel.run((A, 7), (5,), 0, [0] * 99)], CACHE) == 0


def test_programs_are_handed_out_in_turn():
    """Ten to three multiprocessors, of two at a time: 0 to 5, then 6 to 9."""
    found = [neighbours(n, 10, 2, 3) for n in (0, 4, 5, 6, 8, 9)]
    assert found == [[0, 3], [1, 4], [2, 5], [6, 9], [8], [6, 9]]


def test_an_asynchronous_copy_asks_l2_and_writes_shared_memory():
    """Eight threads read, and all write: the others zeros."""
    body = """
	shl.b32 %r3, %r1, 6;
	mul.wide.u32 %rd2, %r1, 16;
	add.s64 %rd3, %rd1, %rd2;
	setp.lt.u32 %p1, %r1, 8;
	selp.b32 %r4, 16, 0, %p1;
	cp.async.cg.shared.global [ %r3 + 0 ], [ %rd3 + 0 ], 0x10, %r4;
"""
    found, *_ = run(body)
    assert (found.asked, found.shared, found.l1) == (8 * 16 / 32, 4 * 4, 0)


def test_pointers_from_memory_are_tensors_of_their_own():
    body = """
	mul.wide.u32 %rd2, %r2, 8;
	add.s64 %rd3, %rd1, %rd2;
	ld.global.b64 %rd4, [%rd3];
	mul.wide.u32 %rd5, %r1, 4;
	add.s64 %rd6, %rd4, %rd5;
	ld.global.b32 %r4, [%rd6 + 256];
"""
    first, second = (run(body, program=n)[0] for n in (0, 1))
    assert first.read == second.read == 1 + 4
    table, tensor = sorted(first.touched)
    assert table == 1 and set(first.touched.values()) == {(1.0, 1), (4.0, 4)}
    assert sorted(second.touched)[1] != tensor


@pytest.mark.parametrize(
    "body, message",
    [
        ("ld.global.b32 %r3, [%rd1]; setp.ne.b32 %p1, %r3, 0; @%p1 bra $L;\n$L:", "on data"),
        ("setp.ne.b32 %p1, %r1, 0; @%p1 bra $L;\n$L:", "threads part"),
        ("ld.shared.b32 %r3, [%r0]; ld.shared.b32 %r4, [%r3];", "an address that depends on data"),
    ],
)
def test_what_cannot_be_followed_is_said(body, message):
    with pytest.raises(ValueError, match=message):
        run(body)


@pytest.mark.parametrize("branch", ["@%p1 bra $L", "@!%p1 bra $R"])
def test_exp_of_float64_takes_its_usual_path(branch):
    """Whether what large numbers need is skipped or jumped to."""
    body = f"""
	ld.global.b32 %r3, [%rd1];
	setp.lt.f32 %p1, %r3, 0f4086232B;
	{branch};
	bra.uni $L;
$R:
	st.global.b32 [%rd1 + 8], %r3;
$L:
	st.global.b32 [%rd1 + 16], %r3;
"""
    _, kernel, counts = run(body)
    stored = [
        (x.operands[0], n)
        for x, n in zip(kernel.instructions, counts, strict=True)
        if x.name.startswith("st")
    ]
    assert stored == [("[%rd1 + 8]", 0), ("[%rd1 + 16]", 1)]


def test_few_programs_stand_for_all():
    assert sample(1) == [0] and sample(2) == [0, 1] and sample(600) == [100, 300, 500]
    one = Traffic(read=2, touched={1: (4.0, 4)}, loaded=frozenset([1]))
    other = Traffic(read=4, touched={2: (2.0, 8)})
    touched = {1: (2.0, 4), 2: (1.0, 8)}
    assert mean([one, other]) == Traffic(read=3, touched=touched, loaded=frozenset([1]))


def test_regions_that_are_only_written_are_not_loaded():
    body = "mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2; {} ;"
    load, store = "ld.global.b32 %r4, [%rd3]", "st.global.b32 [ %rd3 + 0 ], { %r4 }"
    assert run(body.format(load))[0].loaded == {1}
    assert run(body.replace("{}", store))[0].loaded == frozenset()


HELD = {  # launches one after another, the size of L2, and what the last finds there
    "nothing at first": ([{"u": 8}], 100, {}),
    "what the launch before wrote": ([{"u": 50, "p": 10}, {"p": 10}], 60, {"p": 10}),
    "not what is too large": ([{"p": 100}, {"p": 100}], 99, {"p": 0}),
    "all that just fits": ([{"p": 100}, {"p": 100}], 100, {"p": 100}),
    "only as much as there was": ([{"p": 10}, {"p": 30}], 100, {"p": 10}),
    "not what larger ones drove out": ([{"p": 10}, {"c": 95}, {"p": 10}], 100, {"p": 0}),
    "each tensor between counts once": (
        [{"p": 10}, {"c": 45}, {"c": 45}, {"p": 10}],
        60,
        {"p": 10},
    ),
    # at a share f of u: (1 - f) 40 + f 40 of it, all of p, f 40 of c; at most 80 for f up to 1 / 4
    "a part": ([{"u": 40}, {"p": 30}, {"u": 40, "c": 40}], 80, {"u": 10}),
}


@pytest.mark.parametrize("launches, size, found", HELD.values(), ids=list(HELD))
def test_l2_holds_what_was_used_last(launches, size, found):
    l2 = L2(size)
    assert [l2.follow(some) for some in launches][-1] == found


def test_a_launch_repeated_finds_what_it_left():
    assert L2(100, repeated=True).follow({"u": 60, "W": 40}) == {"u": 60, "W": 40}
    assert L2(99, repeated=True).follow({"u": 60, "W": 40}) == {"u": 0, "W": 0}


H100 = GPUS["90"]
PROGRAMS, WARPS = 10 * H100.multiprocessors, 4


def work(executed=(), **changes):
    """10 programs of 4 warps for each multiprocessor, 5 at a time, that do next to nothing else."""
    nothing = Work(PROGRAMS, 5, WARPS, Counter(dict(executed)), Traffic(), 0.0, 0.0)
    return nothing._replace(**changes)


CYCLE = 1 / H100.clock
MANY = 10_000
WAVES = 10 * WARPS * MANY  # instructions of one multiprocessor
LIMITS = {  # a launch that one limit binds, and the seconds that this takes
    "issue": (work({"MOV": MANY}), WAVES / 4 * CYCLE),
    "fp32": (work({"FFMA": MANY, "IMAD.WIDE": MANY}), WAVES * (1 / 4 + 1 / 2) * CYCLE),
    "fp64": (work({"DFMA": MANY}), WAVES / 2 * CYCLE),
    "integer": (work({"LOP3.LUT": MANY}), WAVES / 2 * CYCLE),
    "tensor": (
        work({"HMMA.1688.F32.TF32": MANY}),
        WAVES * 16 * 8 * 8 / (0.62 * 1024) * CYCLE,
    ),
    "mufu": (work({"MUFU.EX2": MANY}), WAVES * 2 * CYCLE),
    "l1": (work(traffic=Traffic(shared=3 * MANY, l1=MANY)), 10 * 4 * MANY * CYCLE),
    "l2": (work(traffic=Traffic(read=MANY, written=MANY)), PROGRAMS * 2 * MANY * 32 / 9.8e12),
    "dram": (work(memory=1e9), 1e9 / 3.35e12),
    "latency": (work(chain=MANY), 2 * MANY * CYCLE),
    "launch": (work(programs=1), 2.5e-6),
}


@pytest.mark.parametrize("name", LIMITS)
def test_every_limit_binds_the_launch_that_it_should(name):
    launch, seconds = LIMITS[name]
    found = limits_of(launch, H100)
    assert set(found) == set(LIMITS)
    assert max(found, key=found.get) == name
    assert math.isclose(found[name], seconds, rel_tol=1e-12)


def test_shuffles_and_spills_go_through_the_banks():
    found = limits_of(work({"SHFL.BFLY": 8, "STL.128": 2, "LDL": 1}), H100)
    assert math.isclose(found["l1"], 10 * WARPS * (8 + 2 * 4 + 1) * CYCLE)


@pytest.mark.parametrize(
    "name, clocks",
    [
        ("HMMA.16816.F32.BF16", 16 * 8 * 16 / (2 * 512)),
        ("HMMA.1688.F32.TF32", 16 * 8 * 8 / 512),
        ("DMMA.884", 8 * 8 * 4 / 64),
    ],
)
def test_matrix_products_count_by_their_shape(name, clocks):
    a100 = GPUS["80"]
    one = work({name: 1}, programs=1, warps=1)
    assert math.isclose(limits_of(one, a100)["tensor"], clocks / a100.clock)


def test_programs_beyond_the_last_full_round_take_another():
    """133 programs on 132 multiprocessors take as long as 264."""
    found = [limits_of(work(programs=n, resident=1, chain=MANY), H100) for n in (132, 133, 264)]
    times = [one["latency"] / (MANY * CYCLE) for one in found]
    assert times == pytest.approx([1, 2, 2])


SASS = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   LDG.E R2, desc[UR4][R8.64] ;
.L_x_1:
        /*0020*/                   LDS R4, [R0] ;
        /*0030*/                   FADD R2, R2, R4 ;
        /*0040*/              @!P0 BRA `(.L_x_1) ;
        /*0050*/                   STG.E desc[UR4][R8.64], R2 ;
        /*0060*/                   EXIT ;
.L_x_2:
        /*0070*/                   BRA `(.L_x_2);
        /*0080*/                   NOP;
"""


def looped(accesses):
    body = "mov.b32 %r3, 0;\n$L:\n"
    body += accesses * "ld.shared.b32 %r4, [%r0];\n"
    return body + "add.s32 %r3, %r3, 1; setp.lt.s32 %p1, %r3, 12; @%p1 bra $L;\n"


@pytest.mark.parametrize("sass, accesses, turns", [(1, 1, 12), (4, 1, 3), (2, 2, 12)])
def test_turns_of_the_loop_of_machine_code(sass, accesses, turns):
    """Those of PTX, or fewer if it is unrolled."""
    line = "        /*0020*/                   LDS R4, [R0] ;\n"
    code = parse_nvidia(SASS.replace(line, sass * line))
    _, kernel, counts = run(looped(accesses))
    times = executions(code, kernel, counts)
    assert list(times.values()) == [turns]
    executed = weights(code, times)
    assert sum(executed) == 5 + turns * (sass + 2)  # with the branch after the end, not the NOP


def test_a_warp_waits_for_its_results():
    code = parse_nvidia(SASS)
    latency = {"shared": 30, "global": 500}
    turns = 7
    (span,) = code.loops
    clocks = Warp(code, {span: float(turns)}, latency).run()
    # issued: S2R at 1, LDG 2, LDS 5 (waits for S2R), FADD 502; then LDS and FADD 30 later each turn
    first = 2 + 500
    turn = 1 + 1 + 30  # branch, LDS, FADD
    assert clocks == pytest.approx(first + (turns - 1) * turn + 4 + 3, abs=3)
    once = Warp(code, {span: 1.0}, latency).run()
    assert clocks - once == pytest.approx((turns - 1) * turn)


def test_a_wait_for_copies_waits():
    text = """
        /*0000*/                   LDGSTS.E.128 [R4], desc[UR4][R8.64] ;
        /*0010*/                   LDGDEPBAR ;
        /*0020*/                   LDGSTS.E.128 [R5], desc[UR4][R8.64] ;
        /*0030*/                   LDGDEPBAR ;
        /*0040*/                   DEPBAR.LE SB0, {left} ;
"""
    for left, clocks in (("0x0", 3 + 500), ("0x1", 1 + 500), ("0x2", 5), ("0x3", 5)):
        code = parse_nvidia(text.format(left=left))
        assert Warp(code, {}, {"shared": 30, "global": 500}).run() == clocks


def test_numbers_of_ptx_wrap_as_in_registers():
    body = """
	mov.b32 %r3, -8;
	shr.s32 %r4, %r3, 1;
	sub.s32 %r5, %r4, %r3;
	mul.hi.u32 %r6, %r3, 2;
	mad.lo.s32 %r7, %r5, %r6, %r1;
	bfe.u32 %r8, %r7, 0, 5;
	rem.s32 %r8, %r8, 32;
	shl.b32 %r3, %r8, 2;
	ld.shared.b32 %r4, [%r3];
"""
    kernel = Kernel(PTX.format(body=body, threads=32))
    (access,) = kernel.run((A, 7), (1,), 0, [0] * len(kernel.instructions))
    np.testing.assert_array_equal(access.addresses, 4 * ((4 + np.arange(32)) % 32))


def test_registers_are_taken_apart_and_put_together():
    body = """
	mov.b32 %r3, {%rs1, %rs2};
	cvt.u16.u32 %rs1, %r1;
	mov.b32 %r3, {%rs1, %rs1};
	mov.b32 {_, %rs2}, %r3;
	cvt.u32.u16 %r4, %rs2;
	mul.wide.u32 %rd2, %r4, 16;
	add.s64 %rd3, %rd1, %rd2;
	ld.global.b32 %r5, [%rd3];
"""
    found, *_ = run(body)
    assert found.asked == 16  # sectors of 32 bytes: two threads' words in each


def test_a_register_that_nothing_writes_holds_anything():
    """As Triton 3.9 packs bytes: three bytes of %r4 come from %r8, and the other one is used."""
    body = """
	and.b32 %r3, %r1, 31;
	prmt.b32 %r4, %r8, %r3, 0x3340U;
	prmt.b32 %r5, %r4, 0, 0x7771U;
	mul.wide.u32 %rd2, %r5, 16;
	add.s64 %rd3, %rd1, %rd2;
	ld.global.b32 %r6, [%rd3];
"""
    found, *_ = run(body)
    assert found.asked == 16


def test_bytes_are_permuted():
    """0x7701: bytes 1 and 0 of the first operand, then of the second operand's byte 3 twice; a
    selector of 8 and more stands for the sign of a byte."""
    from mocapsnet.benchmarks.shared.addresses import permuted

    a, b = (np.array([x], np.int64) for x in (0x44332281, 0x88776655))
    for selector, expected in ((0x7701, 0x88888122), (0x3210, 0x44332281), (0xF8A4, 0xFFFF0055)):
        assert permuted(a, b, np.array([selector], np.int64)) == expected
