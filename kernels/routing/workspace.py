"""Memory that the calls of a thread share, on a CPU."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

DEVICES = ("cpu",)
"""Kinds of devices where memory is shared. On GPUs PyTorch's allocator keeps some at hand and knows
what streams and CUDA graphs still use; what is kept here is dropped when more is wanted."""


class _Workspaces(threading.local):
    """Memory by device and dtype, of each thread its own."""

    def __init__(self) -> None:
        self.held: dict[tuple[torch.device, torch.dtype], Tensor] = {}


_workspaces = _Workspaces()


def workspace(like: Tensor, size: int) -> Tensor:
    """Uninitialised memory that all calls of this thread share, one after the other, on a CPU.

    Fresh memory of this size costs a page fault every 4 KB, more than what is computed in it.
    """
    if like.device.type not in DEVICES:
        return like.new_empty(size)
    key = (like.device, like.dtype)
    held = _workspaces.held.get(key)
    if held is None or held.numel() < size:
        with torch.inference_mode(False):  # else it could not be used outside of it
            held = torch.empty(size, dtype=like.dtype, device=like.device)
        _workspaces.held[key] = held
    return held[:size]
