"""Wrong certificates and keys end the server before anything is loaded, and one sentence says which file it is."""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import ssl
import time
from pathlib import Path

import pytest

from app.api.tls import Certificate, read_certificate
from app.errors import InvalidSettings
from app.main import main
from app.settings_sources import load_settings
from tests.certificates import make_certificate

NOWHERE = Path("/nonexistent/.env")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("pair"))


def complaint(certificate: Path, key: Path) -> str:
    with pytest.raises(InvalidSettings) as told:
        read_certificate(certificate, key)
    sentence = str(told.value)
    assert sentence.endswith(".") and "\n" not in sentence
    return sentence


# --- Settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "other"), [("ssl_certfile", "ssl_keyfile"), ("ssl_keyfile", "ssl_certfile")])
def test_one_without_the_other_is_refused(given: str, other: str) -> None:
    with pytest.raises(InvalidSettings, match=f"--{given} is /a.pem, but there is no --{other}; name both"):
        load_settings([f"--{given}", "/a.pem"], {}, NOWHERE)


def test_kserves_variables_are_read_where_our_own_are_not_there() -> None:
    environment = {"KSERVE_TLS_CERT_FILE": "/k.crt", "KSERVE_TLS_KEY_FILE": "/k.key", "SSL_KEYFILE": "/own.key"}
    settings = load_settings([], environment, NOWHERE)
    assert (settings.ssl_certfile, settings.ssl_keyfile) == (Path("/k.crt"), Path("/own.key"))


def test_https_has_kserves_port_unless_one_is_given() -> None:
    flags = ["--ssl_certfile=/a.crt", "--ssl_keyfile=/a.key"]
    assert load_settings(flags, {}, NOWHERE).http_port == 8443
    assert load_settings([*flags, "--http_port=8080"], {}, NOWHERE).http_port == 8080
    assert load_settings(["--ssl_certfile=none"], {}, NOWHERE).http_port == 8080


# --- Files -----------------------------------------------------------------------------------------------------


def test_a_pair_is_taken(pair: tuple[Path, Path]) -> None:
    read_certificate(*pair)


@pytest.mark.parametrize("days", [-1, 0, 3])
def test_a_certificate_that_is_not_valid_now_is_taken_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, days: int
) -> None:
    # As authorities issue them: none that issues others.
    certificate, key = make_certificate(tmp_path, "-nodes", "-addext", "basicConstraints=critical,CA:FALSE")
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + days * 86400)
    read_certificate(certificate, key)
    said = [re.sub(r"[A-Z][a-z]{2} .+ GMT", "DATE", record.getMessage()) for record in caplog.records]
    wrong = {-1: "is not valid before DATE", 3: "has expired on DATE"}.get(days)
    sentence = f"--ssl_certfile is {certificate}, which {wrong}; clients will refuse it, so name one that is valid"
    assert said == ([sentence] if wrong else [])


def test_a_file_that_is_not_there_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    absent = tmp_path / "absent.pem"
    says = f"is {absent}, which cannot be read (No such file or directory)"
    assert f"--ssl_certfile {says}" in complaint(absent, pair[1])
    assert f"--ssl_keyfile {says}" in complaint(pair[0], absent)
    assert f"--ssl_keyfile is {tmp_path}, which cannot be read (Is a directory)" in complaint(pair[0], tmp_path)


@pytest.mark.parametrize("content", [b"", b"no certificate", b"\0\xff" * 99], ids=["empty", "text", "bytes"])
def test_a_file_that_is_something_else_is_named(pair: tuple[Path, Path], tmp_path: Path, content: bytes) -> None:
    other = tmp_path / "other.pem"
    other.write_bytes(content)
    assert f"--ssl_certfile is {other}, which holds no certificate" in complaint(other, pair[1])
    assert f"--ssl_keyfile is {other}, which holds no private key" in complaint(pair[0], other)


def test_files_in_each_others_place_are_told_so(pair: tuple[Path, Path]) -> None:
    assert f"--ssl_certfile is {pair[1]}, which holds no certificate" in complaint(pair[1], pair[0])


def test_a_certificate_in_the_keys_place_is_told_so(pair: tuple[Path, Path]) -> None:
    assert f"--ssl_keyfile is {pair[0]}, which holds no private key" in complaint(pair[0], pair[0])


def test_a_damaged_key_is_told_so(pair: tuple[Path, Path], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.key"
    text = pair[1].read_text()
    damaged.write_text(text[:200] + "AAAA" + text[300:])
    assert f"--ssl_keyfile is {damaged}, which holds no private key" in complaint(pair[0], damaged)


def test_the_key_of_another_certificate_is_told_so(pair: tuple[Path, Path], tmp_path: Path) -> None:
    _, key = make_certificate(tmp_path)
    says = f"--ssl_keyfile is {key}, which is not the key of the first certificate in {pair[0]}"
    assert says in complaint(pair[0], key)


def test_certificates_in_the_wrong_order_are_told_how_they_belong(pair: tuple[Path, Path], tmp_path: Path) -> None:
    root, _ = make_certificate(tmp_path)
    chain = tmp_path / "chain.crt"
    chain.write_text(root.read_text() + pair[0].read_text())
    assert "the server's own certificate before those that lead to its root" in complaint(chain, pair[1])


def test_a_key_with_a_password_is_refused_and_nobody_is_asked_for_it(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "-passout", "pass:open-sesame")
    assert f"--ssl_keyfile is {key}, which asks for a password" in complaint(certificate, key)


def shown(context: Certificate) -> str:
    """The certificate that a new connection gets to see."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    theirs, ours = client.wrap_bio(back, there), context.wrap_bio(there, back, server_side=True)
    for side in (theirs, ours) * 3:
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    return ssl.DER_cert_to_PEM_cert(theirs.getpeercert(binary_form=True) or b"")


def test_a_certificate_that_is_renewed_is_taken_once_both_files_are_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (certificate, key), (new, new_key) = make_certificate(tmp_path / "now"), make_certificate(tmp_path / "next")
    context = read_certificate(certificate, key)
    first, second = certificate.read_text(), new.read_text()
    shutil.copy(new, certificate)
    context.renew()
    assert shown(context) == first and not caplog.messages, "its key may be on its way"
    for _ in range(3):
        context.renew()
    assert shown(context) == first
    (told,) = caplog.messages
    assert told.startswith("a new certificate is not taken") and "not the key of the first certificate" in told
    shutil.copy(new_key, key)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            context.renew()
    assert shown(context) == second and caplog.messages[1:] == [f"took the new certificate in {certificate}"]
    certificate.unlink()
    for _ in range(3):
        context.renew()
    assert shown(context) == second and len(caplog.messages) == 3


def test_the_server_ends_with_2_before_it_loads_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = tmp_path / "absent.crt"
    flags = ["--ssl_certfile", str(absent), "--ssl_keyfile", str(absent), "--model_id", str(tmp_path / "no-model")]
    assert main([*flags, "--configure_logging=false", "--termination_log=none"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sdxl-runtime: --ssl_certfile is {absent}, which cannot be read")
