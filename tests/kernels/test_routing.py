"""The implementation that runs by default, against the reference in float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mocapsnet.kernels import explain, routing
from mocapsnet.kernels.routing import chunked, direct, op
from mocapsnet.kernels.routing import reference as specification
from mocapsnet.kernels.routing.op import routing_backward, routing_forward

METHODS = ["rba", "sda"]
GRADS = ["final", "full"]


def problem(B, N, K, J, D, dtype=torch.float64, seed=0, scale=0.7):
    """u, W, bias and an incoming gradient; scale gives couplings that are far from uniform."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).mul(scale).to(dtype)

    return randn(B, N, K), randn(N, K, J, D), randn(J, D), randn(B, J, D)


def run(u, W, bias, g, **options):
    leaves = [x.detach().clone().requires_grad_() for x in (u, W, bias)]
    v = routing(leaves[0], leaves[1], bias=leaves[2], **options)
    v.backward(g.to(v.dtype))
    return [v.detach(), *(x.grad for x in leaves)]


@pytest.fixture
def small_chunks(monkeypatch):
    """About three input capsules per chunk: small problems have several, the last ragged."""
    monkeypatch.setattr(chunked, "chunk_bytes", lambda: 3 * 5 * 4 * 5 * 8)
    monkeypatch.setattr(direct, "VOTES", 0)


@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("seen", [False, True], ids=["plain", "as an operation"])
def test_few_votes_equal_the_reference_in_float64(seen, grad, iterations, monkeypatch):
    """All at once, which must run: what else could is broken."""
    monkeypatch.setattr(chunked, "iterate", None)
    if not seen:
        monkeypatch.setattr(op, "routing_forward", None)
    else:
        monkeypatch.setattr(op, "observed", lambda: True)
        if grad == "final" and iterations > 1:
            monkeypatch.setattr(chunked, "differentiate", None)
    for keep in (1 << 20, 0):
        monkeypatch.setattr(chunked, "KEPT_BYTES", keep)
        arguments = problem(B=4, N=11, K=3, J=5, D=5)
        options = dict(routing_grad=grad, iterations=iterations)
        expected = run(*arguments, **options, backend="reference")
        for got, want in zip(run(*arguments, **options), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bias_too", [True, False])
@pytest.mark.parametrize("grad", GRADS)
def test_few_votes_have_second_derivatives(grad, bias_too):
    u, W, bias = problem(B=3, N=4, K=2, J=3, D=2)[:3]
    u[2] = 0  # as of an image without anything
    u, W, bias = (x.requires_grad_() for x in (u, W, bias))
    plain = bias if bias_too else None

    def second(backend):
        v = routing(u, W, bias=plain, routing_grad=grad, backend=backend)
        (du,) = torch.autograd.grad(v.square().sum(), u, create_graph=True)
        return torch.autograd.grad(du.sin().sum(), (u, W, bias)[: 2 + bias_too])

    for got, want in zip(second("chunked"), second("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_which_shapes_are_routed_directly():
    def faster(B, *shape, method="rba"):
        return direct.faster(B, torch.empty(shape, device="meta"), method)

    assert faster(1, 288, 8, 32, 8) and faster(8, 1152, 8, 32, 8) and faster(128, 32, 8, 10, 16)
    assert not faster(16, 1152, 8, 32, 8) and not faster(8, 10000, 8, 100, 16)  # memory
    assert not faster(1, 32, 8, 32, 8)  # a stack's layer
    assert not faster(1, 288, 8, 32, 8, method="sda")
    u, W = torch.empty(1, 288, 8, device="meta"), torch.empty(288, 8, 32, 8, device="meta")
    assert "all votes at once" in str(explain(u, W))


@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_reference_in_float64(method, grad, iterations, small_chunks):
    arguments = problem(B=4, N=11, K=3, J=5, D=5)
    options = dict(method=method, routing_grad=grad, iterations=iterations)
    expected = run(*arguments, **options, backend="reference")
    for got, want in zip(run(*arguments, **options), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("votes", [0, 1 << 20], ids=["chunked", "direct"])
def test_kept_and_recomputed_couplings_give_the_same_bits(method, keep, votes, monkeypatch):
    monkeypatch.setattr(direct, "VOTES", votes)
    arguments = problem(B=4, N=11, K=3, J=5, D=5)
    once = run(*arguments, method=method)
    monkeypatch.setattr(chunked, "KEPT_BYTES", (1 << 20) * keep)
    u, W, bias, _ = arguments
    kept = routing_forward(u, W, bias, 3, method, "final", True, "chunked")[2]
    assert kept.shape == ((11, 5, 4) if keep else (0,))
    for got, want in zip(run(*arguments, method=method), once, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "B, N, K, J, D",
    [
        (0, 3, 2, 4, 2),  # empty batch
        (1, 1, 1, 1, 1),  # one of everything: softmax over one capsule
        (2, 5, 3, 1, 4),  # one output capsule
        (2, 1, 3, 4, 2),  # one input capsule
        (3, 7, 5, 2, 1),  # one output dimension
    ],
)
@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("method", METHODS)
def test_smallest_sizes(B, N, K, J, D, method, grad):
    arguments = problem(B, N, K, J, D)
    options = dict(method=method, routing_grad=grad)
    expected = run(*arguments, **options, backend="reference")
    for got, want in zip(run(*arguments, **options), expected, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_eager_code(dtype, method, grad):
    arguments = [x.to(dtype) for x in problem(B=8, N=40, K=8, J=6, D=8, scale=0.4)]
    options = dict(method=method, routing_grad=grad)
    truth = run(*(x.double() for x in arguments), **options, backend="reference")
    eager = run(*arguments, **options, backend="reference")
    got = run(*arguments, **options)
    for x, e, t in zip(got, eager, truth, strict=True):
        assert x.dtype == dtype
        floor = torch.finfo(dtype).eps * t.abs().max()  # one unit of the largest element
        assert ((x - t).abs().max() <= 2 * (e - t).abs().max() + floor).item()
        # element-wise: as far from the truth as two roundings of the eager code's worst element
        assert ((x - t).abs() <= 2 * (e - t).abs().max() + floor).all()


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck_of_the_full_gradient(method, small_chunks):
    u, W, bias, _ = problem(B=2, N=5, K=3, J=3, D=2)
    leaves = [x.requires_grad_() for x in (u, W, bias)]

    def full(u, W, bias):
        return routing(u, W, bias=bias, method=method, routing_grad="full")

    assert torch.autograd.gradcheck(full, leaves)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("kind", ["zero", "tiny", "huge", "tied"])
def test_extreme_votes(kind, grad, method):
    u, W, bias, g = problem(B=3, N=6, K=4, J=5, D=3)
    bias = bias * 0
    u = {"zero": u * 0, "tiny": u * 1e-100, "huge": u * 1e8, "tied": u}[kind]
    W = W[:, :, :1].expand(-1, -1, 5, -1).contiguous() if kind == "tied" else W
    options = dict(method=method, routing_grad=grad)
    expected = run(u, W, bias, g, **options, backend="reference")
    for got, want in zip(run(u, W, bias, g, **options), expected, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9 * float(want.abs().max()))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 6)] * 5),
    method=st.sampled_from(METHODS),
    grad=st.sampled_from(GRADS),
    iterations=st.integers(1, 4),
    scale=st.sampled_from([0.0, 1e-3, 0.5, 3.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_scale(shape, method, grad, iterations, scale, seed):
    arguments = problem(*shape, seed=seed, scale=scale)
    options = dict(method=method, routing_grad=grad, iterations=iterations)
    expected = run(*arguments, **options, backend="reference")
    for got, want in zip(run(*arguments, **options), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_strided_inputs_and_expanded_gradients():
    u, W, bias, g = problem(B=4, N=6, K=3, J=5, D=2)
    g = g[:1, :, :1].expand(4, 5, 2)
    expected = run(u, W, bias, g.contiguous())
    strided_u = u.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    strided_W = W.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert not strided_u.is_contiguous() and not strided_W.is_contiguous()
    u1, W1 = strided_u.requires_grad_(), strided_W.requires_grad_()
    b1 = bias.clone().requires_grad_()
    v = routing(u1, W1, bias=b1)
    v.backward(g)
    for got, want in zip([v.detach(), u1.grad, W1.grad, b1.grad], expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def strided(x):
    """The same numbers, the last dimension first in memory, as channels-last has W."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("iterations", [1, 3])
def test_weights_in_another_layout(method, grad, iterations, small_chunks, monkeypatch):
    u, W, bias, g = problem(B=4, N=6, K=3, J=5, D=2)
    options = dict(method=method, routing_grad=grad, iterations=iterations)
    monkeypatch.setattr(direct, "faster", lambda *_: False)
    for layout in (strided(W), W.transpose(1, 2).contiguous().transpose(1, 2)):
        assert not layout.is_contiguous()
        leaves = [x.requires_grad_() for x in (u.clone(), layout.detach(), bias.clone())]
        v = routing(leaves[0], leaves[1], bias=leaves[2], **options)
        found = v.detach(), *torch.autograd.grad(v, leaves, g)
        expected = run(u, W, bias, g, **options, backend="reference")
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_inputs_and_gradient_are_left_alone():
    arguments = problem(B=4, N=6, K=3, J=5, D=2)
    before = [x.clone() for x in arguments]
    for method, grad in itertools.product(METHODS, GRADS):
        run(*arguments, method=method, routing_grad=grad)
    for x, y in zip(arguments, before, strict=True):
        assert torch.equal(x, y)


def test_frozen_inputs_get_no_gradient():
    u, W, _, g = problem(B=2, N=6, K=3, J=5, D=2)
    W.requires_grad_()
    routing(u, W).backward(g)
    assert u.grad is None and W.grad is not None


def test_bias_alone_can_be_trained():
    u, W, bias, g = problem(B=2, N=6, K=3, J=5, D=2)
    expected = run(u, W, bias, g)[3]
    bias.requires_grad_()
    routing(u, W, bias=bias).backward(g)
    assert torch.equal(bias.grad, expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grad", GRADS)
def test_same_inputs_same_bits(method, grad):
    arguments = problem(B=4, N=30, K=8, J=6, D=8, dtype=torch.float32)
    options = dict(method=method, routing_grad=grad)
    once, twice = run(*arguments, **options), run(*arguments, **options)
    assert all(torch.equal(x, y) for x, y in zip(once, twice, strict=True))
    with torch.no_grad():
        v = routing(*arguments[:2], bias=arguments[2], **options)
    assert torch.equal(v, once[0])


def test_mixed_dtypes_and_autocast():
    u, W, bias, _ = problem(B=4, N=6, K=3, J=5, D=2, dtype=torch.float32)
    low = u.bfloat16()
    expected = routing(low.float(), W, bias=bias)
    assert torch.equal(routing(low, W, bias=bias), expected)
    for backend in (None, "reference"):
        plain = routing(u, W, bias=bias, backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(routing(u, W, bias=bias, backend=backend), plain)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("layout", [lambda W: W, strided])
def test_opcheck(method, grad, layout, monkeypatch):
    u, W, bias, g = problem(B=2, N=6, K=3, J=5, D=2, dtype=torch.float32)
    W = layout(W)
    monkeypatch.setattr(direct, "faster", lambda *_: False)
    leaves = [x.requires_grad_() for x in (u, W, bias)]
    keep = method == "rba" and grad == "final"
    torch.library.opcheck(routing_forward.registered, (*leaves, 3, method, grad, keep, "chunked"))
    _, sums, kept = routing_forward(u, W, bias, 3, method, grad, keep, "chunked")
    tensors = [x.detach() for x in (g, u, W, sums, kept)]
    torch.library.opcheck(routing_backward.registered, (*tensors, method, grad, True, "chunked"))


@pytest.mark.parametrize("grad", GRADS)
def test_compiles_into_one_graph(grad):
    arguments = problem(B=4, N=6, K=3, J=5, D=2)

    def loss(u, W, bias, g):
        return (routing(u.tanh(), W, bias=bias, routing_grad=grad) * g).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        leaves = [x.clone().requires_grad_() for x in arguments[:3]]
        value = function(*leaves, arguments[3])
        value.backward()
        results.append([value.detach(), *(x.grad for x in leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_peak_memory_is_bounded_by_chunks_and_kept_couplings():
    """Layer 1 for MNIST has 151 MB of votes; forward and backward must stay under 64 MB."""
    u, W = (x.requires_grad_() for x in problem(128, 1152, 8, 32, 8, dtype=torch.float32)[:2])
    g = torch.ones(128, 32, 8)
    with torch.profiler.profile(profile_memory=True) as profile:
        routing(u, W).backward(g)
    live = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert 14e6 < peak < 64e6, f"{peak / 1e6:.1f} MB"  # the gradients alone are 14 MB


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(u=torch.zeros(2, 3)), r"u must have 3 dimensions \[B N K\]"),
        (dict(u=torch.zeros(2, 4, 3)), "must agree in N and K"),
        (dict(u=torch.zeros(2, 6, 3).int()), "must be floating point"),
        (dict(W=torch.zeros(6, 3, 0, 2)), "no empty dimension"),
        (dict(W=torch.zeros(6, 3, 5, 2, device="meta")), "one device"),
        (dict(bias=torch.zeros(5, 3)), r"bias must be \[J, D\] = \[5, 2\]"),
        (dict(iterations=0), "iterations must be an integer of at least 1"),
        (dict(method="em"), "method must be one of 'rba', 'sda'; got 'em'"),
        (dict(routing_grad="none"), "routing_grad must be one of"),
        (dict(sda_mean="all"), "sda_mean must be one of"),
        (dict(backend="cuda"), "backend must be one of"),
        (dict(method="sda", sda_mean="batch", backend="chunked"), 'needs backend="reference"'),
        (dict(sda_scale="log"), "sda_scale must be one of 'paper', 'published'; got 'log'"),
        (
            dict(method="sda", sda_scale="published", backend="chunked"),
            'sda_scale="published" needs backend="reference" or None; got "chunked"',
        ),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = dict(u=torch.zeros(2, 6, 3), W=torch.zeros(6, 3, 5, 2)) | change
    with pytest.raises(ValueError, match=message):
        routing(arguments.pop("u"), arguments.pop("W"), **arguments)


def test_the_chosen_implementation_never_calls_the_reference(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("the reference ran")

    monkeypatch.setattr(specification, "routing", fail)
    arguments = problem(B=2, N=6, K=3, J=5, D=2)
    for backend in (None, "chunked"):
        run(*arguments, backend=backend)
    with pytest.raises(AssertionError, match="the reference ran"):
        run(*arguments, backend="reference")


@pytest.mark.parametrize("B, N", [(4, 64), (32, 150)], ids=["direct", "chunked"])
def test_autocast_around_backward_lowers_no_gradient(B, N):  # noqa: N803
    """As of `with torch.autocast(...): loss(model(x)).backward()`."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(B, N, 8, generator=generator).requires_grad_()
    W = (torch.randn(N, 8, 10, 16, generator=generator) / 8).requires_grad_()
    v = routing(u, W, backend="chunked")
    want = torch.autograd.grad(v, (u, W), torch.ones_like(v), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(v, (u, W), torch.ones_like(v))
    for a, b in zip(got, want, strict=True):
        assert a.equal(b)


def test_second_derivatives_of_few_samples_in_every_way():
    """As `backward=True` of a reference that autograd differentiates."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64).requires_grad_()
    W = torch.randn(5, 3, 2, 4, generator=generator, dtype=torch.float64)  # noqa: N806

    def curvature(backend, vectorize):
        def f(u):
            return routing(u.tanh(), W, backend=backend)

        J = torch.autograd.functional.jacobian(  # noqa: N806
            f, a, create_graph=True, vectorize=vectorize
        )
        return torch.autograd.grad(J.square().sum(), a)[0]

    want = curvature("reference", False)
    for vectorize in (False, True):
        torch.testing.assert_close(curvature("chunked", vectorize), want)
