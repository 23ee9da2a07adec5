"""Tensor data of the Open Inference Protocol, as JSON lists and as raw bytes, to and from Python values.

Pure functions; nothing here knows what a tensor means.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from app.errors import InvalidRequest
from app.sentences import describe

NUMPY_TYPES: dict[str, str] = {
    "BOOL": "|b1",
    "UINT8": "|u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "|i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
    "BF16": "<u2",  # the upper half of a float32; numpy has no name for it
}
"""Datatype to numpy's little-endian type; ``BYTES`` is the only other one."""

Value = str | bytes | int | float | bool

MAX_DIMENSIONS = 8
MAX_ELEMENTS = 2**31


def check_datatype(datatype: str) -> None:
    if datatype != "BYTES" and datatype not in NUMPY_TYPES:
        known = ", ".join(["BYTES", *NUMPY_TYPES])
        raise InvalidRequest(f"datatype {describe(datatype)} is not one of {known}.")


def element_count(shape: Sequence[int]) -> int:
    """The number of elements of a tensor.

    Raises:
        InvalidRequest: a negative dimension, too many of them, or a product no request could carry.
    """
    if len(shape) > MAX_DIMENSIONS:
        raise InvalidRequest(f"a shape may have at most {MAX_DIMENSIONS} dimensions, not {len(shape)}.")
    if any(dimension < 0 for dimension in shape):
        raise InvalidRequest(f"shape {describe(list(shape))} has a negative dimension.")
    count = math.prod(shape)
    if count > MAX_ELEMENTS:
        raise InvalidRequest("the shape describes more elements than a request can carry.")
    return count


def read_json(data: object, datatype: str, shape: Sequence[int]) -> list[Value]:
    """Read the ``data`` of a JSON tensor, flat or nested in row-major order.

    Returns:
        ``prod(shape)`` values: text for ``BYTES``, otherwise bool, int or float.

    Raises:
        InvalidRequest: elements of another type or outside the datatype's range, or data and shape disagree.
    """
    check_datatype(datatype)
    count = element_count(shape)
    if datatype in ("FP16", "BF16"):
        raise InvalidRequest(f"{datatype} has no JSON form; send it as binary data, or as FP32.")
    if not isinstance(data, list):
        raise InvalidRequest("data must be a list.")
    values = _flatten(data, shape) if data and isinstance(data[0], list) else data
    if len(values) != count:
        raise InvalidRequest(f"shape {describe(list(shape))} needs {count} elements, but data has {len(values)}.")
    return _check_texts(values) if datatype == "BYTES" else _check_numbers(values, datatype)


# Millions of elements are looked at all together, in what C does for Python; one by one, they would take half a minute.


def _flatten(data: list[object], shape: Sequence[int]) -> list[object]:
    wrong = InvalidRequest(f"the nesting of data does not follow shape {describe(list(shape))}.")
    if not shape or len(data) != shape[0]:
        raise wrong
    level: list[Any] = data
    for size in shape[1:]:
        if not set(map(type, level)) <= {list} or not set(map(len, level)) <= {size}:
            raise wrong
        level = list(itertools.chain.from_iterable(level))
    if list in set(map(type, level)):
        raise wrong
    return level


def _check_texts(values: list[Any]) -> list[Value]:
    if not set(map(type, values)) <= {str}:
        other = next(value for value in values if not isinstance(value, str))
        raise InvalidRequest(f"elements of BYTES data must be text, not {describe(other)}.")
    return values


def _check_numbers(values: list[Any], datatype: str) -> list[Value]:
    kind = np.dtype(NUMPY_TYPES[datatype]).kind
    types = set(map(type, values))
    if kind == "b":
        if not types <= {bool}:
            raise InvalidRequest("elements of BOOL data must be true or false.")
        return values
    if not types <= {int, float}:
        other = next(value for value in values if type(value) not in (int, float))
        raise InvalidRequest(f"elements of {datatype} data must be numbers, not {describe(other)}.")
    if kind != "f" and float in types:
        # Some clients write every number with a fraction; JSON knows no difference between 7 and 7.0.
        other = next((value for value in values if isinstance(value, float) and not value.is_integer()), None)
        if other is not None:
            raise InvalidRequest(f"elements of {datatype} data must be whole numbers, not {other!r}.")
        values = [int(value) for value in values]
    low, high = _bounds(datatype)
    if values and not low <= min(values) <= max(values) <= high:
        raise InvalidRequest(f"an element of the data does not fit {datatype}.")
    return _as_meant(values, np.dtype(NUMPY_TYPES[datatype])) if kind == "f" else values


def _as_meant(numbers: Sequence[float], dtype: np.dtype) -> list[Value]:
    """0.7, and not 0.699999988079071, which is as near as 32 bits come to it: seven tenths of ten steps are seven.

    Whole numbers are what they are.
    """
    texts = np.array(numbers, dtype).astype(str).tolist()
    return [number if float(number).is_integer() else float(text) for number, text in zip(numbers, texts, strict=True)]


def _bounds(datatype: str) -> tuple[float, float]:
    dtype = np.dtype(NUMPY_TYPES[datatype])
    if dtype.kind == "f":
        return float(np.finfo(dtype).min), float(np.finfo(dtype).max)
    return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)


def read_binary(raw: memoryview, datatype: str, shape: Sequence[int]) -> list[Value]:
    """Read one tensor from exactly its own bytes, little-endian and row-major.

    Returns:
        ``prod(shape)`` values: bytes for ``BYTES``, otherwise bool, int or float.

    Raises:
        InvalidRequest: bytes and shape disagree, or an element is not finite.

    Source: Triton ``extension_binary_data.md``.
    """
    check_datatype(datatype)
    count = element_count(shape)
    if datatype == "BYTES":
        return list(_read_strings(raw, count))
    dtype = np.dtype(NUMPY_TYPES[datatype])
    if len(raw) != count * dtype.itemsize:
        raise InvalidRequest(
            f"{datatype} data of shape {describe(list(shape))} needs {count * dtype.itemsize} bytes, got {len(raw)}."
        )
    array = np.frombuffer(raw, dtype)
    if datatype == "BF16":
        array = (array.astype("<u4") << 16).view("<f4")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InvalidRequest(f"{datatype} data holds NaN or infinity.")
    values = array.tolist()
    if datatype == "BF16":
        meant = {number: _as_bfloat16_meant(number) for number in set(values)}
        return [meant[number] for number in values]
    return _as_meant(values, array.dtype) if array.dtype.kind == "f" else values


def _as_bfloat16_meant(number: float) -> float:
    """As `_as_meant`, for the type that numpy lacks; no more than two digits come through it whole."""
    short = float(f"{number:.2g}")
    half_a_step = math.ldexp(1, math.frexp(min(abs(short), abs(number)))[1] - 9)
    return short if not number.is_integer() and abs(short - number) < half_a_step else number


def _read_strings(raw: memoryview, count: int) -> list[bytes]:
    """Elements of a ``BYTES`` tensor: each a 4-byte length and that many bytes."""
    strings: list[bytes] = []
    position = 0
    for _ in range(count):
        if position + 4 > len(raw):
            raise InvalidRequest(f"BYTES data ends after {len(strings)} of {count} elements.")
        (length,) = struct.unpack_from("<I", raw, position)
        position += 4
        if position + length > len(raw):
            raise InvalidRequest(f"an element of BYTES data claims {length} bytes, but {len(raw) - position} are left.")
        strings.append(bytes(raw[position : position + length]))
        position += length
    if position != len(raw):
        raise InvalidRequest(f"{len(raw) - position} bytes follow the last of {count} elements of BYTES data.")
    return strings


def write_strings(values: Sequence[bytes]) -> bytes:
    """A ``BYTES`` tensor in binary form."""
    return b"".join(struct.pack("<I", len(value)) + value for value in values)
