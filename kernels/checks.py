"""Argument checks of the public functions: each raises one ValueError that says what to do."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def choice(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        options = ", ".join(repr(option) for option in allowed)
        raise ValueError(f"{name} must be one of {options}; got {value!r}")


def tensor(name: str, x: Tensor, shape: str) -> None:
    """`x` is a real floating-point tensor with the dimensions that `shape` names, as "B N K"."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor [{shape}]; got {type(x).__name__}")
    if not x.is_floating_point():
        raise ValueError(
            f"{name} must be floating point; got {x.dtype}: convert it, as {name}.float()"
        )
    if x.dim() != len(shape.split()):
        raise ValueError(
            f"{name} must have {len(shape.split())} dimensions [{shape}]; got shape {list(x.shape)}"
        )


def routing_options(iterations: int, method: str, routing_grad: str, sda_mean: str) -> None:
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations must be an integer of at least 1; got {iterations!r}")
    choice("method", method, ("rba", "sda"))
    choice("routing_grad", routing_grad, ("final", "full"))
    choice("sda_mean", sda_mean, ("input", "batch"))


def capsules_and_weight(u: Tensor, W: Tensor) -> None:
    """`u` [B, N, K] and `W` [N, K, J, D] agree in N, K and device, and N, K, J, D are not zero."""
    tensor("u", u, "B N K")
    tensor("W", W, "N K J D")
    if u.shape[1:] != W.shape[:2]:
        raise ValueError(
            f"u [B, N, K] and W [N, K, J, D] must agree in N and K; got u {list(u.shape)} and "
            f"W {list(W.shape)}"
        )
    if u.device != W.device:
        raise ValueError(f"u and W must be on one device; got u on {u.device} and W on {W.device}")
    if 0 in W.shape:
        raise ValueError(f"W must have no empty dimension; got shape {list(W.shape)}")
