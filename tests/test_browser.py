"""The browser fixtures themselves: what a page asks other hosts for is noted and refused."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page

from .browser import Watched, chromium

PAGE = b"""<!doctype html><h1>Here</h1>
<img src="http://images.example/a.png"><script src="https://scripts.example/a.js"></script>
<script>new WebSocket("ws://sockets.example/"); throw new Error("broken script")</script>"""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(PAGE)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.browser
def test_outside_requests_and_broken_scripts_are_noted(
    page: Page, watched: Watched, address: str
) -> None:
    page.goto(address, wait_until="networkidle")
    assert page.locator("h1").inner_text() == "Here"
    assert set(watched.outside) == {
        "http://images.example/a.png",
        "https://scripts.example/a.js",
        "ws://sockets.example/",
    }
    assert watched.errors == ["broken script"]


@pytest.mark.parametrize(
    "required, outcome", [("1", pytest.fail.Exception), ("0", pytest.skip.Exception)]
)
def test_without_a_chromium(
    required: str,
    outcome: type[BaseException],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Skipped with the reason, or failed where the gate asks for a browser."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("MOCAPSNET_REQUIRE_BROWSER", required)
    with pytest.raises(outcome, match="no Chromium: none of chromium"):
        chromium()
