"""Downloads from a hub on 127.0.0.1: only what is needed, resumed, offline the second time, and every refusal."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from app.engine import hub as downloads
from app.engine.folders import Kind, read_folder
from app.engine.weights import DEMO_WEIGHTS
from app.errors import ModelLoadFailed
from tests.certificates import make_certificate
from tests.hub import Hub, serving

DEMO = DEMO_WEIGHTS / "sdxl"
NAME = "someone/shapes"
UNET = "unet/diffusion_pytorch_model.safetensors"
TOKEN = "hf_a_secret"
NOT_NEEDED = ["README.md", "unet/diffusion_pytorch_model.bin", "unet/code.py", "unet/model.onnx", "sd_xl.safetensors"]


class Reports(list[str]):
    def __call__(self, phase: str) -> None:
        self.append(phase)


@pytest.fixture
def serve() -> Iterator[Any]:
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(serving(Hub({NAME: DEMO, **options.pop("models", {})}, **options)))


def fetch(hub: Hub, cache: Path, token: str | None = None, name: str = NAME, **options: Any) -> Path:
    report = options.pop("report", Reports())
    return downloads.download(name, token, report, cache=cache, endpoint=hub.url, **options)


def complaint(hub: Hub, cache: Path, token: str | None = None, name: str = NAME) -> str:
    with pytest.raises(ModelLoadFailed) as caught:
        fetch(hub, cache, token, name)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert TOKEN not in sentence
    return sentence


# --- Files -----------------------------------------------------------------------------------------------------


def test_a_model_arrives_whole_and_without_what_is_not_needed(serve: Any, tmp_path: Path) -> None:
    model = Path(shutil.copytree(DEMO, tmp_path / "model"))
    for name in NOT_NEEDED:
        (model / name).write_bytes(b"x")
    hub = serve(models={NAME: model})
    folder = fetch(hub, tmp_path / "cache")
    assert read_folder(folder).kind is Kind.SDXL
    got = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert got == {str(path.relative_to(DEMO)) for path in DEMO.rglob("*") if path.is_file()}
    assert not set(hub.downloaded()) & set(NOT_NEEDED)


FILES = [
    "model_index.json",
    "README.md",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer_2/tokenizer.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/model.onnx",
    "text_encoder/pytorch_model.bin",
    "text_encoder_2/config.json",
    "text_encoder_2/model-00001-of-00002.safetensors",
    "text_encoder_2/model-00002-of-00002.safetensors",
    "text_encoder_2/model.safetensors.index.json",
    "text_encoder_2/model.fp16.safetensors",
    "text_encoder_2/model.safetensors.index.fp16.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "vae_1_0/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.fp16.safetensors",
]
INDEX = json.loads((DEMO / "model_index.json").read_text())


def weights_of(chosen: list[str]) -> list[str]:
    return [path for path in chosen if path.endswith((".safetensors", ".index.json", ".fp16.json"))]


def test_fp16_files_are_chosen_where_every_component_has_them() -> None:
    chosen = downloads.select_files(FILES, Kind.SDXL, INDEX)
    assert weights_of(chosen) == [
        "text_encoder/model.fp16.safetensors",
        "text_encoder_2/model.fp16.safetensors",
        "text_encoder_2/model.safetensors.index.fp16.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]
    assert {"model_index.json", "tokenizer/vocab.json", "tokenizer/merges.txt", "vae/config.json"} <= set(chosen)


def test_whole_precision_is_chosen_where_it_is_asked_for_and_where_fp16_is_not_complete() -> None:
    whole = [
        "text_encoder/model.safetensors",
        "text_encoder_2/model-00001-of-00002.safetensors",
        "text_encoder_2/model-00002-of-00002.safetensors",
        "text_encoder_2/model.safetensors.index.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert weights_of(downloads.select_files(FILES, Kind.SDXL, INDEX, full_precision=True)) == whole
    incomplete = [path for path in FILES if path != "vae/diffusion_pytorch_model.fp16.safetensors"]
    assert weights_of(downloads.select_files(incomplete, Kind.SDXL, INDEX)) == whole


def test_weights_that_come_from_elsewhere_are_left_but_not_their_configuration() -> None:
    chosen = downloads.select_files(FILES, Kind.SDXL, INDEX, without_weights={"unet"})
    assert [path for path in chosen if path.startswith("unet/")] == ["unet/config.json"]


# --- The way there ---------------------------------------------------------------------------------------------


def test_progress_is_told_and_the_token_is_not(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(downloads, "SECONDS_BETWEEN_REPORTS", 0.0)
    caplog.set_level(logging.DEBUG)
    reports = Reports()
    fetch(serve(token=TOKEN), tmp_path, TOKEN, report=reports)
    assert reports[0] == f"asking the hub for {NAME}"
    assert reports[-1] == f"downloading {NAME}: 9.1 of 9.1 MB, 100 %"
    shares = [int(report.split()[-2]) for report in reports[1:]]
    assert shares == sorted(shares)
    assert TOKEN not in caplog.text + "".join(reports)


@pytest.mark.parametrize("resets", [False, True], ids=["closed", "reset"])
def test_a_broken_connection_is_taken_up_where_it_broke(serve: Any, tmp_path: Path, resets: bool) -> None:
    hub = serve(token=TOKEN, breaks={UNET: 3_000_000}, resets=resets)
    folder = fetch(hub, tmp_path, TOKEN)
    assert (folder / UNET).read_bytes() == (DEMO / UNET).read_bytes()
    (resumed,) = [range_ for _, path, range_ in hub.requests if path.endswith(UNET) and range_]
    place = int(resumed.removeprefix("bytes=").removesuffix("-"))
    # What had come but was not yet written is fetched again, and no more.
    assert 0 < 3_000_000 - place <= 3 * downloads.PIECE if not resets else 0 < place <= 3_000_000


def test_the_second_time_nothing_is_downloaded_and_nothing_is_needed(
    serve: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub = serve()
    folder = fetch(hub, tmp_path)
    before = len(hub.downloaded())
    assert fetch(hub, tmp_path) == folder
    assert len(hub.downloaded()) == before
    gone = Hub({}, url="http://127.0.0.1:9")
    assert fetch(gone, tmp_path) == folder
    assert re.search(rf"the hub cannot be reached \(ConnectError: .+\): taking {NAME} from the cache", caplog.text)


def test_a_hub_that_has_been_asked_too_often_is_not_needed_the_second_time(serve: Any, tmp_path: Path) -> None:
    hub = serve()
    folder = fetch(hub, tmp_path)
    hub.status = 429
    assert fetch(hub, tmp_path) == folder


def test_where_the_hubs_other_storage_is_out_of_reach_the_files_come_without_it(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub = serve(xet=True)
    assert (fetch(hub, tmp_path) / UNET).stat().st_size == (DEMO / UNET).stat().st_size
    assert any(path.startswith("/xet/") for _, path, _ in hub.requests)
    assert "the hub's Xet storage failed" in caplog.text


def test_what_fails_without_the_hubs_other_storage_too_is_not_tried_for_ever(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    tries: list[str] = []

    def fails(name: str, **_: Any) -> str:
        tries.append(name)
        raise RuntimeError("no storage") if len(tries) < 9 else AssertionError("it is tried for ever")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(RuntimeError, match="no storage"):
        fetch(serve(), tmp_path)
    assert len(tries) == 2


@pytest.mark.parametrize(
    ("without_xet", "advice"),
    [(True, "check the network and HTTPS_PROXY"), (False, "HF_HUB_DISABLE_XET=1 goes without")],
)
def test_where_nothing_comes_any_more_that_is_said_and_what_comes_then_is_taken(
    serve: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    without_xet: bool,
    advice: str,
) -> None:
    monkeypatch.setattr(downloads, "SILENCE", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", without_xet)
    go_on = threading.Event()

    class Patient(Reports):
        def __call__(self, phase: str) -> None:
            super().__call__(phase)
            if "nothing has come" in phase:
                go_on.set()

    reports = Patient()
    folder = fetch(serve(holds={UNET: go_on}), tmp_path, report=reports)
    assert (folder / UNET).stat().st_size == (DEMO / UNET).stat().st_size
    assert f"downloading {NAME}: nothing has come for 0.2 seconds" in reports
    assert f"nothing of {NAME} has come for 0.2 seconds; " in caplog.text and advice in caplog.text
    # Nobody listens any more.
    told = len(reports)
    time.sleep(0.5)
    assert len(reports) == told


def test_signed_addresses_of_files_are_never_logged(
    serve: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    fetch(serve(signature="Signature=of-today"), tmp_path)
    assert "downloading" in caplog.text
    assert "of-today" not in caplog.text


def test_offline_mode_asks_nobody(serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = serve()
    folder = fetch(hub, tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    assert fetch(hub, tmp_path) == folder
    assert len(hub.requests) == before
    assert "is not in the cache, or not all of it, and HF_HUB_OFFLINE forbids" in complaint(hub, tmp_path / "empty")


def test_an_unfinished_download_is_not_taken_for_a_whole_one(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(DEMO, tmp_path / "model"))
    hub = serve(models={NAME: model})
    folder = fetch(hub, tmp_path / "cache")
    (folder / UNET).resolve().unlink()
    (folder / UNET).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "is not in the cache, or not all of it, and HF_HUB_OFFLINE forbids" in complaint(hub, tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert (fetch(hub, tmp_path / "cache") / UNET).exists()


def test_what_killed_starts_left_of_files_does_not_fill_the_disk(serve: Any, tmp_path: Path) -> None:
    hub = serve()
    blobs = fetch(hub, tmp_path).parents[1] / "blobs"
    left, another_is_at_it = blobs / "a.1.incomplete", blobs / "a.2.incomplete"
    for path in (left, another_is_at_it):
        path.write_bytes(b"x")
    os.utime(left, (1, 1))
    fetch(hub, tmp_path)
    assert not left.exists()
    assert another_is_at_it.exists()


# --- Refusals --------------------------------------------------------------------------------------------------


def test_every_refusal_says_what_to_do(serve: Any, tmp_path: Path) -> None:
    closed, gated, denied = serve(token=TOKEN), serve(token=TOKEN, gated=True), serve(token=TOKEN, denied=True)
    assert complaint(closed, tmp_path) == (
        f"The hub wants a token for {NAME}, or there is no such model: set HUGGINGFACE_TOKEN to one of a user who may "
        f"read {closed.url}/{NAME}."
    )
    assert complaint(closed, tmp_path, "hf_wrong") == (
        f"The hub refuses the token for {NAME}: check HUGGINGFACE_TOKEN, which may be wrong or have expired."
    )
    assert complaint(gated, tmp_path, TOKEN) == (
        f"{NAME} is gated, and the user of HUGGINGFACE_TOKEN has not been granted access: accept its conditions at "
        f"{gated.url}/{NAME} and start again."
    )
    assert complaint(denied, tmp_path, TOKEN) == (
        f"The hub denies HUGGINGFACE_TOKEN access to {NAME}: give the token the right to read {denied.url}/{NAME}."
    )
    assert complaint(closed, tmp_path, TOKEN, "someone/else") == (
        f"There is no model someone/else on the hub at {closed.url}; check its name."
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (None, "ConnectError: [Errno"),
        ({"status": 500}, "it answers 500)"),
        ({"status": 429}, "it answers 429)"),
    ],
)
def test_why_a_hub_cannot_be_reached_is_told(
    serve: Any, tmp_path: Path, options: dict[str, Any] | None, reason: str
) -> None:
    hub = Hub({}, url="http://127.0.0.1:9") if options is None else serve(**options)
    sentence = complaint(hub, tmp_path)
    begin = f"{NAME} is not in the cache, or not all of it, and the hub at {hub.url} cannot be reached ({reason}"
    assert sentence.startswith(begin)
    assert sentence.endswith(
        "; check the network, HTTPS_PROXY and SSL_CERT_FILE, try again later, or name a folder with --model_id."
    )


@pytest.mark.parametrize("status", [404, 500])
def test_a_password_in_the_hubs_address_is_never_shown(
    serve: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    hub = serve(status=status)
    hub.url = hub.url.replace("//", "//somebody:of-mine@")
    sentence = complaint(hub, tmp_path)
    assert "hub at http://127.0.0.1:" in sentence
    assert "of-mine" not in sentence + caplog.text


def test_a_certificate_that_is_not_trusted_is_told(tmp_path: Path) -> None:
    with serving(Hub({NAME: DEMO}), make_certificate(tmp_path)) as hub:
        assert "cannot be reached (ConnectError: [SSL: CERTIFICATE_VERIFY_FAILED]" in complaint(hub, tmp_path)


def test_a_proxy_that_wants_a_password_is_told(serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = serve(status=407)
    for name in ("NO_PROXY", "no_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    assert "cannot be reached (ProxyError: 407 Proxy Authentication Required)" in complaint(
        Hub({}, url="https://hub.example.com"), tmp_path
    )


def test_a_proxy_that_wants_a_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)  # as where it is not installed
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    assert "names a SOCKS proxy, for which the package socksio is missing" in complaint(
        Hub({}, url="http://a"), tmp_path
    )


def test_a_repository_that_is_no_model_of_ours_is_told_before_its_weights_are_fetched(
    serve: Any, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.safetensors").write_bytes(b"x")
    shutil.copytree(DEMO, tmp_path / "b")
    (tmp_path / "b" / "model_index.json").write_text('{"_class_name": "SanaPipeline"}')
    hub = serve(models={"a/a": tmp_path / "a", "b/b": tmp_path / "b"})
    assert "a/a on the hub has no model_index.json" in complaint(hub, tmp_path / "cache", name="a/a")
    assert "names the pipeline SanaPipeline" in complaint(hub, tmp_path / "cache", name="b/b")
    assert not any(path.endswith(".safetensors") for path in hub.downloaded())


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.ENOSPC, "There is too little disk space for someone/shapes in "),
        (errno.EACCES, "someone/shapes cannot be kept in "),
        (errno.EROFS, "someone/shapes cannot be kept in "),
    ],
)
def test_a_disk_that_cannot_take_it_is_told(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, says: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, "so it is")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    sentence = complaint(serve(), tmp_path)
    assert sentence.startswith(says)
    assert "HF_HOME" in sentence
