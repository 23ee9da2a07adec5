"""The page at /docs in a browser: it opens where a proxy put it, and shows the pictures that are painted there."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.offer import EXAMPLE_IMAGE
from app.main import create_app
from app.settings import Settings
from tests.fakes import Strict
from tests.waiting import until

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no browser (Debian: chromium)")

PREFIX = "/serving/pictures/sdxl"
PICTURE = re.compile(r'<img src="data:image/\w+;base64,[^"]+" alt="([^"]+)"')
TRY = """<script>
const timer = setInterval(() => {
  const operation = document.getElementById("operations-OPERATION");
  const body = operation?.querySelector("textarea.body-param__text");
  if (!body) return;
  clearInterval(timer);
  operation.querySelector("button.execute").click();
}, 100);
</script>"""
"""What somebody does who opens an operation and clicks on "Execute"."""

LOOK_AT_SIXTEEN = """<script>
const timer = setInterval(() => {
  if (!document.querySelector(".opblock")) return;
  clearInterval(timer);
  const outputs = [{name: "image", data: Array(16).fill("PICTURE")}];
  showPictures({obj: {outputs, parameters: {content_type: "image/png"}}});
  const section = document.getElementById("pictures");
  const pictures = [...section.querySelectorAll("img")];
  pictures.forEach((picture) => { picture.width = 192; });  // whether they are there already or not
  pictures.at(-1).scrollIntoView();
  const last = pictures.at(-1).getBoundingClientRect();
  pictures[0].scrollIntoView();
  const first = pictures[0].getBoundingClientRect();
  section.querySelector("button").click();
  document.title = `${first.left >= 0} ${last.right <= innerWidth} ${getComputedStyle(section).display}`;
}, 100);
</script>""".replace("PICTURE", EXAMPLE_IMAGE)
"""What somebody does whose answer holds more pictures than fit beside each other, and who has seen enough of them."""

READ = """<script>
const timer = setInterval(() => {
  const cell = document.querySelector(".renderedMarkdown td");
  if (!cell) return;
  clearInterval(timer);
  document.title = `${getComputedStyle(cell).color} on ${getComputedStyle(document.documentElement).backgroundColor}`;
}, 100);
</script>"""
"""What somebody sees who reads a table of a description."""


class Proxy:
    """In front of a server: serves it under a prefix and nothing else, and adds a script to its page."""

    def __init__(self, app: ASGIApp, script: str) -> None:
        self._app = app
        self._script = script.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_script(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [header for header in message["headers"] if header[0] != b"content-length"]
            if message.get("body", b"").startswith(b"<!doctype html>"):
                message["body"] += self._script
            await send(message)

        if scope["type"] == "http":
            known = scope["path"].startswith(f"{PREFIX}/")
            path = scope["path"].removeprefix(PREFIX) if known else "/not/behind/this/proxy"
            scope = {**scope, "path": path, "raw_path": path.encode()}
        await self._app(scope, receive, send_with_script)


@contextmanager
def serve(script: str, **settings: str) -> Iterator[str]:
    """A server behind a proxy; gives its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = Proxy(create_app(Settings(model_name="sdxl", **settings), load=Strict), script)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}{PREFIX}"
    try:
        until(lambda: httpx.get(f"{url}/v2/health/ready", timeout=30).status_code == 200)
        yield url
    finally:
        server.should_exit = True
        thread.join()


class Browse(Protocol):
    def __call__(self, url: str, *flags: str) -> str: ...


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    """Opens an address in a browser and gives the page as it is in the end."""

    def browse(url: str, *more: str) -> str:
        assert CHROMIUM is not None
        flags = [*more, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
        # Seconds of the page's own clock, which stands still while it waits for an answer.
        flags += ["--virtual-time-budget=20000", "--dump-dom"]
        result = subprocess.run([CHROMIUM, *flags, url], capture_output=True, text=True, check=True, timeout=300)
        return result.stdout

    return browse


@pytest.mark.parametrize("path", ["/docs", "/docs/"])
def test_the_page_opens_and_paints_under_a_prefix(path: str, browse: Browse) -> None:
    with serve(TRY.replace("OPERATION", "Pictures-infer")) as url:
        page = browse(f"{url}{path}")
    assert 'id="operations-Pictures-infer"' in page
    assert f"{url}/v2/models/sdxl/infer" in page
    assert PICTURE.findall(page) == ["Picture 1 of 1"]


def test_a_browser_opens_the_page_of_a_server_with_a_key_by_password(browse: Browse) -> None:
    with serve("", api_key="sesame") as url:
        page = browse(f"{url.replace('//', '//me:sesame@')}/docs")
    assert 'id="operations-Pictures-infer"' in page
    assert "Authorize" in page, "where the key for painting goes"


@pytest.mark.parametrize("operation", ["Pictures-generate_stream", "Protocol v1-v1_predict"])
def test_the_page_shows_what_streams_and_protocol_v1_paint(operation: str, browse: Browse) -> None:
    with serve(TRY.replace("OPERATION", operation.replace(" ", "_"))) as url:
        page = browse(f"{url}/docs#/{operation.replace('-', '/')}")
    assert PICTURE.findall(page) == ["Picture 1 of 1"]


def test_pictures_that_are_too_many_for_the_window_can_be_scrolled_to_and_hidden(browse: Browse) -> None:
    with serve(LOOK_AT_SIXTEEN) as url:
        page = browse(f"{url}/docs")
    assert "<title>true true none</title>" in page


@pytest.mark.parametrize(
    ("scheme", "colours"),
    [("0", "rgb(228, 230, 230) on rgb(28, 32, 34)"), ("1", "rgb(59, 65, 81) on rgba(0, 0, 0, 0)")],
    ids=["dark", "light"],
)
def test_the_page_can_be_read_in_the_dark_and_in_the_light(browse: Browse, scheme: str, colours: str) -> None:
    with serve(READ) as url:
        page = browse(f"{url}/docs", f"--blink-settings=preferredColorScheme={scheme}")
    assert f"<title>{colours}</title>" in page
