"""CUDA graphs played on the CPU: what stands for `torch.cuda` where no GPU is.

Operations are noted down as they are dispatched, below autograd and within the operations of this
library, and a replay executes them again on the same tensors. What a CUDA graph cannot do, or would
do only once, is refused: reading a tensor in Python, shapes that depend on values, tensors made of
numbers of the host, random numbers. As on a GPU, capturing computes nothing: what was written to
tensors from outside is put back, and what the captured operations made is filled with NaN.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mocapsnet.train.trainer import Trainer

# By the function in Python, since what they do is not dispatched, or not on the CPU.
REFUSED = (
    *(getattr(Tensor, name) for name in "item tolist numpy cpu __array__ pin_memory".split()),
    *(getattr(torch, name) for name in "tensor as_tensor asarray from_numpy".split()),
)
RANDOM_STATE = ("get_rng_state", "set_rng_state", "manual_seed", "seed", "initial_seed")


class Refused(RuntimeError):
    """What a CUDA graph would not capture."""


class Note(NamedTuple):
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: list[tuple[int, Tensor]]
    """What it returned that is new, by its place among all that it returned."""


class Functions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function in REFUSED:
            raise Refused(f"{function.__name__} within a graph")
        return function(*args, **(kwargs or {}))


class Passive(TorchDispatchMode):
    """Does nothing, but under a mode autograd takes some formulas that round otherwise."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        return function(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Notes down what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[Note] = []
        self.own: dict[int, Any] = {}  # storages that were made within, which keeps them
        self.outside: dict[int, Tensor] = {}  # one tensor of each other storage
        self.before: dict[int, tuple[Any, Any]] = {}  # of those written to, what they held

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = kwargs or {}
        refuse(function, args)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.numel()]
        for t in given:
            if place(t) not in self.own:
                self.outside.setdefault(place(t), t)
        written = written_to(function, args, kwargs)
        for t in written:
            if place(t) not in self.own and place(t) not in self.before:
                storage = t.untyped_storage()
                self.before[place(t)] = storage, storage.clone()
        with torch._C.DisableTorchFunction():
            result = function(*args, **kwargs)
        known = {*map(place, given), *self.own, *self.outside}
        leaves = [(n, t) for n, t in enumerate(tree_leaves(result)) if isinstance(t, Tensor)]
        made = [(n, t) for n, t in leaves if place(t) not in known]
        self.own |= {place(t): t.untyped_storage() for _, t in made}
        if made or written:
            self.notes.append(Note(function, args, kwargs, made))
        return result


def place(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def written_to(function: Any, args: Any, kwargs: Any) -> list[Tensor]:
    names = [argument.name for argument in function._schema.arguments]
    values = dict(zip(names, args, strict=False)) | kwargs
    return [
        t
        for argument in function._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
        for t in tree_leaves(values.get(argument.name))
        if isinstance(t, Tensor)
    ]


def refuse(function: Any, args: Any) -> None:
    name = str(function)
    masks = [t for t in tree_leaves(args) if isinstance(t, Tensor) and t.dtype == torch.bool]
    if name.startswith(("aten.index.", "aten.index_put")):
        wrong = any(t is not args[0] for t in masks)  # as many values as are true: a host must know
    else:
        tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
        tags += (torch.Tag.nondeterministic_seeded,)
        wrong = any(tag in function.tags for tag in tags)
        wrong = wrong or name.startswith(("aten.lift_fresh", "aten.equal"))
    if wrong:
        raise Refused(f"{name} within a graph")


class Stream:
    """A stream, and which of them is current."""

    current: Any = None

    def __init__(self, device: Any = None) -> None:
        self.waited_for: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other)


DEFAULT = Stream()
Stream.current = DEFAULT


@contextmanager
def on(stream: Stream) -> Iterator[None]:
    before, Stream.current = Stream.current, stream
    try:
        yield
    finally:
        Stream.current = before


class CUDAGraph:
    """`torch.cuda.CUDAGraph`, with its operations for tests to look at."""

    every: list[CUDAGraph] = []

    def __init__(self) -> None:
        self.operations = Operations()
        self.replays = 0
        CUDAGraph.every.append(self)

    def replay(self) -> None:
        assert Stream.current is DEFAULT
        self.replays += 1
        with torch.no_grad():
            for note in self.operations.notes:
                results = tree_leaves(note.function(*note.args, **note.kwargs))
                for n, t in note.made:
                    t.copy_(results[n])


class graph:
    """`torch.cuda.graph`. As there, a capture that failed ends with an error of its own, and leaves
    its stream current."""

    def __init__(self, made: CUDAGraph, *, stream: Stream) -> None:
        assert stream is not DEFAULT
        self.operations, self.stream, self.held = made.operations, on(stream), ExitStack()

    def __enter__(self) -> None:
        self.stream.__enter__()
        for name in RANDOM_STATE:
            self.held.enter_context(patch.object(torch, name, refused(name)))
        self.held.enter_context(Functions())
        self.held.enter_context(under(self.operations))

    def __exit__(self, *error: Any) -> None:
        self.held.close()
        for storage, content in self.operations.before.values():
            storage.copy_(content)
        with torch.no_grad():
            for note in self.operations.notes:
                for _, t in note.made:
                    if t.is_floating_point():
                        t.fill_(torch.nan)
        if error[0] is not None:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.stream.__exit__(*error)


@contextmanager
def under(mode: TorchDispatchMode) -> Iterator[None]:
    """The mode sees what is in this library's operations, and not these: as where none is on."""
    with patch("mocapsnet.kernels.library.observed", lambda: False), mode:
        yield


def refused(name: str) -> Callable[..., Any]:
    def function(*_: Any, **__: Any) -> Any:
        raise Refused(f"{name} within a graph")

    return function


def install(monkeypatch: pytest.MonkeyPatch) -> list[CUDAGraph]:
    """The CPU takes graphs, and a training takes the CPU for a GPU. Returns the graphs to come."""
    monkeypatch.setattr(CUDAGraph, "every", [])
    for name, value in {
        "Stream": Stream,
        "stream": on,
        "current_stream": lambda *_: Stream.current,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr("mocapsnet.train.graph.DEVICES", ("cpu",))
    monkeypatch.setattr("mocapsnet.train.optimizers.GRAPHED", ("cpu",))
    monkeypatch.setattr("mocapsnet.kernels.checks.queued", lambda _: True)
    workspace = importlib.import_module("mocapsnet.kernels.routing.workspace")
    monkeypatch.setattr(workspace, "DEVICES", ())
    eagerly = Trainer._eagerly

    def step(self: Trainer, *args: Any) -> Tensor:
        with under(Passive()):
            return eagerly(self, *args)

    monkeypatch.setattr(Trainer, "_eagerly", step)
    return CUDAGraph.every
