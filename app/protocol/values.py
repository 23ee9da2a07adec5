"""Single values as every protocol brings them: text, and pictures as encoded files or as plain numbers.

No picture is unpacked here.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence

from app.errors import InvalidRequest
from app.generation import Pixels
from app.sentences import describe

MAX_JSON_NUMBERS = 3 * 1024 * 1024
"""Numbers of pictures in JSON; larger ones come as binary data or as encoded files."""


def check_text(name: str, value: object) -> object:
    """`value`, as text if it is bytes; other types are none of this function's business.

    Raises:
        InvalidRequest: no UTF-8, or a NUL, at which some tokenizers stop reading.
    """
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            raise InvalidRequest(f"{name} is not UTF-8 text.") from None
    if isinstance(value, str) and "\0" in value:
        raise InvalidRequest(f"{name} holds a NUL character.")
    return value


def read_image_file(name: str, value: object) -> object:
    """A file's bytes from base64 text, which lines may break, or from a data URL as browsers' canvases make it.

    Bytes are a file already; other types are none of this function's business.

    Raises:
        InvalidRequest: text of another kind; what an address points to is never fetched.
    """
    if not isinstance(value, str):
        return value
    if value[:5].lower() == "data:":
        header, comma, value = value.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise InvalidRequest(f"{name} is a data URL without ';base64,' before its data.")
    try:
        return base64.b64decode("".join(value.split()), validate=True)
    except ValueError:
        raise InvalidRequest(
            f"{name} must be a file's bytes, in JSON as base64; addresses and file names are not read."
        ) from None


def picture_shape(name: str, shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Number, height, width and channels of the pictures in a ``UINT8`` tensor of that shape.

    Images are ``[h, w, 3]`` or ``[n, h, w, 3]``; masks ``[h, w]`` or ``[n, h, w]``.

    Raises:
        InvalidRequest: neither.
    """
    if name == "mask_image":
        wanted, sides, channels = "[h, w] or [n, h, w]", list(shape), 1
        # An image where a mask belongs would read as h masks, each w high and 3 wide.
        fits = len(sides) in (2, 3) and (len(sides) == 2 or sides[-1] not in (1, 3))
    else:
        wanted, sides, channels = "[h, w, 3] or [n, h, w, 3]", list(shape[:-1]), 3
        fits = len(sides) in (2, 3) and shape[-1] == channels
    if not fits:
        raise InvalidRequest(f"shape must be {wanted}, not {describe(list(shape))}.")
    if 0 in sides:
        raise InvalidRequest("it has no element.")
    return sides[0] if len(sides) == 3 else 1, sides[-2], sides[-1], channels


def split_pictures(data: bytes, count: int, height: int, width: int, channels: int) -> list[Pixels]:
    """Pictures that lie one behind the other."""
    size = height * width * channels
    return [Pixels(data[i * size : (i + 1) * size], height, width, channels) for i in range(count)]
