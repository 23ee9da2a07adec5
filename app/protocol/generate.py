"""The short form of a request, one JSON object with a prompt and parameters, and the events of a stream.

Pure functions; nothing here knows HTTP or a model.

Source: Triton ``extension_generate.md``, KServe ``open-inference-protocol`` (``generate_rest.yaml``), and the HTML
standard, "Server-sent events".
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

from app.errors import InvalidRequest
from app.generation import GenerateRequest, Preview, Progress
from app.parameters import ALIASES
from app.protocol.infer_request import OPTIONS, parse_infer, parse_options
from app.protocol.oip import DEFAULT_OUTPUTS, MAX_ID_LENGTH, InferCall, RequestedOutput, check_pixels
from app.protocol.strict_json import parse_json
from app.protocol.v1 import read_instance
from app.sentences import describe

HEARTBEAT = b": still here\n\n"
"""A comment: clients ignore it, proxies see that the connection is in use."""


def parse_generate(body: bytes, json_length: str | None) -> InferCall:
    """Read the body of a generate or stream call: an infer call's, or the short form ``{"prompt": …, …}``.

    In the short form parameters stand beside the prompt, or in an object ``parameters`` as Triton has it, and the
    prompt may be called ``text_input``.

    Args:
        body: JSON, for an infer call with the tensors' bytes behind it where there are any.
        json_length: the header ``Inference-Header-Content-Length``.

    Raises:
        InvalidRequest: with one sentence that says what to change.
    """
    if json_length is not None:
        return parse_infer(body, json_length)
    document = parse_json(body)
    if not isinstance(document, dict):
        raise InvalidRequest("The body must be a JSON object with a prompt, or with a list of inputs.")
    if "inputs" in document:
        return parse_infer(body, None)
    fields = dict(document)
    identifier = fields.pop("id", None)
    if identifier is not None and (not isinstance(identifier, str) or len(identifier) > MAX_ID_LENGTH):
        raise InvalidRequest(f"id must be text of at most {MAX_ID_LENGTH} characters, not {describe(identifier)}.")
    parameters = fields.pop("parameters", None)
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, dict):
        raise InvalidRequest(f"parameters must be an object, not {describe(parameters)}.")
    for name, value in parameters.items():
        if name in fields:
            raise InvalidRequest(f"{describe(name)} is given twice, in parameters and beside them.")
        fields[name] = value
    if "text_input" in fields:
        if "prompt" in fields:
            raise InvalidRequest("Give prompt or text_input, not both.")
        fields["prompt"] = fields.pop("text_input")
    options = {name: fields.pop(name) for name in OPTIONS if fields.get(name) is not None}
    request = read_instance("body", {name: value for name, value in fields.items() if name not in OPTIONS})
    chosen = parse_options(options)
    return InferCall(
        id=identifier,
        requests=(request,),
        given=frozenset(ALIASES.get(name, name) for name, value in fields.items() if value is not None),
        outputs=tuple(RequestedOutput(name, chosen.binary) for name in DEFAULT_OUTPUTS),
        timeout=chosen.timeout,
        priority=chosen.priority,
        preview=chosen.preview,
    )


def check_stream(call: InferCall, requests: Sequence[GenerateRequest]) -> None:
    """Refuse an answer that cannot be an event.

    Raises:
        InvalidRequest: binary data, which events cannot carry, or what `check_pixels` refuses.
    """
    check_pixels(call, requests)
    if any(output.binary for output in call.outputs):
        raise InvalidRequest(
            "A stream answers in JSON; leave out binary_data and binary_data_output, and send a prompt in JSON too."
        )


def check_whole(call: InferCall, requests: Sequence[GenerateRequest]) -> None:
    """Refuse what an answer in one piece cannot hold.

    Raises:
        InvalidRequest: previews, which only a stream can give, or what `check_pixels` refuses.
    """
    if call.preview is not None:
        raise InvalidRequest("preview needs a stream; send the request to generate_stream instead.")
    check_pixels(call, requests)


# --- Events ----------------------------------------------------------------------------------------------------


def event(name: str, data: bytes) -> bytes:
    """One server-sent event.

    Args:
        name: of the event.
        data: JSON without line breaks.
    """
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"


def news_event(news: Progress | Preview, request_id: str) -> tuple[str, bytes]:
    """What is new, as the name and the data of an event."""
    fields: dict[str, Any]
    if isinstance(news, Preview):
        encoded = base64.b64encode(news.encoded).decode("ascii")
        fields = {"image": news.image, "step": news.step, "content_type": news.format.media_type, "data": encoded}
        return "preview", _json(fields)
    seconds = {} if news.seconds is None else {"remaining_seconds": round(news.seconds, 3)}
    if news.place:
        return "queued", _json({"request_id": request_id, "place": news.place, "steps": news.steps_total, **seconds})
    return "step", _json({"step": news.steps_done, "steps": news.steps_total, **seconds})


def error_event(sentence: str, code: str, status: int) -> bytes:
    """The data of the event that ends a stream without pictures."""
    return _json({"error": sentence, "code": code, "status": status})


def _json(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode()
