"""The specification of votes, in eager PyTorch for any float dtype."""

import torch
from torch import Tensor


def votes(u: Tensor, W: Tensor) -> Tensor:
    """u_hat[b, i, j, :] = u[b, i, :] @ W[i, :, j, :], [B, N, J, D]."""
    return torch.einsum("bnk,nkjd->bnjd", u, W)
