"""Tensor data, JSON and binary: what is read is exactly what was written, and a contradiction never passes."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from app.errors import InvalidRequest
from app.protocol.tensors import NUMPY_TYPES, element_count, read_binary, read_json, write_strings

NATIVE = sorted(set(NUMPY_TYPES) - {"BF16"})


@given(data=st.data(), datatype=st.sampled_from(NATIVE))
def test_binary_numbers_come_back_as_they_were_written(data: st.DataObject, datatype: str) -> None:
    finite = {"allow_nan": False, "allow_infinity": False} if datatype.startswith("FP") else None
    array = data.draw(
        arrays.arrays(NUMPY_TYPES[datatype], st.lists(st.integers(0, 4), max_size=3).map(tuple), elements=finite)
    )
    values = read_binary(memoryview(array.tobytes()), datatype, array.shape)
    assert np.array(values, NUMPY_TYPES[datatype]).tobytes() == array.tobytes()


@given(st.lists(st.binary(max_size=40), max_size=6))
def test_binary_strings_come_back_as_they_were_written(strings: list[bytes]) -> None:
    assert read_binary(memoryview(write_strings(strings)), "BYTES", [len(strings)]) == strings


@given(
    st.binary(max_size=64), st.sampled_from(sorted(["BYTES", *NUMPY_TYPES])), st.lists(st.integers(-1, 5), max_size=3)
)
def test_any_bytes_are_read_or_refused_with_a_sentence(raw: bytes, datatype: str, shape: list[int]) -> None:
    try:
        values = read_binary(memoryview(raw), datatype, shape)
    except InvalidRequest as error:
        assert str(error)
    else:
        assert len(values) == element_count(shape)


def test_bfloat16_is_the_upper_half_of_a_float32() -> None:
    raw = b"".join(struct.pack("<f", value)[2:] for value in (1.0, -2.5, 0.0))
    assert read_binary(memoryview(raw), "BF16", [3]) == [1.0, -2.5, 0.0]


def bfloat16(numbers: list[float]) -> bytes:
    bits = np.array(numbers, "<f4").view("<u4")
    bits += 0x7FFF + (bits >> 16 & 1)  # to the nearest, and from halfway to even
    return (bits >> 16).astype("<u2").tobytes()


def test_a_fraction_as_bfloat16_is_the_number_that_was_meant() -> None:
    numbers = [number / 100 for number in range(-100, 101)] + [0.8125, -0.03125, 2.5e-7, 2096.0]
    assert read_binary(memoryview(bfloat16(numbers)), "BF16", [len(numbers)]) == numbers


def test_every_bfloat16_that_is_read_stands_for_the_same_bits() -> None:
    every = np.arange(1, 2**16, dtype="<u4")  # but 0, which equals -0
    finite = every[(every & 0x7F80) != 0x7F80].astype("<u2").tobytes()
    values = read_binary(memoryview(finite), "BF16", [len(finite) // 2])
    assert bfloat16([float(value) for value in values]) == finite


@pytest.mark.parametrize(
    ("data", "shape"),
    [
        pytest.param([1, 2, 3, 4, 5, 6], [2, 3], id="flat"),
        pytest.param([[1, 2, 3], [4, 5, 6]], [2, 3], id="nested"),
        pytest.param([[[1], [2], [3]], [[4], [5], [6]]], [2, 3, 1], id="deeply-nested"),
    ],
)
def test_json_data_may_be_flat_or_nested(data: list[object], shape: list[int]) -> None:
    assert read_json(data, "INT64", shape) == [1, 2, 3, 4, 5, 6]


def test_a_whole_number_may_be_written_with_a_fraction() -> None:
    (value,) = read_json([7.0], "INT64", [1])
    assert value == 7 and isinstance(value, int)


@pytest.mark.parametrize(
    ("data", "datatype", "shape", "message"),
    [
        pytest.param([1], "INT64", [2], "needs 2 elements, but data has 1", id="too-few"),
        pytest.param([[1], [2, 3]], "INT64", [3], "nesting", id="ragged"),
        pytest.param([[1, 2]], "INT64", [2, 1], "nesting", id="transposed"),
        pytest.param([1, [2]], "INT64", [2], "must be numbers", id="half-nested"),
        pytest.param([[1], 2], "INT64", [2, 1], "nesting", id="half-flat"),
        pytest.param(5, "INT64", [1], "must be a list", id="scalar"),
        pytest.param(None, "INT64", [1], "must be a list", id="null"),
        pytest.param([1.5], "INT64", [1], "whole numbers", id="fraction"),
        pytest.param([True], "INT64", [1], "must be numbers", id="bool-as-int"),
        pytest.param([256], "UINT8", [1], "does not fit UINT8", id="overflow"),
        pytest.param([-1], "UINT64", [1], "does not fit UINT64", id="negative-unsigned"),
        pytest.param([1e39], "FP32", [1], "does not fit FP32", id="float-overflow"),
        pytest.param(["false"], "BOOL", [1], "true or false", id="text-as-bool"),
        pytest.param([1], "BYTES", [1], "must be text", id="number-as-text"),
        pytest.param(["1"], "FP32", [1], "must be numbers", id="text-as-number"),
        pytest.param([1.0], "FP16", [1], "no JSON form", id="half-in-json"),
        pytest.param([1], "int64", [1], "is not one of", id="lower-case"),
        pytest.param([1], "INT64", [-1], "negative dimension", id="negative"),
        pytest.param([1], "INT64", [2**40, 2**40], "more elements", id="overflowing-shape"),
        pytest.param([1], "INT64", [1] * 9, "at most 8 dimensions", id="too-many-dimensions"),
    ],
)
def test_json_data_that_contradicts_its_description_is_refused(
    data: object, datatype: str, shape: list[int], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        read_json(data, datatype, shape)


@pytest.mark.parametrize(
    ("raw", "datatype", "shape", "message"),
    [
        pytest.param(b"\0" * 11, "UINT8", [1, 2, 2, 3], "needs 12 bytes, got 11", id="one-byte-short"),
        pytest.param(b"\0" * 13, "UINT8", [1, 2, 2, 3], "needs 12 bytes, got 13", id="one-byte-long"),
        pytest.param(b"\0" * 4, "FP8", [4], "'FP8' is not one of", id="unknown-datatype"),
        pytest.param(struct.pack("<f", float("nan")), "FP32", [1], "NaN", id="nan"),
        pytest.param(b"\x80\x7f", "BF16", [1], "infinity", id="bfloat16-infinity"),
        pytest.param(b"\5\0\0\0abc", "BYTES", [1], "claims 5 bytes, but 3", id="string-too-long"),
        pytest.param(b"\1\0\0\0a", "BYTES", [2], "ends after 1 of 2", id="string-missing"),
        pytest.param(b"\1\0\0\0ab", "BYTES", [1], "1 bytes follow", id="string-left-over"),
        pytest.param(b"\xff\xff\xff\xffa", "BYTES", [1], "claims 4294967295", id="string-absurd"),
    ],
)
def test_bytes_that_contradict_their_description_are_refused(
    raw: bytes, datatype: str, shape: list[int], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        read_binary(memoryview(raw), datatype, shape)


def test_a_huge_shape_with_no_bytes_is_refused_at_once() -> None:
    with pytest.raises(InvalidRequest, match="needs 2147483648 bytes"):
        read_binary(memoryview(b""), "UINT8", [2**31])
