"""The fused stack of momentum capsule layers against plain routing and autograd, in float64."""

import itertools

import pytest
import torch

from mocapsnet.kernels import momentum_routing, routing
from mocapsnet.kernels.launch import recording
from mocapsnet.kernels.momentum import triton as momentum_kernels
from mocapsnet.kernels.momentum.op import momentum_backward, momentum_forward
from mocapsnet.kernels.momentum.schedule import schedule

MODES = list(itertools.product(["rba", "sda"], ["final", "full"]))  # method, routing_grad
B, J, D = 3, 5, 3


pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture(params=["chunked", "on chip", "by layers", "on chip, in parts"])
def backend(request, monkeypatch):
    """Forces one way through, and breaks the kernels of the other Triton way."""
    if request.param == "chunked":
        return "chunked"
    if request.param == "by layers":
        monkeypatch.setattr(momentum_kernels.plans, "ON_CHIP_VOTES", 0)
        monkeypatch.setattr(momentum_kernels, "momentum_forward_kernel", None)
        monkeypatch.setattr(momentum_kernels, "momentum_backward_kernel", None)
    else:
        monkeypatch.setattr(momentum_kernels.routing, "forward", None)
        monkeypatch.setattr(momentum_kernels.routing, "backward", None)
    if request.param == "on chip, in parts":
        monkeypatch.setattr(momentum_kernels, "TERMS_BYTES", 1)
    return "triton"


def tensors(device, layers, dtype=torch.float64, shape=(B, J, D)):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    x, v, g = (draw(*shape) * 0.5 for _ in range(3))
    state = shape[1:]
    weights = [draw(*state, *state) for _ in range(layers)]
    biases = [draw(*state) * 0.1 for _ in range(layers)]
    return x, v, g, weights, biases


def plain(x, v, weights, *, gamma, block_layers, biases, anchor_every, backend, **modes):
    """Algorithm 1 by autograd."""
    for layer, W in enumerate(weights):
        if block_layers and layer and layer % block_layers == 0:
            v = torch.zeros_like(v)
        f = routing(x, W, bias=biases[layer] if biases else None, backend="reference", **modes)
        v = gamma * v + (1 - gamma) * f
        x = x + v
    return x


def run(function, x, v, g, weights, biases, **options):
    leaves = [t.clone().requires_grad_() for t in (x, v, *weights, *biases)]
    n = 2 + len(weights)
    out = function(*leaves[:2], leaves[2:n], biases=leaves[n:], **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, g)]


@pytest.mark.parametrize("mode", MODES, ids=" ".join)
@pytest.mark.parametrize("layers, anchor_every, block_layers", [(4, 3, 0), (3, 9, 2), (1, 1, 0)])
def test_equals_autograd(mode, layers, anchor_every, block_layers, backend, device):
    x, v, g, weights, biases = tensors(device, layers)
    biases = biases if layers == 4 else []
    options = dict(method=mode[0], routing_grad=mode[1], gamma=0.8, anchor_every=anchor_every)
    options |= dict(block_layers=block_layers, backend=backend)
    want = run(plain, x, v, g, weights, biases, **options)
    got = run(momentum_routing, x, v, g, weights, biases, **options)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("iterations", [1, 2])
def test_iterations(iterations, backend, device):
    x, v, g, weights, _ = tensors(device, 2)
    options = dict(iterations=iterations, gamma=0.9, anchor_every=5, block_layers=0)
    options |= dict(backend=backend)
    want = run(plain, x, v, g, weights, [], **options)
    for a, b in zip(run(momentum_routing, x, v, g, weights, [], **options), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_empty_batch(backend, device, monkeypatch):
    if backend == "triton":  # nothing is launched on chip, so the way layer by layer is taken
        monkeypatch.undo()
    x, v, g, weights, biases = tensors(device, 2, shape=(0, J, D))
    out, dx, dv, *rest = run(momentum_routing, x, v, g, weights, biases, backend=backend)
    assert out.shape == dx.shape == dv.shape == (0, J, D)
    assert all(not gradient.any() for gradient in rest)


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_weights(weights_dtype, backend, device):
    """The state stays float32, and each gradient has its weight's dtype."""
    x, v, g, weights, _ = tensors(device, 2, torch.float32)
    weights = [W.to(weights_dtype) for W in weights]
    options = dict(gamma=0.9, anchor_every=5, block_layers=0, backend=backend)
    got = run(momentum_routing, x, v, g, weights, [], **options)
    wide = [t.double() for t in (x, v, g)], [W.double() for W in weights]
    want = run(plain, *wide[0], wide[1], [], **options)
    assert got[0].dtype == torch.float32
    for a, b in zip(got, want, strict=True):
        rtol = 2 * torch.finfo(a.dtype).eps + 1e-4
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=rtol * float(b.abs().max()))


@pytest.mark.parametrize("grad, iterations", [("final", 1), ("full", 3)])
def test_weights_in_another_layout(grad, iterations, backend, device):
    x, v, g, weights, _ = tensors(device, 2)
    options = dict(gamma=0.9, anchor_every=5, block_layers=0, backend=backend)
    options |= dict(routing_grad=grad, iterations=iterations)
    strided = [W.movedim(-1, 0).contiguous().movedim(0, -1) for W in weights]
    found = []
    for layout in (weights, strided):
        leaves = [W.detach().requires_grad_() for W in layout]  # not cloned: as they lie
        out = momentum_routing(x, v, leaves, **options)
        found.append([out, *torch.autograd.grad(out, leaves, g)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("offset, alignment", [(0, 16), (1, 4), (2, 8)])  # in numbers of 4 bytes
def test_weights_that_are_views_into_a_flat_buffer(offset, alignment, backend, device):
    """Kernels that take W from a table of addresses are told how those are aligned."""
    x, v, g, weights, _ = tensors(device, 2, torch.float32, shape=(2, 8, 4))  # 128-bit loads
    flat = torch.zeros(offset + 2 * 1024, device=device)
    views = [flat[offset + n * 1024 :][:1024].view(8, 4, 8, 4) for n in range(2)]
    for view, W in zip(views, weights, strict=True):
        view.copy_(W)
    modes = dict(gamma=0.9, anchor_every=5, block_layers=0, backend=backend, method="sda")

    def gradients(x, v, weights, function):
        weights = [W.detach().requires_grad_() for W in weights]  # not cloned: still views
        out = function(x, v, weights, biases=[], **modes)
        return [out, *torch.autograd.grad(out, weights, g.to(out.dtype))]

    with recording() as launches:
        gradients(x, v, views, momentum_routing)
    told = {x.options["ALIGNMENT"] for x in launches if x.options.get("ALIGNMENT")}
    on_chip = any(x.kernel.__name__ == "momentum_forward_kernel" for x in launches)
    assert told == ({alignment} if on_chip else {16} if launches else set())
    got = gradients(x, v, views, momentum_routing)
    want = gradients(x.double(), v.double(), [W.double() for W in weights], plain)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_same_inputs_same_bits(backend, device):
    x, v, g, weights, biases = tensors(device, 3, torch.float32)
    once = run(momentum_routing, x, v, g, weights, biases, backend=backend)
    for _ in range(20 if device.type == "cuda" else 1):
        again = run(momentum_routing, x, v, g, weights, biases, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_launches(device):
    """Forward: one launch for every anchor. Backward: two for every part, and no more."""
    x, v, _, weights, _ = tensors(device, 6, torch.float32)
    with recording() as launches:
        leaves = [W.requires_grad_() for W in weights]
        momentum_routing(x, v, leaves, anchor_every=4, backend="triton").sum().backward()
    names = [launch.kernel.__name__ for launch in launches]
    backward = ["momentum_backward_kernel", "weight_gradient_kernel"]
    assert names == ["momentum_forward_kernel"] * 2 + backward * 2


def test_backward_memory_between_launches_is_bounded():
    """At the paper's shape, 8 MB hold the terms of eight layers."""
    x, W = torch.empty(128, 32, 8, device="meta"), torch.empty(32, 8, 32, 8, device="meta")
    plan = schedule(40, 0.9, 39, 0)
    with recording() as launches:
        _, anchors = momentum_kernels.forward(x, x, [W] * 40, [], plan, 3, "rba")
        momentum_kernels.backward(x, anchors, [W] * 40, [], plan, 3, "rba", "final")
    assert [len(launch.args[0]) for launch in launches[:2]] == [128, 128]
    terms = [t.numel() * 4 for t in launches[2].args[5:10] if isinstance(t, torch.Tensor)]
    assert sum(terms) < 10 << 20
    assert len(launches) == 2 + 2 * (1 + 5)  # 39 layers in five parts


def test_opcheck(device):
    x, v, _, weights, biases = tensors(device, 2)
    for backend in ("chunked", "triton"):
        leaves = [t.requires_grad_() for t in (x, v, *weights, *biases)]
        options = (0.9, 1, 0, 2, "rba", "full", backend)
        arguments = (*leaves[:2], leaves[2:4], leaves[4:], *options)
        torch.library.opcheck(momentum_forward.registered, arguments)
        out, anchors = (t.detach() for t in momentum_forward(*arguments))
        inputs = [[t.detach() for t in part] for part in (weights, biases)]
        torch.library.opcheck(momentum_backward.registered, (out, anchors, *inputs, *options))


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_compiles(backend, device):
    x, v, g, weights, biases = tensors(device, 3)
    eager = run(momentum_routing, x, v, g, weights, biases, backend=backend)
    compiled = torch.compile(momentum_routing, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, x, v, g, weights, biases, backend=backend), eager, strict=True):
        assert torch.equal(a, b)


def test_double_backward_is_a_clear_error():
    x, v, _, weights, _ = tensors("cpu", 2)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(momentum_routing(x, v, weights).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        dx.sum().backward()


def test_bad_arguments_are_named():
    x, v, _, weights, biases = tensors("cpu", 2)
    for message, call in {
        "at least one layer": lambda: momentum_routing(x, v, []),
        "x and v must be alike": lambda: momentum_routing(x, v[:1], weights),
        "on cpu and v .* on meta": lambda: momentum_routing(x, v.to("meta"), weights),
        "v must be a torch.Tensor": lambda: momentum_routing(x, None, weights),
        "every W must be a torch.Tensor": lambda: momentum_routing(x, v, ["W"]),
        r"every W must be \[J, D, J, D\]": lambda: momentum_routing(x, v, [weights[0][:2]]),
        "at least as wide": lambda: momentum_routing(x.float(), v.float(), weights),
        "biases must be none, or one": lambda: momentum_routing(x, v, weights, biases=biases[:1]),
        "gamma must lie between 0 and 1": lambda: momentum_routing(x, v, weights, gamma=1.0),
        "backend must be": lambda: momentum_routing(x, v, weights, backend="cuda"),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
