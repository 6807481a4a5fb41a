"""Plain loops written straight from the formulas of the papers, vector by vector, in float64."""

import math

import torch
from torch import Tensor


def squash(s: Tensor) -> Tensor:
    """Sabour et al. 2017, equation 1: |s|^2 / (1 + |s|^2) * s / |s|."""
    n = math.sqrt(sum(float(x) ** 2 for x in s))
    return s * 0 if n == 0 else n**2 / (1 + n**2) * (s / n)


def primary_capsules(features: Tensor, dim: int) -> Tensor:
    B, C, H, Wd = features.shape
    out = []
    for b in range(B):
        for group in range(C // dim):
            for y in range(H):
                for x in range(Wd):
                    out.append(squash(features[b, group * dim : (group + 1) * dim, y, x]))
    return torch.stack(out).view(B, -1, dim)


def votes(u: Tensor, W: Tensor) -> Tensor:
    """Sabour et al. 2017, equation 2."""
    B, N, K = u.shape
    J, D = W.shape[2:]
    u_hat = torch.zeros(B, N, J, D, dtype=u.dtype)
    for b in range(B):
        for i in range(N):
            for j in range(J):
                for d in range(D):
                    u_hat[b, i, j, d] = sum(u[b, i, k] * W[i, k, j, d] for k in range(K))
    return u_hat


def softmax(b: list[float]) -> list[float]:
    e = [math.exp(x - max(b)) for x in b]
    return [x / sum(e) for x in e]


def rba(u: Tensor, W: Tensor, R: int) -> Tensor:
    """Sabour et al. 2017, procedure 1."""
    u_hat = votes(u, W)
    B, N, J, D = u_hat.shape
    out = torch.zeros(B, J, D, dtype=u.dtype)
    for n in range(B):
        b = [[0.0] * J for _ in range(N)]
        for _ in range(R):
            c = [softmax(row) for row in b]
            v = [squash(sum(c[i][j] * u_hat[n, i, j] for i in range(N))) for j in range(J)]
            for i in range(N):
                for j in range(J):
                    b[i][j] += float(u_hat[n, i, j] @ v[j])
        out[n] = torch.stack(v)
    return out


def sda(u: Tensor, W: Tensor, R: int) -> Tensor:
    """Peer et al. 2018, scaled-distance agreement."""
    u_hat = votes(u, W)
    B, N, J, D = u_hat.shape
    out = torch.zeros(B, J, D, dtype=u.dtype)
    for n in range(B):
        short = u_hat[n].clone()
        for i in range(N):
            for j in range(J):
                length = float(short[i, j].norm())
                if length > 0:
                    short[i, j] *= min(length, float(u[n, i].norm())) / length
        b = [[0.0] * J for _ in range(N)]
        for _ in range(R):
            c = [softmax(row) for row in b]
            v = [squash(sum(c[i][j] * short[i, j] for i in range(N))) for j in range(J)]
            for i in range(N):
                d = [float((v[j] - short[i, j]).norm()) for j in range(J)]
                mean = sum(d) / J
                t = (math.log(0.9 * (J - 1)) - math.log(0.1)) / (0.5 * mean - mean)
                b[i] = [t * x for x in d]
        out[n] = torch.stack(v)
    return out
