"""Convolutional routing: the specification, and the implementation that runs by default."""

import pytest
import torch

from mocapsnet.kernels import conv_routing, routing

METHODS = ["rba", "sda"]
GRADS = ["final", "full"]


def problem(shape, kernel, capsules, dtype=torch.float64, seed=0, scale=0.7):
    """u, W and bias for a shape B, H, Wd, a kernel and N, K, J, D; couplings far from uniform."""
    N, K, J, D = capsules
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).mul(scale).to(dtype)

    return randn(*shape, N, K), randn(*kernel, N, K, J, D), randn(J, D)


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
