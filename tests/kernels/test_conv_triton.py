"""Convolutional routing by Triton kernels: interpreted without a GPU, native with one."""

import math

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mocapsnet.kernels import cases, conv_routing, explain_conv, launch
from mocapsnet.kernels.conv_routing import cases as conv_cases
from mocapsnet.kernels.conv_routing import chunked, triton
from mocapsnet.kernels.conv_routing.op import conv_routing_backward, conv_routing_forward

from .test_conv_routing import problem, run
from .test_triton import MODES, force

pytestmark = pytest.mark.usefixtures("poison")

SMALL = (2, 3, 3), (2, 2), (2, 2, 3, 2)  # grids, windows, N, K, J, D
STEPS = dict(stride=(1, 2), padding=(1, 0))  # windows overlap in y, some hang over the border


def assert_equals_reference(arguments, **options):
    expected = run(*arguments, **options, backend="reference")
    for x, want in zip(run(*arguments, **options, backend="triton"), expected, strict=True):
        torch.testing.assert_close(x, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "form, method, grad",
    [
        ("streamed", "rba", "final"),
        ("streamed in parts", "sda", "final"),
        ("tensor cores", "rba", "full"),
    ],
)
def test_equals_the_reference_in_float64(form, method, grad, device, monkeypatch):
    """In modes of which no case is verified in the form, and with couplings kept."""
    force(form, monkeypatch)
    u, W, bias = (x.to(device) for x in problem(*SMALL))
    with launch.recording() as launches:
        conv_routing(u.requires_grad_(), W, backend="triton", method=method, routing_grad=grad)
    assert launches[-2].options["KEEP"] == (form == "streamed")
    explained = explain_conv(u, W, backend="triton", method=method, routing_grad=grad)
    assert explained.forward == tuple(map(str, launches))
    assert explained.form.startswith("streamed")
    assert explained.form.endswith("tensor cores") == (form == "tensor cores")
    assert_equals_reference((u, W, bias), method=method, routing_grad=grad, **STEPS)


@pytest.fixture
def few_programs(monkeypatch):
    """Each takes the interpreter long."""
    monkeypatch.setattr(triton.plans, "multiprocessors_of", lambda device: 2)
    monkeypatch.setattr(triton.plans, "STREAM_WARPS", 1)
    monkeypatch.setattr(triton.plans, "DOT_PROGRAMS", 1)
    monkeypatch.setattr(triton.plans, "OWNED_PROGRAMS", 3)  # two parts of the windows


@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.generate],
)
@given(
    shape=st.tuples(st.integers(0, 2), st.integers(1, 4), st.integers(1, 3)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    capsules=st.tuples(*[st.integers(1, 3)] * 4),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    mode=st.sampled_from(MODES),
)
def test_any_grid_window_stride_and_padding(
    shape, kernel, capsules, stride, padding, mode, few_programs, device
):
    """Also padding of a whole window and more, steps over positions, and an empty batch."""
    padding = tuple(
        max(p, -(-(k - size) // 2)) for p, k, size in zip(padding, kernel, shape[1:], strict=True)
    )
    arguments = [x.to(device) for x in problem(shape, kernel, capsules)]
    options = dict(stride=stride, padding=padding, method=mode[0], routing_grad=mode[1])
    assert_equals_reference(arguments, **options)


@pytest.mark.parametrize("case", range(7))
def test_what_is_verified_on_a_GPU_passes_here(case, few_programs, device):
    """In float32 and bfloat16."""
    every = list(conv_cases.cases())
    assert len(every) == 7
    assert cases.check(every[case], device) == ""


def test_gradcheck_of_the_full_gradient(few_programs, device):
    u, W, bias = (x.to(device) for x in problem((1, 1, 1), (1, 2), (1, 1, 2, 2)))

    def full(u, W, bias):
        options = dict(padding=(0, 1), method="sda", routing_grad="full", iterations=2)
        return conv_routing(u, W, bias=bias, **options, backend="triton")

    leaves = [x.requires_grad_() for x in (u, W, bias)]
    assert torch.autograd.gradcheck(full, leaves, fast_mode=True)


@pytest.mark.parametrize("method, grad", MODES)
@pytest.mark.parametrize("K", [16, 4])  # tensor cores, vector units
def test_no_window_and_no_vote_is_stored(K, method, grad):
    """Of 32768 windows of 144 capsules; the ds and states of all iterations are the largest."""
    u, W = (
        torch.empty(shape, device="meta") for shape in ((32, 32, 32, 16, K), (3, 3, 16, K, 16, 16))
    )
    steps, windows = (1, 1, 1, 1), 32 * 32 * 32
    keep = (method, grad) == ("rba", "final")
    with launch.recording() as launches:
        v, s, kept = triton.forward(u, W, None, steps, 3, method, keep)
        triton.backward(v, u, W, s, kept, steps, method, grad, False)
    assert kept.shape == (0,)  # 302 MB
    tensors = [x for one in launches for x in one.args if isinstance(x, torch.Tensor)]
    assert len(tensors) > 20
    most = max(x.numel() for x in tensors)
    assert most <= max(s.numel() // 3 * 5, triton.routing.TERMS_BYTES // 4)  # ds and states
    assert most < windows * 9 * 16 * K or K == 4


def test_couplings_are_kept_within_the_budget_of_routing():
    u, W = torch.empty(2, 8, 8, 2, 4, device="meta"), torch.empty(3, 3, 2, 4, 5, 6)
    shape = 18, 5, 2, 4, 3
    steps = 2, 3, 1, 1
    assert triton.kept_shape(u, W, steps, True) == shape
    assert triton.kept_shape(u, W, steps, False) == (0,)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.chunked, "KEPT_BYTES", 4 * math.prod(shape) - 1)
        assert triton.kept_shape(u, W, steps, True) == (0,)


def test_compilers_and_transforms_see_one_operation(few_programs, device):
    u, W, bias = (x.to(device) for x in problem((2, 1, 2), (2, 1), (1, 1, 3, 2)))
    leaves = [x.requires_grad_() for x in (u, W, bias)]
    options = 1, 1, 1, 0, 2, "rba", "final", True, "triton"
    torch.library.opcheck(conv_routing_forward.registered, (*leaves, *options))
    v, sums, kept = conv_routing_forward(*leaves, *options)
    assert kept.shape == (2, 3, 2, 2, 2)
    tensors = [x.detach() for x in (v, u, W, sums, kept)]
    torch.library.opcheck(
        conv_routing_backward.registered, (*tensors, *options[:4], "rba", "final", True, "triton")
    )

    def length(u, W):
        return conv_routing(u.unsqueeze(0), W, padding=1, backend="triton").square().sum()

    compiled = torch.compile(length, fullgraph=True, backend="aot_eager")
    (once,) = torch.autograd.grad(length(u[0], W), W)
    (again,) = torch.autograd.grad(compiled(u[0], W), W)
    assert torch.equal(once, again)
    each = torch.func.vmap(torch.func.grad(length, 1), (0, None))(u.detach(), W.detach())
    torch.testing.assert_close(each[0], once, rtol=1e-10, atol=1e-13)


def test_GPUs_take_the_kernels_once_they_are_verified(monkeypatch, device):
    asked = []
    monkeypatch.setattr(launch, "on_gpu", lambda x: True)
    monkeypatch.setattr(launch, "trusted", lambda family, _: asked.append(family) or len(asked) < 2)
    u, W, _ = (x.to(device) for x in problem(*SMALL))
    for taken in (True, False):
        with launch.recording() as launches:
            conv_routing(u, W)
        assert bool(launches) == taken
    assert asked == ["conv_routing"] * 2


def test_explain_tells_of_other_implementations(monkeypatch):
    u, W, _ = problem(*SMALL)
    monkeypatch.setattr(chunked, "block_positions", lambda *_: 3)
    explained = explain_conv(u, W, padding=1)
    assert explained.backend == "chunked"  # 32 positions, samples first
    assert explained.forward == explained.backward == ("16 blocks of at most 3 output positions",)
    assert explain_conv(u, W, backend="reference").forward == ()
    with pytest.raises(ValueError, match="stride must be"):
        explain_conv(u, W, stride=0, backend="triton")
