"""The clients that come with the server, as their users run them, against one running server."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from clients import paint
from clients.client import AsyncClient, Client, Parameters, Result, ServerError
from tests.e2e.conftest import REPOSITORY, Server, clean_environment

PROMPT = "a red circle on a white background"
SMALL = Parameters(seed=7, num_inference_steps=2, width=96, height=64)
FLAGS = ["--seed", "7", "--steps", "2", "--width", "96", "--height", "64"]
TIMEOUT = 300


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Client]:
    with Client(server.url, timeout=TIMEOUT) as connected:
        yield connected


@pytest.fixture(scope="module")
def result(client: Client) -> Result:
    """What `PROMPT` and `SMALL` give."""
    return client.generate(PROMPT, **SMALL)


def run_paint(
    server: Server, folder: Path, *arguments: str, prompt: str = PROMPT, **variables: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clients.paint", prompt, "--url", server.url, "--out", str(folder), *arguments]
    return subprocess.run(
        command, env=clean_environment(**variables), capture_output=True, text=True, timeout=TIMEOUT, check=False
    )


def open_picture(path: Path) -> Image.Image:
    picture = Image.open(io.BytesIO(path.read_bytes()))
    picture.load()
    return picture


# --- Python ----------------------------------------------------------------------------------------------------


async def test_a_seed_gives_the_same_picture_in_json_and_binary(server: Server, result: Result) -> None:
    with Client(server.url, timeout=TIMEOUT, binary=False) as client:
        assert client.generate(PROMPT, **SMALL).pictures == result.pictures
    for binary in (True, False):
        async with AsyncClient(server.url, timeout=TIMEOUT, binary=binary) as asynchronous:
            assert (await asynchronous.generate(PROMPT, **SMALL)).pictures == result.pictures


def test_a_picture_has_the_size_and_the_seed_that_were_asked_for(result: Result) -> None:
    (picture,) = result.pictures
    assert (picture.seed, picture.media_type, picture.image.format) == (7, "image/png", "PNG")
    assert picture.image.size == (96, 64)


def test_the_answer_tells_what_the_model_chose(result: Result) -> None:
    assert result.parameters["scheduler"] == "EulerDiscreteScheduler"
    assert result.parameters["denoise_seconds"] > 0


def test_any_picture_can_be_painted_again_from_its_seed(client: Client) -> None:
    drawn = client.generate([PROMPT, "a blue star"], num_inference_steps=2, num_images_per_prompt=2, request_id="mine")
    assert drawn.id == "mine"
    assert len({picture.seed for picture in drawn.pictures}) == 4
    again = client.generate("a blue star", num_inference_steps=2, seed=drawn.pictures[3].seed).pictures[0]
    pairs = zip(again.image.tobytes(), drawn.pictures[3].image.tobytes(), strict=True)
    assert max(abs(one - other) for one, other in pairs) <= 2


def test_every_keyword_is_understood(client: Client) -> None:
    everything = Parameters(
        **SMALL,
        prompt_2="a circle",
        negative_prompt="blurry",
        negative_prompt_2="text",
        guidance_scale=4.5,
        guidance_rescale=0.5,
        num_images_per_prompt=2,
        clip_skip=0,
        scheduler="DPM++ 2M Karras",
        original_size=(64, 96),
        crops_coords_top_left=(0, 0),
        target_size=(64, 96),
        denoising_end=1.0,
        output_format="webp",
    )
    pictures = client.generate(PROMPT, **everything).pictures
    assert [picture.seed for picture in pictures] == [7, 8]
    assert [picture.image.format for picture in pictures] == ["WEBP", "WEBP"]


def test_the_server_tells_about_itself_and_its_model(client: Client) -> None:
    assert client.live()
    assert client.ready()
    client.wait_until_ready(TIMEOUT)
    assert "binary_tensor_data" in client.server_metadata()["extensions"]
    assert client.metadata()["name"] == "sdxl"


async def test_the_server_tells_asynchronous_callers_the_same(server: Server, client: Client) -> None:
    async with AsyncClient(server.url) as asynchronous:
        assert await asynchronous.live()
        assert await asynchronous.ready()
        await asynchronous.wait_until_ready(TIMEOUT)
        assert await asynchronous.server_metadata() == client.server_metadata()
        assert await asynchronous.metadata() == client.metadata()


def test_a_refusal_is_the_servers_own_sentence(client: Client, server: Server) -> None:
    with pytest.raises(ServerError, match="width") as caught:
        client.generate(PROMPT, width=97)
    assert caught.value.status == 400
    with Client(server.url, model="other") as other, pytest.raises(ServerError, match="There is no model 'other'"):
        other.wait_until_ready(TIMEOUT)


# --- The command line ------------------------------------------------------------------------------------------


def test_the_command_saves_a_picture_for_every_seed(server: Server, result: Result, tmp_path: Path) -> None:
    done = run_paint(server, tmp_path / "new" / "folder", "--number", "3", *FLAGS)
    assert (done.returncode, done.stderr) == (0, "")
    folder = tmp_path / "new" / "folder"
    expected = [f"{folder}/a-red-circle-on-a-white-background-{seed}.png\tseed {seed}" for seed in (7, 8, 9)]
    assert sorted(done.stdout.splitlines()) == expected
    assert sorted(path.name for path in folder.iterdir()) == [Path(line.split("\t")[0]).name for line in expected]
    first = open_picture(folder / "a-red-circle-on-a-white-background-7.png")
    pairs = zip(first.tobytes(), result.pictures[0].image.tobytes(), strict=True)
    assert max(abs(one - other) for one, other in pairs) <= 2


def test_the_command_draws_seeds_and_knows_other_formats(server: Server, tmp_path: Path) -> None:
    done = run_paint(server, tmp_path, "--number", "2", "--steps", "2", "--format", "jpeg", "--parallel", "1")
    assert (done.returncode, done.stderr) == (0, "")
    pictures = [open_picture(path) for path in tmp_path.iterdir()]
    assert [picture.format for picture in pictures] == ["JPEG", "JPEG"]


def test_the_command_names_files_where_their_letters_cannot_be_shown(server: Server, tmp_path: Path) -> None:
    prompt = "a red circle 赤い丸"
    finished = run_paint(server, tmp_path, *FLAGS, "--number", "2", prompt=prompt, PYTHONIOENCODING="ascii")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert len(finished.stdout.splitlines()) == 2
    assert r"\u8d64\u3044\u4e38-7.png" in finished.stdout
    assert {path.name for path in tmp_path.iterdir()} == {f"{paint.file_name(prompt)}-{seed}.png" for seed in (7, 8)}


def test_the_command_counts_steps_on_a_terminal(server: Server, tmp_path: Path) -> None:
    terminal, inside = os.openpty()
    termios.tcsetwinsize(inside, (24, 80))
    command = [sys.executable, "-m", "clients.paint", PROMPT, "--url", server.url, "--number", "2", *FLAGS]
    with subprocess.Popen(
        command, cwd=tmp_path, env=clean_environment(), stdout=subprocess.DEVNULL, stderr=inside
    ) as process:
        os.close(inside)
        shown = b""
        try:
            while chunk := os.read(terminal, 4096):
                shown += chunk
        except OSError:
            pass  # how Linux says that the last writer has gone
        finally:
            os.close(terminal)
        assert process.wait(TIMEOUT) == 0
    assert b"4/4" in shown, "2 steps for each of 2 pictures"


def test_the_command_starts_from_an_image_and_keeps_what_the_mask_keeps(
    server: Server, client: Client, result: Result, tmp_path: Path
) -> None:
    image, mask = result.pictures[0].save(tmp_path / "image.png"), tmp_path / "mask.webp"
    black = Image.new("L", (96, 64))
    black.save(mask, lossless=True)
    start = ["--image", str(image), "--steps", "4", "--strength", "1", "--seed", "7"]
    done = run_paint(server, tmp_path / "free", *start)
    assert (done.returncode, done.stderr) == (0, "")
    (free,) = map(open_picture, (tmp_path / "free").iterdir())
    same = client.generate(PROMPT, image=image, strength=1.0, num_inference_steps=4, seed=7).pictures[0]
    assert free.size == (96, 64) and free.tobytes() == same.image.tobytes()
    done = run_paint(server, tmp_path / "kept", *start, "--mask", str(mask), "--number", "2")
    assert (done.returncode, done.stderr) == (0, "")
    first, second = map(open_picture, (tmp_path / "kept").iterdir())
    # Nothing is painted again, so the seed makes no difference but in what the encoder draws.
    pairs = zip(first.tobytes(), second.tobytes(), strict=True)
    assert sum(abs(one - other) for one, other in pairs) / len(first.tobytes()) < 4


def test_the_command_ends_with_the_servers_sentence(server: Server, tmp_path: Path) -> None:
    done = run_paint(server, tmp_path, "--scheduler", "Oiler", "--number", "3")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("sdxl-paint: There is no scheduler 'Oiler'")
    assert done.stderr.count("\n") == 1


@contextmanager
def paint_at(listener: socket.socket, folder: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with subprocess.Popen(
        [sys.executable, "-m", "clients.paint", PROMPT, "--url", url],
        cwd=folder,
        env=clean_environment(**environment),
        stderr=subprocess.PIPE,
    ) as process:
        yield process


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A server that is only a socket."""
    with socket.create_server(("127.0.0.1", 0)) as opened:
        opened.settimeout(TIMEOUT)
        yield opened


def test_ctrl_c_ends_the_command_with_130(listener: socket.socket, tmp_path: Path) -> None:
    with paint_at(listener, tmp_path) as process, listener.accept()[0]:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, said) == (130, b"")


def test_the_command_sends_the_key_from_the_environment(listener: socket.socket, tmp_path: Path) -> None:
    answer = b'{"error": "Not this key."}'
    with paint_at(listener, tmp_path, SDXL_API_KEY="sesame") as process:
        with listener.accept()[0] as connection:
            request = connection.recv(65536)
            connection.sendall(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: %d\r\n\r\n%s" % (len(answer), answer))
        _, said = process.communicate(timeout=TIMEOUT)
    assert b"\r\nAuthorization: Bearer sesame\r\n" in request
    sentence = b"sdxl-paint: Not this key. It is read from the environment variable SDXL_API_KEY.\n"
    assert (process.returncode, said) == (1, sentence)


# --- curl ------------------------------------------------------------------------------------------------------


def test_every_curl_example_works_as_it_stands(server: Server, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(REPOSITORY / "clients" / "curl.sh"), str(tmp_path)],
        env=clean_environment(URL=server.url, MODEL="sdxl"),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert '{"live": true}' in done.stdout
    pictures = {path.stem: open_picture(path) for path in tmp_path.glob("*.png")}
    assert set(pictures) == {"json", "binary", "raw", "gzip", "batch-1", "batch-2", "image", "inpaint", "v1"}
    assert {picture.format for picture in pictures.values()} == {"PNG"}
    for name in pictures:
        # No byte of another tensor follows the picture's.
        assert (tmp_path / f"{name}.png").read_bytes().endswith(b"IEND\xaeB`\x82")
    assert pictures["json"].tobytes() == pictures["binary"].tobytes() == pictures["v1"].tobytes()
    assert "did you mean" in json.loads((tmp_path / "error.json").read_text())["error"]
