"""The momentum stack: against Algorithm 1, reversible against stored with layers of many kinds,
what memory it keeps, and which layers it refuses."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from mocapsnet import CapsuleLayer, MomentumStack, ResidualStack


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors here are tiny: on a busy machine threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def layers(count, dtype=torch.float64, capsules=4, dim=3, seed=0):
    torch.manual_seed(seed)
    return [
        CapsuleLayer(capsules, dim, capsules, dim, sum_length=2.0).to(dtype) for _ in range(count)
    ]


def capsules(dtype=torch.float64, seed=1):
    return torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(stack, x, g, v=None):
    x = x.clone().requires_grad_()
    v = None if v is None else v.clone().requires_grad_()
    stack.zero_grad()
    y = stack(x, v)
    y.backward(g)
    grads = [p.grad for p in stack.parameters()]
    return [y.detach(), x.grad, *grads] + ([] if v is None else [v.grad])


class Branch(nn.Module):
    """A layer of a residual network, with dropout if wanted."""

    def __init__(self, dim, dropout=0.0):
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(torch.tanh(self.linear(x)))


class Attention(nn.Module):
    """Reads a context [B, M, dim], or x itself; `options` holds a mask and a bias added to x."""

    def __init__(self, dim, dropout=0.0):
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, 2, dropout=dropout, batch_first=True)

    def forward(self, x, context=None, *, options=None):
        options = {} if options is None else options
        x = x + options.get("position", 0)
        context = x if context is None else context
        mask = options.get("mask")
        return self.attention(x, context, context, attn_mask=mask, need_weights=False)[0]


def run(stack, x, g, args, kwargs):
    """Output, gradients of x, of the parameters and of (args, kwargs), and the next random number,
    from a fixed seed."""

    def leaf(t):
        t = t.detach().clone()
        return t.requires_grad_() if t.is_floating_point() else t

    x = leaf(x)
    args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, leaf, (args, kwargs))
    stack.zero_grad()
    torch.manual_seed(7)
    y = stack(x, None, *args, **kwargs)
    following = torch.rand(1)
    y.backward(g)
    given = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if torch.is_tensor(t)]
    given = [t.grad for t in given if t.is_floating_point()]
    return [y.detach(), following, x.grad, *given, *(p.grad for p in stack.parameters())]


def agree(layers, x, *args, gamma=0.9, **kwargs):
    """Reversible and stored gradients are the same to 1e-9 in float64, twice in a row."""
    layers = [layer.double() for layer in layers]
    x = x.double()
    g = torch.randn(x.shape, dtype=x.dtype)
    stored = MomentumStack(copy.deepcopy(layers), gamma=gamma, memory="stored")
    reversible = MomentumStack(layers, gamma=gamma)
    want = run(stored, x, g, args, kwargs)
    assert all(t is not None for t in want)
    for _ in range(2):  # the second forward skips the look for skip connections
        for x_, y in zip(run(reversible, x, g, args, kwargs), want, strict=True):
            assert (x_ - y).norm() <= 1e-9 * y.norm() + 1e-14


def test_forward_is_algorithm_1():
    stack = MomentumStack(layers(5), gamma=0.8)
    x = capsules()
    with torch.no_grad():
        expected, v = x, torch.zeros_like(x)
        for layer in stack.layers:
            v = 0.8 * v + (1 - 0.8) * layer(expected)
            expected = expected + v
        assert torch.equal(stack(x), expected)
    assert torch.equal(stack(x).detach(), expected)  # same code with and without gradients


def test_velocity_block_restarts_every_two_layers():
    stack = MomentumStack(layers(5), gamma=0.8, velocity="block")
    x = capsules()
    with torch.no_grad():
        expected, v = x, torch.zeros_like(x)
        for n, layer in enumerate(stack.layers):
            v = torch.zeros_like(x) if n % 2 == 0 else v
            v = 0.8 * v + (1 - 0.8) * layer(expected)
            expected = expected + v
        torch.testing.assert_close(stack(x), expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("velocity", ["network", "block"])
@pytest.mark.parametrize("anchor_every", [None, 3])  # 3 divides neither 16 nor the block of 2
@pytest.mark.parametrize("depth", [1, 2, 16])
def test_reversible_gradients_equal_stored_ones(depth, anchor_every, velocity):
    g, v = capsules(seed=2), capsules(seed=3)
    options = dict(velocity=velocity, anchor_every=anchor_every)
    stored = MomentumStack(layers(depth), memory="stored", **options)
    reversible = MomentumStack(layers(depth), memory="reversible", **options)
    for given in (None, v):
        want = gradients(stored, capsules(), g, given)
        for x, y in zip(gradients(reversible, capsules(), g, given), want, strict=True):
            assert (x - y).norm() <= 1e-9 * y.norm()


def test_anchors_bound_the_error_in_float32():
    """At gamma 0.5 forty layers amplify a rounding by 1e12 and more; three layers by 27."""
    truth = gradients(MomentumStack(layers(40), gamma=0.5, memory="stored"), capsules(), capsules())

    def error(**options):
        stack = MomentumStack(layers(40, torch.float32), gamma=0.5, **options)
        got = gradients(stack, capsules(torch.float32), capsules(torch.float32))
        return max(float((x - y).norm() / y.norm()) for x, y in zip(got, truth, strict=True))

    assert MomentumStack([], gamma=0.5).spacing(torch.float32) == 3
    assert error() < 1e-4  # 27 roundings of 6e-8 and those of 40 layers
    assert error(anchor_every=40) > 1e-2  # what the anchors are for


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("depth", [2, 40])
def test_float64_gradients_are_exact_to_1e_9(depth, gamma):
    agree([Branch(6) for _ in range(depth)], torch.randn(3, 6), gamma=gamma)


def test_spacing_follows_from_gamma_dtype_and_target():
    for dtype, target in ((torch.float32, 2**-17), (torch.float64, 2**-40)):
        for gamma in (0.5, 0.9, 0.99):
            n = MomentumStack([], gamma=gamma).spacing(dtype)
            eps = torch.finfo(dtype).eps
            growth = (2 - gamma) / gamma
            assert eps * growth**n <= target * (1 + 1e-9) < eps * growth ** (n + 1)
    stack = MomentumStack([], gamma=0.9)
    assert stack.spacing(torch.bfloat16) == stack.spacing(torch.float32) == 20  # state is float32
    assert MomentumStack([], gamma=1e-9).spacing(torch.float32) == 1
    given = MomentumStack([], anchor_every=5)
    assert stack.anchor_every is None and given.anchor_every == given.spacing(torch.float64) == 5


def test_gradcheck_through_the_stack():
    stack = MomentumStack(
        [CapsuleLayer(2, 2, 2, 2, routing_grad="full").double() for _ in range(2)]
    )
    x = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
    parameters = list(stack.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: stack(x), (x, *parameters))


def test_no_layers_is_the_identity():
    x = capsules().requires_grad_()
    MomentumStack([])(x).backward(torch.ones_like(x))
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(ResidualStack([])(x), x)


def test_a_layer_used_twice_gets_the_sum_of_its_gradients():
    shared = layers(1) * 3
    want = gradients(MomentumStack(shared, memory="stored"), capsules(), capsules())
    got = gradients(MomentumStack(shared), capsules(), capsules())
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-13)


def test_frozen_parameters_get_no_gradient():
    stack = MomentumStack(layers(3))
    stack.layers[1].weight.requires_grad_(False)
    x = capsules().requires_grad_()
    stack(x).sum().backward()
    assert stack.layers[1].weight.grad is None
    assert stack.layers[0].weight.grad is not None and x.grad is not None


def test_state_is_float32_under_low_precision():
    stack = MomentumStack(layers(2, torch.float32))
    assert stack(capsules(torch.bfloat16)).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert stack(capsules(torch.float32)).dtype == torch.float32


def saved_bytes(stack, x):
    """Bytes of distinct tensors that the graph of stack(x) keeps, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in stack.parameters()}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        stack(x)
    return sum(kept.values())


def test_reversible_memory_does_not_grow_with_depth():
    x = capsules(torch.float32).requires_grad_()
    state = 2 * x.numel() * x.element_size()
    for depth in (2, 10, 20):
        assert saved_bytes(MomentumStack(layers(depth, torch.float32)), x) == state
    stack = MomentumStack(layers(21, torch.float32))
    assert saved_bytes(stack, x) == 2 * state  # one anchor more
    x = capsules().requires_grad_()
    state *= 2
    stored = [saved_bytes(MomentumStack(layers(d), memory="stored"), x) for d in (2, 10)]
    assert stored[1] > 4 * stored[0] > 4 * state


def test_memory_of_other_layers_is_anchors_and_random_states_of_those_that_drew():
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    module = [Branch(6), Branch(6, dropout=0.5), Branch(6)]
    stack = MomentumStack(module * 4).double()
    # the first call looks for skip connections, and shows no hook what it saves for that
    assert saved_bytes(stack, x) == saved_bytes(stack, x) == 2 * x.numel() * x.element_size()
    random = stack(x).grad_fn.random
    assert list(random) == [1, 4, 7, 10] and all(len(states) == 1 for states in random.values())


@pytest.mark.parametrize("power", [1, 2])  # the first derivative of power 1 is constant in y
def test_double_backward_is_an_error(power):
    stack = MomentumStack(layers(2))
    x = capsules().requires_grad_()
    (grad,) = torch.autograd.grad(stack(x).pow(power).sum(), x, create_graph=True)
    (want,) = torch.autograd.grad(stack(x).pow(power).sum(), x)
    assert torch.equal(grad, want)
    with pytest.raises(RuntimeError, match='no double backward.*memory="stored"'):
        grad.sum().backward()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(gamma=0.0), "gamma must lie between 0 and 1.*cannot be inverted"),
        (dict(gamma=1.0), "gamma = 1 ignores the layers"),
        (dict(memory="none"), "memory must be"),
        (dict(velocity="layer"), "velocity must be"),
        (dict(anchor_every=0), "anchor_every must be at least 1"),
        (dict(block_layers=0), "block_layers must be at least 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MomentumStack([nn.Identity()], **options)


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


class Skip(nn.Module):
    """post(x + g(x)), or what else `join` makes of x and g(x)."""

    def __init__(self, join, branch=None, post=None):
        super().__init__()
        self.join = join
        self.branch = nn.Linear(6, 6) if branch is None else branch
        self.post = nn.Identity() if post is None else post

    def forward(self, x):
        return self.post(self.join(x, self.branch(x)))


def plus(x, g):
    return x + g


def in_place_plus(x, g):
    g += x
    return g


def encoder(**options):
    return nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, **options)


def conv():
    return nn.Conv2d(6, 6, 3, padding=1)


class Bias(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return self.bias


SKIPS = {
    "post-norm encoder": encoder(),
    "pre-norm encoder": encoder(norm_first=True),
    "encoder in eval mode": encoder().eval(),
    "encoder without dropout": encoder(dropout=0.0, activation="gelu"),
    "plain": Skip(plus),
    "in place": Skip(in_place_plus),
    "relu": Skip(in_place_plus, post=nn.ReLU(inplace=True)),
    "scaled branch": Skip(lambda x, g: x + 0.1 * g),
    "minus": Skip(lambda x, g: x - g),
    "dropout": Skip(plus, post=nn.Dropout(0.5)),
    "norm and gelu": Skip(plus, post=nn.Sequential(nn.LayerNorm(6), nn.GELU())),
    "through views": Skip(lambda x, g: x.flatten(1).clone().double().view_as(g).float() + g),
    "of three": Skip(lambda x, g: torch.ones(6) + (g + (g.relu() + x))),
    "twice x": Skip(lambda x, g: x + x, nn.Identity()),
    "stack": ResidualStack([nn.Linear(6, 6)]),
}


@pytest.mark.parametrize("name", SKIPS)
def test_a_layer_with_its_own_skip_connection_is_refused(name):
    layer = SKIPS[name]
    x = torch.randn(2, 3, 6)
    stack = MomentumStack([nn.Linear(6, 6), layer])
    message = rf"layer 1 \({type(layer).__name__}\) contains a skip.*Return the branch g\(x\) alone"
    for _ in range(2):  # refused for good, not only once
        with pytest.raises(ValueError, match=message):
            stack(x)
    with torch.no_grad():
        stack(x)
    MomentumStack(stack.layers, memory="stored")(x)


def test_a_resnet_block_is_refused():
    branch = nn.Sequential(conv(), nn.GroupNorm(2, 6), nn.ReLU(inplace=True), conv())
    block = Skip(in_place_plus, branch, nn.ReLU(inplace=True))
    with pytest.raises(ValueError, match="layer 0 .Skip. contains a skip"):
        MomentumStack([block])(torch.randn(2, 6, 4, 4))
    agree([branch], torch.randn(2, 6, 4, 4))


BRANCHES = {
    "relu": nn.ReLU(),
    "identity": nn.Identity(),
    "norm": nn.LayerNorm(6),
    "dropout": nn.Dropout(0.5),
    "x plus a constant": Skip(lambda x, g: x + torch.ones(6), nn.Identity()),
    "x plus a parameter": Skip(plus, Bias()),
    "skip inside of the branch": Skip(plus, post=nn.Linear(6, 6)),
    "pull towards g(x)": Skip(lambda x, g: g - x),
    "gate": Skip(lambda x, g: x * g.sigmoid()),
    "sum of two branches": Skip(lambda x, g: g + g.sin()),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_is_not_taken_for_a_skip_connection(name):
    x = torch.randn(2, 3, 6, requires_grad=True)
    MomentumStack([BRANCHES[name]])(x).sum().backward()
    assert x.grad is not None


def test_skip_connections_are_looked_for_once_per_layer():
    calls = []
    branch = Branch(6)
    branch.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    stack = MomentumStack([branch, branch])
    x = torch.randn(3, 6)
    for _ in range(2):
        stack(x)
    assert calls == [False, True, False, False, False]
    copied = copy.deepcopy(stack)
    assert copied.branches == {copied.layers[0]}


class Counter(nn.Module):
    """Counts its calls in a buffer, in place or by a new one."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        if self.in_place:
            self.count += 1
        else:
            self.count = self.count + 1
        return x.sin()


CHANGERS = {
    "batch norm": lambda: nn.BatchNorm1d(6),
    "batch norm inside": lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)),
    "instance norm": lambda: nn.InstanceNorm1d(6, track_running_stats=True),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(6, 6)),
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(6, 6)),
    "counter in place": lambda: Counter(True),
    "counter": lambda: Counter(False),
}


@pytest.mark.parametrize("name", CHANGERS)
def test_a_layer_that_changes_its_buffers_is_refused(name):
    x = torch.randn(2, 6, 6)
    stack = MomentumStack([nn.Linear(6, 6), CHANGERS[name]()])
    message = (
        rf"layer 1 \({type(stack.layers[1]).__name__}\) changes its buffers.*GroupNorm.*stored"
    )
    with pytest.raises(ValueError, match=message):
        stack(x)
    with torch.no_grad():
        stack(x)
    if "counter" not in name:
        stack.eval()(x).sum().backward()
        with pytest.raises(ValueError, match=message):  # also after a forward in eval mode
            stack.train()(x)


def test_a_layer_that_changes_its_arguments_in_place_is_refused():
    class Cache(nn.Module):
        def forward(self, x, cache):
            return x * cache.add_(1)

    with pytest.raises(ValueError, match=r"layer 0 \(Cache\) changes its input or another arg"):
        MomentumStack([Cache()])(torch.randn(3), None, torch.zeros(3))
    with pytest.raises(ValueError, match=r"layer 0 \(ReLU\) changes its input.*inplace=False"):
        MomentumStack([nn.ReLU(inplace=True)])(torch.randn(3, requires_grad=True))


@pytest.mark.parametrize("memory", ["reversible", "stored"])
def test_layers_that_change_the_shape_are_refused(memory):
    x = torch.randn(2, 6)
    for layer in (nn.Linear(6, 5), nn.Linear(6, 1)):  # 1 would be broadcast
        with pytest.raises(ValueError, match=r"layer 0 \(Linear\) maps shape \[2, 6\] to \[2, "):
            MomentumStack([layer], memory=memory)(x)
        with pytest.raises(ValueError, match="keep the shape"):
            ResidualStack([layer])(x)
    with pytest.raises(ValueError, match="layer 0 .LSTM. returned a tuple"):
        MomentumStack([nn.LSTM(6, 6)], memory=memory)(x)
    with pytest.raises(ValueError, match=r"v must have the shape of x, \[2, 6\]; got \[6\]"):
        MomentumStack([nn.Linear(6, 6)], memory=memory)(x, torch.zeros(6))
