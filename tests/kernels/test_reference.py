"""The references against plain loops in float64, and at the edges of their domain."""

import itertools
import math

import pytest
import torch

from mocapsnet.kernels import primary_capsules, routing, squash, votes

from . import loops

RTOL = 1e-12  # sums of under 100 float64 terms: a few hundred roundings of 1e-16


def randn(*shape, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator) * scale


def test_squash_matches_the_formula():
    s = randn(3, 4, 5)
    expected = torch.stack([loops.squash(row) for row in s.flatten(0, 1)]).view_as(s)
    torch.testing.assert_close(squash(s), expected, rtol=RTOL, atol=0)


def test_primary_capsules_match_the_formula():
    features = randn(2, 12, 3, 2)  # three groups of four channels, height unlike width
    expected = loops.primary_capsules(features, 4)
    torch.testing.assert_close(primary_capsules(features, 4), expected, rtol=RTOL, atol=0)
    strided = features.to(memory_format=torch.channels_last)
    torch.testing.assert_close(primary_capsules(strided, 4), expected, rtol=RTOL, atol=0)


def test_votes_match_the_formula():
    u, W = randn(2, 3, 4), randn(3, 4, 5, 2)
    torch.testing.assert_close(votes(u, W), loops.votes(u, W), rtol=RTOL, atol=1e-15)
    u, W = u.float(), W.float()
    with torch.autocast("cpu", torch.bfloat16):
        under = votes(u, W)
    assert torch.equal(under, votes(u, W))


@pytest.mark.parametrize("method", ["rba", "sda"])
@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
def test_routing_matches_the_procedure(method, iterations):
    u, W = randn(2, 6, 4), randn(6, 4, 5, 3)
    expected = getattr(loops, method)(u, W, iterations)
    got = routing(u, W, iterations=iterations, method=method, backend="reference")
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


def test_bias_is_added_before_squash():
    u, W, bias = randn(2, 3, 4), randn(3, 4, 5, 2), randn(5, 2)
    expected = squash(loops.votes(u, W).sum(1) / 5 + bias)
    got = routing(u, W, iterations=1, bias=bias, backend="reference")
    torch.testing.assert_close(got, expected, rtol=RTOL, atol=1e-15)


def test_final_gradient_treats_couplings_as_constants():
    """d(u_hat_ij) = c_ij ds_j, with couplings computed apart by the loops' own votes."""
    u, W = randn(2, 6, 4), randn(6, 4, 5, 3)
    u_hat = loops.votes(u, W)
    b = torch.zeros(2, 6, 5, dtype=torch.float64)
    for _ in range(2):
        c = b.softmax(-1)
        b = b + (u_hat * squash((c[..., None] * u_hat).sum(1))[:, None]).sum(-1)
    couplings = b.softmax(-1)
    g = randn(2, 5, 3, seed=1)
    u1, W1 = u.clone().requires_grad_(), W.clone().requires_grad_()
    routing(u1, W1, routing_grad="final", backend="reference").backward(g)
    u2, W2 = u.clone().requires_grad_(), W.clone().requires_grad_()
    squash((couplings[..., None] * torch.einsum("bnk,nkjd->bnjd", u2, W2)).sum(1)).backward(g)
    torch.testing.assert_close(u1.grad, u2.grad, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(W1.grad, W2.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("method", ["rba", "sda"])
def test_full_gradient_is_the_true_derivative(method):
    u, W = randn(2, 4, 3).requires_grad_(), randn(4, 3, 3, 2).requires_grad_()
    bias = randn(3, 2, scale=0.1).requires_grad_()

    def full(u, W, bias):
        return routing(u, W, bias=bias, method=method, routing_grad="full", backend="reference")

    assert torch.autograd.gradcheck(full, (u, W, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e18])
def test_squash_at_extreme_lengths(dtype, scale):
    s = torch.tensor([[3.0, -4.0]], dtype=dtype).mul(scale).requires_grad_()
    v = squash(s)
    v.backward(torch.tensor([[1.0, 2.0]], dtype=dtype))
    n = 5 * scale
    length = n**2 / (1 + n**2)
    torch.testing.assert_close(v.norm().item(), length, rtol=1e-6, atol=1e-37)
    assert s.grad.isfinite().all()
    if scale == 0:
        assert (s.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_that_of_inputs_and_outputs_alone(dtype):
    """In float16 1 + n^2 would overflow from a length of 256 on, and the longest become nothing."""
    for size in (90.0, 200.0):
        s = torch.full((2, 8), size, dtype=dtype)
        features = s[:, :, None, None]
        for v in (squash(s), primary_capsules(features, 8)[:, 0]):
            assert v.dtype == dtype
            torch.testing.assert_close(v, squash(s.double()).to(dtype), rtol=0, atol=0)
    u, W = torch.ones(1, 1152, 8, dtype=dtype), torch.full((1152, 8, 4, 2), 0.1, dtype=dtype)
    for options in ({}, {"method": "sda"}, {"method": "sda", "sda_mean": "batch"}):
        v = routing(u, W, backend="reference", **options)
        assert v.dtype == dtype
        want = routing(u.double(), W.double(), backend="reference", **options).to(dtype)
        torch.testing.assert_close(v, want, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("method", ["rba", "sda"])
def test_second_derivatives_at_zero_capsules(method):
    """Where no length has one, they are 0."""
    s = torch.tensor([[0.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda s: squash(s).sum(), s)
    assert (hessian[0] == 0).all() and hessian.isfinite().all() and hessian.any()
    torch.manual_seed(0)
    u, W = torch.randn(2, 3, 2, dtype=torch.float64), torch.randn(3, 2, 2, 2, dtype=torch.float64)
    u[0, 1] = 0

    def value(u):
        options = dict(method=method, routing_grad="full", backend="reference")
        return routing(u, W, **options).sin().sum()

    hessian = torch.autograd.functional.hessian(value, u)
    assert hessian.isfinite().all()
    torch.testing.assert_close(hessian, torch.func.hessian(value)(u), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sda_mean", ["input", "batch"])
def test_the_published_scale_of_sda(sda_mean):
    """Sample by sample; near votes are wanted where the mean distance is small, else distant."""
    B, N, K, J, D = 2, 6, 4, 5, 3
    W, bias = randn(N, K, J, D), randn(J, D)
    signs = set()
    for length in (0.3, 8.0):
        u = length * randn(B, N, K)
        votes = torch.einsum("bnk,nkjd->bnjd", u, W)
        votes = votes * (u.norm(dim=-1)[:, :, None] / votes.norm(dim=-1)).clamp(max=1)[..., None]
        b = torch.zeros(B, N, J, dtype=u.dtype)
        for _ in range(3):
            v = squash((b.softmax(2)[..., None] * votes).sum(1) + bias)
            for n, k in itertools.product(range(B), range(N)):
                d = (v[n] - votes[n, k]).norm(dim=-1)
                m = d.mean() if sda_mean == "input" else (v[:, None] - votes).norm(dim=-1).mean()
                t = math.log(0.9 * (J - 1)) - math.log(0.1) / (0.5 * m - m)
                signs.add(bool(t > 0))
                b[n, k] = t * d
        found = routing(u, W, method="sda", sda_mean=sda_mean, sda_scale="published", bias=bias)
        torch.testing.assert_close(found, v, rtol=RTOL, atol=1e-15)
    assert signs == {False, True}
    u = torch.zeros(B, N, K, dtype=W.dtype, requires_grad=True)  # NaN in the published code
    v = routing(u, W, method="sda", sda_mean=sda_mean, sda_scale="published")
    v.sum().backward()
    assert (v == 0).all() and u.grad.isfinite().all()


def test_sda_batch_mean_makes_samples_depend_on_each_other():
    u, W = randn(2, 6, 4), randn(6, 4, 5, 3)
    alone = routing(u[:1], W, method="sda", sda_mean="batch")
    together = routing(u, W, method="sda", sda_mean="batch")[:1]
    assert not torch.allclose(alone, together)
    alone = routing(u[:1], W, method="sda")
    together = routing(u, W, method="sda")[:1]
    torch.testing.assert_close(alone, together, rtol=RTOL, atol=1e-15)
