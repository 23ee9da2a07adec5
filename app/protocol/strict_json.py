"""JSON as strictly as a server must read it, and what is wrong with it in one sentence.

Knows no protocol's messages.
"""

from __future__ import annotations

import codecs
import contextlib
import gc
import json
import re
from collections.abc import Collection, Iterator
from typing import Any, NoReturn

from pydantic import ValidationError

from app.errors import InvalidRequest
from app.sentences import describe, nearest, shorten

MAX_NAMES = 256
"""Names in one object; no message needs as many."""
MAX_COMMAS = 4_194_304
"""Python reads JSON in one go, in which nothing else runs: a fifth of a second for as many numbers."""
MAX_LISTS = 1_100_000
"""And objects, which take far longer than numbers; a picture of a million pixels has as many, list in list."""


def parse_json(raw: bytes) -> Any:
    """Strict JSON: UTF-8, no NaN or infinity, no name twice in one object, no lone surrogate, nothing endless.

    Raises:
        InvalidRequest: what is wrong and where.
    """
    if raw.count(b",") > MAX_COMMAS or raw.count(b"[") + raw.count(b"{") > MAX_LISTS:
        raise InvalidRequest("The JSON has too many values; send large tensors as binary data.")
    if raw.startswith(codecs.BOM_UTF8):
        raise InvalidRequest("The body begins with a byte order mark, which JSON has none of; leave it out.")
    try:
        text = raw.decode("utf-8")
        with _no_collection():
            document = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_names)
        if re.search(r"\\u[dD][89abAB]", text) or re.search(r"\\u[dD][c-fC-F]", text):
            json.dumps(document, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The JSON is not UTF-8 (byte {error.start}).") from None
    except UnicodeEncodeError:
        raise InvalidRequest("The JSON holds half of a surrogate pair, which is no character.") from None
    except RecursionError:
        raise InvalidRequest("The JSON is nested too deeply.") from None
    except json.JSONDecodeError as error:
        # Some of Python's messages expect the place right behind them, and end with "at".
        what = error.msg.removesuffix(" at")
        raise InvalidRequest(f"The body is not JSON: {what} at line {error.lineno}, column {error.colno}.") from None
    except ValueError:
        # Python refuses to read integers of more than 4,300 digits.
        raise InvalidRequest("A number in the JSON has too many digits.") from None
    return document


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Python's collector would look again and again through all the lists that are there so far."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequest(f"{name} is not JSON; numbers must be finite.")


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_NAMES:
        raise InvalidRequest(f"One JSON object has more than {MAX_NAMES} names.")
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"{describe(twice)} stands twice in one JSON object.")
    return result


def describe_validation(error: ValidationError, known: Collection[str]) -> str:
    """The first of pydantic's complaints as one sentence that names the place.

    Args:
        error: what pydantic says.
        known: names of fields that there are, one of which may have been meant.
    """
    detail = error.errors(include_url=False)[0]
    place, name, expected = "", "", ""
    for part in detail["loc"]:
        # Pydantic appends the type of a union that it tried first, and complains of nothing else.
        if isinstance(part, str) and part in ("bool", "int", "float", "str"):
            expected = "one number, one text, true or false"
            break
        name = str(part)
        place += f"[{part}]" if isinstance(part, int) else f"{'.' if place else ''}{shorten(part)}"
    if detail["type"] == "extra_forbidden":
        # A field of another object is not what was meant.
        return f"{place} is not a field of the protocol{nearest(name, [field for field in known if field != name])}."
    if detail["type"] == "missing":
        return f"{place} is missing."
    if detail["type"] == "string_too_long":
        return f"{place} must have at most {detail['ctx']['max_length']} characters."
    if detail["type"] == "too_long":
        return f"{place} must have at most {detail['ctx']['max_length']} members."
    if detail["type"] == "model_type":
        expected = "an object"
    expected = expected or detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{place} must be {expected}, not {describe(detail['input'])}."
