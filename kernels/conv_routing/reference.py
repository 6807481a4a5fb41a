"""The specification of convolutional routing: unfold, followed by routing. Any float dtype."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

from ..routing import reference


def conv_routing(
    u: Tensor,
    W: Tensor,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    iterations: int = 3,
    method: str = "rba",
    routing_grad: str = "final",
    bias: Tensor | None = None,
) -> Tensor:
    """Route windows of u [B, H, Wd, N, K] through W [kh, kw, N, K, J, D]; see `op.conv_routing`.

    A capsule of the padding is zero, so all its votes are: none of them adds to a sum, and its
    couplings are its own.
    """
    windows = unfold(u, W.shape[:2], stride, padding)  # [B, H', W', kh, kw, N, K]
    v = reference.routing(
        windows.flatten(3, 5).flatten(0, 2),
        W.flatten(0, 2),
        iterations=iterations,
        method=method,
        routing_grad=routing_grad,
        bias=bias,
    )
    return v.unflatten(0, windows.shape[:3])


def unfold(
    u: Tensor, kernel: tuple[int, ...], stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """The capsules of every output position's window [B, H', W', kh, kw, N, K]."""
    (kh, kw), (sy, sx), (py, px) = kernel, stride, padding
    padded = pad(u, (0, 0, 0, 0, px, px, py, py))
    return padded.unfold(1, kh, sy).unfold(2, kw, sx).permute(0, 1, 2, 5, 6, 3, 4)
