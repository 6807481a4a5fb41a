"""Folders of images: what is read, what is kept, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mocapsnet.images import fit
from mocapsnet.train.data import cache, decode, folder
from mocapsnet.train.errors import InputError

RNG = np.random.default_rng(0)
CLASSES = ("ant", "bee", "cat")

Command = Callable[..., tuple[int, str, str]]


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def write(path: Path, image: np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)


def write_folder(root: Path, count: int = 4, size: tuple[int, ...] = (6, 5)) -> dict[str, dict]:
    """`count` random images of each class; returns {class: {file: pixels}}."""
    written: dict[str, dict] = {}
    for name in CLASSES:
        written[name] = {f"{i}.png": pixels(*size) for i in range(count)}
        for file, image in written[name].items():
            write(root / name / file, image)
    return written


@pytest.fixture(autouse=True)
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return tmp_path / "user" / "mocapsnet"


def assert_holds(images: folder.ImageSet, written: dict[str, dict]) -> None:
    """The same images with the same labels, in whatever order."""
    have = [
        (images.name(label), image.tobytes())
        for label, image in zip(images.labels.tolist(), images.images.numpy(), strict=True)
    ]
    need = [
        (name, np.ascontiguousarray(image if image.ndim == 2 else image.transpose(2, 0, 1)))
        for name, files in written.items()
        for image in files.values()
    ]
    assert sorted(have) == sorted((name, image.tobytes()) for name, image in need)


@pytest.mark.parametrize(("size", "shape"), [((6, 5), (1, 6, 5)), ((6, 5, 3), (3, 6, 5))])
def test_train_and_test_folders(size: tuple, shape: tuple, tmp_path: Path) -> None:
    written = {s: write_folder(tmp_path / s, n, size) for s, n in (("train", 20), ("test", 2))}
    train, test = folder.load(str(tmp_path))
    assert train.classes == test.classes == CLASSES
    assert train.image_shape == test.image_shape == shape
    assert_holds(train, written["train"])
    assert_holds(test, written["test"])
    # So that --limit takes some of every class; 9 of 60 without one happens once in 60 draws.
    assert set(train.first(9).labels.tolist()) == {0, 1, 2}


def test_one_folder_is_split_alike_in_every_class(tmp_path: Path) -> None:
    written = write_folder(tmp_path, 10)
    train, test = folder.load(str(tmp_path), test_share=0.3)
    assert torch.bincount(train.labels).tolist() == [7, 7, 7]
    assert torch.bincount(test.labels).tolist() == [3, 3, 3]
    both = folder.ImageSet(
        torch.cat([train.images, test.images]), torch.cat([train.labels, test.labels]), CLASSES
    )
    assert_holds(both, written)
    again, _ = folder.load(str(tmp_path), test_share=0.3)
    assert torch.equal(train.images, again.images)
    other, _ = folder.load(str(tmp_path), test_share=0.3, split_seed=1)
    assert not torch.equal(train.images, other.images)
    assert len(folder.load(str(tmp_path))[1]) == 6


def test_one_image_in_colour_makes_all_colour(tmp_path: Path) -> None:
    written = write_folder(tmp_path, 2)
    written["bee"]["0.png"] = pixels(6, 5, 3)
    write(tmp_path / "bee" / "0.png", written["bee"]["0.png"])
    train, test = folder.load(str(tmp_path), test_share=0.5)
    assert train.image_shape == (3, 6, 5)
    grey = {n: {f: i for f, i in v.items() if i.ndim == 2} for n, v in written.items()}
    stacked = {n: {f: np.stack([i] * 3, -1) for f, i in v.items()} for n, v in grey.items()}
    both = [*train.images.numpy(), *test.images.numpy()]
    for image in [i for files in stacked.values() for i in files.values()]:
        assert any(np.array_equal(image.transpose(2, 0, 1), found) for found in both)


def test_images_of_other_sizes_are_resized_and_cut_about_the_centre(tmp_path: Path) -> None:
    wide = np.zeros((10, 20), np.uint8)
    wide[:, 5:15] = 200
    for name in ("ant", "bee"):
        for i, image in enumerate((wide, wide.T, np.full((40, 40), 200, np.uint8))):
            write(tmp_path / name / f"{i}.png", image)
    for asked, size in ((None, decode.DEFAULT_SIZE), (10, 10)):
        for images in folder.load(str(tmp_path), image_size=asked, test_share=0.5):
            assert images.image_shape == (1, size, size)
            # Enlarged 3.2 times, the two columns beside the cut reach 6.4 pixels into it.
            edge = 7 if asked is None else 0
            assert (images.images[:, :, edge : size - edge, edge : size - edge] == 200).all()


def test_cameras_rotations_sixteen_bits_and_palettes(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn by 90 degrees clockwise
    picture = np.zeros((8, 16), np.uint8)
    picture[:, :8] = 255  # bright left half; upright it is the upper one
    write(tmp_path / "a" / "0.jpg", picture, exif=exif, quality=100)
    write(tmp_path / "a" / "1.png", (np.arange(128).reshape(16, 8) * 512).astype(np.uint16))
    images, kept, faults = decode.decode(
        [str(tmp_path / "a" / name) for name in ("0.jpg", "1.png")], None, quiet=True
    )
    assert images.shape == (2, 1, 16, 8) and kept.tolist() == [0, 1] and not faults
    assert (images[0, 0, :7] > 240).all() and (images[0, 0, 9:] < 15).all()
    assert images[1].flatten().tolist() == [i * 512 // 257 for i in range(128)]
    palette = Image.fromarray(pixels(4, 4, 3)).quantize(16)
    palette.save(tmp_path / "p.png", transparency=0)
    images, _, _ = decode.decode([str(tmp_path / "p.png")], None, quiet=True)
    np.testing.assert_array_equal(images[0].permute(1, 2, 0), np.asarray(palette.convert("RGB")))


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of images whenever some are decoded."""
    calls: list[int] = []

    def counted(paths: list[str], *arguments: object) -> object:
        calls.append(len(paths))
        return decode.decode(paths, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(folder, "decode", counted)
    return calls


def test_decoded_once_and_again_when_the_folder_changes(
    tmp_path: Path, decodings: list[int], user_cache: Path
) -> None:
    root = tmp_path / "images"
    write_folder(root)

    def load(**options: int) -> tuple[folder.ImageSet, folder.ImageSet]:
        return folder.load(str(root), quiet=True, **options)

    first = load()
    for one, other in zip(first, load(split_seed=0), strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    assert decodings == [12] and (root / cache.NAME).exists() and not user_cache.exists()
    assert (root / cache.NAME).stat().st_mode == (root / "ant" / "0.png").stat().st_mode
    load(image_size=4)
    assert decodings == [12, 12]
    load()
    write(root / "ant" / "9.png", pixels(6, 5))  # one more
    load()
    (root / "ant" / "9.png").rename(root / "ant" / "8.png")  # another name
    load()
    os.utime(root / "bee" / "0.png", ns=(0, 0))  # another time
    load()
    (root / "ant" / "8.png").unlink()  # one less
    load()
    load()
    assert decodings == [12, 12, 12, 13, 13, 13, 12]
    (root / cache.NAME).write_bytes((root / cache.NAME).read_bytes()[:-1])  # a full disk
    load()
    assert decodings[7:] == [12]
    assert [path.name for path in root.iterdir() if path.is_file()] == [cache.NAME]


def test_where_the_folder_cannot_be_written_the_users_cache_is(
    tmp_path: Path, decodings: list[int], user_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "images"
    with_folders(root)
    (root / cache.NAME).mkdir()  # as good as a read-only folder, also for the user root
    (root / cache.NAME / "taken").touch()
    folder.load(str(root))
    (written,) = user_cache.iterdir()
    assert f"kept in {written}" in capsys.readouterr().out
    folder.load(str(root))
    assert decodings == [24] and capsys.readouterr().out == ""
    written.unlink()
    user_cache.rmdir()
    user_cache.write_text("no folder")
    train, _ = folder.load(str(root))
    assert "cannot be kept" in capsys.readouterr().out and len(train) == 12
    assert {path.name for path in root.iterdir()} == {cache.NAME, "train", "test"}


def test_broken_images_are_refused_or_left_out(
    tmp_path: Path, decodings: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path, 12)
    cut, empty = tmp_path / "ant" / "0.png", tmp_path / "bee" / "1.png"
    cut.write_bytes(cut.read_bytes()[:60])
    empty.write_bytes(b"")
    for _ in range(2):  # also from the cache
        with pytest.raises(InputError, match="2 of 36 images cannot be read") as error:
            folder.load(str(tmp_path), quiet=True)
        assert "--broken-images skip" in str(error.value)
        for path in (cut, empty):
            assert f"{path}: " in str(error.value)
        train, test = folder.load(str(tmp_path), broken="skip")
        counts = torch.bincount(torch.cat([train.labels, test.labels]))
        assert counts.tolist() == [11, 11, 12]
        warning = capsys.readouterr().err
        assert "2 of 36" in warning and str(cut) in warning and str(empty) in warning
    assert decodings == [36, 2, 2, 2]  # of the cache only the broken ones are tried again
    for path in (tmp_path / "ant").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError) as error:
        folder.load(str(tmp_path))
    assert "13 of 36" in str(error.value) and "and 3 more" in str(error.value)
    with pytest.raises(InputError, match="class ant has 0 image"):
        folder.load(str(tmp_path), broken="skip")


def test_an_image_that_can_be_read_again_is_no_longer_left_out(tmp_path: Path) -> None:
    """Though its size and its time are as before."""
    write_folder(tmp_path, 4)
    image, link = tmp_path / "ant" / "0.png", tmp_path / "bee" / "link.png"
    content, found = image.read_bytes(), image.stat()
    image.write_bytes(content[:20] + bytes(len(content) - 20))
    os.utime(image, ns=(found.st_atime_ns, found.st_mtime_ns))
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="2 of 13 images cannot be read") as error:
        folder.load(str(tmp_path))
    assert f"{link}: FileNotFoundError" in str(error.value)
    read = [len(images) for images in folder.load(str(tmp_path), broken="skip")]
    assert sum(read) == 11
    image.write_bytes(content)
    os.utime(image, ns=(found.st_atime_ns, found.st_mtime_ns))
    read = [len(images) for images in folder.load(str(tmp_path), broken="skip")]
    assert sum(read) == 12


Spoil = Callable[[Path], object]


def rename(old: str, new: str) -> Spoil:
    return lambda root: (root / old).rename(root / new)


def with_folders(root: Path) -> None:
    for split in ("train", "test"):
        write_folder(root / split)


@pytest.mark.parametrize(
    ("make", "options", "expected"),
    [
        (lambda root: root.rmdir(), {}, "{root} is not a folder"),
        (lambda root: None, {}, "class folder in {root}"),
        (lambda root: write_folder(root / "train"), {}, "--data-dir {root}/train --test-share 0.2"),
        (lambda root: write_folder(root / "test"), {}, "{root}/test is there, but {root}/train"),
        (lambda root: write(root / "ant" / "0.png", pixels(4, 4)), {}, "one class only, ant"),
        (
            lambda root: (write_folder(root), (root / "dog").mkdir()),
            {},
            "no valid file for the classes dog",
        ),
        (
            lambda root: (write_folder(root), write(root / "dog" / "0.png", pixels(6, 5))),
            {},
            "class dog has 1 image",
        ),
        (
            lambda root: (with_folders(root), rename("test/ant", "test/dog")(root)),
            {},
            "{root}/test has classes that {root}/train has not: dog",
        ),
        (with_folders, {"test_share": 0.5}, "{root} has a test folder of its own"),
        (write_folder, {"test_share": 0.01}, "--test-share 0.01 of 12 images: The test_size = 1"),
        (
            lambda root: (write_folder(root / "train"), (root / "test").mkdir()),
            {},
            "class folder in {root}/test",
        ),
        (
            lambda root: (
                write_folder(root / "train"),
                (root / "test" / "ant").mkdir(parents=True),
            ),
            {},
            "{root}/test holds no images",
        ),
    ],
)
def test_folders_that_cannot_be_a_data_set(
    make: Spoil, options: dict, expected: str, tmp_path: Path
) -> None:
    root = tmp_path / "images"
    root.mkdir()
    make(root)
    with pytest.raises(InputError) as error:
        folder.load(str(root), quiet=True, **options)
    assert expected.format(root=root) in str(error.value)


TINY = "--channels 16 --kernel-size 3 --capsules 4 --decoder 16 --batch-size 8 --epochs 1".split()
CPU = ["--device", "cpu"]


def test_a_run_knows_the_files_of_its_images(command: Command) -> None:
    """A share of one folder that is held out is another where a file is more or less."""
    write_folder(Path("photos"), 10, (8, 8))
    folder_of = ["--dataset", "folder", "--data-dir"]
    code, _, errors = command("train", *folder_of, "photos", *TINY, *CPU, "--out", "run")
    assert code == 0, errors
    shutil.copytree("photos", "moved")
    assert command("evaluate", "run", *CPU, "--data-dir", "moved")[0] == 0
    Path("moved/ant/0.png").unlink()
    for words in ("evaluate", "visualize", "evaluate --shift 1 --rotate 5"):
        name, *options = words.split()
        code, _, errors = command(name, "run", *options, *CPU, "--data-dir", "moved")
        assert code == 2 and "some of them it may have been trained on; restore" in errors
    code, _, errors = command("train", "--resume", "run", "--epochs", "2", "--data-dir", "moved")
    assert code == 2 and "the training images are other files than those run began" in errors
    # Images to test with that lie apart are those that are meant, whatever they are.
    Path("apart").mkdir()
    Path("moved").rename("apart/train")
    write_folder(Path("apart/test"), 2, (8, 8))
    code, output, errors = command("evaluate", "run", *CPU, "--data-dir", "apart")
    assert code == 0 and "of 6)" in output, errors
    code, _, errors = command("train", *folder_of, "apart", *TINY, *CPU, "--out", "other")
    assert code == 0, errors
    Path("apart/test/ant/0.png").unlink()
    assert command("evaluate", "other", *CPU)[0] == 0
    code, _, errors = command("train", "--resume", "other", "--epochs", "2")
    assert code == 2 and "the test images are other files than those other began" in errors


def test_hidden_folders_and_files_are_left_out(tmp_path: Path) -> None:
    """As notebooks, version control and other systems leave them."""
    for split in ("", "test"):
        root = tmp_path / "one" if not split else tmp_path / "two" / split
        write_folder(root)
        write(root / ".ipynb_checkpoints" / "0.png", pixels(6, 5))
        write(root / "ant" / ".thumbnails" / "0.png", pixels(6, 5))
        write(root / "ant" / "more" / ".thumbnails" / "0.png", pixels(6, 5))
        (root / ".git").mkdir()
        (root / "ant" / "._0.png").write_bytes(b"no image")
    write_folder(tmp_path / "two" / "train")
    for name, counts in (("one", 12), ("two", 24)):
        train, test = folder.load(str(tmp_path / name))
        assert train.classes == CLASSES and len(train) + len(test) == counts
    (tmp_path / "three" / ".hidden").mkdir(parents=True)
    with pytest.raises(InputError, match="Couldn't find any class folder"):
        folder.load(str(tmp_path / "three"))


def test_images_have_the_names_of_their_files(tmp_path: Path) -> None:
    written = write_folder(tmp_path, 6)
    (tmp_path / "bee" / "2.png").write_bytes(b"")
    for images in folder.load(str(tmp_path), broken="skip", quiet=True):
        for some in (images, images.take(torch.tensor([2, 0])), images.first(3)):
            assert len(some.names) == len(some)
            for n, name in enumerate(some.names):
                folder_name, file = name.split("/")
                assert folder_name == some.name(int(some.labels[n]))
                assert np.array_equal(written[folder_name][file], some.images[n, 0].numpy())
    assert images.title(1) == f"image 1 ({images.names[1]})"


def test_new_images_with_known_classes_test_a_run(tmp_path: Path, command: Command) -> None:
    """From a test folder alone, in which classes may be missing."""
    for place in ("photos", "split/train", "split/test", "new/test", "other/test"):
        write_folder(Path(place), 10, (8, 8))
    for name in ("photos", "split"):
        code, _, errors = command(
            "train", "--dataset", "folder", "--data-dir", name, *TINY, *CPU, "--out", f"run-{name}"
        )
        assert code == 0, errors
    shutil.rmtree("new/test/ant")
    rename("test/ant", "test/dog")(Path("other"))
    for run in ("run-photos", "run-split"):
        code, output, errors = command("evaluate", run, *CPU, "--data-dir", "new")
        assert code == 0 and "of 20)" in output and "ant" not in output.splitlines()[2], errors
        assert "(test/bee/" in output or "(test/cat/" in output
        code, output, errors = command("evaluate", run, "--shift", "1", *CPU, "--data-dir", "new")
        assert code == 0 and "20 test images" in output, errors
        code, _, errors = command("evaluate", run, *CPU, "--data-dir", "other")
        assert code == 2 and "other/test has classes that the run has not: dog" in errors
    code, _, errors = command(
        "train", "--resume", "run-split", "--epochs", "2", "--data-dir", "new"
    )
    assert code == 2 and "new/train is not" in errors


def test_a_class_may_be_missing_from_the_test_folder(tmp_path: Path) -> None:
    with_folders(tmp_path)
    rename("test/bee", "elsewhere")(tmp_path)
    _, test = folder.load(str(tmp_path))
    assert test.classes == CLASSES and torch.bincount(test.labels).tolist() == [4, 0, 4]


def test_train_resume_evaluate_visualize(command: Command, tmp_path: Path) -> None:
    for split, count in (("train", 16), ("test", 8)):
        for value, name in enumerate(CLASSES):
            for i in range(count):  # noise with a bright stripe
                image = pixels(12, 12) // 4
                image[:, 4 * value : 4 * value + 4] += 180
                write(Path("images", split, name, f"{i}.png"), image)
    sizes = "--channels 16 --kernel-size 3 --capsules 4 --decoder 16 --batch-size 16".split()
    source = "--dataset folder --data-dir images --device cpu".split()
    code, output, errors = command("train", *source, *sizes, "--epochs", "1", "--out", "run")
    assert code == 0, errors
    assert "folder, 3 classes, 48 training and 24 test images of 1x12x12;" in output
    code, output, errors = command("train", "--resume", "run", "--epochs", "6")
    assert code == 0, errors
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert rows[-1]["test_accuracy"] > 0.9  # chance is a third
    for name in ("evaluate", "visualize"):
        code, output, errors = command(name, "run", "--device", "cpu")
        assert code == 0, errors
        assert f"test accuracy {rows[-1]['test_accuracy']:.2%}" in output
    (Path("images/test/ant")).rename("images/test/swapped")
    (Path("images/test/bee")).rename("images/test/ant")
    (Path("images/test/swapped")).rename("images/test/bee")
    code, output, errors = command("evaluate", "run", "--device", "cpu")
    assert code == 0, errors
    assert "ant taken for bee (" in output and "bee taken for ant (" in output


def test_a_run_refuses_other_classes_and_shapes(command: Command) -> None:
    """Of as many classes with other names nothing else would tell, but a wrong accuracy."""
    for root, size in (("images", (12, 12)), ("others", (12, 12)), ("wide", (12, 14))):
        for split in ("train", "test"):
            write_folder(Path(root, split), size=size)
    for split in ("train", "test"):
        Path("others", split, "bee").rename(Path("others", split, "wasp"))
    sizes = "--channels 16 --kernel-size 3 --capsules 4 --decoder 16 --device cpu".split()
    start = ["train", "--dataset", "folder", "--data-dir", "images", *sizes]
    code, _, errors = command(*start, "--epochs", "1", "--out", "run")
    assert code == 0, errors
    kept = {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}
    for wrong, told in (
        ("others", "classes wasp where run/config.json has bee; give"),
        ("wide", "image shape 1, 12, 14 where run/config.json has 1, 12, 12; give"),
    ):
        for words in (
            ["evaluate", "run", "--device", "cpu"],
            ["visualize", "run", "--device", "cpu"],
            ["train", "--resume", "run", "--epochs", "2"],
        ):
            code, _, errors = command(*words, "--data-dir", wrong)
            assert code == 2 and told in errors and errors.count("\n") == 1, errors
    assert {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()} == kept


def test_where_no_image_can_be_decoded_it_is_said(tmp_path: Path) -> None:
    """Heads that are whole, as an interrupted copy leaves them."""
    for place in ("one", "two/train", "two/test"):
        write_folder(tmp_path / place, 2, (40, 40))
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:200])
    for name, said in (("one", "class ant has 0 image that can be read"), ("two", "of class ant")):
        for _ in ("decoded", "kept"):
            with pytest.raises(InputError, match=said):
                folder.load(str(tmp_path / name), broken="skip", quiet=True)


def test_new_images_become_of_the_size_and_the_colours_that_a_run_knows(command: Command) -> None:
    write_folder(Path("grey"), 10, (8, 8))
    write_folder(Path("colour"), 10, (9, 8, 3))
    write_folder(Path("new-grey/test"), 2, (8, 8))
    write_folder(Path("new-colour/test"), 2, (14, 10, 3))
    write(Path("new-colour/test/ant/large.png"), pixels(30, 40))
    for name in ("grey", "colour"):
        code, _, errors = command(
            "train", "--dataset", "folder", "--data-dir", name, *TINY, *CPU, "--out", f"run-{name}"
        )
        assert code == 0, errors
        for new, count in (("new-grey", 6), ("new-colour", 7)):
            code, output, errors = command("evaluate", f"run-{name}", *CPU, "--data-dir", new)
            assert code == 0 and f"of {count})" in output and "become" not in output, errors
    shape = (3, 9, 8)
    _, test = folder.load("new-colour", quiet=True, tested=folder.Known(CLASSES, shape))
    assert test.image_shape == shape
    for image, name in zip(test.images.numpy(), test.names, strict=True):
        with Image.open(Path("new-colour", name)) as file:
            assert np.array_equal(image, fit(file, shape[1:], 3))
