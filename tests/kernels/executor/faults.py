"""What the executor must find, in PTX that breaks one rule each. `test_executed.py` runs this."""

import pytest
import torch
import triton
import triton.language as tl

from .decode import Program
from .execute import Memory, run

PTX = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid 64
{{
	.reg .b32 	%r<9>;
	ld.param.b64 	%rd1, [kernel_param_0];
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, %ctaid.x;
	mov.b32 	%r0, global_smem;
	shl.b32 	%r3, %r1, 2;
	add.s32 	%r4, %r0, %r3;
	mul.wide.u32 	%rd2, %r1, 4;
	add.s64 	%rd3, %rd1, %rd2;
{body}
	ret;
$L__func_end0:
}}
"""
BACKWARDS = "sub.s32 %r5, 252, %r3; add.s32 %r6, %r0, %r5;"  # where the other warp stores
FAULTS = {  # of 64 threads, a tensor of 64 numbers, and 64 numbers of shared memory
    "": "ld.global.b32 %r5, [%rd3]; st.shared.b32 [%r4], %r5;",
    "out of bounds, global": "ld.global.b32 %r5, [%rd3 + 4];",
    "out of bounds, shared": "st.shared.b32 [%r4 + 4], %r1;",
    "misaligned": "ld.global.v2.b32 {%r5, %r6}, [%rd3];",
    "shared memory read before written": "ld.shared.b32 %r5, [%r4];",
    "race of warps, shared": f"{BACKWARDS} st.shared.b32 [%r4], %r1; ld.shared.b32 %r7, [%r6];",
    "race of warps, global": "st.global.b32 [%rd1], %r1;",
    "race of programs": "setp.eq.b32 %p1, %r1, 0; @%p1 st.global.b32 [%rd1], %r2;",
    "asynchronous copy not waited for": "cp.async.ca.shared.global [%r4 + 0], [%rd3 + 0], 0x4; "
    "cp.async.commit_group; ld.shared.b32 %r5, [%r4];",
    "divergence at a synchronisation": "setp.lt.u32 %p1, %r1, 7; @%p1 bar.sync 0;",
    "deadlock at a barrier": "setp.lt.u32 %p1, %r1, 32; @%p1 bar.sync 0;",
}


def found(body, programs=2):
    """Kinds of what is found in 64 threads, with shared memory of 64 numbers."""
    memory, tensor = Memory(), torch.arange(64, dtype=torch.float32)
    address = memory.add(tensor)
    memory.fill()
    some = run(Program(PTX.format(body=body)), [address], (programs,), memory, 256)
    return {finding.kind for finding in some}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_breaks_a_rule_is_found(kind):
    kinds = found(FAULTS[kind], programs=2 if kind == "race of programs" else 1)
    assert kind in kinds if kind else not kinds


def test_a_barrier_ends_a_race():
    body = FAULTS["race of warps, shared"]
    assert "race of warps, shared" not in found(body.replace("%r1; ld", "%r1; bar.sync 0; ld"))


@triton.jit
def double_kernel(x_ptr, y_ptr, n, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (place < n) if MASKED else place < n + 1
    tl.store(y_ptr + place, 2 * tl.load(x_ptr + place, mask), mask)


@pytest.mark.parametrize("masked", [True, False])
def test_a_mask_that_lets_one_more_pass_is_found(executed, masked):
    x, y = torch.arange(70.0), torch.full((70,), float("nan"))
    double_kernel[(3,)](x, y, 70, MASKED=masked, BLOCK=32)
    torch.testing.assert_close(y, 2 * x)
    kinds = {finding.kind for _, findings in executed.ran for finding in findings}
    assert kinds == (set() if masked else {"out of bounds, global"})
    executed.clear()
