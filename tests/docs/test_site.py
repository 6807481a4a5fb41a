"""The built site in a browser: every page, with its pictures, links and search."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import ConsoleMessage, Page, TimeoutError

from ..browser import Watched, screenshot

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (ROOT / "mkdocs.yml").exists(), reason="the source distribution holds no site"
    ),
]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


def build(root: Path, target: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)],
        cwd=root,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """The address of a built site, and the paths of its pages."""
    folder = tmp_path_factory.mktemp("site")
    built = build(ROOT, folder)
    assert built.returncode == 0, built.stdout
    pages = sorted(
        path.relative_to(folder).as_posix().removesuffix("index.html")
        for path in folder.rglob("index.html")
    )
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", pages
        server.shutdown()


def test_every_page_is_whole(site: tuple[str, list[str]], page: Page, watched: Watched) -> None:
    """Nothing in the console, nothing from outside, no missing picture or formula, no dead link."""
    address, pages = site
    assert {"", "use/", "api/operations/", "kernels/routing/"} <= set(pages)
    complaints: list[str] = []

    def note(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            complaints.append(f"{page.url}: {message.text}")

    page.on("console", note)
    page.on("requestfailed", lambda request: complaints.append(f"{page.url}: {request.url}"))
    page.on("response", lambda r: r.ok or complaints.append(f"{page.url}: {r.status} {r.url}"))
    page.emulate_media(reduced_motion="reduce")
    links = set()
    for path in pages:
        page.goto(address + path, wait_until="networkidle")  # leaving cuts off nothing
        blank = page.evaluate(
            "[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"
        )
        complaints += [f"{path}: {src} is not shown" for src in blank]
        raw = page.locator(".arithmatex, :text-matches('^::: ')").count()
        if raw:
            complaints.append(f"{path}: a formula or an API entry was left as text")
        links |= set(page.evaluate("[...document.links].map(a => a.href.split('#')[0])"))
        for device, width in (("desk", 1280), ("telephone", 390)):
            page.set_viewport_size({"width": width, "height": 800})
            try:
                page.wait_for_function(
                    "document.documentElement.scrollWidth <= window.innerWidth", timeout=2000
                )
            except TimeoutError:
                complaints.append(f"{path}: wider than {width} pixels")
            screenshot(page, f"{device}-{path.strip('/').replace('/', '-') or 'index'}")
    outside = {link for link in links if not link.startswith(address)}
    for link in sorted(links - outside):
        found = page.request.get(link)
        if not found.ok:
            complaints.append(f"{found.status}: {link}")
    assert not complaints
    assert not watched.errors
    assert not watched.outside


def test_search_finds_a_parameter(site: tuple[str, list[str]], page: Page) -> None:
    address, _ = site
    page.goto(address, wait_until="load")
    page.locator(".md-search__input").click()
    ready = page.locator(".md-search-result__meta", has_text="Type to start searching")
    ready.wait_for()  # the index is there
    page.locator(".md-search__input").press_sequentially("anchor_every")
    result = page.locator(".md-search-result__link").first
    result.wait_for()
    result.click()
    page.wait_for_load_state("load")
    assert "anchor_every" in page.locator("article").inner_text()


def test_drawings_follow_the_colour_scheme(site: tuple[str, list[str]], page: Page) -> None:
    address, _ = site
    colours = "['ink', 'one', 'two'].map(c => getComputedStyle(document.querySelector("
    colours += "`svg.figure .${c}.solid`)).fill)"
    page.emulate_media(color_scheme="dark")
    page.goto(address, wait_until="load")
    dark = page.evaluate(colours)
    page.locator("label[title=Light]").click()
    light = page.evaluate(colours)
    assert all(a != b for a, b in zip(dark, light, strict=True)), (dark, light)


def test_links_that_lead_nowhere_stop_the_build(tmp_path: Path) -> None:
    """To a page, to a heading, and to a file that is in the repository but not on the site."""
    for name in ("kernels", "mocapsnet", "train", "benchmarks", "CHANGELOG.md", "CONTRIBUTING.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    wrong = ["missing.md", "use.md#missing", "../train/loop.py"]
    with (tmp_path / "docs/index.md").open("a") as index:
        index.writelines(f"\n[a link]({link})\n" for link in wrong)
    built = build(tmp_path, tmp_path / "site")
    assert built.returncode != 0
    for link in ("'missing.md'", "#missing", "train/loop.py"):
        assert link in built.stdout, built.stdout
