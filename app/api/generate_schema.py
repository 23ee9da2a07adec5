"""What the short form and streams may say and answer, as JSON Schema and in examples. Nothing here knows OpenAPI."""

from __future__ import annotations

import copy
from typing import Any

from app.api import infer_schema, predict_schema
from app.api.infer_schema import BINARY_DATA_OUTPUT, EXAMPLE_PROMPT, PRIORITY, one_of
from app.api.offer import Offer
from app.protocol.oip import MAX_ID_LENGTH

SHORT_FORM = """\
One JSON object with a prompt, which may be called `text_input` too, and every other parameter beside it or in an object
`parameters`. Images go in as base64 text. A body with `inputs` is read as in [`infer`](#/Pictures/infer), and so are
the parameters `timeout` (microseconds) and `binary_data_output`. The answer is that of `infer`.

```sh
curl -s "$SERVER/v2/models/$MODEL/generate" -d '{"prompt": "a red circle on a white background"}' \\
  | jq -r '.outputs[0].data[0]' | base64 -d > picture.png
```
"""

EVENTS = """\
The answer is a stream of server-sent events, each with JSON as its data:

| event | data | when |
|---|---|---|
| `queued` | `request_id`, `place`, `steps`, `remaining_seconds` | while it waits: at once, and when its place changes |
| `step` | `step`, `steps`, `remaining_seconds` | after each denoising step; both count the steps of all pictures |
| `preview` | `image`, `step`, `content_type`, `data` (base64) | as `preview` asks for |
| `done` | the body of an answer of [`infer`](#/Pictures/infer) | once, at the end |
| `error` | `error`, `code`, `status` | once, in its place |

`remaining_seconds` is left out until something like it was measured. What goes wrong before the first event is an
answer with an error's status, as in `infer`. A line that begins with a colon says that the server is still there.
A client that closes the connection cancels its request.

`preview` shows the pictures so far as JPEG: `latents` small ones that cost nearly nothing, `vae` whole ones that cost
as much as the end of a picture; `preview_every` says after how many steps, 5 unless given. Neither changes a pixel of
the result.

```sh
curl -sN "$SERVER/v2/models/$MODEL/generate_stream" -d '{"prompt": "a red circle on a white background"}'
```
"""


def description(offer: Offer) -> str:
    """What the schema of the short form cannot say, for those who read."""
    return SHORT_FORM + offer.conditions()


def stream_description(offer: Offer) -> str:
    return f"{EVENTS}\n{description(offer)}"


def infer_stream_description(offer: Offer) -> str:
    return f"{EVENTS}\nThe body is that of [`infer`](#/Pictures/infer), or the short form.\n{offer.conditions()}"


def schemas(offer: Offer) -> dict[str, Any]:
    """The schemas of the bodies, and of an event, by name."""
    return {
        **one_of("GenerateRequest", _short(offer, "Generate", {"binary_data_output": BINARY_DATA_OUTPUT})),
        **one_of("GenerateStreamRequest", _short(offer, "GenerateStream", _previews())),
        **one_of("InferenceStreamRequest", _infer_stream(offer)),
        "Event": events(),
    }


def _previews() -> dict[str, Any]:
    return {
        "preview": {
            "type": "string",
            "enum": ["none", "latents", "vae"],
            "default": "none",
            "description": "Show the pictures so far: small ones from the latents, or whole ones from the VAE.",
        },
    }


def _short(offer: Offer, verb: str, extra: dict[str, Any]) -> list[dict[str, Any]]:
    bodies = []
    for task in offer.tasks:
        body = predict_schema.instance(offer, task)
        body["title"] = verb + infer_schema.TITLES[task]
        body["properties"] |= {
            "id": {"type": ["string", "null"], "maxLength": MAX_ID_LENGTH, "description": "Comes back in the answer."},
            **{name: predict_schema.or_null(schema) for name, schema in {"priority": PRIORITY, **extra}.items()},
        }
        bodies.append(body)
    return bodies


def _infer_stream(offer: Offer) -> list[dict[str, Any]]:
    bodies = []
    for task in offer.tasks:
        body = copy.deepcopy(infer_schema.request(offer, task))
        body["title"] = "InferStream" + infer_schema.TITLES[task]
        parameters = body["properties"]["parameters"]["properties"]
        del parameters["binary_data_output"]
        parameters |= _previews()
        bodies.append(body)
    return bodies


def examples(offer: Offer) -> dict[str, Any]:
    """Requests to try, each within the limits."""
    steps = min(20, offer.limits.max_steps)
    return {
        "picture": {
            "summary": "One picture",
            "value": {"prompt": EXAMPLE_PROMPT, "num_inference_steps": steps, "seed": 7},
        },
    }


def stream_examples(offer: Offer) -> dict[str, Any]:
    steps = min(20, offer.limits.max_steps)
    previews = {"prompt": EXAMPLE_PROMPT, "num_inference_steps": steps, "preview": "latents"}
    return {**examples(offer), "previews": {"summary": "With previews", "value": previews}}


def infer_stream_examples(offer: Offer) -> dict[str, Any]:
    return {name: example for name, example in infer_schema.examples(offer).items() if name != "binary"}


EVENTS_EXAMPLE = {"event": "step", "data": '{"step":3,"steps":20,"remaining_seconds":1.9}'}


def events() -> dict[str, Any]:
    """The schema of one event of a stream."""
    step, seconds = {"type": "integer", "minimum": 0}, {"type": "number", "minimum": 0}
    text = {"type": "string"}
    data: dict[str, dict[str, Any]] = {
        "queued": {"request_id": text, "place": {"type": "integer", "minimum": 1}, "steps": step},
        "step": {"step": step, "steps": step},
        "preview": {"image": step, "step": step, "content_type": text, "data": text},
        "error": {"error": text, "code": text, "status": {"type": "integer"}},
    }
    optional = {"remaining_seconds": seconds}
    schemas: dict[str, Any] = {"done": {"$ref": "#/components/schemas/InferenceResponse"}}
    for name, fields in data.items():
        extra = optional if name in ("queued", "step") else {}
        schemas[name] = {
            "type": "object",
            "properties": {**fields, **extra},
            "required": list(fields),
            "additionalProperties": False,
        }
    return {"oneOf": [_event(name, schema) for name, schema in schemas.items()]}


def _event(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    content = {"type": "string", "contentMediaType": "application/json", "contentSchema": schema}
    return {
        "title": name,
        "type": "object",
        "properties": {"event": {"type": "string", "const": name}, "data": content},
        "required": ["event", "data"],
    }
