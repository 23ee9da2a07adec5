"""Requests of the Open Inference Protocol v2, from keywords to bytes. Reads image files, and needs nothing but Python.

Source: KServe ``open-inference-protocol`` (REST) and Triton ``extension_binary_data.md``.
"""

from __future__ import annotations

import base64
import decimal
import io
import json
import numbers
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

from clients.errors import ClientError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    ImageInput: TypeAlias = "bytes | str | os.PathLike[str] | Image | np.ndarray"

IMAGES = ("image", "mask_image")


class Parameters(TypedDict, total=False):
    """What shapes a picture besides its prompt; whatever is left out or ``None`` is the model's own choice.

    Sizes are pairs of height and width in pixels. `seed` is that of the first picture of a prompt, the next has
    ``seed + 1``. Images are the path or the bytes of a PNG, JPEG or WebP file, a picture of Pillow's, or an array of
    numpy's: uint8 of shape ``[height, width, 3]``, a mask's ``[height, width]``. `loras` are names and scales, as
    ``{"style": 0.8}`` or ``"style:0.8, detail"``.

    With several prompts, a list has one value for each of them. The server judges every value and names the ones it
    refuses.
    """

    prompt_2: str | None
    negative_prompt: str | None
    negative_prompt_2: str | None
    height: int | None
    width: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    guidance_rescale: float | None
    guidance_end: float | None
    true_cfg_scale: float | None
    image: ImageInput | Sequence[ImageInput] | None
    mask_image: ImageInput | Sequence[ImageInput] | None
    strength: float | None
    seed: int | None
    num_images_per_prompt: int | None
    clip_skip: int | None
    scheduler: str | None
    use_karras_sigmas: bool | None
    use_exponential_sigmas: bool | None
    use_beta_sigmas: bool | None
    timestep_spacing: Literal["linspace", "leading", "trailing"] | None
    timesteps: Sequence[float] | None
    sigmas: Sequence[float] | None
    eta: float | None
    original_size: tuple[int, int] | None
    crops_coords_top_left: tuple[int, int] | None
    target_size: tuple[int, int] | None
    negative_original_size: tuple[int, int] | None
    negative_crops_coords_top_left: tuple[int, int] | None
    negative_target_size: tuple[int, int] | None
    aesthetic_score: float | None
    negative_aesthetic_score: float | None
    denoising_limit: float | None
    denoising_end: float | None
    max_sequence_length: int | None
    loras: Mapping[str, float] | str | None
    output_format: Literal["png", "jpeg", "webp"] | None


def write_request(
    prompt: str | Sequence[str], parameters: Mapping[str, object], binary: bool = True, request_id: str | None = None
) -> tuple[bytes, int | None]:
    """The body of an infer call, and the length of its JSON where images' bytes follow it.

    Args:
        prompt: one, or several to be painted together.
        parameters: as in `Parameters`; the server refuses others by name.
        binary: let images travel as raw bytes behind the JSON, in the request and in the answer; otherwise as base64
            inside it.
        request_id: comes back with the answer.

    Raises:
        ClientError: an image cannot be read, or a value is none that can be sent.
    """
    texts = _plain("prompt", prompt)
    inputs = [_tensor("prompt", texts if isinstance(texts, list) else [texts])]
    scalars: dict[str, object] = {"binary_data_output": binary}
    tail = b""
    for name, value in parameters.items():
        if value is None:
            continue
        if name in IMAGES:
            tensor, raw = _images(name, value, binary)
            inputs.append(tensor)
            tail += raw
        elif isinstance(value, Mapping):
            scalars[name] = ",".join(f"{adapter}:{_plain(name, scale)}" for adapter, scale in value.items())
        elif isinstance(plain := _plain(name, value), list):
            # Parameters of the protocol are scalars; several values need a tensor.
            inputs.append(_tensor(name, plain))
        else:
            scalars[name] = plain
    message: dict[str, Any] = {"inputs": inputs, "parameters": scalars}
    if request_id is not None:
        if not isinstance(request_id, str):
            raise ClientError(f"request_id must be text, not {type(request_id).__name__}.")
        message["id"] = request_id
    head = json.dumps(message).encode()
    return head + tail, len(head) if tail else None


def _plain(name: str, value: Any) -> Any:
    """`value` as JSON knows it: tuples, ranges and arrays as lists, numpy's and other numbers as Python's.

    Raises:
        ClientError: it is nothing of the kind, or an empty list.
    """
    if isinstance(value, str):
        return str.__str__(value)  # not a kind of text of somebody's own
    if isinstance(value, bool | int | float):
        return value
    if hasattr(value, "__array_interface__"):
        return _plain(name, value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        if not value:
            raise ClientError(f"{name} is an empty list.")
        return [_plain(name, each) for each in value]
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real | decimal.Decimal):
        return float(value)
    raise ClientError(f"{name} must be a text, a number, True or False, or a list of them, not {type(value).__name__}.")


def _tensor(name: str, values: Sequence[Any]) -> dict[str, Any]:
    """Texts, truths or numbers, or equally long lists of them."""
    rows = [value for value in values if isinstance(value, list)]
    if rows and (len(rows) < len(values) or len({len(row) for row in rows}) > 1):
        raise ClientError(f"{name} must have lists of one length, or none.")
    shape = [len(values), len(rows[0])] if rows else [len(values)]
    flat = [element for row in rows for element in row] if rows else list(values)
    kinds = {type(element) for element in flat}
    datatype = {str: "BYTES", bool: "BOOL", int: "INT64"}.get(kinds.pop(), "FP64") if len(kinds) == 1 else "FP64"
    return {"name": name, "shape": shape, "datatype": datatype, "data": flat}


# --- Images ----------------------------------------------------------------------------------------------------


def read_image(name: str, value: object) -> bytes:
    """The bytes of an image file, from its path, its bytes or a picture of Pillow's.

    Raises:
        ClientError: there is no such file, or it is something else.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, str | os.PathLike):
        try:
            return Path(value).read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ClientError(f"Cannot read {os.fspath(value)!r} for {name}: {reason}.") from None
    save: Any = getattr(value, "save", None)
    if save is None:
        raise ClientError(
            f"{name} must be a path, the bytes of a file, a picture of Pillow's or an array of numpy's, not "
            f"{type(value).__name__}."
        )
    # Pillow leaves out which way is up unless it is told.
    exif: Any = getattr(value, "getexif", dict)()
    buffer = io.BytesIO()
    try:
        save(buffer, "PNG", compress_level=1, **({"exif": exif} if exif else {}))
    except (OSError, ValueError) as error:
        raise ClientError(f"{name} cannot be written as PNG: {error}.") from None
    return buffer.getvalue()


def _images(name: str, value: Any, binary: bool) -> tuple[dict[str, Any], bytes]:
    """One tensor, and its bytes where they are to follow the JSON."""
    values = list(value) if isinstance(value, tuple | list) else [value]
    if not values:
        raise ClientError(f"{name} is an empty list.")
    arrays = [_is_array(each) for each in values]
    if any(arrays):
        if not all(arrays) or len({each.shape for each in values}) > 1:
            raise ClientError(f"{name} must be arrays of one shape, or files.")
        if any(each.__array_interface__["typestr"] != "|u1" for each in values):
            raise ClientError(f"{name} must be an array of uint8, with values from 0 to 255.")
        shape = [*([len(values)] if len(values) > 1 else []), *values[0].shape]
        raw = b"".join(each.tobytes() for each in values)
        data: list[Any] | None = None if binary else list(raw)
        tensor = {"name": name, "shape": shape, "datatype": "UINT8"}
    else:
        files = [read_image(name, each) for each in values]
        raw = b"".join(len(file).to_bytes(4, "little") + file for file in files)
        data = None if binary else [base64.b64encode(file).decode("ascii") for file in files]
        tensor = {"name": name, "shape": [len(files)], "datatype": "BYTES"}
    if data is not None:
        return {**tensor, "data": data}, b""
    return {**tensor, "parameters": {"binary_data_size": len(raw)}}, raw


def _is_array(value: object) -> bool:
    # Pillow's pictures have numpy's interface too, but travel better as files.
    return hasattr(value, "__array_interface__") and not hasattr(value, "save")
