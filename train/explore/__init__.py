"""`mocapsnet explore`: a local page that shows what a trained network sees in an image.

The page is Gradio's, `pip install "mocapsnet[explore]"`. It is served to this machine alone, makes
no share link, and neither it nor the browser that shows it asks any other host for anything.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import socket
import sys
import threading
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mocapsnet.train.errors import InputError
from mocapsnet.train.options import ExploreOptions

if TYPE_CHECKING:
    from mocapsnet.train.explore.explorer import Explorer

    Example = tuple[torch.Tensor, int]

HOST = "127.0.0.1"
EXAMPLES = 500
"""Test images to pick from."""
LARGEST = "50mb"
"""File that can be loaded."""


def explore(command: ExploreOptions) -> None:
    """Serve the page of a run until Ctrl-C.

    Raises: InputError if Gradio is missing, the run cannot be used or the port is taken.
    """
    if importlib.util.find_spec("gradio") is None:
        raise InputError('explore shows its page with Gradio: pip install "mocapsnet[explore]"')
    listener = listen(command.port)
    with listener:
        application = make_application(*read(command))
        print(f"{command.run} is shown at {address(listener)} (Ctrl-C ends it)", flush=True)
        if not command.no_browser and has_display():
            threading.Timer(1.0, webbrowser.open, [address(listener)]).start()
        import uvicorn

        uvicorn.Server(server_config(application)).run(sockets=[listener])


def listen(port: int | None) -> socket.socket:
    """A socket bound to this machine alone; on a free port if None."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    # A port of a page that was just closed can be taken at once; one in use cannot.
    if sys.platform != "win32":
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port or 0))
        listener.listen()
    except (OSError, OverflowError) as error:
        listener.close()
        raise InputError(
            f"--port {port} cannot be used ({error}); choose another, or leave --port out and a "
            "free one is taken"
        ) from error
    return listener


def address(listener: socket.socket) -> str:
    return f"http://{HOST}:{listener.getsockname()[1]}/"


def has_display() -> bool:
    """Whether a browser that is opened here can be seen."""
    if sys.platform in ("darwin", "win32"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def make_application(explorer: Explorer, title: str, examples: Sequence[Example]) -> Any:
    """The page as an ASGI application; for the arguments see `page.build_page`."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read by Gradio when it is imported
    import fastapi
    import gradio
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from mocapsnet.train.explore import canvas
    from mocapsnet.train.explore.page import STYLE, build_page

    application = fastapi.FastAPI(openapi_url=None)
    # A page of another host gets nothing, nor can it send anything, also one whose name is made to
    # lead here.
    application.add_middleware(OwnPagesOnly)
    application.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    return gradio.mount_gradio_app(
        application,
        build_page(explorer, title, examples),
        path="/",
        server_name=HOST,
        max_file_size=LARGEST,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        enable_monitoring=False,
        mcp_server=False,
        theme=gradio.themes.Default(
            font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        css=STYLE + canvas.STYLE,
    )


class OwnPagesOnly:
    """Refuses what a page of another origin sends, as a form does without asking."""

    def __init__(self, application: Any):
        self.application = application

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import PlainTextResponse

        headers = dict(scope.get("headers", ()))
        origin = headers.get(b"origin")
        answer = self.application
        if origin is not None and origin != b"http://" + headers.get(b"host", b""):
            answer = PlainTextResponse("This is for pages from here.", status_code=403)
        await answer(scope, receive, send)


def server_config(application: Any) -> Any:
    """For uvicorn's server, which comes with Gradio."""
    import uvicorn

    # Pages that are open when it ends would be reported as errors.
    return uvicorn.Config(application, log_level="critical", timeout_graceful_shutdown=1)


def read(command: ExploreOptions) -> tuple[Explorer, str, list[Example]]:
    """The network of a run, a line that describes it, and test images with their classes."""
    import mocapsnet
    from mocapsnet.train import data
    from mocapsnet.train.explore.explorer import Explorer
    from mocapsnet.train.run_folder import check_test_images, read_config

    try:
        network = mocapsnet.load(command.run)
    except ValueError as error:
        raise InputError(str(error)) from error
    if not network.has_capsules:
        raise InputError(
            f"{command.run} holds a network without capsules: there is none to explore"
        )
    if isinstance(network, mocapsnet.ConvMoCapsNet):
        raise InputError(
            f"{command.run} holds a ConvMoCapsNet, whose windows this page does not show; "
            "mocapsnet predict tells what it sees in an image"
        )
    title = f"{type(network).__name__} with {network.config.blocks} block(s)"
    run = Path(command.run)
    if not (run / "config.json").is_file() or not (run / "model").is_dir():
        return Explorer(network), title, []  # a model's folder knows no data set
    options = read_config(run)
    title += f", trained on {options.data.dataset}"
    source = options.data
    if command.data_dir is not None:
        source = dataclasses.replace(source, data_dir=command.data_dir)
    try:
        _, test_set = data.load(dataclasses.replace(source, download=False), quiet=True)
        check_test_images(run, test_set)
    except InputError as error:
        print(f"mocapsnet: no test images to pick from: {error}", file=sys.stderr)
        return Explorer(network), title, []
    generator = torch.Generator().manual_seed(0)
    some = torch.randperm(len(test_set), generator=generator)[:EXAMPLES]
    chosen = zip(test_set.images[some], test_set.labels[some].tolist(), strict=True)
    return Explorer(network), title, list(chosen)
