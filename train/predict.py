"""`mocapsnet predict`: which class is in each image."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import mocapsnet
from mocapsnet import CapsNet, images
from mocapsnet.train.errors import InputError, Stop
from mocapsnet.train.files import hidden
from mocapsnet.train.options import PredictOptions

BATCH_SIZE = 128


class BadImages(Stop):
    """Some images could not be read; the others were predicted."""


@dataclass(frozen=True)
class Found:
    """A file and what was found in it, or why nothing was.

    Attributes:
        lengths: of the class capsules, or probabilities of a network without capsules [classes].
        pair: the image as the network saw it, beside its reconstruction [C, H, 2 W + 1], or alone
            [C, H, W] where the network has no decoder.
    """

    file: Path
    fault: str | None = None
    lengths: Tensor | None = None
    pair: Tensor | None = None

    def ranked(self, count: int) -> list[tuple[int, float]]:
        """The `count` longest capsules' classes and lengths, longest first."""
        assert self.lengths is not None
        longest = self.lengths.topk(min(count, len(self.lengths)))
        return list(zip(longest.indices.tolist(), longest.values.tolist(), strict=True))


def predict(options: PredictOptions) -> list[Found]:
    """Print what is in each image; with --pictures draw it beside its reconstruction.

    Raises: InputError if the run, the device or all of the images cannot be used; BadImages at the
        end, if some of them could not be read.
    """
    cuda = torch.cuda.is_available()
    if options.device == "cuda" and not cuda:
        raise InputError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    try:
        model = mocapsnet.load(
            options.run, device="cuda" if cuda and options.device != "cpu" else "cpu"
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    files = list_images(options.images)
    found = [
        one
        for n in range(0, len(files), BATCH_SIZE)
        for one in _batch(model, files[n:][:BATCH_SIZE])
    ]
    if options.json:
        print(json.dumps([_entry(one, model.class_names) for one in found], indent=2))
    else:
        number = "length" if model.has_capsules else "probability"
        for line in table(found, model.class_names, number):
            print(line)
    if options.pictures is not None:
        folder = Path(options.pictures)
        write_pictures(folder, found, model.class_names)
        print(f"pictures: {folder}", file=sys.stderr)
    bad = [f"{one.file}: {one.fault}" for one in found if one.fault]
    if bad:
        listing = "\n".join(f"  {line}" for line in bad)
        raise BadImages(f"{len(bad)} of {len(found)} images cannot be used:\n{listing}")
    return found


def list_images(paths: tuple[str, ...]) -> list[Path]:
    """Files as they are given, and of folders all image files in and below them, by name, without
    hidden ones.

    Raises: InputError if a folder holds none.
    """
    from PIL import Image

    if not paths:
        raise InputError("IMAGES: name image files, or folders of them")
    known = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(path)
            continue
        inside = sorted(
            p
            for p in path.rglob("*")
            if p.suffix.lower() in known and p.is_file() and not hidden(p.relative_to(path))
        )
        if not inside:
            raise InputError(f"{path} holds no image files")
        files += inside
    return files


def _batch(model: CapsNet, files: list[Path]) -> Iterator[Found]:
    """What the network finds in a few files, in their order."""
    pixels: dict[int, Tensor] = {}
    faults: dict[int, str] = {}
    for n, file in enumerate(files):
        try:
            pixels[n] = images.read(file, model.config.image_shape, torch.device("cpu"))
        except ValueError as error:
            faults[n] = str(error).removeprefix(f"{file}: ")
    if pixels:
        predicted = model.predict(torch.cat(list(pixels.values())))
        pairs = predicted.pixels.cpu()
        if predicted.reconstruction is not None:
            gap = pairs.new_ones(*pairs.shape[:3], 1)
            pairs = torch.cat([pairs, gap, predicted.reconstruction.cpu()], 3)
        rows = dict(zip(pixels, zip(predicted.lengths.cpu(), pairs, strict=True), strict=True))
    for n, file in enumerate(files):
        yield Found(file, faults[n]) if n in faults else Found(file, None, *rows[n])


def table(found: list[Found], names: tuple[str, ...], number: str = "length") -> list[str]:
    """Lines of text; images that could not be read have none.

    Args:
        number: what `lengths` are.
    """
    rows = [("file", "class", number, "runner-up", number)]
    for one in found:
        if one.fault is None:
            cells = [(names[k], f"{length:.3f}") for k, length in one.ranked(2)]
            rows.append((str(one.file), *cells[0], *(cells[1] if len(cells) > 1 else ("", ""))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _entry(one: Found, names: tuple[str, ...]) -> dict[str, object]:
    """One image as JSON has it."""
    if one.fault is not None:
        return {"file": str(one.file), "error": one.fault}
    assert one.lengths is not None
    first, *others = (
        {"class": names[k], "label": k, "length": length} for k, length in one.ranked(2)
    )
    return {
        "file": str(one.file),
        **first,
        "runner_up": others[0] if others else None,
        "lengths": one.lengths.tolist(),
    }


def write_pictures(folder: Path, found: list[Found], names: tuple[str, ...]) -> list[Path]:
    """A PNG of each image beside its reconstruction, with what was found, under the file's name."""
    from PIL import Image, ImageDraw, ImageFont

    folder.mkdir(parents=True, exist_ok=True)
    font = ImageFont.load_default(size=14)
    written: list[Path] = []
    for one in found:
        if one.pair is None:
            continue
        C, H, width = one.pair.shape
        scale = max(1, 280 // width)
        values = (one.pair * 255).round().byte().permute(1, 2, 0).numpy()
        pair = Image.fromarray(values[..., 0] if C == 1 else values[..., :3]).convert("RGB")
        pair = pair.resize((width * scale, H * scale), Image.Resampling.NEAREST)
        captions = [f"{names[k]}  {length:.3f}" for k, length in one.ranked(2)]
        sheet = Image.new("RGB", (pair.width, pair.height + 20 * len(captions) + 4), "white")
        sheet.paste(pair, (0, 0))
        draw = ImageDraw.Draw(sheet)
        for n, caption in enumerate(captions):
            colour = "black" if n == 0 else "gray"
            draw.text((4, pair.height + 2 + 20 * n), caption, fill=colour, font=font)
        path, copy = folder / f"{one.file.stem}.png", 1
        while path in written:
            copy += 1
            path = folder / f"{one.file.stem}-{copy}.png"
        sheet.save(path)
        written.append(path)
    return written
