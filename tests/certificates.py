"""Certificates that tests make for themselves."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def make_certificate(folder: Path, *options: str) -> tuple[Path, Path]:
    """A self-signed certificate for this machine, and its key.

    Args:
        folder: gets both.
        options: of openssl; the key has no password unless they say so.
    """
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("the program openssl, which makes certificates, is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    certificate, key = folder / "tls.crt", folder / "tls.key"
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", *(options or ("-nodes",)), "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    return certificate, key
