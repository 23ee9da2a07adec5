"""Safetensors headers: what a whole file says, and the sentence for each way in which a file is not one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.engine.checkpoints import check_suffix, read_checkpoint
from app.engine.weights import DEMO_WEIGHTS
from app.errors import ModelLoadFailed

WHOLE = DEMO_WEIGHTS / "sdxl" / "vae" / "diffusion_pytorch_model.safetensors"


def complaint(path: Path) -> str:
    with pytest.raises(ModelLoadFailed) as caught:
        read_checkpoint(path)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.startswith(str(path))
    assert sentence.endswith(".")
    return sentence


def make(folder: Path, content: bytes) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return path


def with_header(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_the_header_of_a_whole_file_tells_names_and_shapes() -> None:
    checkpoint = read_checkpoint(WHOLE)
    assert checkpoint.size == WHOLE.stat().st_size
    assert checkpoint.shapes["encoder.conv_in.weight"] == (16, 3, 3, 3)


def test_the_header_tells_which_tensors_hold_whole_numbers(tmp_path: Path) -> None:
    kinds = ("F32", "BF16", "F8_E4M3", "I8", "U8", "I64")
    sizes = (4, 2, 1, 1, 1, 8)
    ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
    header = {kind: entry(end - size, end, [1], kind) for kind, size, end in zip(kinds, sizes, ends, strict=True)}
    checkpoint = read_checkpoint(make(tmp_path, with_header(header, bytes(ends[-1]))))
    assert checkpoint.integers == {"I8", "U8", "I64"}
    assert not read_checkpoint(WHOLE).integers


def test_a_file_may_hold_metadata_scalars_and_empty_tensors(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "b": entry(4, 4, [0, 5]), "a": entry(0, 4, [])}
    assert read_checkpoint(make(tmp_path, with_header(header, b"1234"))).shapes == {"a": (), "b": (0, 5)}


@pytest.mark.parametrize("kept", [1, 7, 8, 9, 100, 5000, -1], ids=str)
def test_a_file_that_is_cut_off_anywhere_is_told_so(tmp_path: Path, kept: int) -> None:
    sentence = complaint(make(tmp_path, WHOLE.read_bytes()[:kept]))
    assert "download it again" in sentence and "is cut off" in sentence


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty; download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "is a Git LFS pointer and not the we"),
        (b"<!DOCTYPE html><html><body>Log in</body></html>", "is a web page and not the weights"),
        (b"\n  <html><head>", "is a web page and not the weights"),
        (b'{"error": "Invalid credentials"}', "is a JSON document and not the weights"),
        (b"PK\x03\x04" + bytes(400), "holds pickled weights under the name of a .safetensors file"),
        (b"\x80\x02}q\x00(X\x05\x00\x00\x00stateq\x01", "holds pickled weights under the name of a .safetensors file"),
        (bytes(range(256)) * 4, "is no safetensors file"),
        (bytes(1000), "is no safetensors file"),
        (with_header({"a": entry(0, 4, [1])}, b"1234", length=2**62), "is cut off"),
        (with_header({"a": entry(0, 4, [1])}, b"1234", length=5), "header cannot be read"),
        (with_header({"a": entry(0, 4, [1])}, b"1234", length=0), "header cannot be read"),
        (with_header(b'{"a": [}'), "header cannot be read"),
        (with_header(b'{"a": 1}'), "header cannot be read"),
        (with_header(b"{\xff}"), "header cannot be read"),
        (with_header(b'{"a":' + b"[" * 90_000 + b"]" * 90_000 + b"}"), "header cannot be read"),
        (with_header({}), "holds no tensor"),
        (with_header({"a": entry(0, 8, [1])}, bytes(8)), "its header contradicts itself"),
        (with_header({"a": entry(4, 8, [1])}, bytes(8)), "its header contradicts itself"),
        (with_header({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, bytes(4)), "its header contradicts itself"),
        (with_header({"a": entry(0, 4, [1])}, bytes(5)), "is damaged: it has"),
        (with_header({"a": entry(0, 4, [1])}, bytes(3)), "is cut off: it has"),
    ],
)
def test_every_other_file_is_told_what_it_is(tmp_path: Path, content: bytes, says: str) -> None:
    assert says in complaint(make(tmp_path, content))


def test_a_missing_file_a_dangling_link_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    assert "does not exist; check the name" in complaint(tmp_path / "gone.safetensors")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "gone.safetensors")
    assert "is a link to a file that does not exist" in complaint(tmp_path / "link.safetensors")
    assert "is a folder, where one .safetensors file was expected" in complaint(tmp_path)


def test_a_file_that_may_not_be_read_is_told_so(tmp_path: Path) -> None:
    path = make(tmp_path, WHOLE.read_bytes())
    path.chmod(0)
    if os.geteuid() != 0:
        assert "(Permission denied); give the user of this server the right" in complaint(path)
        return
    # The superuser reads everything: ask as somebody else, in a process that has imported what it needs.
    code = (
        "import os, sys; from pathlib import Path; from app.engine.checkpoints import read_checkpoint\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "try: read_checkpoint(Path(sys.argv[1]))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    said = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"ModelLoadFailed {path} cannot be read (Permission denied); give the user of this server")


@pytest.mark.parametrize("name", ["model.ckpt", "model.PT", "pytorch_model.bin", "model.pth", "model.pkl"])
def test_pickled_weights_are_refused_by_their_name_without_opening_them(name: str) -> None:
    with pytest.raises(ModelLoadFailed, match=r"holds pickled weights, which can run programs .* only \.safetensors"):
        check_suffix(Path(name))


def test_other_names_are_refused_too() -> None:
    with pytest.raises(ModelLoadFailed, match=r"model\.gguf is not a \.safetensors file"):
        check_suffix(Path("model.gguf"))
    check_suffix(Path("model.SafeTensors"))
