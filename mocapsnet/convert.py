"""Parameters of other capsule networks in the form this library's layers want.

Capsule networks agree in their formulas and differ in how they lay out the same numbers. What the
usual repositories do is listed, with what to call for each, in docs/converting.md.
"""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import torch
from torch import Tensor

OURS = "NKJD"


def matrices(
    W: Any,
    layout: str | None = None,
    *,
    N: int | None = None,
    K: int | None = None,
    J: int | None = None,
    D: int | None = None,
) -> Tensor:
    """Transformation matrices of another library as `CapsuleLayer.weight` [N, K, J, D].

    Args:
        W: the matrices, a tensor or an array.
        layout: the axes of W, outermost first: N input capsules of dimension K, J output capsules
            of dimension D, 1 for an axis of one element, and two letters in parentheses where two
            axes are one, the first changing more slowly. "1 J N D K" is the published
            MoCapsNet's, "N K (J D)" that of a matrix product with all output capsules at once.
            None finds the layout from the sizes.
        N, K, J, D: sizes, where known. With a layout they are checked, and needed only to divide
            joined axes. Without, all but one are needed, and those longer than one must differ:
            a square layer, whose input and output capsules are alike, fits several layouts.
    Returns: the same numbers [N, K, J, D], contiguous, in memory of their own.
    Raises: ValueError if W does not fit the layout or the sizes, or fits several layouts.
    """
    W = torch.as_tensor(W)
    sizes = {name: size for name, size in zip(OURS, (N, K, J, D), strict=True) if size is not None}
    axes = _find(W, sizes) if layout is None else _parse(layout)
    flat = [name for axis in axes for name in axis]
    ordered = W.reshape(_lengths(W, axes, sizes)).permute([flat.index(n) for n in OURS])
    return ordered.clone(memory_format=torch.contiguous_format)


def filters(parameter: Any, order: str, *, K: int) -> Tensor:
    """Filters or biases of the convolution before primary capsules, in this library's order.

    Here the K components of a capsule are K neighbouring channels: "G K", for G channel groups.
    Where each component has a convolution of its own, of G channels, and the K convolutions are
    joined by `torch.cat`, the order is "K G".

    Args:
        parameter: weight [G K, in, height, width] or bias [G K], a tensor or an array.
        order: "K G" or "G K", the first changing more slowly.
        K: components of a primary capsule.
    Returns: the same numbers, output channels in the order "G K".
    Raises: ValueError if the order is unknown or the channels are no multiple of K.
    """
    parameter = torch.as_tensor(parameter)
    order = _order(order, "GK")
    channels = parameter.shape[0] if parameter.dim() else 0
    if K < 1 or channels % K or not channels:
        raise ValueError(
            f"parameter must have a multiple of K={K} output channels, its first axis; got shape "
            f"{list(parameter.shape)}"
        )
    G = channels // K
    sizes = {"G": G, "K": K}
    split = parameter.unflatten(0, [sizes[name] for name in order])
    ordered = (split if order == "GK" else split.transpose(0, 1)).flatten(0, 1)
    return ordered.clone(memory_format=torch.contiguous_format)


def input_capsules(weight: Tensor, order: str, *, G: int, H: int, W: int) -> Tensor:
    """The first capsule layer's weight, its input capsules in the order of `PrimaryCapsules`.

    Primary capsules are counted here by channel group, then row, then column: "G H W". Code whose
    channels come last counts them by row, column, group: "H W G".

    Args:
        weight: matrices [N, K, J, D], N = G H W, as `matrices` returns them.
        order: how the other network counts its primary capsules, slowest index first.
        G, H, W: channel groups, rows and columns of its feature map.
    Returns: the same matrices [N, K, J, D], counted "G H W".
    Raises: ValueError if the order is unknown, or N is not G H W.
    """
    order = _order(order, "GHW")
    sizes = {"G": G, "H": H, "W": W}
    if weight.dim() != 4 or weight.shape[0] != G * H * W:
        raise ValueError(
            f"weight must be [N, K, J, D] with N = G H W = {G * H * W}; got {list(weight.shape)}"
        )
    split = weight.unflatten(0, [sizes[name] for name in order])
    axes = [order.index(name) for name in "GHW"]
    ordered = split.permute(*axes, 3, 4, 5).flatten(0, 2)
    return ordered.clone(memory_format=torch.contiguous_format)


def _order(order: str, names: str) -> str:
    found = order.replace(" ", "")
    if sorted(found) != sorted(names):
        raise ValueError(f"order must hold {', '.join(names)} once each; got {order!r}")
    return found


def _parse(layout: str) -> list[str]:
    """The axes of a layout: "", for an axis of one element, one letter, or several."""
    found = re.findall(r"\(([NKJD\s]+)\)|([NKJD1])", layout)
    axes = ["".join(joined.split()) + single.replace("1", "") for joined, single in found]
    rest = re.sub(r"\([NKJD\s]+\)|[NKJD1\s]", "", layout)
    if rest or sorted("".join(axes)) != sorted(OURS):
        raise ValueError(
            "layout must name each of N, K, J and D once, outermost first, with 1 for an axis of "
            f'one element and parentheses for joined axes, as "1 J N D K"; got {layout!r}'
        )
    return axes


def _lengths(W: Tensor, axes: list[str], sizes: dict[str, int]) -> list[int]:
    """The lengths of the four axes in the order in which `axes` names them."""
    named = "[" + ", ".join(" ".join(axis) or "1" for axis in axes) + "]"
    fits = W.dim() == len(axes)
    lengths: list[int] = []
    for length, axis in zip(W.shape, axes, strict=False):
        known = [sizes[name] for name in axis if name in sizes]
        unknown = len(axis) - len(known)
        if unknown > 1:
            raise ValueError(
                f"layout {named} joins {' and '.join(axis)}, {length} in all: give the size of one"
            )
        rest = math.prod(known)
        fits = fits and (rest > 0 and length % rest == 0 if unknown else length == rest)
        lengths += [sizes.get(name, length // max(rest, 1)) for name in axis]
    if not fits:
        wanted = "".join(f", {name}={size}" for name, size in sizes.items())
        raise ValueError(f"W of shape {list(W.shape)} does not fit the layout {named}{wanted}")
    return lengths


def _find(W: Tensor, sizes: dict[str, int]) -> list[str]:
    """The only layout of four axes, and others of one element, that fits the sizes."""
    if len(sizes) < 3:
        raise ValueError(
            "without a layout at least three of N, K, J and D must be given; got "
            f"{', '.join(f'{n}={s}' for n, s in sizes.items()) or 'none'}"
        )
    found: dict[tuple[str, ...], list[str]] = {}
    for order in itertools.permutations(OURS):
        for where in itertools.combinations(range(W.dim()), 4):
            axes = [""] * W.dim()
            for axis, name in zip(where, order, strict=True):
                axes[axis] = name
            fits = all(
                length == sizes.get(name, length) if name else length == 1
                for length, name in zip(W.shape, axes, strict=True)
            )
            # Where axes of one element stand makes no difference.
            memory = tuple(n for n, s in zip(axes, W.shape, strict=True) if s > 1)
            if fits:
                found.setdefault(memory, axes)
    given = ", ".join(f"{name}={size}" for name, size in sizes.items())
    if not found:
        raise ValueError(
            f"no order of N, K, J and D fits W of shape {list(W.shape)} and {given}: check the "
            'sizes, or give the layout, as "N K (J D)" where axes are joined'
        )
    if len(found) > 1:
        several = " or ".join(repr(" ".join(n or "1" for n in axes)) for axes in found.values())
        raise ValueError(
            f"W of shape {list(W.shape)} with {given} can be read in several ways: give layout="
            f"{several}, as the code says that wrote it"
        )
    return next(iter(found.values()))
