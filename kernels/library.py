"""Operations that torch.library knows, and that plain eager calls reach without it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

Layout = Callable[[tuple[Any, ...], tuple[Tensor, ...]], tuple[int | None, ...]]

BATCHED: Any = torch._C._parse_dispatch_key("Batched")


def observed() -> bool:
    """Whether something looks on that must see operations: a compiler or a mode."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def transformed() -> bool:
    """Whether a transform of torch.func is at work."""
    return torch._C._are_functorch_transforms_active()


def plain_only() -> str:
    """What is at work that takes no operations but PyTorch's own; empty if nothing is."""
    if torch.compiler.is_compiling():
        if transformed():
            return "torch.func inside compiled code"
        return "ONNX export" if torch.onnx.is_in_onnx_export() else ""
    if forward_ad._current_level >= 0:  # torch.func.jvp and jacfwd set it too
        return "forward-mode differentiation"
    return "" if torch._C._get_tracing_state() is None else "torch.jit.trace"


class Operation:
    """A function of tensors that torch.compile, torch.export and dispatch modes see as one.

    Passing torch.library takes longer than a launch does, so where nobody looks on the function is
    called directly, with the same derivative. Transforms of torch.func, which torch.library does
    not serve, get an autograd.Function of the form that they ask for.

    Args:
        name: the operation becomes torch.ops.mocapsnet.<name>.
        function: with annotated arguments; returns new tensors and changes none.
        fake: the same for tensors without data.
        batched: how many of the first arguments have the batch as their first dimension, samples
            independent: `torch.vmap` over these alone becomes a larger batch. Anything else that
            is mapped over is a loop.
        layout: given arguments and outputs, the dimension of each output that is the batch, None
            for none; as a rule the first.
        flops: given the arguments, what `torch.utils.flop_counter` counts: two for every
            multiply-add of sums that the equations need.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        fake: Callable[..., Any],
        batched: int = 0,
        layout: Layout = lambda args, outputs: (0,) * len(outputs),
        flops: Callable[..., int] | None = None,
    ):
        self.name = name
        self.registered = torch.library.custom_op(f"mocapsnet::{name}", function, mutates_args=())
        self.registered.register_fake(fake)
        self.function = self.direct = self.transformed = function
        self.batched = batched
        self.layout = layout
        self.flops = flops

    def __call__(self, *args: Any) -> Any:
        if transformed():
            return self.transformed(*args)
        if observed() or args[0].is_meta:
            return self.seen(*args)
        if forward_ad._current_level >= 0:
            raise RuntimeError(
                f"mocapsnet::{self.name} has no forward-mode derivative: use "
                'backend="reference", or make the dual numbers before the forward pass'
            )
        return self.direct(*args)

    def seen(self, *args: Any) -> Any:
        """The call by way of torch.library, known to every FlopCounterMode that is on.

        They are told here since importing theirs for `register_flop_formula` would import Triton.
        """
        if not torch.compiler.is_compiling():
            for mode in _get_current_dispatch_mode_stack():
                formulas = getattr(getattr(mode, "counter", None), "flop_registry", None)
                if formulas is not None and self.flops is not None:
                    packet = getattr(torch.ops.mocapsnet, self.name)
                    formulas.setdefault(packet, lambda *args, out_val: self.flops(*args))
        return self.registered(*args)

    def differentiate(
        self, backward: Callable[..., Any], setup_context: Callable[..., Any]
    ) -> None:
        """Gives it a derivative, in the form of torch.autograd.Function."""
        self.registered.register_autograd(backward, setup_context=setup_context)
        function = self.function

        def gradients(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            of_args = backward(ctx, *grads)
            return None, *flattened(of_args if isinstance(of_args, tuple) else (of_args,))

        class Direct(torch.autograd.Function):
            """One function for forward and its context: torch reads no signature then."""

            @staticmethod
            def forward(ctx: Any, lengths: list[int | None], *flat: Any) -> Any:
                args = nested(flat, lengths)
                ctx.lengths = lengths
                output = function(*args)
                setup_context(ctx, args, output)
                return output

            backward = staticmethod(gradients)

        self.direct = applied(Direct)
        self.transformed = applied(self.transformable(gradients, setup_context))

    def refuse_derivative(self) -> None:
        """Makes differentiating this operation, itself a backward pass, a clear error."""
        function = self.function

        def backward(ctx: Any, *grads: Any) -> None:
            raise RuntimeError(
                f"mocapsnet::{self.name} has no derivative of its own, so there is no double "
                'backward through the fused operations: use backend="reference", and where '
                'layers are stacked memory="stored"'
            )

        def direct(first: Tensor, *args: Any) -> Any:
            if torch._C._dispatch_keys(first).has(BATCHED):
                return self.for_all(first, *args)
            if torch.is_grad_enabled():  # backward with create_graph=True: the result must not
                # pass for a constant, even if no argument needs a gradient
                first = first if first.requires_grad else first.detach().requires_grad_()
                return self.registered(first, *args)
            return function(first, *args)

        self.registered.register_autograd(backward)
        self.direct = direct
        self.transformed = applied(self.transformable(backward, lambda *_: None))

    def transformable(
        self, gradients: Callable[..., Any], setup_context: Callable[..., Any]
    ) -> type[torch.autograd.Function]:
        """The form of autograd.Function that torch.func takes."""
        operation = self

        class Transformable(torch.autograd.Function):
            @staticmethod
            def forward(lengths: list[int | None], *flat: Any) -> Any:
                run = operation.seen if observed() else operation.function
                return run(*nested(flat, lengths))

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
                lengths, *flat = inputs
                setup_context(ctx, nested(flat, lengths), output)

            backward = staticmethod(gradients)

            @staticmethod
            def vmap(info: Any, in_dims: Any, lengths: list[int | None], *flat: Any) -> Any:
                return operation.mapped(info.batch_size, in_dims[1:], lengths, flat)

        return Transformable

    def for_all(self, first: Tensor, *args: Any) -> Any:
        """A call within the vmap of `is_grads_batched`, older than torch.func, for each gradient.

        The first argument alone is an incoming gradient.
        """
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        every = torch._remove_batch_dim(first, level, 0, 0)
        lengths, flat = packed((every, *args))
        outputs, _ = self.mapped(len(every), (0,) + (None,) * (len(flat) - 1), lengths, flat)
        several = isinstance(outputs, tuple)
        batched = [torch._add_batch_dim(x, 0, level) for x in (outputs if several else [outputs])]
        return tuple(batched) if several else batched[0]

    def mapped(
        self,
        samples: int,
        dims: tuple[int | None, ...],
        lengths: list[int | None],
        flat: Sequence[Any],
    ) -> tuple[Any, Any]:
        """The outputs for many arguments at once, and the dimension of each that counts them.

        `dims` are the dimensions of the flattened arguments that do, None for those that stay.
        """

        def outputs(args: Iterable[Any]) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
            whole = nested(args, lengths)
            output = self(*whole)
            return whole, output if isinstance(output, tuple) else (output,)

        if any(dim is not None for dim in dims[self.batched :]):
            made = [
                outputs(x if d is None else x.select(d, i) for x, d in zip(flat, dims, strict=True))
                for i in range(samples)
            ]
            results = tuple(torch.stack(parts) for parts in zip(*(m[1] for m in made), strict=True))
            counted: tuple[int | None, ...] = (0,) * len(results)
        else:
            some = [
                x.expand(samples, *x.shape) if d is None else x.movedim(d, 0)
                for x, d in zip(flat[: self.batched], dims[: self.batched], strict=True)
            ]
            B = some[0].shape[1]
            args, folded = outputs([*(x.flatten(0, 1) for x in some), *flat[self.batched :]])
            counted = self.layout(args, folded)
            results = tuple(
                x if d is None else x.unflatten(d, (samples, B))
                for x, d in zip(folded, counted, strict=True)
            )
        return (results, counted) if len(results) > 1 else (results[0], counted[0])


def applied(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Calls an autograd.Function of the lengths of lists and the flattened arguments."""

    def call(*args: Any) -> Any:
        lengths, flat = packed(args)
        return function.apply(lengths, *flat)

    return call


def packed(args: Iterable[Any]) -> tuple[list[int | None], list[Any]]:
    """The lengths of lists among the arguments, None for what is none, and all flattened."""
    return [len(x) if isinstance(x, list) else None for x in args], flattened(args)


def flattened(args: Iterable[Any]) -> list[Any]:
    """The elements of lists in their places: torch.autograd.Function sees no tensors in lists."""
    return [x for arg in args for x in (arg if isinstance(arg, list) else [arg])]


def nested(flat: Iterable[Any], lengths: Iterable[int | None]) -> tuple[Any, ...]:
    """What was flattened, given the lengths of lists, None for what was none."""
    rest = iter(flat)
    return tuple(next(rest) if n is None else list(islice(rest, n)) for n in lengths)
