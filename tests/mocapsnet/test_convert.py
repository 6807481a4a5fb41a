"""Parameters of other repositories give their outputs and gradients here.

What those repositories compute is written again from their descriptions, docs/converting.md, with
einsum and plain loops.
"""

import itertools

import pytest
import torch
from torch import nn

from mocapsnet import CapsNet, CapsuleLayer, Decoder, PrimaryCapsules
from mocapsnet.convert import filters, input_capsules, matrices

B, N, K, J, D = 3, 12, 4, 5, 6

# Layout; shape of the parameter; its votes as an einsum of the parameter and u [B, N, K].
LAYOUTS = {
    "1 J N D K": ((1, J, N, D, K), "xjndk,bnk->bnjd"),
    "1 N J D K": ((1, N, J, D, K), "xnjdk,bnk->bnjd"),
    "1 N J K D": ((1, N, J, K, D), "xnjkd,bnk->bnjd"),
    "J N D K": ((J, N, D, K), "jndk,bnk->bnjd"),
    "J N K D": ((J, N, K, D), "jnkd,bnk->bnjd"),
    "N J D K": ((N, J, D, K), "njdk,bnk->bnjd"),
    "N J K D": ((N, J, K, D), "njkd,bnk->bnjd"),
    "N K (J D)": ((N, K, J * D), None),
    "1 N (J D) K 1": ((1, N, J * D, K, 1), None),
}


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def their_votes(layout, W, u):
    """Votes [B, N, J, D]."""
    formula = LAYOUTS[layout][1]
    if formula:
        return torch.einsum(formula, W, u)
    if layout == "N K (J D)":  # a matrix product for all output capsules, taken apart afterwards
        return (u.unsqueeze(2) @ W).view(B, N, J, D)
    return (W[..., 0] * u.unsqueeze(2)).sum(3).view(B, N, J, D)


def squash(s):
    square = s.square().sum(-1, keepdim=True)
    return square / (1 + square) * s / square.sqrt()


def their_routing(u_hat, iterations, detached, bias=0.0):
    """Sabour et al. 2017, procedure 1; all but the last iteration on detached votes, or on none."""
    seen = u_hat.detach() if detached else u_hat
    b = torch.zeros_like(seen[..., 0])
    for _ in range(iterations - 1):
        v = squash((b.softmax(2).unsqueeze(-1) * seen).sum(1) + bias)
        b = b + torch.einsum("bnjd,bjd->bnj", seen, v)
    return squash((b.softmax(2).unsqueeze(-1) * u_hat).sum(1) + bias)


@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_of_another_repository(layout, detached):
    W = random(*LAYOUTS[layout][0]).requires_grad_()
    u, dv = random(B, N, K, seed=1), random(B, J, D, seed=2)
    bias = 0.1 if layout == "1 N (J D) K 1" else 0.0
    v = their_routing(their_votes(layout, W, u), 3, detached, bias)
    (dW,) = torch.autograd.grad(v, W, dv)

    layer = CapsuleLayer(N, K, J, D, routing_grad="final" if detached else "full", bias=bool(bias))
    layer.double()
    weight = matrices(W.detach(), layout, J=J)
    state = {"weight": weight} | ({"bias": torch.full((J, D), bias)} if bias else {})
    layer.load_state_dict(state)
    ours = layer(u)
    torch.testing.assert_close(ours, v)
    ours.backward(dv)
    torch.testing.assert_close(layer.weight.grad, matrices(dW, layout, J=J))
    assert weight.is_contiguous()
    if " (" not in layout:  # the sizes alone tell
        assert torch.equal(matrices(W.detach(), N=N, J=J, D=D), weight)
    assert torch.equal(matrices(W.detach().numpy(), layout, D=D), weight)


def test_every_order_of_the_axes_is_found():
    weight = random(N, K, J, D)
    for order in itertools.permutations(range(4)):
        assert torch.equal(matrices(weight.permute(order)[None], N=N, K=K, J=J), weight)


def test_sizes_of_one_fit_anywhere():
    """[1, N, 1, D, K] is "1 N J D K" and "J N 1 D K", which are the same numbers."""
    W = random(1, N, 1, D, K)
    expected = torch.einsum("anbdk->nkbd", W)
    assert torch.equal(matrices(W, N=N, J=1, D=D), expected)


def test_square_layers_need_a_layout():
    W = random(1, 32, 32, 8, 8)  # a block of the published network
    with pytest.raises(ValueError, match=r"several ways.*'1 N J K D'.*'1 J N D K'"):
        matrices(W, N=32, K=8, J=32, D=8)
    for layout in ("1 J N D K", "1 N J D K"):
        expected = torch.einsum(layout.replace(" ", "").replace("1", "x") + "->NKJD", W)
        assert torch.equal(matrices(W, layout, N=32, K=8, J=32, D=8), expected)


@pytest.mark.parametrize(
    "shape, arguments, message",
    [
        ((1, J, N, D, K), {"layout": "J N D K"}, r"\[1, 5, 12, 6, 4\] does not fit.*\[J, N, D, K"),
        ((J, N, D, K), {"layout": "J N D K", "N": 7}, r"does not fit the layout.*N=7"),
        ((2, N, J, D, K), {"layout": "1 N J D K"}, "does not fit the layout"),
        ((N, J, D, K), {"layout": "N J D"}, "must name each of N, K, J and D once"),
        ((N, J, D, K), {"layout": "N J D K X"}, "must name each of N, K, J and D once"),
        ((N, J, D, K), {"layout": "N J D K K"}, "must name each of N, K, J and D once"),
        ((N, K, J * D), {"layout": "N K (J D)"}, "joins J and D, 30 in all: give the size of one"),
        ((N, K, J * D), {"layout": "N K (J D)", "J": 7}, "does not fit the layout.*J=7"),
        ((N, J, D, K), {}, "at least three of N, K, J and D must be given; got none"),
        ((N, J, D, K), {"J": J, "D": D}, "at least three.*got J=5, D=6"),
        ((N, J, D, K), {"N": N, "J": J, "D": 7}, "no order of N, K, J and D fits"),
        ((N, K, J * D), {"N": N, "J": J, "D": D}, "no order of N, K, J and D fits"),
    ],
)
def test_what_does_not_fit_is_refused(shape, arguments, message):
    with pytest.raises(ValueError, match=message):
        matrices(random(*shape), **arguments)


# The network in front of the first capsule layer: G groups of K channels, a map of 4 x 3.
G, H, W = 2, 4, 3
IMAGE = (3, H + 2, W + 2)


def convolutions(count, channels):
    torch.manual_seed(0)
    return nn.ModuleList(nn.Conv2d(3, channels, 3) for _ in range(count)).double()


def one_convolution_viewed(convs, x):
    """[B, G K, H, W].view(B, -1, K): values that follow each other in memory."""
    (conv,) = convs
    return conv(x).view(len(x), -1, K)


def components_viewed(convs, x):
    """K convolutions of G channels, stacked, then .view(B, -1, K)."""
    return torch.stack([conv(x) for conv in convs], 1).view(len(x), -1, K)


def a_convolution_a_component(convs, x):
    """Component k of capsule (g, h, w) is channel g of convolution k."""
    u = x.new_empty(len(x), G * H * W, K)
    for k, conv in enumerate(convs):
        for n, (g, h, w) in enumerate(itertools.product(range(G), range(H), range(W))):
            u[:, n, k] = conv(x)[:, g, h, w]
    return u


def a_convolution_a_group(convs, x):
    """Capsules by row, column, group; component k of group g is channel k of convolution g."""
    u = x.new_empty(len(x), G * H * W, K)
    for n, (h, w, g) in enumerate(itertools.product(range(H), range(W), range(G))):
        u[:, n] = convs[g](x)[:, :, h, w]
    return u


def channels_last(convs, x):
    """Channels-last features, reshaped to [B, -1, K]."""
    (conv,) = convs
    return conv(x).permute(0, 2, 3, 1).reshape(len(x), -1, K)


@pytest.mark.parametrize(
    "primary, convs, channel_order, capsule_order, grouping",
    [
        (one_convolution_viewed, (1, G * K), "G K", "G H W", "pixels"),
        (components_viewed, (K, G), "G K", "G H W", "pixels"),
        (a_convolution_a_component, (K, G), "K G", "G H W", "channels"),
        (a_convolution_a_group, (G, K), "G K", "H W G", "channels"),
        (channels_last, (1, G * K), "G K", "H W G", "channels"),
    ],
)
def test_primary_capsules_of_another_repository(
    primary, convs, channel_order, capsule_order, grouping
):
    convs, x = convolutions(*convs), random(B, *IMAGE)
    theirs = random(J, G * H * W, D, K, seed=1)
    v = their_routing(torch.einsum("jndk,bnk->bnjd", theirs, squash(primary(convs, x))), 3, True)

    conv = nn.Conv2d(3, G * K, 3).double()
    conv.load_state_dict(
        {
            name: filters(torch.cat([getattr(c, name) for c in convs]), channel_order, K=K)
            for name in ("weight", "bias")
        }
    )
    layer = CapsuleLayer(G * H * W, K, J, D).double()
    weight = input_capsules(matrices(theirs, "J N D K"), capsule_order, G=G, H=H, W=W)
    layer.load_state_dict({"weight": weight})
    torch.testing.assert_close(layer(PrimaryCapsules(K, grouping=grouping)(conv(x))), v)


def test_orders_that_do_not_fit_are_refused():
    weight = random(24, K, J, D)
    with pytest.raises(ValueError, match="order must hold G, H, W once each; got 'H W C'"):
        input_capsules(weight, "H W C", G=G, H=H, W=W)
    with pytest.raises(ValueError, match=r"N = G H W = 18; got \[24, 4, 5, 6\]"):
        input_capsules(weight, "H W G", G=2, H=3, W=3)
    with pytest.raises(ValueError, match="multiple of K=5 output channels"):
        filters(random(8, 3, 3, 3), "K G", K=5)
    with pytest.raises(ValueError, match="order must hold G, K once each"):
        filters(random(8, 3, 3, 3), "K K", K=4)


def test_grouping_of_primary_capsules():
    with pytest.raises(ValueError, match="grouping must be one of 'channels', 'pixels'"):
        PrimaryCapsules(4, grouping="rows")
    with pytest.raises(ValueError, match=r"27 values of a feature map \[3, 3, 3\] cannot"):
        PrimaryCapsules(4, grouping="pixels")(torch.randn(2, 3, 3, 3))
    torch.manual_seed(0)
    model = CapsNet((1, 12, 12), 3, channels=8, kernel_size=3, decoder=(8,), grouping="pixels")
    x = torch.randn(2, 1, 12, 12)
    u = squash(model.convolutions(x).reshape(2, -1, 8))
    torch.testing.assert_close(model(x).capsules, model.last(model.stack(model.first(u))))


def test_a_decoder_that_sees_one_capsule_only():
    """Its first weight [units, D], side by side for every class, is that of a masked decoder."""
    capsules, shown = random(B, J, D), torch.tensor([4, 0, 2])
    theirs = nn.Sequential(nn.Linear(D, 7), nn.ReLU(), nn.Linear(7, 6), nn.Sigmoid()).double()
    ours = Decoder(J * D, (7,), (1, 2, 3)).double()
    state = {f"layers.{name}": value for name, value in theirs.state_dict().items()}
    state["layers.0.weight"] = state["layers.0.weight"].repeat(1, J)
    ours.load_state_dict(state)
    masked = capsules * nn.functional.one_hot(shown, J).unsqueeze(-1)
    expected = theirs(capsules[range(B), shown]).view(B, 1, 2, 3)
    torch.testing.assert_close(ours(masked), expected)


def test_what_is_converted_shares_no_memory():
    W = torch.randn(6, 2, 3, 4)  # noqa: N806
    array = W.numpy().copy()
    for same in (
        matrices(W, "N K J D"),
        matrices(array, "N K J D"),
        filters(W, "G K", K=2),
        input_capsules(W, "G H W", G=1, H=2, W=3),
    ):
        assert torch.equal(same, W)
        same.zero_()
    assert W.all() and array.all()
