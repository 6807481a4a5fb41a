"""Images of every usual kind become the same pixels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mocapsnet import Preprocessing
from mocapsnet.images import read
from mocapsnet.preprocessing import fit_channels, fit_size, normalise

CPU = torch.device("cpu")
GREY, COLOUR = (1, 6, 5), (3, 6, 5)


def grey(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (6, 5), np.uint8)


def colour(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)


def test_every_kind_of_grey_image_gives_the_same_pixels(tmp_path: Path):
    array = grey()
    path = tmp_path / "image.png"
    Image.fromarray(array).save(path)
    expected = torch.from_numpy(array)[None, None].float() / 255
    tensor = torch.from_numpy(array)
    kinds = [
        array,
        array[None],
        array[..., None],
        array[None, None],
        array[None, ..., None],
        array / 255,
        tensor,
        tensor[None] / 255,
        tensor.double() / 255,
        Image.fromarray(array),
        Image.fromarray(array.astype(np.uint16) * 257),  # 16 bits
        path,
        str(path),
        [path],
    ]
    for kind in kinds:
        pixels = read(kind, GREY, CPU)
        assert pixels.dtype == torch.float32
        torch.testing.assert_close(pixels, expected)
    mixed = read(kinds[:-1], GREY, CPU)
    torch.testing.assert_close(mixed, expected.expand(len(mixed), -1, -1, -1))


def test_every_kind_of_colour_image_gives_the_same_pixels(tmp_path: Path):
    array = colour()
    path = tmp_path / "image.png"
    Image.fromarray(array).save(path)
    expected = torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255
    palette = Image.fromarray((array // 128 * 255).astype(np.uint8)).convert("P", colors=8)
    for kind in (array, array[None], torch.from_numpy(array).permute(2, 0, 1), path):
        torch.testing.assert_close(read(kind, COLOUR, CPU), expected)
    read_palette = read(palette, COLOUR, CPU)
    assert torch.equal(read_palette, read(palette.convert("RGB"), COLOUR, CPU))


def test_batches_and_lists_of_different_sizes():
    batch = torch.rand(7, 3, 6, 5)
    assert read(batch, COLOUR, CPU) is not batch
    assert torch.equal(read(batch, COLOUR, CPU), batch)
    pixels = read([colour(), grey(1), torch.rand(3, 12, 10), torch.rand(20, 5)], COLOUR, CPU)
    assert pixels.shape == (4, *COLOUR)
    with pytest.raises(ValueError, match="image 1 of the sequence is a batch of 7"):
        read([batch[0], batch], COLOUR, CPU)


def test_colour_grey_and_transparency():
    pixels = torch.rand(2, 3, 4, 4)
    luma = fit_channels(pixels, 1)
    r, g, b = pixels.unbind(1)
    torch.testing.assert_close(luma[:, 0], 0.299 * r + 0.587 * g + 0.114 * b)
    array = colour()
    as_pil = torch.from_numpy(np.array(Image.fromarray(array).convert("L"))) / 255
    assert torch.equal(read(Image.fromarray(array), GREY, CPU)[0, 0], as_pil)
    assert (read(array, GREY, CPU)[0, 0] - as_pil).abs().max() < 0.51 / 255  # PIL rounds
    assert torch.equal(fit_channels(luma, 3), luma.expand(-1, 3, -1, -1))
    alpha = np.concatenate([array, grey()[..., None]], 2)
    for kind in (alpha, Image.fromarray(alpha)):
        assert torch.equal(read(kind, COLOUR, CPU), read(array, COLOUR, CPU))
    white = fit_channels(torch.ones(1, 3, 2, 2), 1)
    assert torch.equal(read(white, (1, 2, 2), CPU), white)  # within [0, 1] in spite of rounding
    with pytest.raises(ValueError, match="images of 3 channels cannot be made into 5"):
        read(pixels, (5, 4, 4), CPU)


def test_another_size_is_covered_and_cut_around_the_centre():
    pixels = torch.zeros(1, 1, 8, 16)
    pixels[..., 4:12] = 1
    assert torch.equal(fit_size(pixels, 8, 8), torch.ones(1, 1, 8, 8))  # the middle, unscaled
    halved = fit_size(pixels, 4, 8)
    assert halved.shape == (1, 1, 4, 8)
    assert torch.equal(halved[..., 3:5], torch.ones(1, 1, 4, 2)) and not halved[..., 0].any()
    ramp = np.add.outer(np.arange(40), np.arange(30)).astype(np.uint8)  # smooth
    tensor, file = (read(kind, (1, 12, 12), CPU) for kind in (ramp, Image.fromarray(ramp)))
    assert (tensor - file).abs().max() < 1 / 255
    assert fit_size(torch.rand(2, 3, 3, 7), 28, 20).shape == (2, 3, 28, 20)
    assert fit_size(torch.rand(2, 3, 101, 7), 28, 28).shape == (2, 3, 28, 28)


@pytest.mark.parametrize(
    "image, message",
    [
        (torch.rand(6, 5) * 255, r"^images: .* must lie in \[0, 1\]; got .* divide"),
        (torch.rand(6, 5) - 0.5, r"must lie in \[0, 1\]; got -0"),
        (torch.full((6, 5), torch.nan), r"must lie in \[0, 1\]"),
        (torch.ones(6, 5, dtype=torch.int64), "uint8, bool or floating point; got torch.int64"),
        (torch.rand(9, 6, 5), r"got \[9, 6, 5\]: a batch of grey images"),
        (torch.rand(3, 6, 5), r"one image in colour or 3 grey ones: give the one as \[image\]"),
        (np.zeros((4, 6, 5), np.uint8), r"one image in colour or 4 grey ones"),
        (torch.rand(1, 2, 3, 6, 5), r"got \[1, 2, 3, 6, 5\]"),
        (torch.rand(1, 0, 5), r"got \[1, 0, 5\]"),
        (torch.rand(5), r"got \[5\]"),
        ("missing.png", "missing.png: does not exist"),
        (Path(__file__), "test_preprocessing.py: cannot be read as an image"),
        (3, "images: not a path, a PIL image, a tensor or an array, but int"),
        (Image.fromarray(np.ones((6, 5), np.float32)), "floating point: save it with 8 or 16 bits"),
        (Image.fromarray(np.full((6, 5), 70000, np.int32)), r"outside 0..65535"),
        (Image.fromarray(np.full((6, 5), 255, np.int32)), r"images: its integers are all within 0"),
        (Image.fromarray(np.full((6, 5), 9, np.uint16)), r"images: its integers are all within 0"),
        ([], "at least one image"),
        ([torch.rand(6, 5), torch.rand(6, 5) * 9], r"image 1: floating-point pixels must"),
    ],
)
def test_what_is_no_image_is_named(image, message):
    with pytest.raises(ValueError, match=message):
        read(image, GREY, CPU)


def test_a_truncated_file_is_named(tmp_path: Path):
    path = tmp_path / "cut.png"
    Image.fromarray(colour().repeat(30, 0)).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="cut.png: cannot be read as an image"):
        read(path, COLOUR, CPU)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:6000])
    with pytest.raises(ValueError, match="image 1: .*truncated"):
        read([colour(), Image.open(path)], COLOUR, CPU)  # which is decoded when it is needed


def test_a_dark_file_of_sixteen_bits_is_dark(tmp_path: Path):
    """Integers in memory that are as small are refused, as they were meant otherwise."""
    values = np.arange(30, dtype=np.uint16).reshape(6, 5) * 8
    Image.fromarray(values).save(tmp_path / "dark.png")
    assert read(tmp_path / "dark.png", GREY, CPU).max() == 0
    assert read(Image.open(tmp_path / "dark.png"), GREY, CPU).max() == 0
    with pytest.raises(ValueError, match=r"all within 0..255"):
        read(Image.fromarray(values), GREY, CPU)


def test_four_channels_are_those_of_an_image_that_has_them():
    four = np.random.default_rng(0).integers(0, 256, (6, 5, 4), np.uint8)
    assert torch.equal(read(Image.fromarray(four), (4, 6, 5), CPU), read(four, (4, 6, 5), CPU))
    with pytest.raises(ValueError, match="3 channels cannot be made into 4"):
        read(Image.fromarray(four[..., :3]), (4, 6, 5), CPU)


def test_a_camera_s_orientation_is_followed(tmp_path: Path):
    path = tmp_path / "turned.jpg"
    image = Image.fromarray(np.repeat([[0, 255]], 8, 0).repeat(8, 1).astype(np.uint8))  # 8 x 16
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    image.save(path, exif=exif, quality=95)
    pixels = read(path, (1, 16, 8), CPU)[0, 0]
    assert pixels[:7].max() < 0.1 and pixels[9:].min() > 0.9


def test_normalisation():
    pixels = torch.rand(4, 3, 6, 5)
    assert torch.equal(Preprocessing()(pixels), normalise(pixels))
    assert torch.equal(Preprocessing("none")(pixels), pixels)
    fixed = Preprocessing("fixed", (0.1, 0.2, 0.3), (0.5, 0.25, 2.0))(pixels)
    torch.testing.assert_close(fixed[:, 1], (pixels[:, 1] - 0.2) / 0.25)
    torch.testing.assert_close(Preprocessing("fixed", (0.5,), (0.5,))(pixels), (pixels - 0.5) / 0.5)
    with pytest.raises(ValueError, match="mean and std have 3 channels, the images 1"):
        Preprocessing("fixed", (0.1, 0.2, 0.3), (0.5, 0.25, 2.0))(pixels[:, :1])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("batch",), "normalisation must be one of 'image', 'fixed', 'none'"),
        (("image", (0.1,), (0.2,)), 'go with normalisation="fixed" only'),
        (("fixed",), "needs mean and std"),
        (("fixed", (0.1,), None), "needs mean and std"),
        (("fixed", (0.1,), (0.2, 0.3)), "needs mean and std"),
        (("fixed", (0.1,), (0.0,)), "std must be a number, at least 1e-06"),
    ],
)
def test_normalisation_that_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(*arguments)
