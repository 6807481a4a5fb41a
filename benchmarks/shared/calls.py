"""The calls of routing that a network makes in a training step, found without computing anything.

The network is built and run with tensors that have no data; what reaches `torch.library` is noted
down.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mocapsnet.kernels.momentum.schedule import Schedule, schedule
from mocapsnet.kernels.tuning import Problem, name_of
from mocapsnet.train.data import SHAPES, ImageSet, load
from mocapsnet.train.options import TrainOptions
from mocapsnet.train.prepare import build


class Call(NamedTuple):
    """One call of `routing`, or of `momentum_routing` with all its layers."""

    operation: str
    sizes: tuple[int, int, int, int, int]
    """B, N, K, J, D."""
    iterations: int
    method: str
    routing_grad: str
    u: torch.dtype
    W: torch.dtype
    bias: bool
    stack: tuple[int, float, int, int] | None = None
    """Of a stack: layers, gamma, layers between anchors, layers of a block or 0."""

    def problem(self, direction: str, precision: str) -> Problem:
        grad = self.routing_grad if direction == "backward" else ""
        modes = self.iterations, self.method, grad
        dtypes = self.u, self.W
        return Problem(self.operation, direction, *self.sizes, *modes, *dtypes, precision)

    def schedule(self) -> Schedule:
        assert self.stack is not None
        return schedule(*self.stack)

    def __str__(self) -> str:
        layers = f", {self.stack[0]} layers" if self.stack else ""
        dtypes = " and ".join(dict.fromkeys(map(name_of, (self.u, self.W))))
        modes = f"R {self.iterations}, {self.method} {self.routing_grad}"
        return f"{self.operation} {self.sizes}{layers}, {modes}, {dtypes}"


class Seen(TorchDispatchMode):
    """Notes down the calls of routing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.mocapsnet.routing_forward.default:
            u, W, bias, R, method, grad, _, _ = args
            kind = R, method, grad, u.dtype, W.dtype, bias is not None
            (B, N, K), (J, D) = u.shape, W.shape[2:]
            self.calls.append(Call("routing", (B, N, K, J, D), *kind))
        elif func is torch.ops.mocapsnet.momentum_forward.default:
            x, _, weights, biases, *anchors, R, method, grad, _ = args
            B, J, D = x.shape
            kind = R, method, grad, x.dtype, weights[0].dtype, bool(biases)
            stack = (len(weights), *anchors)
            self.calls.append(Call("momentum", (B, J, D, J, D), *kind, stack))
        return func(*args, **(kwargs or {}))


def images_of(options: TrainOptions) -> ImageSet:
    """Shape and classes of the images; those of a folder are read.

    Raises: InputError if they cannot be.
    """
    if options.data.dataset == "folder":
        return load(options.data, quiet=True)[0]
    classes = 100 if options.data.dataset == "cifar100" else 10
    return no_images(SHAPES[options.data.dataset], classes)


def no_images(shape: tuple[int, int, int], classes: int) -> ImageSet:
    labels = torch.empty(0, dtype=torch.int64)
    names = tuple(str(n) for n in range(classes))
    return ImageSet(torch.empty(0, *shape, dtype=torch.uint8), labels, names)


def calls(options: TrainOptions, images: ImageSet, dtype: torch.dtype) -> list[Call]:
    """The different calls in a training step of the network that resolved options describe.

    Args:
        dtype: of parameters and images.
    Raises: InputError if its sizes do not fit.
    """
    batch = max(1, options.optim.batch_size // options.optim.gradient_accumulation)
    bfloat16 = options.machine.mixed_precision == "bf16"
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # tensors without data cannot be converted in their module
    try:
        with FakeTensorMode(), Seen() as seen:
            model = build(options, images)
            pictures = torch.randn(batch, *images.image_shape)
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                model(pictures, torch.zeros(batch, dtype=torch.int64))
    finally:
        torch.set_default_dtype(before)
    return list(dict.fromkeys(seen.calls))
