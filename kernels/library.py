"""Operations that torch.library knows, and that plain eager calls reach without it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor


def observed() -> bool:
    """Whether something looks on that must see operations: a compiler, a mode, a transform."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


class Operation:
    """A function of tensors that torch.compile, torch.export and dispatch modes see as one.

    Passing torch.library takes longer than a launch does, so where nobody looks on the function is
    called directly, with the same derivative.

    Args:
        name: the operation becomes torch.ops.mocapsnet.<name>.
        function: with annotated arguments; returns new tensors and changes none.
        fake: the same for tensors without data.
    """

    def __init__(self, name: str, function: Callable[..., Any], fake: Callable[..., Any]):
        self.name = name
        self.registered = torch.library.custom_op(f"mocapsnet::{name}", function, mutates_args=())
        self.registered.register_fake(fake)
        self.direct = function

    def __call__(self, *args: Any) -> Any:
        return self.registered(*args) if observed() else self.direct(*args)

    def differentiate(
        self, backward: Callable[..., Any], setup_context: Callable[..., Any]
    ) -> None:
        """Gives it a derivative, in the form of torch.autograd.Function."""
        self.registered.register_autograd(backward, setup_context=setup_context)
        function = self.direct

        class Direct(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, lengths: list[int | None], *flat: Any) -> Any:
                args = nested(flat, lengths)
                ctx.lengths = lengths
                output = function(*args)
                setup_context(ctx, args, output)
                return output

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
                of_args = backward(ctx, *grads)
                return None, *flattened(of_args if isinstance(of_args, tuple) else (of_args,))

        def direct(*args: Any) -> Any:
            lengths = [len(x) if isinstance(x, list) else None for x in args]
            return Direct.apply(lengths, *flattened(args))

        self.direct = direct

    def refuse_derivative(self) -> None:
        """Makes differentiating this operation, itself a backward pass, a clear error."""
        function = self.direct

        def backward(ctx: Any, *grads: Any) -> None:
            raise RuntimeError(
                f"mocapsnet::{self.name} has no derivative of its own, so there is no double "
                'backward through the fused operations: use backend="reference", and where '
                'layers are stacked memory="stored"'
            )

        def direct(first: Tensor, *args: Any) -> Any:
            if torch.is_grad_enabled():  # backward with create_graph=True: the result must not
                # pass for a constant, even if no argument needs a gradient
                return self.registered(first.detach().requires_grad_(), *args)
            return function(first, *args)

        self.registered.register_autograd(backward)
        self.direct = direct


def flattened(args: Iterable[Any]) -> list[Any]:
    """The elements of lists in their places: torch.autograd.Function sees no tensors in lists."""
    return [x for arg in args for x in (arg if isinstance(arg, list) else [arg])]


def nested(flat: Iterable[Any], lengths: Iterable[int | None]) -> tuple[Any, ...]:
    """What was flattened, given the lengths of lists, None for what was none."""
    rest = iter(flat)
    return tuple(next(rest) if n is None else list(islice(rest, n)) for n in lengths)
