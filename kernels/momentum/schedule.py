"""Which layers of a momentum stack restart the velocity, and after which x and v are stored."""

from __future__ import annotations

from typing import NamedTuple


class Schedule(NamedTuple):
    """gamma, and the layers of a stack that are special, counted from 0."""

    gamma: float
    block: int
    """v is set to zero before every layer that is a multiple of this, but the first; 0: never."""
    anchors: list[int]
    """Layers after which (x, v) is stored, in order; the last layer is always one."""

    def restarts(self, layer: int) -> bool:
        return self.block > 0 and layer > 0 and layer % self.block == 0

    def segments(self) -> list[tuple[int, int]]:
        """Runs of layers, (first, last + 1), that end at an anchor."""
        ends = [layer + 1 for layer in self.anchors]
        return list(zip([0, *ends[:-1]], ends, strict=True))


def schedule(layers: int, gamma: float, every: int, block: int) -> Schedule:
    """Anchors after every `every` layers, after the last, and before every restart."""

    def anchored(layer: int) -> bool:
        end = layer + 1
        return end == layers or end % every == 0 or (block > 0 and end % block == 0)

    return Schedule(gamma, block, [layer for layer in range(layers) if anchored(layer)])
