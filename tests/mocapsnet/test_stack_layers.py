"""Momentum stacks of layers of many kinds, and among what PyTorch puts around a module."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mocapsnet import MomentumStack, ResidualStack

from .stacks import Attention, Branch, agree, run


def test_convolutions():
    agree(
        [nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding=1)) for _ in range(3)],
        torch.randn(2, 4, 5, 5),
    )


def test_attention_with_a_mask_a_context_and_a_position_in_a_dict():
    x, context = torch.randn(2, 5, 6), torch.randn(2, 7, 6).double()
    options = {"mask": torch.rand(5, 7) > 0.8, "position": torch.randn(5, 6).double()}
    agree([Attention(6) for _ in range(3)], x, context, options=options)
    agree([Attention(6, dropout=0.3) for _ in range(3)], x)
    agree([Attention(6, dropout=0.3).eval() for _ in range(3)], x, options={"name": "none"})


def test_dropout_repeats_its_mask_and_leaves_the_stream_of_random_numbers_alone():
    drops = [Branch(6, dropout=0.5), Branch(6), Branch(6, dropout=0.5)]
    agree(drops, torch.randn(3, 6))
    stack = MomentumStack(drops)
    y = stack(torch.randn(3, 6).double())
    before = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_residual_stack_and_stored_memory_pass_arguments():
    x, context = torch.randn(2, 5, 6), torch.randn(2, 7, 6)
    layer = Attention(6)
    options = {"position": torch.ones(5, 6)}
    want = layer(x, context, options=options)
    torch.testing.assert_close(ResidualStack([layer])(x, context, options=options), x + want)
    stack = MomentumStack([layer], memory="stored")
    torch.testing.assert_close(stack(x, None, context, options=options), x + (1 - 0.9) * want)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("inside", [True, False])  # is backward called in the autocast region?
def test_autocast_is_restored_in_backward(inside, cache):
    class Watch(Branch):
        def forward(self, x):
            assert x.dtype == torch.float32
            f = self.linear(x)
            kinds.append((f.dtype, torch.is_autocast_enabled("cpu")))
            return f

    def gradients(memory):
        stack = MomentumStack(copy.deepcopy(branches), memory=memory)
        kinds.clear()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            y = stack(x)
            if inside:
                y.backward(g)
        if not inside:
            with torch.autocast("cpu", torch.float16):
                y.backward(g)
        assert y.dtype == torch.float32
        assert set(kinds) == {(torch.bfloat16, True)}
        return [y.detach(), *(p.grad for p in stack.parameters())]

    kinds, x, g = [], torch.randn(3, 8), torch.randn(3, 8)
    branches = [Watch(8) for _ in range(3)]
    for a, b in zip(gradients("reversible"), gradients("stored"), strict=True):
        # a value at a tie may round to another bfloat16 in the second call
        assert (a - b).norm() <= 2**-8 * b.norm()


def test_autocast_leaves_no_weight_without_gradient_behind():
    branch = Branch(8)
    with torch.autocast("cpu", torch.bfloat16):
        MomentumStack([branch])(torch.randn(3, 8))
        branch(torch.randn(3, 8)).sum().backward()
    assert branch.linear.weight.grad is not None


def test_a_forward_without_autocast_stays_so_in_backward():
    stack, seen = MomentumStack([Branch(8)]), []
    stack.layers[0].register_forward_hook(
        lambda _, inputs, f: seen.append((f.dtype, torch.is_autocast_enabled("cpu")))
    )
    y = stack(torch.randn(3, 8))
    with torch.autocast("cpu", torch.bfloat16):
        y.sum().backward()
    assert seen == [(torch.float32, False)] * 3  # forward, the look for skips, backward


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_dropout_and_autocast_on_a_gpu():
    torch.manual_seed(0)
    branches = [Branch(64, dropout=0.5).cuda() for _ in range(4)]
    x, g = torch.randn(2, 32, 64, device="cuda")

    def gradients(memory, dtype):
        stack = MomentumStack(copy.deepcopy(branches), memory=memory)
        torch.manual_seed(1)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            y = stack(x)
        following = torch.rand(1, device="cuda")
        y.backward(g)
        return [y.detach(), following, *(p.grad for p in stack.parameters())]

    for dtype, error in ((torch.float32, 1e-4), (torch.float16, 2**-8)):
        want = gradients("stored", dtype)
        for a, b in zip(gradients("reversible", dtype), want, strict=True):
            assert (a - b).norm() <= error * b.norm()


def test_autograd_grad_and_accumulation_over_two_backwards():
    stack = MomentumStack([Branch(6) for _ in range(3)])
    x = torch.randn(3, 6, requires_grad=True)
    parameters = list(stack.parameters())
    grads = torch.autograd.grad(stack(x).square().sum(), [x, *parameters])
    assert x.grad is None and parameters[0].grad is None
    (alone,) = torch.autograd.grad(stack(x).square().sum(), x)
    y = stack(x)
    y.square().sum().backward(retain_graph=True)
    y.square().sum().backward()
    assert torch.equal(alone, grads[0])
    for t, grad in zip([x, *parameters], grads, strict=True):
        torch.testing.assert_close(t.grad, 2 * grad)


def test_hooks_on_parameters_run_once_with_the_whole_gradient():
    shared = Branch(6)
    stack = MomentumStack([shared, Branch(6), shared])
    seen, after = [], []
    shared.linear.weight.register_hook(lambda grad: (seen.append(grad.clone()), 2 * grad)[1])
    shared.linear.weight.register_post_accumulate_grad_hook(lambda p: after.append(p.grad))
    stack(torch.randn(3, 6)).sum().backward()
    assert len(seen) == len(after) == 1
    assert torch.equal(shared.linear.weight.grad, 2 * seen[0])


def test_frozen_layers_and_layers_without_gradient():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.ones_like(x)

    branches = [Branch(6), Branch(6), Constant(), nn.ReLU(), nn.Identity()]
    branches[1].requires_grad_(False)
    stack = MomentumStack(branches)
    x = torch.randn(3, 6, requires_grad=True)
    stack(x).sum().backward()
    got = [x.grad, branches[0].linear.weight.grad]
    x.grad = None
    stack.zero_grad()
    MomentumStack(branches, memory="stored")(x).sum().backward()
    torch.testing.assert_close(got, [x.grad, branches[0].linear.weight.grad])
    assert branches[1].linear.weight.grad is None


def test_parameters_changed_before_backward_are_an_error():
    stack = MomentumStack([Branch(6)])
    y = stack(torch.randn(3, 6))
    with torch.no_grad():
        stack.layers[0].linear.bias.add_(1)
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        y.sum().backward()


def test_distributed_data_parallel(tmp_path):
    stack = MomentumStack([Branch(6, dropout=0.5), Branch(6)])
    x, g = torch.randn(3, 6), torch.randn(3, 6)
    want = run(stack, x, g, (), {})
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        parallel = nn.parallel.DistributedDataParallel(stack)
        torch.testing.assert_close(run(parallel, x, g, (), {}), want)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("memory", ["reversible", "stored"])
def test_compiled_surroundings_equal_eager(memory):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = MomentumStack([Branch(6, dropout=0.5), Branch(6)], memory=memory)
            self.head = nn.Linear(6, 6)

        def forward(self, x, *_):
            return self.head(self.stack(x * 2) + 1)

    network, x, g = Network(), torch.randn(3, 6), torch.randn(3, 6)
    want = run(network, x, g, (), {})
    compiled = torch.compile(network, backend="aot_eager")
    torch.testing.assert_close(run(compiled, x, g, (), {}), want)


def test_checkpoint_around_a_stack():
    stack = MomentumStack([Branch(6, dropout=0.5), Branch(6)])
    x = torch.randn(3, 6, requires_grad=True)

    def grad(call):
        torch.manual_seed(0)
        return torch.autograd.grad(call(x).square().sum(), x)

    got = grad(lambda x: checkpoint(stack, x, use_reentrant=False))
    torch.testing.assert_close(got, grad(stack))


@pytest.mark.filterwarnings("ignore")  # PyTorch's, that scripting and tracing are old
def test_scripted_traced_and_compiled_layers():
    x = torch.randn(3, 6, requires_grad=True)
    layer = Branch(6)
    want, *grads = [
        torch.autograd.grad(MomentumStack([made])(x).sum(), x)
        for made in (layer, torch.jit.script(layer), torch.jit.trace(layer, x))
    ]
    for got in grads:
        torch.testing.assert_close(got, want)
    compiled = [torch.compile(Branch(6, dropout=0.5), backend="aot_eager") for _ in range(2)]
    compiled[1].compile(backend="aot_eager")
    agree(compiled, x.detach())


def test_operations_are_counted_with_those_of_the_second_calls():
    stack, x = MomentumStack([nn.Linear(6, 6) for _ in range(2)]), torch.randn(3, 6)
    stack(x)  # the first looks at the layers
    with FlopCounterMode(display=False) as counter:
        stack(x.requires_grad_()).sum().backward()
    product = 2 * 3 * 6 * 6
    # forward, the call in backward, gradients
    assert counter.get_total_flops() == 2 * product * (1 + 1 + 2)


def test_a_stack_inside_of_a_layer_of_a_stack():
    agree(
        [nn.Sequential(MomentumStack([Branch(6), Branch(6)]), nn.Linear(6, 6)) for _ in range(2)],
        torch.randn(3, 6),
    )
