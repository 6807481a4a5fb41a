"""A training step as one CUDA graph: captured once, then replayed on other images.

What a step launches is then launched at once, without the time that Python takes to get there. What
Python does is done only while the step is captured. So a captured step reads no tensor, draws no
random numbers and makes no tensor of numbers of the host; what changes from step to step, which
images and how they are seen, and the learning rate, it reads from tensors that stay where they are.

Before a graph is relied on, it is replayed a few times, and the losses, and where the weights have
gone, are compared with those of eager steps; all that these steps change is put back.

On an H200 a training on the digits was captured and replayed; tests replay on the CPU.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mocapsnet.train.errors import InputError
from mocapsnet.train.optimizers import FusedAdam
from mocapsnet.train.options import TrainOptions

DEVICES = ("cuda",)
"""Kinds of devices that can capture what is launched on them."""
STEPS = 3
"""Eager steps before the capture, which compile kernels and fill caches, and replays after it that
are compared with them."""
NEAR, ALIKE = 0.01, 0.5
"""Relative differences of the losses, and of all that the weights move, up to which replays do what
eager steps do. Kernels may be others under capture, and where a gradient is only rounding Adam may
step either way; but a step that is lost, or done at another rate, is further off."""

T = TypeVar("T")


def why_eager(options: TrainOptions, accelerator: Accelerator, images: int) -> str | None:
    """Why no step of a training can be a graph, in words; None if steps on whole batches can.

    Args:
        images: to train with.
    Raises: InputError if --graph on asks for what cannot be.
    """
    optim, kind = options.optim, accelerator.device.type
    if options.machine.graph == "off":
        return "--graph off"
    reason = None
    if kind not in DEVICES:
        reason = f"a CUDA graph needs a CUDA device, and this trains on {kind}"
    elif accelerator.num_processes > 1:
        reason = f"{accelerator.num_processes} processes exchange gradients in a step"
    elif optim.gradient_accumulation > 1:
        reason = "--gradient-accumulation makes several passes of a step"
    elif optim.optimizer != "adam":
        reason = f"--optimizer {optim.optimizer} decides in Python what a step does"
    elif images < optim.batch_size:
        reason = f"{images} images fill no batch of --batch-size {optim.batch_size}"
    if reason is not None and options.machine.graph == "on":
        raise InputError(f"--graph on: {reason}; use --graph auto, which goes without one then")
    return reason


class Graph:
    """A captured step; call it with the inputs of each step, which are copied to where it reads.

    Attributes:
        output: what the step returned. Each call fills it anew.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor],
        output: Tensor,
        replay: Callable[[], None],
        optimizer: FusedAdam,
    ):
        self.inputs, self.output, self.replay = inputs, output, replay
        self.optimizer = optimizer

    def __call__(self, *inputs: Tensor) -> Tensor:
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept.copy_(given)
        self.optimizer.set_rates()
        self.replay()
        return self.output


def capture(
    step: Callable[..., Tensor], inputs: Sequence[Tensor], model: nn.Module, optimizer: FusedAdam
) -> Graph:
    """A graph of `step(*inputs)`; model, optimiser and random numbers are then as they were before.

    Args:
        step: one step of the optimiser, with gradients that are None before and after it. Returns
            numbers of which the first is the loss.
        inputs: of a first step, on the device; those of later ones must have their shapes.
        model, optimizer: all that the step changes. Tensors that the optimiser does not have before
            its first step must be zero then, as Adam's are.
    Raises: what the step or its capture raises; RuntimeError if replays do not do what eager steps
        do.
    """
    gc.collect()  # what is left of an eager step would draw its stream into the capture
    device = inputs[0].device
    static = [given.clone() for given in inputs]

    def run() -> Tensor:
        return step(*static)

    def tried(step: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
        losses = torch.stack([step()[0].clone() for _ in range(STEPS)])
        return losses, [p.detach().clone() for p in model.parameters()]

    with unchanged(model, optimizer, device), aside(device) as stream:
        losses, weights = tried(run)
    with unchanged(model, optimizer, device):
        with optimizer.captured():
            replay, output = recorded(run, stream)
        graph = Graph(static, output, replay, optimizer)
        replayed, their_weights = tried(lambda: graph(*inputs))
    if not torch.allclose(replayed, losses, rtol=NEAR, atol=0, equal_nan=True):
        raise RuntimeError(
            f"losses of {STEPS} replayed steps are {replayed.tolist()}, of eager ones "
            f"{losses.tolist()}"
        )
    before = [p.detach() for p in model.parameters()]
    moved, off = distance(before, weights), distance(weights, their_weights)
    if not off <= ALIKE * moved:
        raise RuntimeError(
            f"{STEPS} replayed steps move the weights to {float(off):.1e} from where eager ones "
            f"do, which move them by {float(moved):.1e}"
        )
    return graph


def distance(these: list[Tensor], those: list[Tensor]) -> Tensor:
    """The Euclidean distance of two sets of weights."""
    return torch.stack([torch.dist(a, b) for a, b in zip(these, those, strict=True)]).norm()


@contextmanager
def aside(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """Work inside goes to a new stream: after what is queued on the current one, which then waits
    for it. To warm up there what is to be captured there: libraries keep something per stream."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            yield stream
    finally:
        torch.cuda.current_stream(device).wait_stream(stream)


def recorded(run: Callable[[], T], stream: torch.cuda.Stream) -> tuple[Callable[[], None], T]:
    """Calls `run` to capture it, which computes nothing.

    Returns: what replays it on the current stream, and what it returned, which replays fill.
    Raises: what `run` raises, rather than what ending such a capture does; else what that does.
    """
    graph = torch.cuda.CUDAGraph()
    failed: list[BaseException] = []
    try:
        # The outer block leaves the current stream as it was, which a failed capture does not.
        with torch.cuda.stream(torch.cuda.current_stream()):
            with torch.cuda.graph(graph, stream=stream):
                try:
                    result = run()
                except BaseException as error:
                    failed.append(error)
                    raise
    except BaseException:
        if failed:
            raise failed[0] from None
        raise
    return graph.replay, result


@contextmanager
def unchanged(model: nn.Module, optimizer: FusedAdam, device: torch.device) -> Iterator[None]:
    """Puts back, where they are, what steps inside change, and drops gradients."""
    before = [(t, t.detach().clone()) for t in tensors_of(model, optimizer)]
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device]):
            yield
    finally:
        known = {id(t) for t, _ in before}
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for t, value in before:
                t.copy_(value)
            for t in tensors_of(model, optimizer):
                if id(t) not in known:
                    t.zero_()


def tensors_of(model: nn.Module, optimizer: FusedAdam) -> list[Tensor]:
    """All that a step changes: parameters, buffers, and what the optimiser keeps of each."""
    kept = [t for values in optimizer.state.values() for t in values.values()]
    return [*model.parameters(), *model.buffers(), *(t for t in kept if isinstance(t, Tensor))]
