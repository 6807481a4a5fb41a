"""Convolutional routing: the specification, and the implementation that runs by default."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mocapsnet.kernels import conv_routing, routing
from mocapsnet.kernels.conv_routing import chunked
from mocapsnet.kernels.conv_routing import reference as specification
from mocapsnet.kernels.conv_routing.op import conv_routing_backward, conv_routing_forward

METHODS = ["rba", "sda"]
GRADS = ["final", "full"]


def problem(shape, kernel, capsules, dtype=torch.float64, seed=0, scale=0.7):
    """u, W and bias for a shape B, H, Wd, a kernel and N, K, J, D; couplings far from uniform."""
    N, K, J, D = capsules
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).mul(scale).to(dtype)

    return randn(*shape, N, K), randn(*kernel, N, K, J, D), randn(J, D)


def run(u, W, bias, **options):
    """v and the gradients, given a random gradient of v."""
    leaves = [x.detach().clone().requires_grad_() for x in (u, W, bias)]
    v = conv_routing(leaves[0], leaves[1], bias=leaves[2], **options)
    g = torch.randn(v.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    v.backward(g.to(v))
    return [v.detach(), *(x.grad for x in leaves)]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of five positions, and chunks of about two input capsules."""
    monkeypatch.setattr(chunked, "block_positions", lambda *_: 5)
    monkeypatch.setattr(chunked.routing, "chunk_bytes", lambda: 2 * 5 * 4 * 2 * 8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stride, padding", [(1, 0), (2, 1), ((1, 3), (3, 0)), ((3, 2), (0, 2))])
def test_every_position_routes_the_capsules_of_its_window_that_exist(stride, padding, method):
    """One position after the other by `routing`, which is not told of capsules outside."""
    u, W, bias = problem((2, 5, 7), (3, 2), (2, 3, 4, 2))
    (sy, sx), (py, px) = (x if isinstance(x, tuple) else (x, x) for x in (stride, padding))
    v = conv_routing(u, W, bias=bias, stride=stride, padding=padding, method=method)
    assert v.shape == (2, (5 + 2 * py - 3) // sy + 1, (7 + 2 * px - 2) // sx + 1, 4, 2)
    for y in range(v.shape[1]):
        for x in range(v.shape[2]):
            inside = [
                (y * sy - py + dy, x * sx - px + dx, dy, dx)
                for dy in range(3)
                for dx in range(2)
                if 0 <= y * sy - py + dy < 5 and 0 <= x * sx - px + dx < 7
            ]
            if not inside:  # nothing is routed: the sum is the bias
                n = bias.norm(dim=-1, keepdim=True)
                want = (n / (1 + n * n) * bias).expand(2, 4, 2)
            else:
                some = torch.cat([u[:, row, column] for row, column, _, _ in inside], 1)
                weights = torch.cat([W[dy, dx] for _, _, dy, dx in inside])
                want = routing(some, weights, bias=bias, method=method, backend="reference")
            torch.testing.assert_close(v[:, y, x], want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_reference_in_float64(method, grad, iterations, small_blocks):
    arguments = problem((2, 5, 4), (3, 2), (2, 3, 4, 2))
    options = dict(stride=(1, 2), padding=1, method=method, routing_grad=grad)
    options["iterations"] = iterations
    expected = run(*arguments, **options, backend="reference")
    for got, want in zip(run(*arguments, **options), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("positions", [5, 1000], ids=["blocks", "one block"])
def test_couplings_above_the_budget_are_made_again(positions, monkeypatch):
    arguments = problem((2, 5, 4), (3, 2), (2, 3, 4, 2))
    monkeypatch.setattr(chunked, "block_positions", lambda *_: positions)
    made, couplings = [], chunked.routing.Votes.couplings
    monkeypatch.setattr(
        chunked.routing.Votes, "couplings", lambda *args: made.append(0) or couplings(*args)
    )
    kept = run(*arguments, padding=1)
    with_kept = len(made)
    monkeypatch.setattr(chunked, "KEPT_BYTES", 12 * 4 * 5 * 5 * 2 * 8 - 1)  # one byte too few
    made.clear()
    again = run(*arguments, padding=1)
    assert 2 * len(made) == 3 * with_kept  # of the second and third iteration, and in backward
    for x, y in zip(kept, again, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 7), st.integers(1, 7)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    capsules=st.tuples(*[st.integers(1, 3)] * 3, st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    positions=st.sampled_from([1, 3, 8, 1000]),
    method=st.sampled_from(METHODS),
    grad=st.sampled_from(GRADS),
    scale=st.sampled_from([0.0, 1e-3, 0.7, 2.0]),
    seed=st.integers(0, 1000),
)
def test_any_grid_window_stride_and_padding(
    shape, kernel, capsules, stride, padding, positions, method, grad, scale, seed
):
    """Also padding of a whole window and more, steps over positions, and an empty batch."""
    padding = tuple(
        max(p, -(-(k - size) // 2)) for p, k, size in zip(padding, kernel, shape[1:], strict=True)
    )
    arguments = problem(shape, kernel, capsules, seed=seed, scale=scale)
    options = dict(stride=stride, padding=padding, method=method, routing_grad=grad)
    expected = run(*arguments, **options, backend="reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "block_positions", lambda *_: positions)
        for got, want in zip(run(*arguments, **options), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_blocks_cover_every_position_once():
    windows = chunked.Windows(9, 6, 3, 3, 2, 1, 1, 1)
    for most in (1, 3, 20, 70, 1000):
        count = torch.zeros(*windows.output, 3)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chunked, "block_positions", lambda *_, most=most: most)
            for block in chunked.blocks(windows, 3, 4, 2, 4):
                part = block.of_output(count)
                assert 0 < part.numel() <= most
                part += 1
        assert (count == 1).all()


@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_eager_code(dtype, method, grad):
    arguments = problem((2, 6, 5), (3, 3), (4, 8, 6, 8), dtype, scale=0.4)
    options = dict(padding=1, method=method, routing_grad=grad)
    truth = run(*(x.double() for x in arguments), **options, backend="reference")
    eager = run(*arguments, **options, backend="reference")
    for x, e, t in zip(run(*arguments, **options), eager, truth, strict=True):
        assert x.dtype == dtype
        floor = torch.finfo(dtype).eps * t.abs().max()  # one unit of the largest element
        assert ((x - t).abs() <= 2 * (e - t).abs().max() + floor).all()


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck_of_the_full_gradient(method, small_blocks):
    u, W, bias = problem((1, 2, 2), (2, 1), (1, 2, 2, 2))
    leaves = [x.requires_grad_() for x in (u, W, bias)]

    def full(u, W, bias):
        return conv_routing(u, W, bias=bias, padding=1, method=method, routing_grad="full")

    assert torch.autograd.gradcheck(full, leaves)


def test_strided_inputs_are_taken_and_left_alone():
    u, W, bias = problem((2, 4, 5), (3, 2), (2, 3, 4, 2))
    expected = run(u, W, bias, padding=1)
    strided = [x.permute(*range(x.dim())[::-1]).contiguous() for x in (u, W)]
    strided = [x.permute(*range(x.dim())[::-1]).requires_grad_() for x in strided]
    before = [x.detach().clone() for x in strided]
    assert not any(x.is_contiguous() for x in strided)
    v = conv_routing(*strided, bias=bias, padding=1)
    g = torch.randn(v.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    v.backward(g.movedim(1, 3).contiguous().movedim(3, 1))
    for got, want in zip([v.detach(), *(x.grad for x in strided)], expected, strict=False):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    assert all(torch.equal(x, y) for x, y in zip(strided, before, strict=True))


@pytest.mark.parametrize("method, grad", list(itertools.product(METHODS, GRADS)))
@pytest.mark.parametrize("iterations", [1, 3])
def test_weights_in_another_layout(method, grad, iterations):
    u, W, bias = problem((2, 4, 5), (3, 2), (2, 3, 4, 2))
    options = dict(padding=1, method=method, routing_grad=grad, iterations=iterations)
    strided = W.movedim(-1, 0).contiguous().movedim(0, -1).requires_grad_()
    assert not strided.is_contiguous()
    expected = conv_routing(u, W.requires_grad_(), bias=bias, backend="reference", **options)
    expected.square().sum().backward()
    v = conv_routing(u, strided, bias=bias, **options)
    v.square().sum().backward()
    torch.testing.assert_close(v, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(strided.grad, W.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method, grad", list(itertools.product(METHODS, GRADS)))
def test_same_inputs_same_bits(method, grad):
    arguments = problem((3, 6, 5), (3, 3), (4, 8, 6, 8), torch.float32)
    options = dict(padding=1, method=method, routing_grad=grad)
    once, twice = run(*arguments, **options), run(*arguments, **options)
    assert all(torch.equal(x, y) for x, y in zip(once, twice, strict=True))


def test_mixed_dtypes_and_autocast():
    u, W, bias = problem((1, 4, 5), (3, 3), (2, 3, 4, 2), torch.float32)
    low = u.bfloat16()
    expected = conv_routing(low.float(), W, bias=bias)
    assert torch.equal(conv_routing(low, W, bias=bias), expected)
    for backend in (None, "reference"):
        plain = conv_routing(u, W, bias=bias, backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(conv_routing(u, W, bias=bias, backend=backend), plain)


def test_opcheck():
    u, W, bias = problem((2, 4, 3), (3, 2), (2, 3, 4, 2), torch.float32)
    W = W.movedim(-1, 0).contiguous().movedim(0, -1)
    leaves = [x.requires_grad_() for x in (u, W, bias)]
    options = (2, 1, 1, 0)
    for grad, keep in (("full", False), ("final", True)):
        modes = 3, "rba", grad, keep, "chunked"
        torch.library.opcheck(conv_routing_forward.registered, (*leaves, *options, *modes))
        v, sums, kept = conv_routing_forward(u, W, bias, *options, *modes)
        assert (kept.dim() == 5) == keep
        tensors = [x.detach() for x in (v, u, W, sums, kept)]
        torch.library.opcheck(
            conv_routing_backward.registered, (*tensors, *options, "rba", grad, True, "chunked")
        )


def test_compiles_into_one_graph():
    u, W, bias = problem((2, 4, 3), (3, 2), (2, 3, 4, 2))

    def loss(u, W, bias):
        return conv_routing(u.tanh(), W, bias=bias, stride=2, padding=1).square().sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (u, W, bias)]
        value = function(*leaves)
        value.backward()
        results.append([value.detach(), *(x.grad for x in leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_transforms_and_modes():
    """Shapes without data, vmap, gradients for each sample, forward mode, and what is counted."""
    u, W, bias = problem((3, 4, 3), (3, 2), (2, 3, 4, 2))
    options = dict(padding=1, stride=2)
    v = conv_routing(u, W, bias=bias, **options)
    meta = conv_routing(u.to("meta"), W.to("meta"), **options)
    assert meta.is_meta and meta.shape == v.shape

    def one(u, W):
        return conv_routing(u.unsqueeze(0), W, bias=bias, **options)[0]

    torch.testing.assert_close(torch.vmap(one, (0, None))(u, W), v, rtol=1e-12, atol=1e-14)
    each = torch.func.vmap(torch.func.grad(lambda u, W: one(u, W).sum(), 1), (0, None))(u, W)
    for b in range(3):
        whole = W.clone().requires_grad_()
        one(u[b], whole).sum().backward()
        torch.testing.assert_close(each[b], whole.grad, rtol=1e-10, atol=1e-13)
    _, tangent = torch.func.jvp(lambda u: conv_routing(u, W, **options), (u,), (u,))
    assert tangent.shape == v.shape
    with FlopCounterMode(display=False) as counter:
        conv_routing(u.requires_grad_(), W, **options).sum().backward()
    positions, votes = 3 * 2 * 2, 6 * 2 * 4 * 2  # of each
    assert counter.get_total_flops() == 2 * positions * votes * (3 + 5 + 2 * 3)
    v = conv_routing(u, W)
    (du,) = torch.autograd.grad(v.sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match='no double backward .* use backend="reference"'):
        du.sum().backward()


def test_peak_memory_is_far_below_all_votes(monkeypatch):
    """All votes are 302 MB here, of which eager code holds several copies."""
    monkeypatch.setattr(chunked.routing, "chunk_bytes", lambda: 2 << 20)  # of a cache of 32 MB
    u, W, _ = problem((4, 32, 32), (3, 3), (8, 16, 8, 16), torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        conv_routing(u.requires_grad_(), W.requires_grad_(), padding=1).sum().backward()
    live = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert 6e6 < peak < 60e6, f"{peak / 1e6:.1f} MB"  # s of three iterations alone is 6 MB


def test_the_chosen_implementation_never_calls_the_reference(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("the reference ran")

    monkeypatch.setattr(specification, "conv_routing", fail)
    arguments = problem((1, 4, 3), (2, 2), (2, 3, 4, 2))
    for backend in (None, "chunked"):
        run(*arguments, backend=backend)
    with pytest.raises(AssertionError, match="the reference ran"):
        run(*arguments, backend="reference")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(u=torch.zeros(2, 5, 5, 6)), r"u must have 5 dimensions \[B H Wd N K\]"),
        (dict(u=torch.zeros(2, 5, 5, 3, 4)), "must agree in N and K"),
        (dict(u=torch.zeros(2, 5, 5, 6, 4).int()), "must be floating point"),
        (dict(u=torch.zeros(2, 5, 2, 6, 4)), r"\[3, 3\] does not fit a grid of \[5, 2\] with"),
        (dict(W=torch.zeros(3, 3, 6, 4, 0, 2)), "no empty dimension"),
        (dict(W=torch.zeros(3, 3, 6, 4, 5, 2, device="meta")), "one device"),
        (dict(bias=torch.zeros(5, 3)), r"bias must be \[J, D\] = \[5, 2\]"),
        (dict(stride=0), "stride must be an integer of at least 1, or two for y and x; got 0"),
        (dict(stride=(1, 2, 3)), "stride must be an integer"),
        (dict(padding=-1), "padding must be an integer of at least 0"),
        (dict(padding=True), "padding must be an integer"),
        (dict(padding=1.5), "padding must be an integer"),
        (dict(iterations=0), "iterations must be an integer of at least 1"),
        (dict(method="em"), "method must be one of 'rba', 'sda'; got 'em'"),
        (dict(routing_grad="none"), "routing_grad must be one of"),
        (dict(backend="cuda"), "backend must be one of"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = dict(u=torch.zeros(2, 5, 5, 6, 4), W=torch.zeros(3, 3, 6, 4, 5, 2)) | change
    with pytest.raises(ValueError, match=message):
        conv_routing(arguments.pop("u"), arguments.pop("W"), **arguments)
