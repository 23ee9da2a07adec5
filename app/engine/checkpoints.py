"""Safetensors files as they lie on disk: what their headers say, and what is wrong with those that have none.

No tensor is read here and torch is not imported, so that broken weights are told within milliseconds. Nothing here
knows which tensors a model needs.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from app.errors import ModelLoadFailed

SUFFIX = ".safetensors"
PICKLES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
MAX_HEADER = 100_000_000
"""Bytes; the safetensors library refuses longer headers too."""
AGAIN = "download it again"

BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4}
BITS |= {"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a safetensors file's header says.

    Attributes:
        path: of the file.
        shapes: of every tensor, by name.
        size: of the file in bytes.
        integers: names of the tensors that hold whole numbers.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    size: int
    integers: frozenset[str] = frozenset()


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the header of a safetensors file and hold it against the file's size.

    Source: the safetensors format: eight bytes with the header's length (little-endian), the header in JSON with
    dtype, shape and data_offsets of each tensor, then the tensors' bytes without gaps.

    Raises:
        ModelLoadFailed: it is no whole safetensors file; the sentence says what it is instead and what to do.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ModelLoadFailed(f"{path} is a folder, where one {SUFFIX} file was expected; name the file.")
        size = path.stat().st_size
        with path.open("rb") as file:
            header = _read_header(path, size, file)
    except FileNotFoundError:
        what = "is a link to a file that does not exist" if path.is_symlink() else "does not exist"
        raise ModelLoadFailed(f"{path} {what}; check the name, or {AGAIN}.") from None
    except OSError as error:
        raise ModelLoadFailed(
            f"{path} cannot be read ({error.strerror}); give the user of this server the right to read it."
        ) from None
    return _read_entries(path, header, size)


def check_suffix(path: Path) -> None:
    """Refuse by its name what cannot be a safetensors file.

    Raises:
        ModelLoadFailed: pickled weights, or some other file.
    """
    if path.suffix.lower() in PICKLES:
        raise ModelLoadFailed(
            f"{path} holds pickled weights, which can run programs when they are read; only {SUFFIX} files are loaded: "
            "take the model in that format, or convert it."
        )
    if path.suffix.lower() != SUFFIX and not path.is_dir():
        raise ModelLoadFailed(f"{path} is not a {SUFFIX} file; only those are loaded.")


def _read_header(path: Path, size: int, file: BinaryIO) -> bytes:
    start = file.read(512)
    length = int.from_bytes(start[:8], "little")
    if len(start) >= 8 and 2 <= length <= min(MAX_HEADER, size - 8) and start[8:9] == b"{":
        file.seek(8)
        return file.read(length)
    raise ModelLoadFailed(f"{path} {_describe(start, length, size)}.")


KNOWN = (
    # How files begin that are often found under a wrong name, and what to do about each.
    (b"version https://git-lfs", "is a Git LFS pointer and not the weights; fetch them with 'git lfs pull'"),
    (b"<!doctype", f"is a web page and not the weights; {AGAIN}, logged in where that is needed"),
    (b"<html", f"is a web page and not the weights; {AGAIN}, logged in where that is needed"),
    (b"<?xml", f"is an XML document and not the weights; {AGAIN}"),
    (b"{", f"is a JSON document and not the weights; {AGAIN}"),
    # An archive, or the protocols of pickles.
    *(
        (start, f"holds pickled weights under the name of a {SUFFIX} file; take the model in that format")
        for start in (b"pk\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    ),
)


def _describe(start: bytes, length: int, size: int) -> str:
    """What a file is that is no safetensors file, and what to do."""
    if not size:
        return f"is empty; {AGAIN}"
    if start[8:9] == b"{" and length > size - 8:
        return f"is cut off: its header alone has {length} bytes, and the file {size}; {AGAIN}"
    text = start.lstrip().lower()
    for beginning, what in KNOWN:
        if text.startswith(beginning):
            return what
    if size <= 8:
        return f"is cut off: it has {size} bytes, which no header fits into; {AGAIN}"
    return f"is no safetensors file: its header cannot be read; {AGAIN}"


def _read_entries(path: Path, header: bytes, size: int) -> Checkpoint:
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        shapes = {name: tuple(int(side) for side in entry["shape"]) for name, entry in entries.items()}
        integers = frozenset(name for name, entry in entries.items() if entry["dtype"].startswith(("I", "U")))
        ranges = sorted(
            (int(start), int(end), BITS.get(entry["dtype"], 0) * math.prod(shapes[name]))
            for name, entry in entries.items()
            for start, end in [entry["data_offsets"]]
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ModelLoadFailed(f"{path} is no safetensors file: its header cannot be read; {AGAIN}.") from None
    position = 0
    for start, end, bits in ranges:
        if start != position or end < start or (bits and (bits + 7) // 8 != end - start):
            raise ModelLoadFailed(f"{path} is damaged: its header contradicts itself; {AGAIN}.")
        position = end
    whole = 8 + len(header) + position
    if whole != size:
        what = "cut off" if size < whole else "damaged"
        raise ModelLoadFailed(f"{path} is {what}: it has {size} bytes and should have {whole}; {AGAIN}.")
    if not ranges:
        raise ModelLoadFailed(f"{path} holds no tensor; {AGAIN}.")
    return Checkpoint(path, shapes, size, integers)
