"""What composes with what: each test checks a row of docs/composition.md."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.flop_counter import FlopCounterMode

from mocapsnet import CapsuleLayer, ConvCapsuleLayer, MoCapsNet, MomentumStack
from mocapsnet.kernels import momentum_routing, primary_capsules, routing, squash, votes
from mocapsnet.kernels.momentum import reference as momentum_reference
from mocapsnet.kernels.routing import reference as routing_reference

MODES = list(itertools.product(["rba", "sda"], ["final", "full"]))  # method, routing_grad
B, J, D = 2, 4, 3


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def layer(**options):
    torch.manual_seed(0)
    return CapsuleLayer(J, D, 5, 2, bias=True, sum_length=2.0, **options).double()


def stack(**options):
    torch.manual_seed(0)
    layers = [CapsuleLayer(J, D, J, D, sum_length=2.0, **options) for _ in range(3)]
    return MomentumStack(layers, gamma=0.8, anchor_every=2).double()


def network(**options):
    torch.manual_seed(0)
    small = dict(channels=8, capsule_dim=4, capsules=3, class_dim=2, kernel_size=3, decoder=(4,))
    return MoCapsNet((1, 7, 7), 3, **small, **options).double()


class Branch(torch.nn.Linear):
    """A layer that is no capsule layer."""

    def forward(self, x):
        return super().forward(x).tanh()


def general(**options):
    torch.manual_seed(0)
    return MomentumStack([Branch(D, D) for _ in range(3)], gamma=0.8, anchor_every=2).double()


class Lengths(torch.nn.Module):
    """One tensor of a network."""

    def __init__(self, **options):
        super().__init__()
        self.network = network(**options)

    def forward(self, images):
        return self.network(images).lengths


SUBJECTS = {  # a module and its input
    "layer": (layer, (B, J, D)),
    "fused stack": (stack, (B, J, D)),
    "general stack": (general, (B, J, D)),
    "network": (Lengths, (B, 1, 7, 7)),
}


@pytest.fixture(params=SUBJECTS)
def subject(request):
    make, shape = SUBJECTS[request.param]
    return make(), draw(*shape, seed=1)


@pytest.fixture
def no_reference(monkeypatch):
    """Fails if the reference runs: what is tested is the fused operations."""

    def fail(*args, **kwargs):
        raise AssertionError("the reference ran")

    monkeypatch.setattr(routing_reference, "routing", fail)
    monkeypatch.setattr(momentum_reference, "momentum_routing", fail)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def parameters(module):
    return {name: p.detach() for name, p in module.named_parameters() if "decoder" not in name}


def dot(a, b):
    return sum((x * y).sum() for x, y in zip(a, b, strict=True))


def operations(method, routing_grad):
    """Functions of tensors alone, and their arguments."""
    modes = dict(method=method, routing_grad=routing_grad)
    x, v, W = draw(B, J, D), draw(B, J, D, seed=1), draw(2, J, D, J, D, seed=2)
    return {
        "routing": (lambda u, W, b: routing(u, W, bias=b, **modes), (x, W[0], draw(J, D))),
        "momentum_routing": (
            lambda x, v, *p: momentum_routing(x, v, p[:2], biases=p[2:], **modes),
            (x, v, *W, draw(J, D), draw(J, D, seed=3)),
        ),
        "squash": (squash, (x,)),
        "squash of a vector": (squash, (x[0, 0],)),
        "votes": (votes, (x, W[0])),
        "primary_capsules": (lambda f: primary_capsules(f, 2), (draw(B, 4, 3, 3),)),
    }


@pytest.mark.parametrize("mode", MODES, ids=" ".join)
@pytest.mark.parametrize("name", operations("rba", "final"))
def test_jvp_of_operations(name, mode):
    """<w, J v> = <J^T w, v>, J^T by the operation that runs in backward: so the jvp is the
    derivative that `routing_grad` defines."""
    function, args = operations(*mode)[name]
    tangents = tuple(draw(*a.shape, seed=9 + n) for n, a in enumerate(args))
    out, along = jvp(function, args, tangents)
    leaves = [a.clone().requires_grad_() for a in args]
    value = function(*leaves)
    w = draw(*out.shape, seed=7)
    back = torch.autograd.grad(value, leaves, w)
    close(out, value.detach())
    assert along.abs().max() > 1e-3
    close((w * along).sum(), dot(back, tangents))


def test_jvp_of_modules(subject):
    """By torch.func and by forward_ad, with respect to input and parameters."""
    module, x = subject
    P = parameters(module)
    tangents = {name: draw(*p.shape, seed=3) for name, p in P.items()}, draw(*x.shape, seed=4)
    out, along = jvp(lambda P, x: functional_call(module, P, (x,)), (P, x), tangents)
    close(out, module(x).detach())
    w = draw(*out.shape, seed=7)
    leaf = x.clone().requires_grad_()
    wanted = [p for name, p in module.named_parameters() if name in P]
    back = torch.autograd.grad(module(leaf), [*wanted, leaf], w)
    close((w * along).sum(), dot(back, [*tangents[0].values(), tangents[1]]))
    with forward_ad.dual_level():
        P = {name: forward_ad.make_dual(p, tangents[0][name]) for name, p in P.items()}
        dual = functional_call(module, P, (forward_ad.make_dual(x, tangents[1]),))
        close(forward_ad.unpack_dual(dual).tangent, along)


def test_jacobians(subject):
    """Rows by the fused backward pass, columns by forward mode, and all at once by autograd."""
    module, x = subject
    rows = jacrev(module)(x)
    close(jacfwd(module)(x), rows)
    close(torch.autograd.functional.jacobian(module, x, vectorize=True), rows)


@pytest.mark.usefixtures("no_reference")
def test_grad(subject):
    """torch.func.grad, vjp and functional_call run the fused operations."""
    module, x = subject
    names = list(parameters(module))
    leaf = x.clone().requires_grad_()
    out = module(leaf)
    w = draw(*out.shape, seed=7)
    wanted = [p for name, p in module.named_parameters() if name in names]
    want = torch.autograd.grad(out, [*wanted, leaf], w)

    def value(P, x):
        return (functional_call(module, P, (x,)) * w).sum()

    got = grad(value, argnums=(0, 1))(parameters(module), x)
    for a, b in zip([*got[0].values(), got[1]], want, strict=True):
        close(a, b)
    _, pullback = vjp(module, x)
    close(pullback(w)[0], want[-1])


def test_functional_call(subject):
    """By autograd: what the call swapped in is gone when backward runs."""
    module, x = subject
    P = {name: p.clone().requires_grad_() for name, p in parameters(module).items()}
    value = functional_call(module, P, (x,)).square().sum()
    value.backward()
    module(x).square().sum().backward()
    for name, p in module.named_parameters():
        if name in P:
            close(P[name].grad, p.grad)


@pytest.mark.usefixtures("no_reference")
def test_vmap_over_samples_is_a_larger_batch(subject, monkeypatch):
    module, x = subject
    some = torch.stack([x, draw(*x.shape, seed=5), draw(*x.shape, seed=6)], 1)
    close(vmap(module, 1)(some).detach(), torch.stack([module(s).detach() for s in some.unbind(1)]))
    gradient = grad(lambda x: module(x).square().sum())
    close(vmap(gradient, 1)(some), torch.stack([gradient(s) for s in some.unbind(1)]))


@pytest.mark.usefixtures("no_reference")
def test_vmap_over_weights(subject):
    """An ensemble, and gradients sample by sample."""
    module, x = subject
    P = parameters(module)
    several = {name: torch.stack([p, 2 * p]) for name, p in P.items()}
    got = vmap(lambda P, x: functional_call(module, P, (x,)), (0, None))(several, x)
    each = [{name: p[n] for name, p in several.items()} for n in range(2)]
    close(got, torch.stack([functional_call(module, P, (x,)) for P in each]).detach())

    def value(P, x):
        return functional_call(module, P, (x.unsqueeze(0),)).square().sum()

    got = vmap(grad(value), (None, 0))(P, x)
    for n, sample in enumerate(x):
        for name, share in grad(value)(P, sample).items():
            close(got[name][n], share)


@pytest.mark.usefixtures("no_reference")
def test_many_gradients_at_once(subject):
    """is_grads_batched, as `torch.autograd.functional.jacobian(vectorize=True)` uses it."""
    module, x = subject
    inputs = [p for name, p in module.named_parameters() if "decoder" not in name]
    inputs.append(x.requires_grad_())
    out = module(x)
    w = draw(3, *out.shape)
    got = torch.autograd.grad(out, inputs, w, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(out, inputs, row, retain_graph=True) for row in w]
    for a, b in zip(got, zip(*each, strict=True), strict=True):
        close(a, torch.stack(b))


def test_second_derivatives():
    """Forward over backward is exact; backward over backward is refused with the way out."""
    for make in (layer, stack):
        module, plain = make(routing_grad="full"), make(routing_grad="full", backend="reference")
        plain.memory = "stored"
        x = draw(B, J, D)

        def value(x, of=module):
            return of(x).square().sum()

        close(hessian(value)(x), torch.autograd.functional.hessian(lambda x: value(x, plain), x))  # noqa: B023
        with pytest.raises(RuntimeError, match='no double backward.* use backend="reference"'):
            grad(lambda x: grad(value)(x).sum())(x)  # noqa: B023
        if make is layer:  # few samples: plain PyTorch
            expected = torch.autograd.functional.hessian(lambda x: value(x, plain), x)  # noqa: B023
            close(torch.autograd.functional.hessian(value, x), expected)
            continue
        for by in (value, lambda x: module(x).sum()):  # noqa: B023
            with pytest.raises(RuntimeError, match='no double backward.* use backend="reference"'):
                torch.autograd.functional.hessian(by, x)


def test_second_derivatives_of_a_general_stack():
    module, stored, x = general(), general(), draw(B, J, D)
    stored.memory = "stored"
    want = torch.autograd.functional.hessian(lambda x: stored(x).square().sum(), x)

    def value(x):
        return module(x).square().sum()

    close(hessian(value)(x), want)
    close(jacrev(grad(value))(x), want)


def test_a_fused_backend_by_name_is_refused_in_forward_mode():
    module, x = layer(backend="chunked"), draw(B, J, D)
    with pytest.raises(ValueError, match='forward-mode .* use backend="reference" or None'):
        jvp(module, (x,), (x,))
    out = stack()(x.clone().requires_grad_())
    with forward_ad.dual_level():
        w = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(RuntimeError, match='no forward-mode derivative: use backend="ref'):
            out.backward(w)


@pytest.mark.slow
def test_compiled():
    """torch.func inside torch.compile, one graph."""
    module, x = layer(), draw(B, J, D)

    def both(x):
        return grad(lambda x: module(x).square().sum())(x) + jvp(module, (x,), (x,))[1].sum()

    close(torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_vmap_of_operations(backend, device):
    """Samples fold into the batch, whichever arguments are mapped over."""
    x, W, f = draw(B, J, D), draw(J, D, J, D, seed=2), draw(B, 4, 3, 3)
    x, W, f = (t.to(device) for t in (x, W, f))
    for function, args in {
        "squash": (squash, (x,)),
        "votes": (votes, (x, W)),
        "primary": (lambda f, backend: primary_capsules(f, 2, backend=backend), (f,)),
        "routing": (routing, (x, W)),
        "momentum": (lambda x, v, backend: momentum_routing(x, v, [W], backend=backend), (x, x)),
    }.values():
        several = torch.stack([args[0], 2 * args[0], -args[0]])
        run = vmap(lambda x: function(x, *args[1:], backend=backend))  # noqa: B023
        want = torch.stack([function(x, *args[1:], backend=backend) for x in several])
        close(run(several), want)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_many_gradients_of_operations_at_once(backend, device):
    x, f = draw(B, J, D).to(device), draw(B, 4, 3, 3).to(device)
    for function, arg in (
        (squash, x),
        (squash, x[0, 0]),
        (lambda f, backend: primary_capsules(f, 2, backend=backend), f),
    ):
        arg = arg.detach().requires_grad_()
        out = function(arg, backend=backend)
        w = draw(3, *out.shape).to(device)
        (got,) = torch.autograd.grad(out, arg, w, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(out, arg, row, retain_graph=True)[0] for row in w]
        close(got, torch.stack(each))


def test_traced(subject):
    """By torch.jit.trace, also for another batch, and as TensorBoard's graph."""
    module, x = subject
    traced = torch.jit.trace(module, x)
    assert "Direct" not in str(traced.inlined_graph)
    more = torch.cat([x, -x])
    close(traced(more).detach(), module(more).detach())


def test_graph_for_tensorboard(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        writer.add_graph(network(), draw(B, 1, 7, 7))
    (events,) = tmp_path.iterdir()
    assert b"network/last" in events.read_bytes() or b"CapsuleLayer[last]" in events.read_bytes()


def test_exported_and_saved(tmp_path):
    """By torch.export, for any batch, with the fused operations in the file."""
    module, x = network(), draw(B, 1, 7, 7)
    batch = torch.export.Dim("batch", max=64)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},))
    graphs = [part.graph for part in program.graph_module.modules() if hasattr(part, "graph")]
    names = {str(node.target) for graph in graphs for node in graph.nodes}
    assert {"mocapsnet.routing_forward.default", "mocapsnet.momentum_forward.default"} <= names
    torch.export.save(program, tmp_path / "network.pt2")
    more = torch.cat([x, -x])
    loaded = torch.export.load(tmp_path / "network.pt2").module()(more)
    assert type(loaded) is type(module(more))
    for got, want in zip(loaded, module(more), strict=True):
        close(got, want)


@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda: CapsuleLayer(1152, 8, 10, 8), (1152, 8)),  # whose couplings outgrow what is kept
        (lambda: ConvCapsuleLayer(4, 8, 4, 8, stride=2), (6, 6, 4, 8)),
    ],
)
def test_exported_with_gradients_for_any_batch(make, shape):
    """Also one for which training would not keep the couplings."""
    module, x = make(), torch.randn(2, *shape)
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},))
    for more in (torch.randn(5, *shape), x):
        torch.testing.assert_close(program.module()(more), module(more))


def test_exported_stack_of_any_layers():
    module, x = general(), draw(B, J, D)
    close(torch.export.export(module, (x,)).module()(x), module(x))


@pytest.mark.slow
def test_exported_to_onnx(tmp_path):
    """In ONNX's own operations, as its reference evaluator runs them."""
    pytest.importorskip("onnxscript")
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
    module, x = network().float().eval(), draw(B, 1, 7, 7).float()
    file = str(tmp_path / "network.onnx")
    torch.onnx.export(module, (x,), file, dynamo=True, verbose=False)
    for got, want in zip(evaluator(file).run(None, {"images": x.numpy()}), module(x), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), want.detach(), rtol=1e-4, atol=1e-5)


def test_on_the_meta_device(subject):
    """Shapes of outputs and gradients, without data."""
    module, x = subject
    shape = module(x).shape
    module.to("meta")
    x = x.to("meta").requires_grad_()
    out = module(x)
    assert out.is_meta and out.shape == shape
    out.sum().backward()
    assert x.grad.is_meta and all(
        p.grad.shape == p.shape for n, p in module.named_parameters() if "decoder" not in n
    )


@pytest.mark.parametrize("memory", ["reversible", "stored"])
def test_flops(memory):
    """PyTorch's counter: B J D K of a layer are its votes, and a sum over them takes B J D."""
    x, module = draw(B, J, D), stack()
    module.memory = memory
    unit = 2 * 3 * B * J * J * D  # of three layers, for each multiply-add of a component of a vote
    for routing_grad, of_gradients in {"final": 2 * D, "full": 3 * D + 6}.items():
        for layer in module.layers:
            layer.routing_grad = routing_grad
        with FlopCounterMode(display=False) as counter:
            out = module(x.requires_grad_())
        assert counter.get_total_flops() == unit * (D + 3 + 2)
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        again = D + 3 + 2 if memory == "reversible" else 0
        assert counter.get_total_flops() == unit * (again + of_gradients)


def test_flops_of_a_general_stack():
    """Forward, the same in backward again, and gradients; at first also a look at the layers."""
    x, module = draw(B, J, D).requires_grad_(), general()
    with FlopCounterMode(display=False) as counter:
        module(x)
        before = counter.get_total_flops()
        module(x).sum().backward()
    assert counter.get_total_flops() - before == 3 * 2 * B * J * D * D * (1 + 1 + 2)


def test_flops_of_operations():
    """Those of the votes are what the counter finds in the reference."""
    u, W = draw(B, J, D), draw(J, D, 5, 2, seed=2)
    counted = []
    for backend in ("reference", "chunked"):
        with FlopCounterMode(display=False) as counter:
            routing(u, W, iterations=1, backend=backend)
            votes(u, W)
        counted.append(counter.get_total_flops())
    assert counted[1] - counted[0] == 2 * B * J * 5 * 2  # the sum of the votes
    with FlopCounterMode(display=False) as counter:
        grad(lambda u: routing(u, W).sum())(u)
    assert counter.get_total_flops() == 2 * B * J * 5 * 2 * (D + 5 + 2 * D)
    with FlopCounterMode(display=False) as counter:
        momentum_routing(u, u, [draw(J, D, J, D)] * 2)
    assert counter.get_total_flops() == 2 * 2 * B * J * J * D * (D + 5)


def test_the_table_names_tests_that_exist():
    root = Path(__file__).parents[2]
    named = set(re.findall(r"`(test_\w+)`", (root / "docs" / "composition.md").read_text()))
    code = "".join(file.read_text() for file in (root / "tests").rglob("test_*.py"))
    assert len(named) > 15 and all(f"def {name}(" in code for name in named)
    own = {name for name in globals() if name.startswith("test_")}
    assert own - named == {"test_the_table_names_tests_that_exist"}
