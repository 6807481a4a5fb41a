"""The losses: their formulas, and what they refuse."""

import math
import subprocess
import sys

import pytest
import torch

from mocapsnet import CapsNetOutput, CapsuleLoss, MarginLoss, MoCapsNet

SMALL = dict(blocks=1, capsules=4, capsule_dim=4, channels=8, kernel_size=3, decoder=(8,))


def output(classes=7, batch=4):
    lengths = torch.rand(batch, classes)
    return CapsNetOutput(lengths, torch.rand(batch, classes, 3), torch.rand(batch, 1, 12, 10))


def test_margin_loss_matches_the_formula():
    lengths = torch.tensor([[0.95, 0.3, 0.05], [0.2, 0.6, 0.1]], dtype=torch.float64)
    labels = torch.tensor([0, 2])
    first = 0 + 0.5 * (0.3 - 0.1) ** 2 + 0
    second = 0.5 * (0.2 - 0.1) ** 2 + 0.5 * (0.6 - 0.1) ** 2 + (0.9 - 0.1) ** 2
    assert MarginLoss()(lengths, labels).item() == pytest.approx(first + second)
    assert MarginLoss(reduction="mean")(lengths, labels).item() == pytest.approx(
        (first + second) / 2
    )
    with pytest.raises(ValueError, match="reduction must be"):
        MarginLoss(reduction="none")


@pytest.mark.parametrize("reduction, divisor", [("sum", 1), ("mean", 4)])
def test_capsule_loss_adds_the_weighted_squared_error(reduction, divisor):
    pixels, labels, out = torch.rand(4, 1, 12, 10), torch.arange(4), output()
    loss = CapsuleLoss(reconstruction_weight=0.01, reduction=reduction)(out, pixels, labels)
    error = sum((out.reconstruction[b] - pixels[b]).square().sum() for b in range(4)) / divisor
    torch.testing.assert_close(loss.reconstruction, error)
    torch.testing.assert_close(loss.margin, MarginLoss()(out.lengths, labels) / divisor)
    torch.testing.assert_close(loss.total, loss.margin + 0.01 * loss.reconstruction)
    with pytest.raises(ValueError, match="must have the shape of the reconstruction"):
        CapsuleLoss()(out, pixels[:, :, :5], labels)


WRONG_LABELS = [
    (torch.zeros(4, 1, dtype=torch.int64), r"indices \[B\] = \[4\]; got shape \[4, 1\].*squeeze"),
    (torch.eye(7, dtype=torch.int64)[:4], r"got shape \[4, 7\].*argmax"),
    (torch.zeros(3, dtype=torch.int64), r"got shape \[3\]"),
    (torch.zeros((), dtype=torch.int64), r"got shape \[\]"),
    (torch.zeros(4), "integer dtype; got torch.float32"),
    (torch.zeros(4, dtype=torch.bool), "integer dtype; got torch.bool"),
    (torch.tensor([0, 1, 7, 2]), "between 0 and 6, for 7 classes; got 7"),
    (torch.tensor([0, -100, 1, 2]), "got -100"),
    ([0, 1, 2, 3], r"torch.Tensor \[B\].*got list"),
    (torch.zeros(4, dtype=torch.int64, device="meta"), "on the device of the capsules, cpu"),
]


@pytest.mark.parametrize("labels, message", WRONG_LABELS)
def test_labels_that_are_no_class_indices_are_refused(labels, message):
    out, pixels = output(), torch.rand(4, 1, 12, 10)
    model = MoCapsNet((1, 12, 10), 7, **SMALL)
    with pytest.raises(ValueError, match=message):
        MarginLoss()(out.lengths, labels)
    with pytest.raises(ValueError, match=message):
        CapsuleLoss()(out, pixels, labels)
    with pytest.raises(ValueError, match=message):
        model(torch.randn(4, 1, 12, 10), labels)


def test_the_margin_loss_says_that_it_takes_lengths():
    out = CapsNetOutput(torch.rand(2, 3), torch.rand(2, 3, 4), None)
    with pytest.raises(ValueError, match="not CapsNetOutput; of what a network gives it is output"):
        MarginLoss()(out, torch.tensor([0, 1]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_dtype_serve(dtype):
    out = output()
    labels = torch.tensor([0, 6, 3, 3])
    assert torch.equal(
        MarginLoss()(out.lengths, labels.to(dtype)), MarginLoss()(out.lengths, labels)
    )


def test_labels_are_checked_under_vmap_and_in_compiled_code():
    lengths, labels = torch.rand(4, 7), torch.tensor([0, 1, 2, 7])

    def sample(lengths, label):
        return MarginLoss()(lengths[None], label[None])

    each = torch.func.vmap(torch.func.grad(sample))(lengths, labels % 7)
    leaf = lengths.clone().requires_grad_()
    MarginLoss()(leaf, labels % 7).backward()
    torch.testing.assert_close(each, leaf.grad)
    with pytest.raises(ValueError, match="got 7"):
        torch.func.vmap(sample)(lengths, labels)

    compiled = torch.compile(MarginLoss(), backend="eager", fullgraph=True)
    assert torch.equal(compiled(lengths, labels % 7), MarginLoss()(lengths, labels % 7))
    with pytest.raises(RuntimeError, match="labels must lie between 0 and 6"):
        compiled(lengths, labels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_wrong_label_ends_a_process_on_a_gpu():
    """In a process of its own: after a failed assertion on a device nothing runs on it."""
    script = (
        "import torch; from mocapsnet import MarginLoss\n"
        "MarginLoss()(torch.rand(2, 3).cuda(), torch.tensor([0, 3]).cuda())\n"
        "torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode != 0
    assert "labels must lie between 0 and 2" in done.stderr or "assert" in done.stderr


@pytest.mark.parametrize("classes, weight", [(1, 0.5), (10, 0.5), (11, 0.45), (200, 4.5 / 199)])
def test_absent_classes_weigh_together_at_most_what_nine_weigh(classes: int, weight: float) -> None:
    lengths, labels = torch.full((3, classes), 0.5), torch.zeros(3, dtype=torch.long)
    each = (0.9 - 0.5) ** 2 + weight * (classes - 1) * (0.5 - 0.1) ** 2
    torch.testing.assert_close(
        MarginLoss(down_weight=None).each(lengths, labels), torch.full((3,), each)
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(upper=0.1, lower=0.9), "lower must be less than upper"),
        (dict(upper=0.5, lower=0.5), "lower must be less than upper"),
        (dict(upper=math.nan), "upper must be a number, between 0 and 1; got nan"),
        (dict(upper=9), "upper must be"),
        (dict(lower=-0.1), "lower must be"),
        (dict(down_weight=-0.5), "down_weight must be a number, at least 0; got -0.5"),
        (dict(down_weight=math.inf), "down_weight must be a number, finite; got inf"),
        (dict(down_weight="0.5"), "down_weight must be"),
        (dict(down_weight=True), "down_weight must be"),
    ],
)
def test_margins_and_weights_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MarginLoss(**options)


def test_a_capsule_loss_has_one_reduction_and_a_weight():
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="reconstruction_weight must be"):
            CapsuleLoss(weight)
    with pytest.raises(ValueError, match="reduction='sum' does not go with a margin loss of"):
        CapsuleLoss(reduction="sum", margin=MarginLoss(reduction="mean"))
    assert CapsuleLoss(margin=MarginLoss(reduction="mean")).reduction == "mean"
    assert CapsuleLoss().reduction == CapsuleLoss().margin.reduction == "sum"


def test_pixels_in_bytes_are_refused():
    bytes = torch.zeros(4, 1, 12, 10, dtype=torch.uint8)
    with pytest.raises(ValueError, match="pixels must be floating point.*got torch.uint8"):
        CapsuleLoss()(output(), bytes, torch.arange(4))


def test_shares_of_classes_weigh_the_losses_of_their_labels():
    lengths = torch.rand(4, 7, dtype=torch.float64)
    first, second, share = torch.tensor([0, 6, 3, 3]), torch.tensor([1, 6, 0, 5]), 0.3
    one_hot = torch.eye(7, dtype=torch.float64)
    mixed = share * one_hot[first] + (1 - share) * one_hot[second]
    loss = MarginLoss()
    want = share * loss(lengths, first) + (1 - share) * loss(lengths, second)
    torch.testing.assert_close(loss(lengths, mixed), want)
    torch.testing.assert_close(loss(lengths, one_hot[first]), loss(lengths, first))


def test_the_decoder_sees_capsules_by_their_shares():
    model = MoCapsNet((1, 12, 10), 7, **SMALL)
    x = torch.randn(2, 1, 12, 10)
    mixed = torch.zeros(2, 7)
    mixed[0, 2], mixed[0, 5], mixed[1, 1] = 0.25, 0.75, 1
    out = model(x, mixed)
    want = model.decoder(out.capsules * mixed.unsqueeze(-1))
    torch.testing.assert_close(out.reconstruction, want)
    labels = model(x, torch.tensor([2, 1])).reconstruction
    torch.testing.assert_close(out.reconstruction[1], labels[1])


@pytest.mark.parametrize(
    "shares, message",
    [
        (torch.full((4, 7), 1.5), "between 0 and 1; got 1.5"),
        (torch.full((4, 7), -0.1), "between 0 and 1; got -0.1"),
        (torch.full((4, 7), float("nan")), "between 0 and 1; got nan"),
        (torch.zeros(4, 6), r"shares of the classes \[B, classes\] = \[4, 7\].*got shape \[4, 6\]"),
        (torch.zeros(4, 7, device="meta"), "on cpu; got shape .* on meta"),
    ],
)
def test_shares_that_are_none_are_refused(shares, message):
    with pytest.raises(ValueError, match=message):
        MarginLoss()(torch.rand(4, 7), shares)
