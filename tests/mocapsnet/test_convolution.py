"""Convolutions by Fourier coefficients: PyTorch's values and derivatives, of any order, and where
they are called and where not."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mocapsnet import CapsNet, MoCapsNet, convolution, fourier
from mocapsnet.convolution import Conv2d, conv2d
from mocapsnet.fourier import Shape

CASES = [  # images [B, C, H, Wd], kernels [O, kh, kw], stride
    ((2, 3, 20, 20), (4, 9, 9), (2, 2)),  # the paper's; phases of 5 and 4 taps
    ((2, 3, 13, 9), (4, 5, 3), (1, 2)),  # odd lengths: one real coefficient; sides differ
    ((2, 2, 11, 12), (3, 2, 4), (3, 3)),  # a stride wider than the kernel: pixels nobody reads
    ((1, 1, 5, 5), (1, 5, 5), (1, 1)),  # one output
    ((2, 3, 17, 18), (2, 7, 6), (2, 3)),  # last rows and columns that no window reaches
    ((3, 2, 6, 7), (2, 1, 1), (2, 1)),  # one tap: a transform of one point along rows
]


def tensors(images, kernels, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    size = (kernels[0], images[1], *kernels[1:])
    x = torch.randn(images, generator=generator, dtype=torch.float64).relu()
    w = torch.randn(size, generator=generator, dtype=torch.float64) / w_norm(size)
    return x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()


def w_norm(size):
    return (size[1] * size[2] * size[3]) ** 0.5


def run(function, x, w):
    """Output and gradients, for a gradient that is random and not contiguous."""
    y = function(x, w)
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(y.shape[::-1], generator=generator, dtype=torch.float64).permute(3, 2, 1, 0)
    return [y.detach(), *torch.autograd.grad(y, (x, w), g.to(y.dtype))]


@pytest.fixture
def small_parts(monkeypatch):
    """Two channels or three at a time, not all."""
    monkeypatch.setattr(fourier, "WORKSPACE", 2**13)


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(Shape, "pays", lambda shape: True)


@pytest.fixture
def calls(monkeypatch):
    """Which of the library's functions run: the convolution, and its two gradients."""
    found = []

    def counted(name):
        function = getattr(fourier, name)
        return lambda *args: found.append(name) or function(*args)

    for name in ("correlate", "correlate_input", "correlate_weight"):
        monkeypatch.setattr(convolution, name, counted(name))
    return found


@pytest.mark.parametrize("images, kernels, stride", CASES)
@pytest.mark.parametrize("parts", ["whole", "small"])
def test_equals_pytorch(images, kernels, stride, parts, request):
    if parts == "small":
        request.getfixturevalue("small_parts")
    x, w = tensors(images, kernels)
    got = run(lambda x, w: conv2d(x, w, stride), x, w)
    want = run(lambda x, w: F.conv2d(x, w, stride=stride), x, w)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("images, kernels, stride", CASES[:3])
def test_first_and_second_derivatives(images, kernels, stride):
    x, w = tensors((1, 2, *images[2:]), (2, *kernels[1:]))
    x, w = x[:, :, :9, :8].detach().requires_grad_(), w[:, :, :4, :3].detach().requires_grad_()
    assert gradcheck(lambda x, w: conv2d(x, w, stride), (x, w))
    assert gradgradcheck(lambda x, w: conv2d(x, w, stride), (x, w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_at_most_twice_that_of_pytorch(dtype):
    """Of the whole; each number within four times PyTorch's worst, as sums of more terms are."""
    x, w = tensors((16, 64, 20, 20), (48, 9, 9), dtype)
    got = run(lambda x, w: conv2d(x, w, (2, 2)), x, w)
    direct = run(lambda x, w: F.conv2d(x, w, stride=2), x, w)
    exact = run(lambda x, w: F.conv2d(x, w, stride=2), *tensors((16, 64, 20, 20), (48, 9, 9)))
    for a, b, true in zip(got, direct, exact, strict=True):
        assert a.dtype == dtype
        ours, theirs = (a - true).abs(), (b - true).abs()
        assert ours.norm() <= 2 * theirs.norm() + torch.finfo(dtype).eps / 2 * true.norm()
        assert ours.max() <= 4 * theirs.max()


def test_many_gradients_at_once():
    x, w = tensors((2, 3, 9, 8), (4, 5, 3))
    g = torch.randn(5, 2, 4, 3, 3, dtype=torch.float64)
    got, want = (
        torch.autograd.grad(function(x, w), (x, w), g, is_grads_batched=True)
        for function in (
            lambda x, w: conv2d(x, w, (2, 2)),
            lambda x, w: F.conv2d(x, w, stride=2),
        )
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_matrices_first_made_in_inference_mode_serve_training():
    fourier.matrices.cache_clear()
    x, w = tensors((2, 3, 9, 8), (4, 5, 3))
    with torch.inference_mode():
        conv2d(x, w, (1, 1))
    y = conv2d(x, w, (1, 1)).square().sum()
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    dx.square().sum().backward()
    assert w.grad.isfinite().all()


def test_autocast_around_backward_changes_no_gradient():
    x, w = tensors((2, 3, 20, 20), (4, 9, 9), torch.float32)
    want = run(lambda x, w: conv2d(x, w, (2, 2)), x, w)
    y = conv2d(x, w, (2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y, (x, w), want[0])
    for a, b in zip(got, torch.autograd.grad(conv2d(x, w, (2, 2)), (x, w), want[0]), strict=True):
        assert a.equal(b)


@pytest.mark.parametrize(
    "B, C, O, size, taps, stride, pays",
    [
        (128, 256, 256, 20, 9, 2, True),  # the paper's second convolution on MNIST,
        (128, 256, 256, 24, 9, 2, True),  # and on SVHN and CIFAR-10
        (128, 1, 256, 28, 9, 1, False),  # its first: one channel to share a transform
        (1, 256, 256, 20, 9, 2, False),  # one image to share the kernels' transforms
        (128, 32, 32, 20, 9, 2, False),
        (128, 256, 256, 16, 3, 1, False),  # few taps
        (128, 256, 256, 224, 9, 2, False),  # transforms of so many points take longer
        (128, 256, 256, 8, 9, 1, False),  # no output: PyTorch's error
        (0, 256, 256, 20, 9, 2, False),
    ],
)
def test_where_it_pays(B, C, O, size, taps, stride, pays):  # noqa: N803, E741
    shape = Shape.of((B, C, size, size), (O, C, taps, taps), (stride, stride))
    assert shape.pays() == pays


def test_products_of_the_papers_shapes():
    """As the module says: 148 for each of four phases, in place of 36 outputs by 81 taps."""
    shape = Shape.of((128, 256, 20, 20), (256, 256, 9, 9), (2, 2))
    assert (shape.products, shape.outputs, shape.height.points) == (148, 36, 10)


def paper_network(calls):
    """With few enough channels to be quick, and a batch that is large enough all the same."""
    torch.manual_seed(0)
    model = MoCapsNet((1, 28, 28), 10, channels=128, decoder=(8, 8))
    images, labels = torch.randn(64, 1, 28, 28), torch.arange(64) % 10
    model(images[:1])
    assert not calls  # a single image goes PyTorch's way
    return model, images, labels


@pytest.mark.parametrize("bfloat16, tiles", [(False, False), (True, False), (True, True)])
def test_network(calls, bfloat16, tiles, monkeypatch):
    """Forward is PyTorch's where the processor multiplies tiles of bfloat16, gradients are not."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    if bfloat16:
        monkeypatch.setattr(convolution, "multiplies_bfloat16", lambda: True)
    model, images, labels = paper_network(calls)
    plain = copy.deepcopy(model)
    for n, layer in enumerate(plain.convolutions):
        if isinstance(layer, Conv2d):
            layer.__class__ = nn.Conv2d
            assert plain.convolutions[n] is layer
    results = []
    for net in (model, plain):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            out = net(images, labels)
        out.capsules.square().sum().backward()
        results.append([out.capsules.detach(), *(p.grad for p in net.convolutions.parameters())])
    forward = [] if tiles else ["correlate"]
    assert sorted(calls) == [*forward, "correlate_input", "correlate_weight"]
    assert model.features(images).is_contiguous(memory_format=torch.channels_last)
    # first order: bfloat16 keeps 8 bits, and capsules add up what differs by as much
    limit = 2**-5 if bfloat16 else 2**-16
    for a, b in zip(*results, strict=True):
        assert a.is_contiguous() == b.is_contiguous() and (a - b).norm() <= limit * b.norm()


@pytest.mark.parametrize("bfloat16", [False, True])
def test_kernels_are_laid_out_where_they_are_copied_anyway(bfloat16, monkeypatch, always):
    """In float32 they are the parameter itself, so that no copy is held for backward."""
    monkeypatch.setattr(convolution, "multiplies_bfloat16", lambda: True)
    seen = []
    monkeypatch.setattr(
        convolution, "conv2d", lambda x, w, stride: seen.append(w) or conv2d(x, w, stride)
    )
    layer = Conv2d(2, 3, 3)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        layer(torch.randn(2, 2, 6, 6)).sum().backward()
    assert layer.weight.grad.is_contiguous()
    if bfloat16:
        assert seen[0].dtype == torch.bfloat16
        assert seen[0].is_contiguous(memory_format=torch.channels_last)
    else:
        assert seen[0] is layer.weight


def test_bfloat16_is_left_to_pytorch_on_other_processors(calls, monkeypatch, always):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    layer, x = Conv2d(2, 3, 3), torch.randn(2, 2, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16 and not calls
    assert layer(x).dtype == torch.float32 and calls


def forward_mode(layer, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x))).tangent


def counted_flops(layer, x):
    with FlopCounterMode(display=False) as counter:
        layer(x)
    return torch.tensor(counter.get_total_flops())


OBSERVERS = {
    "torch.compile": lambda layer, x: torch.compile(layer, fullgraph=True, backend="eager")(x),
    "torch.export": lambda layer, x: torch.export.export(layer, (x,)).module()(x),
    "torch.jit.trace": lambda layer, x: torch.jit.trace(layer, (x,), check_trace=False)(x),
    "vmap": lambda layer, x: vmap(lambda one: layer(one[None])[0])(x),
    "grad": lambda layer, x: grad(lambda x: layer(x).square().sum())(x),
    "forward mode": forward_mode,
    "flop counter": counted_flops,
    "no batch": lambda layer, x: layer(x[0]),
    "float64": lambda layer, x: copy.deepcopy(layer).double()(x.double()),
}


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_whoever_sees_operations_sees_pytorchs(name, calls, always):
    torch.manual_seed(0)
    layer = Conv2d(2, 3, 3, stride=2)
    plain = copy.deepcopy(layer)
    plain.__class__ = nn.Conv2d
    x = torch.randn(2, 2, 7, 6)
    got, want = (OBSERVERS[name](net, x) for net in (layer, plain))
    torch.testing.assert_close(got, want)
    assert not calls
    layer(x)
    assert calls


@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"padding": "same"}, {"dilation": 2}, {"groups": 2}]
)
def test_options_it_does_not_know_are_left_to_pytorch(options, calls, always):
    layer = Conv2d(2, 4, 3, **options)
    x = torch.randn(2, 2, 7, 6)
    plain = copy.deepcopy(layer)
    plain.__class__ = nn.Conv2d
    assert layer(x).equal(plain(x)) and not calls


@pytest.mark.parametrize(
    "x", [torch.randn(2, 3, 7, 6), torch.randn(2, 2, 7, 6).double(), torch.randn(2, 2, 2, 6)]
)
def test_errors_are_pytorchs(x, calls):
    layer = Conv2d(2, 4, 3)
    plain = copy.deepcopy(layer)
    plain.__class__ = nn.Conv2d
    messages = []
    for net in (layer, plain):
        with pytest.raises(RuntimeError) as error:
            net(x)
        messages.append(str(error.value))
    assert messages[0] == messages[1] and not calls


def test_state_is_that_of_pytorchs_layer():
    torch.manual_seed(0)
    layer = Conv2d(2, 3, 3)
    torch.manual_seed(0)
    plain = nn.Conv2d(2, 3, 3)
    assert all(a.equal(b) for a, b in zip(layer.parameters(), plain.parameters(), strict=True))
    assert layer.state_dict().keys() == plain.state_dict().keys()
    assert repr(layer) == repr(plain)


@pytest.mark.parametrize(
    "stem",
    [
        nn.Conv2d(1, 8, 9, stride=3),  # no children
        nn.Sequential(nn.Conv2d(1, 8, 9, stride=3)),
        nn.Sequential(nn.Conv2d(1, 8, 9), nn.ReLU(), nn.Conv2d(8, 8, 8, stride=2)),
    ],
)
def test_other_layers_in_place_of_the_convolutions(stem, calls, always):
    """As of whoever takes a pretrained stem."""
    model = CapsNet((1, 28, 28), 10, channels=8, capsule_dim=8)
    model.convolutions = stem
    assert model.features(torch.randn(2, 1, 28, 28)).shape == (2, 8, 7, 7) and not calls


def test_many_gradients_at_once_by_vmap(always):
    """Forward outside of it, so that nothing tells until backward."""
    x, w = tensors((2, 3, 20, 20), (4, 9, 9))
    y, plain = conv2d(x, w, (2, 2)), F.conv2d(x, w, stride=(2, 2))
    G = torch.randn(3, *y.shape, dtype=y.dtype)  # noqa: N806
    found, wanted = (
        vmap(lambda g, y=y: torch.autograd.grad(y, (x, w), g, retain_graph=True))(G)
        for y in (y, plain)
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
