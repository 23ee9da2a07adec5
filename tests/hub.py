"""A small Hugging Face hub on 127.0.0.1, with what `huggingface_hub` asks of one, and ways to fail.

Source: the requests of huggingface_hub 2.4's `snapshot_download`: ``/api/models/NAME[/revision/REV]``,
``/api/models/NAME/tree/REV?recursive=true``, and HEAD and GET of ``/NAME/resolve/REV/FILE``.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the hub holds, how it fails, and what it was asked.

    Attributes:
        models: folders by ``ORGANISATION/NAME``.
        token: every request needs it; ``None``: none does.
        gated: who has the token has not accepted the conditions.
        denied: the token lacks the right to read.
        status: what every request is refused with.
        signature: files are at addresses that end in it, to which who asks for one is sent.
        xet: weights are in a storage of another kind too, which refuses everything.
        breaks: bytes of a file, by its path, after which the connection ends once.
        resets: as above, but the connection is reset and not closed.
        holds: what a file's bytes wait for, by its path.
        requests: every method, path and Range header.
    """

    models: dict[str, Path]
    token: str | None = None
    gated: bool = False
    denied: bool = False
    status: int | None = None
    signature: str = ""
    xet: bool = False
    breaks: dict[str, int] = field(default_factory=dict)
    resets: bool = False
    holds: dict[str, threading.Event] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    url: str = ""

    def downloaded(self) -> list[str]:
        """Paths of all files whose bytes were asked for, each as often as it was."""
        return [
            path.partition(f"/resolve/{COMMIT}/")[2]
            for method, path, _ in self.requests
            if method == "GET" and "/resolve/" in path
        ]


@contextmanager
def serving(hub: Hub, certificate: tuple[Path, Path] | None = None) -> Iterator[Hub]:
    """Serve `hub` on a free port of 127.0.0.1, by HTTPS with a certificate and its key."""

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        hub.url = hub.url.replace("http:", "https:")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_CONNECT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.served, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path, self.headers.get("Range")))
        found = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+)(/.*)?", path)
        name, rest = (found[1], found[2] or "") if found else ("", "")
        is_file = rest.startswith("/resolve/")
        if path.startswith("/xet/"):
            self._refuse(404)
        elif path == "/xet":
            access = {"Access-Token": "x", "Cas-Url": f"{hub.url}/xet/", "Token-Expiration": "9999999999"}
            self._send_head(200, {f"X-Xet-{key}": value for key, value in access.items()} | {"Content-Length": "0"})
        elif hub.status is not None:
            self._refuse(hub.status)
        elif hub.token is not None and self.headers.get("Authorization") is None:
            self._refuse(401, "GatedRepo" if is_file else None)
        elif hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._refuse(401, message="Invalid credentials in Authorization header")
        elif name not in hub.models:
            self._refuse(404, "RepoNotFound")
        elif hub.denied or (hub.gated and is_file):
            self._refuse(403, "GatedRepo" if hub.gated else None)
        elif is_file and self.command == "GET" and not self.path.endswith(hub.signature):
            self._send_head(302, {"Location": f"{hub.url}{self.path}?{hub.signature}", "Content-Length": "0"})
        elif is_file:
            self._send_file(hub.models[name], rest.split("/", 3)[3])
        elif rest.startswith("/tree/"):
            self._send_json(self._tree(hub.models[name]))
        else:
            files = [{"rfilename": entry["path"]} for entry in self._tree(hub.models[name])]
            self._send_json({"id": name, "sha": COMMIT, "siblings": files})

    @staticmethod
    def _tree(folder: Path) -> list[dict[str, object]]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return [
            {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": _etag(path)}
            for path in files
        ]

    def _send_json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self._send_head(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        self.wfile.write(body)

    def _refuse(self, status: int, code: str | None = None, message: str | None = None) -> None:
        headers = {"Content-Length": "0"}
        if code:
            headers["X-Error-Code"] = code
        if message:
            headers["X-Error-Message"] = message
        self._send_head(status, headers)

    def _send_head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send_file(self, folder: Path, name: str) -> None:
        path = folder / name
        if not path.is_file():
            return self._refuse(404, "EntryNotFound")
        content = path.read_bytes()
        headers = {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.served.xet and path.suffix == ".safetensors":
            headers |= {"X-Xet-Hash": "a" * 64, "X-Xet-Refresh-Route": f"{self.served.url}/xet"}
        asked, start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""), 0
        if asked:
            start = int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send_head(206 if asked else 200, headers | {"Content-Length": str(len(content) - start)})
        if self.command == "HEAD":
            return None
        if name in self.served.holds:
            self.served.holds[name].wait(60)
        end = self.served.breaks.pop(name, None)
        if end is not None and self.served.resets:
            # A reset takes with it what the caller has not read yet: most of it must have been, to be resumed at all.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
        self.wfile.write(content[start:end])
        if end is not None:
            self._break_off()
        return None

    def _break_off(self) -> None:
        self.wfile.flush()
        if self.served.resets:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()
