"""Triton kernels against the float64 references: interpreted without a GPU, native with one."""

import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from mocapsnet.kernels import explain, launch, primary_capsules, routing, squash, votes
from mocapsnet.kernels.primary.op import primary_backward, primary_forward
from mocapsnet.kernels.routing import chunked, plans, tile
from mocapsnet.kernels.routing import op as routing_op
from mocapsnet.kernels.routing import triton as routing_kernels
from mocapsnet.kernels.routing.op import routing_backward, routing_forward
from mocapsnet.kernels.squash.op import squash_backward, squash_forward
from mocapsnet.kernels.votes.op import votes_backward, votes_forward

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
MODES = list(itertools.product(["rba", "sda"], ["final", "full"]))  # method, routing_grad
# Jacobians along random directions: in the interpreter those of every element take long.
gradcheck = partial(torch.autograd.gradcheck, fast_mode=True)
SHAPES = [  # B, N, K, J, D
    (3, 6, 3, 5, 3),  # no side a power of two
    (2, 4, 8, 4, 8),  # every side a power of two
    (17, 5, 2, 3, 4),  # a second, ragged batch tile
    (1, 1, 1, 1, 1),
    (0, 3, 2, 4, 2),  # empty batch
]


pytestmark = pytest.mark.usefixtures("poison")


def force(form, monkeypatch):
    """Forces one form of routing, and breaks the other's kernels so that they cannot run unseen.

    That with votes on tensor cores runs in float64 too, whose products the interpreter does.
    """
    broken = ["on_chip_forward_kernel", "on_chip_backward_kernel"]
    dots = form == "tensor cores"
    monkeypatch.setattr(plans, "DOT_SIZES", (4, 8) if dots else ())
    monkeypatch.setattr(plans, "DOT_K", range(1, 33))
    monkeypatch.setattr(plans, "DOT_COLUMNS", range(8, 513))
    monkeypatch.setattr(plans, "multiprocessors_of", lambda device: 2)
    monkeypatch.setattr(plans, "OWNED_PROGRAMS", 3)  # several tiles of samples each
    sliced = plans.sliced  # three programs, so several input capsules each, not in their own order
    monkeypatch.setattr(plans, "sliced", lambda B, N, block_b, _: sliced(B, N, block_b, 3))
    if form == "on chip":
        broken = ["streamed_sum_kernel", "streamed_backward_kernel", "kept_backward_kernel"]
        broken.append("dot_sum_kernel")
        broken += ["kept_backward_dots_kernel", "owned_backward_kernel"]
    else:
        monkeypatch.setattr(plans, "ON_CHIP_VOTES", 0)
        broken.append("streamed_backward_kernel" if dots else "owned_backward_kernel")
    if form == "streamed in parts":
        broken.append("kept_backward_kernel")
        monkeypatch.setattr(routing_kernels, "TERMS_BYTES", 300)
        monkeypatch.setattr(chunked, "KEPT_BYTES", 0)
    for name in broken:
        monkeypatch.setattr(routing_kernels, name, None)


@pytest.fixture(params=["on chip", "streamed", "streamed in parts", "tensor cores"])
def form(request, monkeypatch):
    force(request.param, monkeypatch)
    return request.param


def test_a_tile_of_samples_is_a_power_of_two_whatever_K_is(device, monkeypatch):
    """K = 6 would fit ten of 17 samples with 32 components of kept sums."""
    monkeypatch.setattr(plans, "ON_CHIP_VOTES", 0)
    monkeypatch.setattr(plans, "DOT_SIZES", ())
    u, W, g = tensors(device, torch.float32, (17, 2, 6), (2, 6, 2, 17), (17, 2, 17))
    with launch.recording() as launches:
        run(routing, (u, W), g, backend="triton")
    (tile,) = (x.options["BLOCK_B"] for x in launches if "kept_backward" in x.kernel.__name__)
    assert tile == 8
    got = run(routing, (u, W), g, backend="triton")
    want = run(routing, (u.double(), W.double()), g.double(), backend="reference")
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grad", ["final", "full"])
def test_products_of_16_columns_at_least(grad, device, monkeypatch):
    """As Triton before 3.8 asks for: K = 8 is padded, the numbers stay."""
    force("tensor cores", monkeypatch)
    u, W, g = tensors(device, torch.float32, (17, 3, 8), (3, 8, 5, 6), (17, 5, 6))
    want = run(
        routing, (u.double(), W.double()), g.double(), routing_grad=grad, backend="reference"
    )
    monkeypatch.setattr(routing_kernels, "LEAST_K", 16)
    with launch.recording() as launches:
        run(routing, (u, W), g, routing_grad=grad, backend="triton")
    widths = {x.kernel.__name__: x.options.get("BLOCK_K") for x in launches}
    assert widths["dot_sum_kernel"] == 16
    assert widths.get("owned_backward_kernel") == (16 if grad == "full" else None)
    got = run(routing, (u, W), g, routing_grad=grad, backend="triton")
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)


def tensors(device, dtype, *shapes, scale=0.7):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(s, dtype=torch.float64, generator=generator).mul(scale).to(device, dtype)
        for s in shapes
    ]


def run(function, inputs, g, **options):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves, **options)
    out.backward(g.to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves)]


def assert_as_good_as_eager(function, inputs, g, shuffles=0):
    """Element by element at most twice as far from the float64 truth as eager code's worst element
    in the same dtype, plus one unit of the largest element; in float64 the truth is eager code
    itself, and sums of under 100 terms leave a relative difference far below 1e-10.

    Eager code's worst element is that for these inputs and for so many shuffles of their elements.
    """
    generator = torch.Generator().manual_seed(1)

    def shuffled(x):
        order = torch.randperm(x.numel(), generator=generator)
        return x.flatten()[order.to(x.device)].view(x.shape)

    def eager_and_truth(inputs, g):
        wide = [x.double() for x in inputs]
        truth = run(function, wide, g.double(), backend="reference")
        return run(function, inputs, g, backend="reference"), truth

    eager, truth = eager_and_truth(inputs, g)
    pairs = [(eager, truth)]
    pairs += [eager_and_truth([shuffled(x) for x in inputs], shuffled(g)) for _ in range(shuffles)]
    got = run(function, inputs, g, backend="triton")
    for i, (x, e, t) in enumerate(zip(got, eager, truth, strict=True)):
        assert x.dtype == e.dtype and x.shape == e.shape
        if x.numel():
            unit = 1e-10 if x.dtype == torch.float64 else torch.finfo(x.dtype).eps
            floor = unit * t.abs().max()
            worst = max((es[i] - ts[i]).abs().max() for es, ts in pairs)
            assert ((x - t).abs() <= 2 * worst + floor).all()


def routed(mode):
    """`routing` of one mode, as a function of u, W and perhaps a bias."""
    method, routing_grad = mode

    def route(u, W, bias=None, **options):
        return routing(u, W, bias=bias, method=method, routing_grad=routing_grad, **options)

    return route


route = routed(("rba", "final"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 6), (1,), (0, 4), (700, 3)])  # 700: two tiles
def test_squash(shape, dtype, device):
    s, g = tensors(device, dtype, shape, shape)
    assert_as_good_as_eager(squash, [s], g)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape, dim", [((2, 12, 3, 5), 4), ((1, 3, 2, 1), 3), ((0, 4, 3, 3), 2)])
def test_primary_capsules(shape, dim, memory_format, dtype, device):
    B, C, H, Wd = shape
    features, g = tensors(device, dtype, shape, (B, C // dim * H * Wd, dim))
    features = features.to(memory_format=memory_format)
    assert_as_good_as_eager(
        lambda f, backend: primary_capsules(f, dim, backend=backend), [features], g
    )
    if B:
        assert primary_backward(g, features, dim).stride() == features.stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_votes(shape, dtype, device):
    B, N, K, J, D = shape
    u, W, g = tensors(device, dtype, (B, N, K), (N, K, J, D), (B, N, J, D))
    assert_as_good_as_eager(votes, [u, W], g)


# The other modes differ in the code of a tile, not in how shapes are cut into tiles.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "mode, shape",
    [(MODES[0], shape) for shape in SHAPES] + list(itertools.product(MODES[1:], SHAPES[:1])),
)
def test_routing(mode, shape, dtype, form, device):
    B, N, K, J, D = shape
    u, W, bias, g = tensors(device, dtype, (B, N, K), (N, K, J, D), (J, D), (B, J, D))
    # Products of parts round otherwise than eager code, whose worst of few elements may be lucky.
    shuffles = 7 if form == "tensor cores" and dtype == torch.float32 else 0
    assert_as_good_as_eager(routed(mode), [u, W, bias], g, shuffles)


@pytest.mark.slow
@pytest.mark.parametrize("mode, dtype", [(MODES[0], torch.float32), (MODES[2], torch.bfloat16)])
def test_a_large_layer_takes_tensor_cores(mode, dtype, device):
    """As `plan` chooses them; in float32 by products of parts, as exact as eager code."""
    B, N, K, J, D = 5, 33, 8, 64, 8  # the longest row that takes them, the first N that is streamed
    u, W, bias, g = tensors(device, dtype, (B, N, K), (N, K, J, D), (J, D), (B, J, D))
    with launch.recording() as launches:
        run(routed(mode), [u, W, bias], g, backend="triton")
    precision = {"split"} if dtype == torch.float32 else {"exact"}
    sums = [x for x in launches if x.kernel.__name__ in ("first_sum_kernel", "dot_sum_kernel")]
    assert len(sums) == 3 and {x.options["PRECISION"] for x in sums} == precision
    assert_as_good_as_eager(routed(mode), [u, W, bias], g)


@pytest.mark.parametrize("iterations", [1, 5])  # 2 to 4: any shape
@pytest.mark.parametrize("mode", MODES, ids=" ".join)
def test_routing_iterations_without_bias(mode, iterations, form, device):
    u, W, g = tensors(device, torch.float64, (3, 6, 3), (6, 3, 5, 3), (3, 5, 3))
    options = dict(iterations=iterations)
    got = run(routed(mode), [u, W], g, backend="triton", **options)
    want = run(routed(mode), [u, W], g, backend="reference", **options)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", ["zero", "tiny", "huge", "tied"])
@pytest.mark.parametrize("mode", MODES, ids=" ".join)
def test_routing_of_extreme_votes(mode, kind, form, device):
    u, W, g = tensors(device, torch.float64, (3, 6, 4), (6, 4, 5, 3), (3, 5, 3))
    u = u * {"zero": 0, "tiny": 1e-100, "huge": 1e8, "tied": 1}[kind]
    W = W[:, :, :1].expand_as(W).contiguous() if kind == "tied" else W
    want = run(routed(mode), [u, W], g, backend="reference")
    for x, y in zip(run(routed(mode), [u, W], g, backend="triton"), want, strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-9 * float(y.abs().max()))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e18])
def test_squash_at_extreme_lengths(scale, device):
    s, g = tensors(device, torch.float32, (4, 6), (4, 6))
    s = s * scale
    want = run(squash, [s.double()], g.double(), backend="reference")
    for x, y in zip(run(squash, [s], g, backend="triton"), want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-24)


def test_strided_inputs_and_expanded_gradients(form, device):
    u, W, g = tensors(device, torch.float64, (3, 4, 6), (3, 5, 6, 4), (3, 1, 1))
    u, W, g = u.transpose(1, 2), W.permute(2, 3, 1, 0), g.expand(3, 5, 3)
    assert not (u.is_contiguous() or W.is_contiguous() or g.is_contiguous())
    want = run(route, [u, W], g, backend="reference")
    leaves = [u.requires_grad_(), W.requires_grad_()]
    v = routing(*leaves, backend="triton")
    v.backward(g)
    for x, y in zip([v.detach(), u.grad, W.grad], want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-13)


def test_same_inputs_same_bits(form, device):
    u, W, g = tensors(device, torch.float32, (17, 6, 3), (6, 3, 5, 3), (17, 5, 3))
    once = run(route, [u, W], g, backend="triton")
    for _ in range(20 if device.type == "cuda" else 1):
        again = run(route, [u, W], g, backend="triton")
        assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_gpu():
    u, W, g = tensors("cuda:1", torch.float32, (3, 6, 3), (6, 3, 5, 3), (3, 5, 3))
    for x, y in zip(run(route, [u, W], g), run(route, [u.cpu(), W.cpu()], g.cpu()), strict=True):
        assert x.device == u.device
        torch.testing.assert_close(x.cpu(), y, rtol=1e-4, atol=1e-5)


def test_gradcheck(device):
    s, features, u, W = (
        x.requires_grad_()
        for x in tensors(device, torch.float64, (2, 3), (1, 4, 2, 2), (2, 2, 3), (2, 3, 2, 2))
    )
    assert gradcheck(lambda s: squash(s, backend="triton"), (s,))
    assert gradcheck(lambda f: primary_capsules(f, 2, backend="triton"), (features,))
    assert gradcheck(lambda u, W: votes(u, W, backend="triton"), (u, W))


@pytest.mark.parametrize("form", ["on chip", "streamed"], indirect=True)
@pytest.mark.parametrize("method", ["rba", "sda"])
def test_gradcheck_of_the_full_gradient(method, form, device):
    u, W, bias = (
        x.requires_grad_()
        for x in tensors(device, torch.float64, (1, 2, 1), (2, 1, 3, 2), (3, 2), scale=1.5)
    )
    route = routed((method, "full"))
    assert gradcheck(lambda *x: route(*x, backend="triton"), (u, W, bias))


@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_double_backward_is_a_clear_error(backend, device):
    u, W = (x.requires_grad_() for x in tensors(device, torch.float32, (2, 2, 3), (2, 3, 2, 3)))
    v = routing(u, W, backend=backend)
    (du,) = torch.autograd.grad(v.sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match='no double backward .* use backend="reference"'):
        du.sum().backward()


@given(data=st.data())
@settings(
    max_examples=8,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@pytest.mark.parametrize("mode", MODES, ids=" ".join)
def test_any_shape_and_values(mode, form, device, data):
    B, N, K, J = (data.draw(st.integers(1, most)) for most in (5, 6, 4, 6))
    D = data.draw(st.integers(2, 5))  # for D = 1 the derivative of a long sum cancels to nothing
    scales = st.sampled_from(
        [0.0, 1e-30, 1e-3, 1.0, 30.0]
    )  # beyond, full gradients are all rounding
    u, W, bias, g = tensors(device, torch.float64, (B, N, K), (N, K, J, D), (J, D), (B, J, D))
    if form == "tensor cores":  # the smallest fill no tile and take other kernels
        assume(plans.planned(u, W).dots)
    u, bias = u * data.draw(scales), bias * data.draw(scales)
    if data.draw(st.booleans()):
        u[:, ::2] = 0
    if data.draw(st.booleans()):
        W = W[:, :, :1].expand_as(W)
    options = dict(iterations=data.draw(st.integers(1, 4)))
    want = run(routed(mode), [u, W, bias], g, backend="reference", **options)
    got = run(routed(mode), [u, W, bias], g, backend="triton", **options)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8 * float(y.abs().max()))


def test_compiles_and_exports(form, device):
    u, W, g = tensors(device, torch.float64, (3, 6, 3), (6, 3, 5, 3), (3, 5, 3))
    eager = run(route, [u, W], g, backend="triton")
    compiled = torch.compile(route, fullgraph=True, backend="aot_eager")
    for x, y in zip(run(compiled, [u, W], g, backend="triton"), eager, strict=True):
        assert torch.equal(x, y)

    class Layer(torch.nn.Module):
        def forward(self, u, W):
            return routing(u, W, backend="triton")

    exported = torch.export.export(Layer(), (u, W))
    assert torch.equal(exported.module()(u, W), eager[0])


def test_gradients_of_each_sample(device):
    """Backward is given parts of what forward kept of all samples, which lie apart."""
    u, W = tensors(device, torch.float64, (2, 3, 2), (3, 2, 3, 2))

    def length(u, W, backend="triton"):
        return routing(u.unsqueeze(0), W, backend=backend).square().sum()

    each = torch.vmap(torch.func.grad(length, 1), (0, None))(u, W)
    for dW, u_b in zip(each, u, strict=True):
        want = torch.func.grad(length, 1)(u_b, W, "reference")
        torch.testing.assert_close(dW, want, rtol=1e-10, atol=1e-13)


def test_opcheck(device):
    s, features, u, W = (
        x.requires_grad_()
        for x in tensors(device, torch.float32, (2, 3), (1, 4, 2, 2), (2, 2, 3), (2, 3, 2, 2))
    )
    torch.library.opcheck(squash_forward.registered, (s,))
    torch.library.opcheck(squash_backward.registered, (s.detach(), s.detach()))
    torch.library.opcheck(primary_forward.registered, (features, 2))
    for layout in (features, features.transpose(2, 3)):  # neither contiguous nor channels-last
        given = features.detach().view(1, 8, 2), layout.detach(), 2
        torch.library.opcheck(primary_backward.registered, given)
    torch.library.opcheck(votes_forward.registered, (u, W))
    u_hat = votes(u, W).detach()
    torch.library.opcheck(votes_backward.registered, (u_hat, u.detach(), W.detach()))
    for method, routing_grad in MODES:
        options = (method, routing_grad)
        arguments = (u, W, None, 3, *options, options == MODES[0], "triton")
        torch.library.opcheck(routing_forward.registered, arguments)
        v, sums, kept = (x.detach() for x in routing_forward(*arguments))
        arguments = (v, u.detach(), W.detach(), sums, kept, *options, False, "triton")
        torch.library.opcheck(routing_backward.registered, arguments)


def test_mixed_dtypes(form, device):
    u, W = tensors(device, torch.float32, (3, 6, 3), (6, 3, 5, 3))
    low = u.bfloat16()
    got = routing(low, W, backend="triton")
    assert got.dtype == torch.float32
    # the same bits, but where other products are made of float32 inputs than of bfloat16
    close = dict(rtol=1e-5, atol=1e-6) if form == "tensor cores" else dict(rtol=0, atol=0)
    torch.testing.assert_close(got, routing(low.float(), W, backend="triton"), **close)


@pytest.mark.parametrize("precision, dots", [("highest", "ieee"), ("high", "tf32")])
def test_dots_follow_the_matmul_precision(precision, dots, form, device):
    """tf32 rounds to 11 bits; float64 is never rounded."""
    before = torch.get_float32_matmul_precision()
    u, W, g = tensors(device, torch.float64, (3, 6, 3), (6, 3, 5, 3), (3, 5, 3))
    want = run(route, [u, W], g, backend="reference")
    try:
        torch.set_float32_matmul_precision(precision)
        for dtype, expected in ((torch.float32, dots), (torch.float64, "ieee")):
            inputs = [u.to(dtype), W.to(dtype)]
            with launch.recording() as launches:
                run(route, inputs, g, backend="triton")
            used = {x.options["PRECISION"] for x in launches if x.options.get("PRECISION")}
            if form == "tensor cores" and dtype == torch.float32:
                assert used == {"split" if precision == "highest" else "rounded"}
            else:
                assert used == {expected}
            for x, y in zip(run(route, inputs, g, backend="triton"), want, strict=True):
                torch.testing.assert_close(x.double(), y, rtol=2e-3, atol=2e-3)
    finally:
        torch.set_float32_matmul_precision(before)


@triton.jit
def places_kernel(tile_ptr, slice_ptr, multiprocessors):
    n = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    of_batch, of_inputs = tile.place(multiprocessors)
    tl.store(tile_ptr + n, of_batch)
    tl.store(slice_ptr + n, of_inputs)


@pytest.mark.parametrize("multiprocessors", [1, 2, 5, 12, 99])
def test_programs_of_one_multiprocessor_share_a_slice(multiprocessors, device):
    """4 tiles and 3 slices: programs that are handed out in turn, as 0, 5 and 10 of five, follow
    one another there, and each is taken once."""
    tiles, slices = torch.full((2, 12), -1, dtype=torch.int32, device=device)
    launch.launch(places_kernel, (4, 3), tiles, slices, multiprocessors)
    of_one = [range(n, 12, multiprocessors) for n in range(min(multiprocessors, 12))]
    order = [(tiles[n].item(), slices[n].item()) for some in of_one for n in some]
    assert order == [(tile, part) for part in range(3) for tile in range(4)]


def test_the_form_follows_from_shapes():
    def plan(*sizes):
        return plans.plan(128, *sizes, 4, device)

    device = torch.device("meta")

    assert plan(32, 8, 32, 8).on_chip  # block layer
    assert plan(32, 8, 10, 16).on_chip  # layer 2, 10 classes
    assert plan(32, 8, 100, 16) == (False, 2, 8, 8, False)  # layer 2, 100 classes: rows too long
    assert plan(1152, 8, 32, 8) == (False, 16, 24, 4, True)  # layer 1
    assert plan(1152, 4, 32, 8) == (False, 4, 18, 1, False)  # half of each product would be padding
    assert not plans.plan(128, 1152, 8, 32, 8, 8, device).dots  # float64


def test_plans_fill_the_multiprocessors_of_the_gpu(monkeypatch):
    """Layer 1 of a batch of 128 on an A100, whose 108 hold three programs each."""
    about = SimpleNamespace(multi_processor_count=108)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    gpu = torch.device("cuda", 99)  # which nothing else has asked for
    p = plans.plan(128, 1152, 8, 32, 8, 4, gpu)
    assert p == (False, 16, 29, 4, True) and 8 * -(-1152 // p.per_slice) <= 3 * 108
    assert plans.plan(128, 1152, 8, 32, 8, 4, torch.device("meta")).per_slice == 24


def test_tiles_of_backward_of_long_rows():
    """Half the samples on half the warps; a tile of one sample keeps its warps."""
    meta = torch.device("meta")
    found = {
        (B, J): plans.backward_tile(plans.vector_plan(B, 32, J, 16, 4, meta), False, False)
        for B, J in ((128, 100), (1, 100), (128, 500), (128, 16))
    }
    assert found == {(128, 100): (1, 4), (1, 100): (1, 4), (128, 500): (1, 16), (128, 16): (4, 1)}
    assert plans.backward_tile(plans.vector_plan(128, 32, 16, 16, 4, meta), True, True) == (2, 1)


def test_explain_says_where_gradients_are_made():
    def form(K, J, D=8, **options):
        u, W = torch.empty(128, 1152, K), torch.empty(1152, K, J, D)
        return explain(u, W, backend="triton", **options).form.partition(", ")[2]

    assert form(8, 32) == form(8, 32, method="sda") == "votes and gradients on tensor cores"
    # more than registers hold of W
    expected = "gradients on vector units, votes on tensor cores"
    assert form(24, 32, routing_grad="full") == expected
    # or of a row, whose j are padded to eights
    assert form(8, 128) == form(8, 1, 128) == ""


def test_explain_names_what_runs(form, device, monkeypatch):
    u, W = torch.empty(3, 6, 3, device=device), torch.empty(6, 3, 5, 3, device=device)
    explained = explain(u, W, backend="triton")
    with launch.recording() as launches:
        got = routing(u.requires_grad_(), W, backend="triton")
        got.sum().backward()
    assert explained.forward + explained.backward == tuple(map(str, launches))
    assert explained.form.startswith("on chip" if form == "on chip" else "streamed")
    assert explained.form.endswith("tensor cores") == (form == "tensor cores")
    assert explain(u.cpu(), W.cpu()).backend == "chunked"
    assert explain(u, W, method="sda", sda_mean="batch").backend == "reference"
    assert explain(u, W, method="sda", sda_scale="published").backend == "reference"
    rba = explain(u.cpu(), W.cpu(), sda_scale="published")
    assert rba.backend == "chunked"  # it has no such scale
    with pytest.raises(ValueError, match="method must be"):
        explain(u, W, method="em", backend="triton")
    for option in (dict(sda_mean="batch"), dict(sda_scale="published")):
        with pytest.raises(ValueError, match='needs backend="reference" or None; got "triton"'):
            explain(u, W, method="sda", backend="triton", **option)
    monkeypatch.setattr(routing_op, "triton_installed", lambda: False)
    with pytest.raises(ValueError, match="pip install triton"):
        explain(u, W, backend="triton")


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    x, W = torch.randn(2, 3, 4), torch.randn(3, 4, 5, 2)
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    with pytest.raises(ValueError, match="needs tensors on a GPU; got one on cpu"):
        squash(x, backend="triton")
    monkeypatch.setattr(launch, "triton_installed", lambda: False)
    with pytest.raises(ValueError, match="needs the package triton"):
        routing(x, W, backend="triton")
    assert routing(x, W).shape == (2, 5, 2)
