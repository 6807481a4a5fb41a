"""`mocapsnet explore`: the page in a browser, what it asks other hosts for, and its errors."""

from __future__ import annotations

import importlib.util
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from playwright.sync_api import Page, expect

from mocapsnet import CapsNet, MoCapsNet
from mocapsnet.train import explore
from mocapsnet.train.explore import explorer as explorer_module
from mocapsnet.train.explore.explorer import Explorer, Seen, from_sketch
from mocapsnet.train.options import ExploreOptions

from ..browser import HERE, Watched, screenshot

Command = Callable[..., tuple[int, str, str]]
Train = Callable[..., Path]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Other hosts that this process connects to or looks up; all of it fails."""
    hosts: list[str] = []
    connect, lookup = socket.socket.connect, socket.getaddrinfo

    def refuse(host: object) -> None:
        if isinstance(host, str) and host not in HERE:
            hosts.append(host)
            raise OSError(f"no way out to {host}")

    def watched_connect(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple):
            refuse(address[0])
        connect(self, address)  # type: ignore[arg-type]

    def watched_lookup(host: object, *rest: object, **options: object) -> object:
        refuse(host)
        return lookup(host, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", watched_connect)
    monkeypatch.setattr(socket, "getaddrinfo", watched_lookup)
    return hosts


@contextmanager
def served(*page: object) -> Iterator[str]:
    """The address of a page that a thread of this process serves."""
    import uvicorn

    application = explore.make_application(*page)  # type: ignore[arg-type]
    server = uvicorn.Server(explore.server_config(application))
    with explore.listen(None) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield explore.address(listener)
        finally:
            server.should_exit = True
            thread.join(30)


def draw(page: Page) -> None:
    """A seven, in one stroke."""
    canvas = page.locator("#sketch canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    for n, (x, y) in enumerate(((90, 80), (230, 80), (150, 270))):
        times = box["width"] / 320
        page.mouse.move(box["x"] + x * times, box["y"] + y * times, steps=5)
        if n == 0:
            page.mouse.down()
    page.mouse.up()


def fits(page: Page) -> bool:
    """Nothing sticks out to the right."""
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.browser
@pytest.mark.slow
def test_draw_move_a_slider_see_couplings(
    page: Page, watched: Watched, asked: list[str], train: Train
) -> None:
    run = train("run", "--epochs", "1")
    with served(*explore.read(ExploreOptions(str(run)))) as address:
        page.goto(address)
        expect(page.locator("#answer")).to_contain_text("Nothing given yet")

        draw(page)
        expect(page.locator("#answer .bar")).to_have_count(10)
        expect(page.locator("#shown img")).to_be_visible()
        drawings = page.locator("#reconstruction img")
        expect(drawings).to_have_count(3)
        sources = [drawings.nth(i).get_attribute("src") for i in range(3)]
        assert sources[1] == sources[2] != sources[0]
        couplings = page.locator("#couplings img")
        expect(couplings).to_be_visible()
        last = couplings.get_attribute("src")

        page.locator("#dimension-3 input[type=number]").fill("0.2")
        page.locator("#dimension-3 input[type=number]").press("Enter")
        expect(drawings.nth(2)).not_to_have_attribute("src", sources[2] or "")
        expect(drawings.nth(1)).to_have_attribute("src", sources[1] or "")
        page.locator("#reset").click()
        expect(drawings.nth(2)).to_have_attribute("src", sources[2] or "")
        expect(page.locator("#dimension-3 input[type=number]")).to_have_value("0")

        page.locator("#iteration input[type=number]").fill("1")
        page.locator("#iteration input[type=number]").press("Enter")
        expect(couplings).not_to_have_attribute("src", last or "")
        equal = couplings.get_attribute("src")
        page.locator("#layer input").click()
        page.get_by_role("option", name="hidden layer 2 of 2").click()
        expect(couplings).not_to_have_attribute("src", equal or "")

        page.locator("#pick").click()
        expect(page.locator("#shown figcaption")).to_contain_text("a test image of class")
        screenshot(page, "explore")
        assert fits(page)
        page.set_viewport_size({"width": 390, "height": 800})
        assert fits(page)
        screenshot(page, "explore-narrow")
    assert watched.outside == [] and watched.errors == [] and asked == []


@pytest.mark.browser
@pytest.mark.slow
def test_forty_layers_a_hundred_classes_in_colour(
    page: Page, watched: Watched, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = MoCapsNet((3, 20, 24), 100, blocks=20, channels=8, kernel_size=5, decoder=(16,))
    network.class_names = [f"class & {i}" for i in range(100)]
    photo = Image.effect_noise((90, 60), 80).convert("RGB")
    photo.save(tmp_path / "photo.png")
    with served(Explorer(network), "<b>bold</b> & plain", []) as address:
        page.goto(address)
        expect(page.get_by_text("<b>bold</b> & plain")).to_be_visible()
        expect(page.locator("#pick")).to_be_hidden()
        page.get_by_role("tab", name="Load").click()
        page.locator("#upload input[type=file]").set_input_files(tmp_path / "photo.png")
        expect(page.locator("#answer .bar")).to_have_count(12)
        expect(page.locator("#answer")).to_contain_text("the other 88 classes are shorter than")
        expect(page.locator("#answer .best")).to_contain_text("class & ")
        expect(page.locator("#couplings img")).to_be_visible()
        before = page.locator("#couplings img").get_attribute("src")
        page.locator("#layer input").click()
        page.get_by_role("option", name="hidden layer 40 of 40").click()
        expect(page.locator("#couplings img")).not_to_have_attribute("src", before or "")
        screenshot(page, "explore-colour")
        assert fits(page)
    assert watched.outside == [] and watched.errors == []


def seven() -> Image.Image:
    sketch = Image.new("RGBA", (320, 320))
    ImageDraw.Draw(sketch).line([(20, 20), (100, 20), (60, 120)], "black", 12)
    return sketch


def test_a_sketch_becomes_an_image_as_mnist_has_them() -> None:
    small = from_sketch(seven(), (1, 28, 28))
    assert small is not None and small.size == (28, 28) and small.mode == "L"
    ink = np.asarray(small, dtype=float)
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    assert rows[-1] - rows[0] + 1 == 20  # the longer side fills MNIST's box of 20 pixels
    assert ink.max() > 200 and ink[0, 0] == 0
    centre = [(ink.sum(axis) * np.arange(28)).sum() / ink.sum() for axis in (1, 0)]
    assert centre == pytest.approx([13.5, 13.5], abs=0.6) or rows[-1] == 27
    assert len(columns) < 20


def test_a_sketch_for_a_colour_network_keeps_its_colours_and_its_place() -> None:
    sketch = seven()
    ImageDraw.Draw(sketch).rectangle([200, 200, 300, 300], "#1f77b4")
    image = from_sketch(sketch, (3, 32, 32))
    assert image is not None and image.mode == "RGB" and image.size == (320, 320)
    assert image.getpixel((250, 250)) == (0x1F, 0x77, 0xB4)
    assert image.getpixel((319, 0)) == (255, 255, 255)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_empty_sketch_is_nothing(channels: int) -> None:
    assert from_sketch(Image.new("RGBA", (320, 320)), (channels, 28, 28)) is None


def test_a_capsule_is_moved_along_one_dimension_only() -> None:
    torch.manual_seed(0)
    network = CapsNet((1, 8, 8), 3, blocks=0, channels=8, kernel_size=3, class_dim=4)
    explorer = Explorer(network)
    seen = explorer.look(torch.randint(256, (1, 8, 8), dtype=torch.uint8))
    assert isinstance(seen, Seen)
    masked = torch.zeros(1, 3, 4)
    masked[0, 1] = seen.capsules[1] + torch.tensor([0, 0, 0.2, 0])
    expected = network.decoder(masked)[0]
    torch.testing.assert_close(explorer.reconstruct(seen, 1, (0, 0, 0.2, 0)), expected)
    assert not torch.equal(explorer.reconstruct(seen, 1), expected)


def test_two_looks_at_once_are_at_two_images(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = CapsNet((1, 8, 8), 3, blocks=0, channels=8, kernel_size=3, class_dim=4)
    explorer, shown = Explorer(network), torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8)
    alone = [explorer.look(image).layers["last"].couplings for image in shown]
    inspect, both, inside = explorer_module.inspect_layers, [], threading.Semaphore(1)

    def slow(*arguments: object) -> object:
        assert inside.acquire(blocking=False), "two are in there"
        time.sleep(0.1)
        found = inspect(*arguments)  # type: ignore[arg-type]
        inside.release()
        return found

    monkeypatch.setattr(explorer_module, "inspect_layers", slow)
    with ThreadPoolExecutor(2) as pool:
        both = [seen.layers["last"].couplings for seen in pool.map(explorer.look, shown)]
    for found, expected in zip(both, alone, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("iterations", [1, 2])
def test_a_page_of_another_origin_gets_and_sends_nothing(iterations: int) -> None:
    from starlette.testclient import TestClient

    small = dict(blocks=0, channels=8, kernel_size=3, class_dim=4)
    network = CapsNet((1, 8, 8), 3, iterations=iterations, **small)  # type: ignore[arg-type]
    application = explore.make_application(Explorer(network), "A title", [])
    here = "http://127.0.0.1:1234"
    client = TestClient(application, base_url=here)
    file = {"files": ("x.html", b"<p>", "text/html")}
    for origin, code in ((here, 200), ("http://evil.example", 403), ("null", 403)):
        headers = {"Origin": origin}
        assert client.post("/gradio_api/upload", files=file, headers=headers).status_code == code
        assert client.get("/", headers=headers).status_code == code
    assert client.get("/").status_code == 200
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400


def test_a_loaded_image_is_read_as_a_file_is() -> None:
    """Sixteen bits a pixel too, which Gradio would cut off."""
    from gradio.components.image import ImageData

    from mocapsnet.train.explore.page import build_page

    small = dict(blocks=0, channels=8, kernel_size=3, class_dim=4)
    network = CapsNet((1, 8, 8), 3, **small)  # type: ignore[arg-type]
    page = build_page(Explorer(network), "A title", [])
    (upload,) = [b for b in page.blocks.values() if getattr(b, "elem_id", "") == "upload"]
    values = (np.arange(64).reshape(8, 8) * 1000).astype(np.uint16)
    Image.fromarray(values).save("deep.png")
    given = upload.preprocess(ImageData(path="deep.png", orig_name="deep.png"))
    found = (network.predict(given).pixels * 255).round()[0, 0].numpy()
    assert np.array_equal(found, values // 257)


def test_bad_input_is_one_line(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        cases = {
            f"--port {port} cannot be used": ("explore", ".", "--port", str(port)),
            "--port 70000 cannot be used": ("explore", ".", "--port", "70000"),
            "nowhere is not a folder": ("explore", "nowhere"),
        }
        for message, arguments in cases.items():
            code, _, errors = command(*arguments)
            assert code == 2 and message in errors and len(errors.splitlines()) == 1, errors
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    code, _, errors = command("explore", "unfinished")
    assert code == 2 and "without a trained network yet" in errors
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "gradio" else find(name, *a)
    )
    code, _, errors = command("explore", ".")
    assert code == 2 and 'pip install "mocapsnet[explore]"' in errors


def test_gradio_is_imported_by_explore_alone_and_when_it_runs() -> None:
    root = Path(__file__).resolve().parents[2]
    imports = re.compile(r"^( *)(?:import|from) gradio\b", re.MULTILINE)
    found = {
        path.relative_to(root).parts[:2]: min(imports.findall(path.read_text()), key=len)
        for folder in ("kernels", "mocapsnet", "train", "benchmarks")
        for path in (root / folder).rglob("*.py")
        if imports.search(path.read_text())
    }
    assert found.keys() == {("train", "explore")} and all(found.values())
