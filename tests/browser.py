"""A headless Chromium for tests of pages: nothing but this machine can be reached from it.

Playwright drives the Chromium that is installed; it needs none of its own downloads. Without one
the tests that use the fixtures are skipped, or fail if MOCAPSNET_REQUIRE_BROWSER=1.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, Route, WebSocketRoute, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--no-sandbox",  # a container's root cannot have one
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # Whatever gets past the fixture `page` finds no host.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
]
HERE = {"127.0.0.1", "localhost", "[::1]", "::1"}


def chromium() -> str:
    """Path of an installed Chromium; without one the test is skipped, or fails if required."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        reason = f"no Chromium: none of {', '.join(NAMES)} is on the PATH"
        if os.environ.get("MOCAPSNET_REQUIRE_BROWSER") == "1":
            pytest.fail(f"{reason}, and MOCAPSNET_REQUIRE_BROWSER=1 asks for one")
        pytest.skip(reason)
    return path


# Of a module, not of the session: while Playwright runs, asyncio takes its loop for the thread's,
# and tests that start one of their own would fail.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    path = chromium()
    with sync_playwright() as playwright:
        chosen = playwright.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        yield chosen
        chosen.close()


class Watched:
    """What a page asked other hosts for, all of it refused, and what went wrong in it.

    Attributes:
        outside: addresses on other hosts, in the order they were asked for.
        errors: uncaught exceptions of the page's scripts.
    """

    def __init__(self, page: Page):
        self.outside: list[str] = []
        self.errors: list[str] = []
        page.context.route("**/*", self._request)
        page.context.route_web_socket("**/*", self._socket)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _request(self, route: Route) -> None:
        if self._is_outside(route.request.url):
            route.abort()
        else:
            route.continue_()

    def _socket(self, socket: WebSocketRoute) -> None:
        if self._is_outside(socket.url):
            socket.close()
        else:
            socket.connect_to_server()

    def _is_outside(self, address: str) -> bool:
        parts = urlsplit(address)
        outside = parts.scheme in ("http", "https", "ws", "wss") and parts.hostname not in HERE
        if outside:
            self.outside.append(address)
        return outside


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """An empty page, 1280 x 900, that keeps no state from one test to the next."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, service_workers="block")
    yield context.new_page()
    context.close()


@pytest.fixture
def watched(page: Page) -> Watched:
    """What `page` asks other hosts for; they are refused."""
    return Watched(page)


def screenshot(page: Page, name: str) -> None:
    """Keep a picture of the whole page if MOCAPSNET_SCREENSHOTS names a folder."""
    folder = os.environ.get("MOCAPSNET_SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)
