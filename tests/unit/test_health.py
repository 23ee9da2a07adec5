"""Where ``sdxl-runtime health`` looks for the server."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.health import ask, local_url, main


@pytest.mark.parametrize(
    ("port", "environment", "env_file", "url"),
    [
        (None, {}, "", "http://127.0.0.1:8080"),
        (None, {"HTTP_PORT": "9000"}, "HTTP_PORT=9001", "http://127.0.0.1:9000"),
        (None, {}, "export HTTP_PORT='9001'\nHOST=0.0.0.0", "http://127.0.0.1:9001"),
        ("9002", {"HTTP_PORT": "9000"}, "", "http://127.0.0.1:9002"),
        (None, {"HTTP_PORT": "tcp://10.0.0.1:80"}, "", "http://127.0.0.1:8080"),
        (None, {"HOST": "10.0.0.7"}, "", "http://10.0.0.7:8080"),
        (None, {"HOST": "::"}, "", "http://[::1]:8080"),
        (None, {"HOST": "fd00::7"}, "", "http://[fd00::7]:8080"),
        (None, {"SSL_CERTFILE": "/tls.crt"}, "", "https://127.0.0.1:8443"),
        (None, {"KSERVE_TLS_CERT_FILE": "/tls.crt", "HTTP_PORT": "9000"}, "", "https://127.0.0.1:9000"),
        (None, {"HOST": "::"}, "SSL_CERTFILE=/tls.crt", "https://[::1]:8443"),
        ("9002", {}, "KSERVE_TLS_CERT_FILE=/tls.crt", "https://127.0.0.1:9002"),
        (None, {"SSL_CERTFILE": "none"}, "SSL_CERTFILE=/tls.crt", "http://127.0.0.1:8080"),
        (None, {"SSL_CERTFILE": "", "KSERVE_TLS_CERT_FILE": "/tls.crt"}, "", "https://127.0.0.1:8443"),
        (None, {"SSL_CERTFILE": ""}, "SSL_CERTFILE=/tls.crt", "https://127.0.0.1:8443"),
        (None, {"HTTP_PORT": "tcp://10.0.0.1:80"}, "HTTP_PORT=9000", "http://127.0.0.1:9000"),
    ],
)
def test_it_asks_where_the_server_listens(
    port: str | None, environment: dict[str, str], env_file: str, url: str, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text(env_file)
    assert local_url(port, environment, tmp_path / ".env") == url


@pytest.mark.parametrize(
    "url", ["", "localhost:8080", "file:///etc/passwd", "http://", "http://127.0.0.1:99999", "http://[::1"]
)
def test_what_is_no_address_is_told_so(url: str) -> None:
    well, sentence = ask(url, "ready")
    assert not well and url in sentence and sentence.endswith(".")


def test_nobody_there_is_told_so() -> None:
    assert ask("http://127.0.0.1:1", "live") == (
        False,
        "The server at http://127.0.0.1:1 does not answer (Connection refused).",
    )


def test_a_host_that_is_not_known_is_told_so() -> None:
    well, sentence = ask("http://no.invalid:1", "live")
    assert not well and "name" in sentence.lower() and "Unknown error" not in sentence


def test_an_env_file_that_is_no_text_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".env").write_text("HTTP_PORT=1", encoding="utf-16")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HTTP_PORT", raising=False)
    assert main([]) == 1
    assert capsys.readouterr().err.startswith(".env cannot be read: ")
