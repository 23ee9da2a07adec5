"""What an infer request may say, as JSON Schema and in examples: one prompt and every parameter.

The protocol lets a value be sent in many ways. This is the plainest of them, and strict: whatever follows it is served.
Nothing here knows OpenAPI.
"""

from __future__ import annotations

from typing import Any

from app.api.offer import CONDITIONS, EXAMPLE_IMAGE, EXAMPLE_MASK, Offer
from app.generation import DEFAULT_PRIORITY, MAX_PRIORITY, PARAMETERS, ImageTask, Kind
from app.protocol.oip import DATATYPES, DEFAULT_OUTPUTS, MAX_ID_LENGTH

DESCRIPTION = """\
The schema below is the plainest form of a request: one prompt, an image and a mask where wanted, everything else as
`parameters`. To get a picture into a file:

```sh
curl -s "$SERVER/v2/models/$MODEL/infer" -d '{"inputs": [
  {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a red circle on a white background"]}
]}' | jq -r '.outputs[0].data[0]' | base64 -d > picture.png
```

Also taken:

- **Any image** in place of the example's: a PNG, JPEG or WebP file as base64 or as the data URL of a browser's canvas,
  or pixels as `UINT8` of shape `[height, width, 3]`, a mask's `[height, width]`. It is resized to `height` and `width`;
  without them, its own sides have to be multiples of {size_step}.
- **Several prompts**: `"shape": [n]` and `n` elements of `data`. Every parameter may be an input too, `BYTES` for text
  and images, `INT64` or `FP32` for numbers, `BOOL` for truth, with 1 value for all prompts or `n`, one for each; lists
  have the shape `[k]`.
- **Binary requests**: JSON, then the inputs' bytes. The header `Inference-Header-Content-Length` gives the number of
  bytes of JSON, the input's parameter `binary_data_size` replaces its `data`. With the header `0`, the whole body is
  one prompt as UTF-8 text. The header decides, whatever the content type says.
- **Binary answers**: all outputs with the request's parameter `binary_data_output`, one with its own parameter
  `binary_data`.
- **Pixels**: the output `pixels` as `UINT8` of shape `[n, height, width, 3]`, in JSON for small pictures only:
  `{"name": "pixels", "parameters": {"binary_data": true}}`.
- **A deadline**: the request's parameter `timeout` in microseconds.
- **The same request again**: with the `Idempotency-Key` of the first one it is not painted twice, but gets the same
  answer, while the first one runs and for `idempotency_seconds` after.
- **A scheduler by its diffusers class**, such as `EulerDiscreteScheduler`.
- **Any size** of which each side is a multiple of {size_step} and at most `max_side`, and the product at most
  `max_pixels`.
- **Any number of steps** with an image too, as long as `strength` times `num_inference_steps` leaves one to do.
- **Bodies packed** with `Content-Encoding: gzip` or `deflate`.
"""
PICKY = "- **Schedulers that need certain steps**: `PNDM` (4 or more), `LCM` and `TCD` (50 or fewer).\n"
ADAPTERS = "- **Several adapters** in `loras`, separated by commas: `style:0.8, detail`.\n"

EXAMPLE_PROMPT = "a red circle on a white background"
BINARY_DATA_OUTPUT = {
    "description": "Answer with the tensors' bytes behind the JSON instead of base64 in it.",
    "type": "boolean",
    "default": False,
}
PRIORITY = {
    "description": "1 is the most urgent, 0 means the default; each level more doubles the time that a request is "
    "content to wait.",
    "type": "integer",
    "minimum": 0,
    "maximum": MAX_PRIORITY,
    "default": DEFAULT_PRIORITY,
}
TITLES = {
    ImageTask.TEXT_TO_IMAGE: "TextToImage",
    ImageTask.IMAGE_TO_IMAGE: "ImageToImage",
    ImageTask.INPAINT: "Inpaint",
}
"""What bodies are called. Generators of clients make classes of titles: no two bodies may have the same."""


def description(offer: Offer) -> str:
    """What the schema cannot say, for those who read."""
    text = DESCRIPTION.replace("{size_step}", str(offer.size_step))
    text += PICKY if offer.has_picky_schedulers else ""
    text += ADAPTERS if offer.has_adapters else ""
    return text + offer.conditions()


def schemas(offer: Offer) -> dict[str, Any]:
    """The schemas of an infer request's JSON by name; ``InferenceRequest`` is the one that is sent."""
    bodies = [request(offer, task) for task in offer.tasks]
    return {**one_of("InferenceRequest", bodies), "EveryParameter": _every_parameter(offer)}


def one_of(name: str, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    """The schema `name` for any of `bodies`, and each of these under its title, where generators of clients find it."""
    references = [{"$ref": f"#/components/schemas/{body['title']}"} for body in bodies]
    return {name: {"oneOf": references}, **{body["title"]: body for body in bodies}}


def request(offer: Offer, task: ImageTask) -> dict[str, Any]:
    """The schema of one task's body."""
    names = offer.names(task)
    needed = [name for name in ("prompt", "image", "mask_image") if name in names]
    pairs = [name for name in names if PARAMETERS[name].kind is Kind.PAIR]
    scalars = {name: offer.schema(name, task) for name in names if name not in needed and name not in pairs}
    scalars["priority"] = PRIORITY
    scalars["binary_data_output"] = BINARY_DATA_OUTPUT
    body = _object(
        {
            "inputs": {
                "type": "array",
                "description": f"{', '.join(needed)}; behind, where wanted, SDXL's size conditioning."
                if pairs
                else f"{', '.join(needed)}.",
                "prefixItems": [_tensor(offer, name, task) for name in (*needed, *pairs)],
                "minItems": len(needed),
                "maxItems": len(needed) + len(pairs),
            },
            "parameters": {
                **_object(scalars),
                "type": ["object", "null"],
                "description": "Everything else. What is left out is the model's own choice.",
            },
            "outputs": {
                "type": ["array", "null"],
                "description": f"What comes back; {' and '.join(DEFAULT_OUTPUTS)} unless given.",
                # Pixels are too many numbers for JSON, but for the smallest pictures.
                "items": _object({"name": {"type": "string", "enum": list(DEFAULT_OUTPUTS)}}, "name"),
                "uniqueItems": True,
                "maxItems": len(DEFAULT_OUTPUTS),
            },
            "id": {
                "type": ["string", "null"],
                "maxLength": MAX_ID_LENGTH,
                "description": "Comes back in the answer.",
            },
        },
        "inputs",
    )
    return {"title": TITLES[task], **body}


def _tensor(offer: Offer, name: str, task: ImageTask) -> dict[str, Any]:
    """One input: the parameter's value, or its values where it is a pair, as the tensor's data."""
    parameter = PARAMETERS[name]
    schema = offer.schema(name, task)
    meaning = schema.pop("description")
    schema.pop("default", None)
    count, element = (2, schema["items"]) if parameter.kind is Kind.PAIR else (1, schema)
    fields = {
        "name": {"type": "string", "const": name},
        # A list that is a constant as a whole makes generators of clients give up.
        "shape": {"type": "array", "items": {"type": "integer", "const": count}, "minItems": 1, "maxItems": 1},
        "datatype": {"type": "string", "const": DATATYPES[parameter.kind]},
        "data": {"type": "array", "items": element, "minItems": count, "maxItems": count},
    }
    return {"title": name, "description": meaning, **_object(fields, *fields)}


def _every_parameter(offer: Offer) -> dict[str, Any]:
    """No request looks like this: it is for those who want to know what there is."""
    properties = {}
    for name in PARAMETERS:
        if offer.takes(name):
            properties[name] = offer.schema(name, ImageTask.INPAINT if name == "strength" else ImageTask.TEXT_TO_IMAGE)
            if name in CONDITIONS:
                properties[name]["description"] += f" Needs: {CONDITIONS[name]}."
            if PARAMETERS[name].kind is Kind.IMAGE:
                properties[name].pop("enum")
    meaning = (
        "Every parameter of the model and the kind of its value, for reading; requests are made as InferenceRequest."
    )
    return {"title": "EveryParameter", "description": meaning, **_object(properties)}


def _object(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**schema, "required": list(required)} if required else schema


def examples(offer: Offer) -> dict[str, Any]:
    """Requests to try, each within the limits and for a task that the model has."""
    steps = min(20, offer.limits.max_steps)
    prompt = _bytes("prompt", EXAMPLE_PROMPT)
    blue, star = (_bytes("prompt", f"a blue {shape} on a white background") for shape in ("circle", "star"))
    image = _bytes("image", EXAMPLE_IMAGE)
    by_task = {
        ImageTask.TEXT_TO_IMAGE: _text_examples(offer, prompt, steps),
        ImageTask.IMAGE_TO_IMAGE: {
            "image": {
                "summary": "From one image to another",
                "value": {"inputs": [blue, image], "parameters": {"strength": 0.8, "seed": 7, **offer.usual_size}},
            }
        },
        ImageTask.INPAINT: {
            "inpaint": {
                "summary": "Part of an image painted again",
                "value": {
                    "inputs": [star, image, _bytes("mask_image", EXAMPLE_MASK)],
                    "parameters": {"strength": 0.95, "seed": 7, **offer.usual_size},
                },
            }
        },
    }
    return {name: example for task in offer.tasks for name, example in by_task[task].items()}


def _bytes(name: str, value: str) -> dict[str, Any]:
    return {"name": name, "shape": [1], "datatype": "BYTES", "data": [value]}


def _text_examples(offer: Offer, prompt: dict[str, Any], steps: int) -> dict[str, Any]:
    several = min(4, offer.limits.max_images_per_request)
    schedulers = offer.schema("scheduler")["enum"]
    return {
        "picture": {
            "summary": "One picture",
            "value": {"inputs": [prompt], "parameters": {"num_inference_steps": steps, "seed": 7}},
        },
        "several": {
            "summary": "Several pictures of one prompt",
            "value": {
                "inputs": [prompt],
                "parameters": {"num_inference_steps": steps, "num_images_per_prompt": several, "output_format": "webp"},
            },
        },
        "steered": {
            "summary": "A scheduler, guidance and a negative prompt",
            "value": {
                "id": "my-own-id",
                "inputs": [prompt],
                "parameters": {
                    "negative_prompt": "blue",
                    "num_inference_steps": steps,
                    "guidance_scale": 7.5,
                    "scheduler": "DPM++ 2M Karras" if "DPM++ 2M Karras" in schedulers else schedulers[-1],
                    **({"true_cfg_scale": 2.0} if offer.takes("true_cfg_scale") else {}),
                },
                "outputs": [{"name": "image"}],
            },
        },
        "binary": {
            "summary": "A binary answer",
            "value": {"inputs": [prompt], "parameters": {"num_inference_steps": steps, "binary_data_output": True}},
        },
    }


def answer(model_name: str) -> dict[str, Any]:
    """An answer to the first of the examples, its picture cut short."""
    return {
        "model_name": model_name,
        "parameters": {
            "content_type": "image/png",
            "guidance_scale": 5.0,
            "queue_seconds": 0.0004,
            "denoise_seconds": 2.61,
            "decode_seconds": 0.12,
            "encode_seconds": 0.02,
        },
        "outputs": [
            {"name": "image", "shape": [1], "datatype": "BYTES", "data": ["iVBORw0KGgoAAAANSUhEUgAAB…"]},
            {"name": "seed", "shape": [1], "datatype": "INT64", "data": [7]},
        ],
    }
