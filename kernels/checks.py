"""Argument checks of the public functions: each raises one ValueError that says what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
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


def routing_options(
    iterations: int, method: str, routing_grad: str, sda_mean: str, sda_scale: str
) -> None:
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations must be an integer of at least 1; got {iterations!r}")
    choice("method", method, ("rba", "sda"))
    choice("routing_grad", routing_grad, ("final", "full"))
    choice("sda_mean", sda_mean, ("input", "batch"))
    choice("sda_scale", sda_scale, ("paper", "published"))


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


def bias(bias: Tensor | None, shape: Sequence[int], device: torch.device) -> None:
    """`bias` is None, or [J, D] of this shape on this device."""
    if bias is None:
        return
    tensor("bias", bias, "J D")
    if bias.shape != tuple(shape) or bias.device != device:
        raise ValueError(
            f"bias must be [J, D] = {list(shape)} on {device}; "
            f"got {list(bias.shape)} on {bias.device}"
        )


def pair(name: str, value: object, least: int) -> tuple[int, int]:
    """`value`, an integer of at least `least` or two of them for y and x, as two."""
    both = (value, value) if isinstance(value, int) else value
    if (
        not isinstance(both, Sequence)
        or len(both) != 2
        or not all(isinstance(x, int) and not isinstance(x, bool) and x >= least for x in both)
    ):
        raise ValueError(
            f"{name} must be an integer of at least {least}, or two for y and x; got {value!r}"
        )
    return both[0], both[1]


def number(name: str, value: object, low: float, high: float = math.inf) -> None:
    """`value` is a real number between `low` and `high`, both included, and finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        wanted = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
    elif math.isinf(value):
        wanted = "finite"
    else:
        return
    raise ValueError(f"{name} must be a number, {wanted}; got {value!r}")


def queued(x: Tensor) -> bool:
    """Whether to look at the values of `x` with the rest of the work: to read them would wait for
    a device, or end what is compiled or captured."""
    return torch.compiler.is_compiling() or x.device.type not in ("cpu", "meta")


def labels(labels: Tensor, lengths: Tensor) -> None:
    """`labels` are class indices [B] for `lengths` [B, classes], on the same device.

    Values are looked at where that waits for nothing. On a GPU, and in compiled code, the check is
    queued with the rest of the work: `torch._assert_async`, as PyTorch's own losses do.
    """
    tensor("lengths", lengths, "B classes")
    B, classes = lengths.shape
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"labels must be a torch.Tensor [B] of class indices; got {type(labels).__name__}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels must be class indices, of an integer dtype; got {labels.dtype}: convert "
            "indices by labels.long(), one-hot rows by labels.argmax(1)"
        )
    if labels.shape != (B,):
        raise ValueError(
            f"labels must be class indices [B] = [{B}]; got shape {list(labels.shape)}: one-hot "
            "rows become indices by labels.argmax(1), a column by labels.squeeze(1)"
        )
    if labels.device != lengths.device:
        raise ValueError(
            f"labels must be on the device of the capsules, {lengths.device}; got {labels.device}"
        )
    if queued(labels):
        inside = labels.clamp(0, classes - 1) == labels
        torch._assert_async(inside.all(), f"labels must lie between 0 and {classes - 1}")
        return
    while torch._C._functorch.is_functorch_wrapped_tensor(labels):  # all samples of a vmap at once
        labels = torch._C._functorch.get_unwrapped(labels)
    if type(labels) is not Tensor or labels.is_meta or torch.jit.is_tracing():
        return
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise ValueError(
            f"labels must lie between 0 and {classes - 1}, for {classes} classes; got {wrong[0]}: "
            "leave out samples that have no class"
        )


def shares(shares: Tensor, lengths: Tensor) -> None:
    """`shares` are numbers between 0 and 1 [B, classes] for `lengths`, on the same device.

    Values are looked at as those of `labels` are.
    """
    tensor("lengths", lengths, "B classes")
    if shares.shape != lengths.shape or shares.device != lengths.device:
        raise ValueError(
            f"labels must be class indices [B], or shares of the classes [B, classes] = "
            f"{list(lengths.shape)} on {lengths.device}; got shape {list(shares.shape)} on "
            f"{shares.device}"
        )
    if queued(shares):
        inside = shares.clamp(0, 1) == shares
        torch._assert_async(inside.all(), "shares of classes must lie between 0 and 1")
        return
    while torch._C._functorch.is_functorch_wrapped_tensor(shares):
        shares = torch._C._functorch.get_unwrapped(shares)
    if type(shares) is not Tensor or shares.is_meta or torch.jit.is_tracing():
        return
    wrong = shares[~(shares.clamp(0, 1) == shares)]
    if len(wrong):
        raise ValueError(f"shares of classes must lie between 0 and 1; got {wrong[0]}")
