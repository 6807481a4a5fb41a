"""How windows lie on a grid of capsules."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Windows(NamedTuple):
    """Sizes in y and x: of the input grid, of the windows, their steps, and the padding.

    The window of output position (y, x) holds input positions
    (y stride - padding + dy, x stride - padding + dx), dy and dx from 0 to the kernel's sides.
    """

    H: int
    Wd: int
    kh: int
    kw: int
    sy: int
    sx: int
    py: int
    px: int

    @classmethod
    def of(cls, u: Tensor, W: Tensor, steps: tuple[int, ...]) -> Windows:
        """For u [B, H, Wd, N, K], W [kh, kw, N, K, J, D] and steps sy, sx, py, px."""
        return cls(*u.shape[1:3], *W.shape[:2], *steps)

    @property
    def output(self) -> tuple[int, int]:
        """H' and W'."""
        height = (self.H + 2 * self.py - self.kh) // self.sy + 1
        return height, (self.Wd + 2 * self.px - self.kw) // self.sx + 1

    def addresses(self, N: int, K: int) -> tuple[int, ...]:
        """Where the windows of a grid [B, H + 2 py, Wd + 2 px, N, K] lie, see `routing/tile.py`."""
        H, Wd = self.H + 2 * self.py, self.Wd + 2 * self.px
        n = N * K
        steps = H * Wd * n, self.sy * Wd * n, self.sx * n
        return self.kw * n, (Wd - self.kw) * n, *self.output, *steps
