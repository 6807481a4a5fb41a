"""The wheel and the source distribution hold what they should and work without the repository."""

import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import mocapsnet

ROOT = Path(__file__).resolve().parents[1]
MAPPED = {
    "mocapsnet": "mocapsnet",
    "kernels": "mocapsnet/kernels",
    "train": "mocapsnet/train",
    "benchmarks": "mocapsnet/benchmarks",
}
FOLDERS = [*MAPPED, "tests", ".ci"]
TOP = [
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "pyproject.toml",
    "setup.py",
]

# Runs with the folder of the installed wheel first on the path. What makes it a test of the wheel
# is its last check: the repository is installed in this environment as well, and its import hook
# would supply whatever the wheel lacks.
USE_WHEEL = """
import importlib.metadata, importlib.util, pathlib, pkgutil, sys

target = pathlib.Path(sys.argv[1])
sys.path.insert(0, str(target))

import torch
from mocapsnet import (
    CapsNet, CapsuleLayer, CapsuleLoss, Decoder, MarginLoss, MoCapsNet, MomentumStack,
    PrimaryCapsules, ResCapsNet, ResidualStack,
)
from mocapsnet.kernels import primary_capsules, routing, squash, votes

model = MoCapsNet((1, 28, 28), 10, channels=16)
output = model(torch.rand(2, 1, 28, 28), torch.tensor([3, 7]))
assert output.lengths.shape == (2, 10), output.lengths.shape
(output.lengths.square().sum() + output.reconstruction.square().sum()).backward()
for name, parameter in model.named_parameters():
    assert parameter.grad is not None and parameter.grad.isfinite().all(), name

(distribution,) = importlib.metadata.distributions(name="mocapsnet", path=[str(target)])
(command,) = distribution.entry_points
assert command.name == "mocapsnet" and callable(command.load())

has_triton = importlib.util.find_spec("triton") is not None
for module in pkgutil.walk_packages([str(target / "mocapsnet")], "mocapsnet."):
    last = module.name.rpartition(".")[2]
    if last != "__main__" and (has_triton or last != "triton"):
        importlib.import_module(module.name)

for name, module in list(sys.modules.items()):
    if name.partition(".")[0] == "mocapsnet":
        assert pathlib.Path(module.__file__).is_relative_to(target), (name, module.__file__)
"""


def run(*command: object, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def build(source: Path, kind: str, output: Path) -> Path:
    """Build `kind` ("sdist" or "wheel") with the setuptools of this environment; its file."""
    run("-m", "build", f"--{kind}", "--no-isolation", "--outdir", output, cwd=source)
    (built,) = output.iterdir()
    return built


def files(folder: Path) -> set[str]:
    """Paths below a folder, without those that tools leave behind and benchmarks' results."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file()
        and not {"__pycache__", "results"} & set(path.relative_to(folder).parts)
        and not path.name.startswith(".")
    }


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree: a build leaves files beside its sources and finds old ones."""
    copy = tmp_path_factory.mktemp("source")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in TOP:
        shutil.copy2(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def archive(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def sdist(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive) as tar:
        tar.extractall(unpacked, filter="data")
    (top,) = unpacked.iterdir()
    return top


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, "wheel", tmp_path_factory.mktemp("wheel"))


def test_an_index_would_take_both(archive: Path, wheel: Path, tmp_path: Path) -> None:
    run("-m", "twine", "check", "--strict", wheel, archive, cwd=tmp_path)


def test_an_index_page_refers_to_nothing_that_an_index_lacks(wheel: Path) -> None:
    (metadata,) = (text for name, text in contents(wheel).items() if name.endswith("/METADATA"))
    page = metadata.decode()
    assert (
        "# MoCapsNet" in page
        and "make test" in page
        and "docs/" in (ROOT / "README.md").read_text()
    )
    targets = re.findall(r"\]\((.*?)\)", page)
    assert all(target.startswith("https://") for target in targets), targets


def test_an_index_page_refers_to_the_public_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    index_page = runpy.run_path(str(ROOT / "setup.py"))["index_page"]
    readme = (
        "![a\npicture](docs/a.svg)\n\n[a page](docs/a.md#part), [outside](https://example.org/)\n"
    )
    assert index_page(readme, "https://example.org/us/it") == (
        "![a\npicture](https://example.org/us/it/raw/HEAD/docs/a.svg)\n\n"
        "[a page](https://example.org/us/it/blob/HEAD/docs/a.md#part), [outside](https://example.org/)\n"
    )
    assert index_page(readme, None) == "\n\na page, [outside](https://example.org/)\n"


def test_the_citation_names_this_version() -> None:
    assert f"version: {mocapsnet.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_wheel_holds_the_four_folders_and_nothing_else(wheel: Path) -> None:
    expected = {
        f"{target}/{path}"
        for folder, target in MAPPED.items()
        for path in files(ROOT / folder)
        if not path.endswith(".md")
    }
    assert {name for name in contents(wheel) if ".dist-info/" not in name} == expected


def test_sdist_holds_what_building_and_testing_need(sdist: Path) -> None:
    for folder in FOLDERS:
        assert files(sdist / folder) == files(ROOT / folder)
    assert set(TOP) <= files(sdist)


def test_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    assert contents(build(sdist, "wheel", tmp_path)) == contents(wheel)


@pytest.mark.slow
def test_wheel_works_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    run("-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=tmp_path)
    run("-I", "-c", USE_WHEEL, target, cwd=tmp_path)
