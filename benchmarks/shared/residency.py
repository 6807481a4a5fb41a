"""What a launch finds in L2 of what launches before it have touched.

A byte is there if what was touched since its last use fits L2: all of the launches between, and of
the two launches the rest of the one and the beginning of the other. Launches are taken to walk
through their tensors at an even pace from their first byte to their last.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

STEPS = 16
"""Places of a tensor at which it is looked up whether L2 still holds it."""

Touched = Mapping[Hashable, float]
"""Bytes that a launch touches, by the tensor they belong to."""


class L2:
    """The launches so far.

    Args:
        size: bytes that L2 holds.
        repeated: every launch is made many times in a row, as when it is timed.
    """

    def __init__(self, size: float, repeated: bool = False):
        self.size, self.repeated = size, repeated
        self.launches: list[Touched] = []

    def follow(self, touched: Touched) -> dict[Hashable, float]:
        """Makes one more launch; bytes of each tensor that it finds in L2."""
        before = [*self.launches, touched] if self.repeated else self.launches
        found = {}
        for tensor, size in touched.items():
            last = max((n for n, some in enumerate(before) if tensor in some), default=None)
            if last is not None:
                between = before[last + 1 :]
                share = held(before[last], between, touched, self.size)
                found[tensor] = min(size, before[last][tensor]) * share
        self.launches.append(touched)
        return found


def held(first: Touched, between: list[Touched], then: Touched, size: float) -> float:
    """Share of a tensor that L2 still holds in the launch `then` since the launch `first`."""
    whole: dict[Hashable, float] = {}
    for some in between:
        for tensor, n in some.items():
            whole[tensor] = max(n, whole.get(tensor, 0.0))
    count = 0
    for step in range(STEPS):
        place = (step + 0.5) / STEPS
        since = sum(
            max(
                whole.get(tensor, 0.0),
                (1 - place) * first.get(tensor, 0.0) + place * then.get(tensor, 0.0),
            )
            for tensor in {*first, *whole, *then}
        )
        count += since <= size
    return count / STEPS
