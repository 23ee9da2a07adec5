"""The files that input images come in, PNG, JPEG and WebP: cut down to what makes the picture, before anything is read.

Text, profiles and whatever else a file may hold can take minutes and gigabytes to read, and say nothing that is wanted
here but which side is up. Knows these formats' outer form; Pillow knows the rest.

Source: W3C PNG (Third Edition), ITU-T T.81 Annex B, Google's WebP Container Specification, CIPA Exif 3.0.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"
RIFF, WEBP = b"RIFF", b"WEBP"

_PNG_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_JFIF, _EXIF, _ADOBE, _COMMENT = 0xE0, 0xE1, 0xEE, 0xFE
_END, _START_OF_SCAN, _FILL = 0xD9, 0xDA, 0xFF
_BETWEEN_SCANS = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
"""A marker that ends a scan's data, in which there may be zeros and restarts behind 0xFF."""
_ORIENTATION = 0x0112
MAX_SCANS = 50
"""Of a progressive JPEG; encoders make ten to twenty, and each takes the time of a whole picture."""


def image_format(data: bytes) -> str | None:
    """``PNG``, ``JPEG`` or ``WEBP``, by the first bytes; ``None`` for everything else."""
    if data.startswith(PNG):
        return "PNG"
    if data.startswith(JPEG):
        return "JPEG"
    return "WEBP" if data[:4] == RIFF and data[8:12] == WEBP else None


def essentials(data: bytes) -> tuple[bytes, int]:
    """The file without what does not make its picture, and its orientation as Exif counts: 1 to 8, where 1 is upright.

    Raises:
        ValueError: it has far more parts than any picture needs.
        struct.error: it ends too early.
    """
    return {"PNG": _png, "JPEG": _jpeg, "WEBP": _webp}[image_format(data) or ""](data)


def _png(data: bytes) -> tuple[bytes, int]:
    view, kept, orientation = memoryview(data), [PNG], 1
    for kind, start, end in _chunks(data, len(PNG), ">I4s", around=4):
        if kind in _PNG_CHUNKS:
            kept.append(view[start - 8 : end])  # type: ignore[arg-type]
        elif kind == b"eXIf":
            orientation = _orientation(data[start : end - 4])
        if kind == b"IEND":
            break
    return b"".join(kept), orientation


def _webp(data: bytes) -> tuple[bytes, int]:
    # Left whole: its parts are counted, and libwebp skips those that it does not need.
    orientation = 1
    for kind, start, end in _chunks(data, 12, "<4sI", around=0):
        if kind == b"EXIF":
            orientation = _orientation(data[start:end])
    return data, orientation


def _chunks(data: bytes, position: int, head: str, around: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of each chunk's content; PNG's checksum counts as content."""
    parts = _Parts(data)
    while position + 8 <= len(data):
        parts.count()
        first, second = struct.unpack_from(head, data, position)
        kind, size = (second, first) if isinstance(second, bytes) else (first, second)
        start = position + 8
        position = start + size + around
        yield kind, start, min(position, len(data))
        if not around:
            position += size % 2  # RIFF pads


def _jpeg(data: bytes) -> tuple[bytes, int]:
    view, kept, orientation = memoryview(data), [data[:2]], 1
    parts = _Parts(data)
    position = 2
    while True:
        parts.count()
        lead, marker = struct.unpack_from("BB", data, position)
        if lead != _FILL:
            raise ValueError("no marker where one belongs")
        if marker == _FILL:
            position += 1
            continue
        if marker == _START_OF_SCAN:
            end = _end_of_jpeg(data, position, parts)
            if data.count(b"\xff\xda", position, end) > MAX_SCANS:
                raise ValueError("too many scans")
            kept.append(view[position:end])  # type: ignore[arg-type]
            return b"".join(kept), orientation
        (size,) = struct.unpack_from(">H", data, position + 2)
        end = position + 2 + max(size, 2)
        content = data[position + 4 : end]
        if marker == _EXIF and content.startswith(b"Exif\0\0") and orientation == 1:
            orientation = _orientation(content[6:])
        is_application = _JFIF <= marker <= _JFIF + 15
        if not (is_application or marker == _COMMENT) or marker in (_JFIF, _ADOBE):
            kept.append(view[position:end])  # type: ignore[arg-type]
        position = end


def _end_of_jpeg(data: bytes, position: int, parts: _Parts) -> int:
    """Where the picture is over whose first scan is at `position`; phones put a film behind it."""
    while found := _BETWEEN_SCANS.search(data, position):
        parts.count()
        position = found.end()
        if data[position - 1] == _END:
            return position
        if position + 2 <= len(data):
            position += max(2, int.from_bytes(data[position : position + 2], "big"))
    return len(data)


class _Parts:
    """Counts the parts of a file; what needs more of them than one for each kilobyte is no picture."""

    def __init__(self, data: bytes) -> None:
        self._left = 1024 + len(data) // 1024

    def count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise ValueError("too many parts")


def _orientation(exif: bytes) -> int:
    """What the first directory of Exif data says; upright where it says nothing that can be read."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for i in range(count):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", exif, start + 2 + 12 * i)
            if tag == _ORIENTATION:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1
