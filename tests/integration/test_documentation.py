"""The OpenAPI document says what the server takes and answers, and /docs shows it without help from elsewhere."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import jsonschema
import pytest
import schemathesis

from app.api import edge
from app.api.offer import CONDITIONS, PICKY_SCHEDULERS
from app.engine.family import Family
from app.engine.scheduler_names import NAMES
from app.errors import InvalidRequest, StartupError
from app.generation import MAX_SEED, PARAMETERS, GenerateRequest, ImageTask, Kind
from app.images import decode_images
from app.main import create_app
from app.protocol.infer_request import parse_infer
from app.settings import Settings
from tests.fakes import Narrow, OnlyInpaints, Strict

INFER = "/v2/models/sdxl/infer"
EVENT = re.compile(r"^\| `(\w+)` \|", re.MULTILINE)
PREDICT = "/v1/models/sdxl:predict"
OPERATIONS = {
    ("get", "/v2"),
    ("get", "/v2/health/live"),
    ("get", "/v2/health/ready"),
    ("get", "/v2/models/{model_name}"),
    ("get", "/v2/models/{model_name}/ready"),
    ("get", "/v2/models/{model_name}/versions/{model_version}"),
    ("get", "/v2/models/{model_name}/versions/{model_version}/ready"),
    ("post", "/v2/models/{model_name}/infer"),
    ("post", "/v2/models/{model_name}/versions/{model_version}/infer"),
    ("post", "/v2/models/{model_name}/generate"),
    ("post", "/v2/models/{model_name}/versions/{model_version}/generate"),
    ("post", "/v2/models/{model_name}/generate_stream"),
    ("post", "/v2/models/{model_name}/versions/{model_version}/generate_stream"),
    ("post", "/v2/models/{model_name}/infer_stream"),
    ("post", "/v2/models/{model_name}/versions/{model_version}/infer_stream"),
    ("get", "/v2/requests/{request_id}"),
    ("delete", "/v2/requests/{request_id}"),
    ("get", "/"),
    ("get", "/v1/models"),
    ("get", "/v1/models/{model_name}"),
    ("post", "/v1/models/{model_name}:predict"),
    ("get", "/metrics"),
}


class LoadsWhenTold:
    """Makes a family once the test says `go`."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def __call__(self) -> Strict:
        assert self.go.wait(30)
        return Strict()


@asynccontextmanager
async def serve(load: Callable[[], Family[Any]] = Strict, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(Settings(model_name="sdxl", **settings), load=load)
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        if load is Strict:
            await wait_until_ready(client)
        yield client


async def wait_until_ready(client: httpx.AsyncClient) -> None:
    for _ in range(1000):
        if (await client.get("/v2/health/ready")).status_code == 200:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("The model was not ready after 10 seconds.")


async def fetch(**settings: Any) -> dict[str, Any]:
    async with serve(**settings) as client:
        document: dict[str, Any] = (await client.get("/openapi.json")).json()
    return document


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with serve() as client:
        yield client


@pytest.fixture
async def document(client: httpx.AsyncClient) -> dict[str, Any]:
    found: dict[str, Any] = (await client.get("/openapi.json")).json()
    return found


async def test_the_document_is_made_with_few_trials_and_while_others_are_answered() -> None:
    tried: list[int] = []

    class Tried(Strict):
        def resolve(self, request: GenerateRequest) -> GenerateRequest:
            tried.append(threading.get_ident())
            return super().resolve(request)

    async with serve(Tried) as client:
        await wait_until_ready(client)
        tried.clear()
        assert (await client.get("/openapi.json")).status_code == 200
    assert 0 < len(tried) < 500
    assert threading.get_ident() not in tried


def infer_operation(document: dict[str, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = document["paths"]["/v2/models/{model_name}/infer"]["post"]
    return operation


def predict_operation(document: dict[str, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = document["paths"]["/v1/models/{model_name}:predict"]["post"]
    return operation


def examples_of(operation: dict[str, Any]) -> dict[str, Any]:
    examples = operation["requestBody"]["content"]["application/json"]["examples"]
    return {name: example["value"] for name, example in examples.items()}


def infer_examples(document: dict[str, Any]) -> dict[str, Any]:
    return examples_of(infer_operation(document))


def instance_schema(document: dict[str, Any], task: ImageTask = ImageTask.TEXT_TO_IMAGE) -> dict[str, Any]:
    instances = document["components"]["schemas"]["PredictRequest"]["properties"]["instances"]["items"]["oneOf"]
    (found,) = [instance["properties"] for instance in instances if instance["title"] == task.value]
    properties: dict[str, Any] = found
    return properties


def documented_parameters(document: dict[str, Any], form: str = "TextToImage") -> dict[str, Any]:
    """Schema by name, whether it travels as an input or as a parameter."""
    request = document["components"]["schemas"][form]["properties"]
    inputs = {tensor["properties"]["name"]["const"]: tensor for tensor in request["inputs"]["prefixItems"]}
    return {**inputs, **request["parameters"]["properties"]}


def validator(document: dict[str, Any], name: str) -> jsonschema.Draft202012Validator:
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    return jsonschema.Draft202012Validator(schema)


def places_of_null(node: Any) -> Iterator[Any]:
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        if value is None or value == "null":
            yield node
        yield from places_of_null(value)


# --- The document ----------------------------------------------------------------------------------------------


async def test_the_document_is_valid_openapi_3_1(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1.")
    schemathesis.openapi.from_dict(document).validate()
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


async def test_every_operation_has_a_summary_a_known_tag_and_a_name_of_its_own(document: dict[str, Any]) -> None:
    paths = document["paths"]
    operations = {(method, path): paths[path][method] for path in paths for method in paths[path]}
    assert set(operations) == OPERATIONS
    assert len({operation["operationId"] for operation in operations.values()}) == len(operations)
    tags = {tag["name"] for tag in document["tags"]}
    assert all(operation["summary"] and set(operation["tags"]) <= tags for operation in operations.values())


TYPES = {
    Kind.TEXT: "string",
    Kind.INTEGER: "integer",
    Kind.NUMBER: "number",
    Kind.BOOLEAN: "boolean",
    Kind.PAIR: "array",
    Kind.LIST: "array",
    Kind.ADAPTERS: "string",
    Kind.IMAGE: "string",
}


async def test_every_parameter_is_told_with_its_type_and_meaning(document: dict[str, Any]) -> None:
    told = document["components"]["schemas"]["EveryParameter"]["properties"]
    assert set(told) == set(PARAMETERS)
    for name, parameter in PARAMETERS.items():
        assert told[name]["description"].startswith(parameter.description)
        assert told[name]["type"] == TYPES[parameter.kind]


async def test_a_request_of_each_task_offers_every_parameter_or_says_in_words_what_it_needs(
    document: dict[str, Any],
) -> None:
    text = infer_operation(document)["description"]
    in_words = {name for name in CONDITIONS if f"| `{name}` |" in text}
    assert in_words == set(CONDITIONS)
    # This model has no adapters.
    assert "loras" not in text
    everything = {*PARAMETERS, "binary_data_output", "priority"} - in_words - {"loras"}
    # With an image, the number of steps hangs on the strength, as the text says.
    assert set(documented_parameters(document, "Inpaint")) == everything - {"num_inference_steps"}
    assert set(documented_parameters(document, "ImageToImage")) == everything - {"mask_image", "num_inference_steps"}
    assert set(documented_parameters(document)) == everything - {"mask_image", "image", "strength"}


async def test_another_family_is_told_with_what_it_takes_and_nothing_else() -> None:
    async with serve(Narrow) as client:
        await wait_until_ready(client)
        document = (await client.get("/openapi.json")).json()
        names = {tensor["name"] for tensor in (await client.get("/v2/models/sdxl")).json()["inputs"]}
        assert names == set(document["components"]["schemas"]["EveryParameter"]["properties"]) == Narrow.parameters
        told = documented_parameters(document)
        assert told["height"]["multipleOf"] == told["height"]["minimum"] == 16
        assert told["scheduler"]["enum"] == ["Euler", "Heun"]
        assert documented_parameters(document, "ImageToImage")["strength"]["minimum"] == Narrow.least_strength
        assert re.fullmatch(told["loras"]["pattern"], "style.2:0.5")
        assert not re.fullmatch(told["loras"]["pattern"], "style+2")
        assert "Inpaint" not in document["components"]["schemas"]
        text = infer_operation(document)["description"]
        assert "a multiple of 16" in text and "`loras`" in text
        assert not any(f"`{name}`" in text for name in PICKY_SCHEDULERS)
        for example in infer_examples(document).values():
            validator(document, "InferenceRequest").validate(example)
            assert (await client.post(INFER, json=example)).status_code == 200


async def test_a_model_that_only_inpaints_offers_nothing_else() -> None:
    async with serve(OnlyInpaints, warm_up=False) as client:
        await wait_until_ready(client)
        document = (await client.get("/openapi.json")).json()
        assert document["components"]["schemas"]["InferenceRequest"]["oneOf"] == [
            {"$ref": "#/components/schemas/Inpaint"}
        ]
        for example in infer_examples(document).values():
            assert (await client.post(INFER, json=example)).status_code == 200


@pytest.mark.parametrize("verb", ["generate", "generate_stream", "infer_stream"])
async def test_examples_of_the_short_form_and_of_streams_follow_their_schema_and_are_served(
    client: httpx.AsyncClient, document: dict[str, Any], verb: str
) -> None:
    operation = document["paths"][f"/v2/models/{{model_name}}/{verb}"]["post"]
    content = operation["requestBody"]["content"]["application/json"]
    name = content["schema"]["$ref"].rsplit("/", 1)[1]
    for example in content["examples"].values():
        validator(document, name).validate(example["value"])
        answer = await client.post(f"/v2/models/sdxl/{verb}", json=example["value"])
        assert answer.status_code == 200
        told = operation["responses"]["200"]["content"]
        assert answer.headers["content-type"] in told
        if verb != "generate":
            lines = [line for line in answer.text.splitlines() if line.startswith("event: ")]
            assert lines[-1] == "event: done"
            assert {line.removeprefix("event: ") for line in lines} <= set(EVENT.findall(operation["description"]))


async def test_bounds_are_the_limits_of_the_settings() -> None:
    documented = documented_parameters(
        await fetch(max_steps=7, max_images_per_request=3, max_pixels=100_000, max_prompt_length=12)
    )
    assert documented["num_inference_steps"]["maximum"] == 7
    assert documented["num_images_per_prompt"]["maximum"] == 3
    assert documented["negative_prompt"]["maxLength"] == 12
    assert documented["prompt"]["properties"]["data"]["items"]["maxLength"] == 12
    # The largest square: whatever height and width are chosen up to it, the product fits.
    assert documented["height"]["maximum"] == documented["width"]["maximum"] == 312
    assert documented["seed"]["maximum"] == MAX_SEED
    assert "minimum" not in documented["denoising_end"] and documented["denoising_end"]["exclusiveMinimum"] == 0


async def test_a_server_without_room_for_an_example_image_offers_none() -> None:
    for settings in ({"max_side": 56}, {"max_pixels": 4095}, {"max_input_pixels": 8191}, {"max_steps": 3}):
        schemas = (await fetch(**settings))["components"]["schemas"]
        assert schemas["InferenceRequest"]["oneOf"] == [{"$ref": "#/components/schemas/TextToImage"}]
    examples = infer_examples(await fetch())
    assert [decode(examples["inpaint"], i)[:2] for i in (1, 2)] == [(64, 64), (64, 64)]


def decode(example: dict[str, Any], index: int) -> tuple[int, int]:
    tensor = example["inputs"][index]
    (pixels,) = decode_images([(tensor["name"], base64.b64decode(tensor["data"][0]))], 4096)
    return pixels.height, pixels.width


async def test_defaults_and_bounds_of_the_model_are_told_once_it_is_loaded() -> None:
    load = LoadsWhenTold()
    async with serve(load) as client:
        before = documented_parameters((await client.get("/openapi.json")).json())
        load.go.set()
        await wait_until_ready(client)
        after = documented_parameters((await client.get("/openapi.json")).json())
    assert "default" not in before["height"]
    assert before["output_format"]["default"] == after["output_format"]["default"] == "png"
    assert after["height"]["default"] == 16 and after["guidance_scale"]["default"] == 5.0
    assert after["scheduler"]["default"] == "Euler"


async def test_every_keyword_of_an_instance_is_told_with_its_meaning_and_its_bounds() -> None:
    document = await fetch(max_steps=7, max_images_per_request=3, max_prompt_length=12)
    documented = instance_schema(document, ImageTask.INPAINT)
    assert {name: schema["description"] for name, schema in documented.items()} == {
        name: parameter.description
        for name, parameter in PARAMETERS.items()
        if name not in CONDITIONS and name not in ("loras", "num_inference_steps")
    }
    without = {name for name, schema in instance_schema(document).items() if schema["type"] == "null"}
    assert without == {"image", "mask_image", "strength"}
    assert instance_schema(document)["num_inference_steps"]["maximum"] == 7
    assert documented["num_images_per_prompt"]["maximum"] == 3
    assert documented["prompt"]["maxLength"] == 12 and documented["denoising_limit"]["exclusiveMinimum"] == 0
    assert documented["crops_coords_top_left"]["type"] == ["array", "null"] and documented["prompt"]["type"] == "string"


async def test_schedulers_are_listed_or_told_with_what_they_need(document: dict[str, Any]) -> None:
    assert {*documented_parameters(document)["scheduler"]["enum"], *PICKY_SCHEDULERS} == set(NAMES)
    assert all(f"`{name}`" in infer_operation(document)["description"] for name in PICKY_SCHEDULERS)


async def test_paths_offer_the_served_model_so_that_trying_it_works_at_once(document: dict[str, Any]) -> None:
    for methods in document["paths"].values():
        for operation in methods.values():
            for parameter in operation.get("parameters", ()):
                if parameter["name"] in ("request_id", "X-Request-Id", "Idempotency-Key"):
                    continue  # a caller's own
                name = {"model_name": "sdxl", "model_version": "1"}[parameter["name"]]
                assert parameter["in"] == "path" and parameter["schema"]["enum"] == [name]


# --- What it says is so ----------------------------------------------------------------------------------------


async def test_examples_follow_the_schema_and_are_read_and_served(
    client: httpx.AsyncClient, document: dict[str, Any]
) -> None:
    for example in infer_examples(document).values():
        validator(document, "InferenceRequest").validate(example)
        assert parse_infer(json.dumps(example).encode(), None).requests[0].prompt
        assert (await client.post(INFER, json=example)).status_code == 200


async def test_examples_keep_to_the_limits_of_a_narrow_server() -> None:
    async with serve(max_steps=4, max_images_per_request=1, max_queue=1) as client:
        for example in infer_examples((await client.get("/openapi.json")).json()).values():
            assert (await client.post(INFER, json=example)).status_code == 200
        document = (await client.get("/openapi.json")).json()
        for example in examples_of(predict_operation(document)).values():
            assert (await client.post(PREDICT, json=example)).status_code == 200


async def test_examples_of_protocol_v1_follow_the_schema_and_are_served(
    client: httpx.AsyncClient, document: dict[str, Any]
) -> None:
    for example in examples_of(predict_operation(document)).values():
        validator(document, "PredictRequest").validate(example)
        answer = await client.post(PREDICT, json=example)
        assert answer.status_code == 200
        assert set(predict_operation(document)["responses"]["200"]["headers"]) == {"X-Request-Id", "X-Seed"}
        assert "X-Seed" in answer.headers


async def test_answers_follow_the_schema_and_hold_no_null(client: httpx.AsyncClient, document: dict[str, Any]) -> None:
    example = infer_examples(document)["picture"]
    answers = {
        "InferenceResponse": await client.post(INFER, json=example, headers={"X-Request-Id": "abc"}),
        "RequestProgress": await client.get("/v2/requests/abc"),
        "ErrorMessage": await client.post(INFER, json={}),
        "ServerMetadata": await client.get("/v2"),
        "ModelMetadata": await client.get("/v2/models/sdxl"),
        "Live": await client.get("/v2/health/live"),
        "Ready": await client.get("/v2/health/ready"),
        "ModelReady": await client.get("/v2/models/sdxl/ready"),
        "Alive": await client.get("/"),
        "Models": await client.get("/v1/models"),
        "PredictResponse": await client.post(PREDICT, json={"instances": [{"prompt": "a"}]}),
    }
    for name, answer in answers.items():
        validator(document, name).validate(answer.json())
        assert not list(places_of_null(answer.json()))
        assert not list(places_of_null(document["components"]["schemas"][name]))
    parts = ("Tensor", "Output", "Prediction", "EncodedImage")
    verbs = ("", "Generate", "GenerateStream", "InferStream")
    requests = {verb + task for verb in verbs for task in ("TextToImage", "ImageToImage", "Inpaint")}
    requests |= {"InferenceRequest", "GenerateRequest", "GenerateStreamRequest", "InferenceStreamRequest"}
    requests |= {"PredictRequest", "EveryParameter", "Event"}
    assert set(answers) | requests >= {name for name in document["components"]["schemas"] if not name.endswith(parts)}


async def test_generators_of_clients_find_a_name_for_each_body_and_no_constant_they_cannot_read(
    document: dict[str, Any],
) -> None:
    def constants(node: Any) -> Iterator[Any]:
        if isinstance(node, dict) and "const" in node:
            yield node["const"]
        for part in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            yield from constants(part)

    schemas = document["components"]["schemas"]
    # openapi-python-client refuses the whole document for one constant that is a list.
    assert not [constant for constant in constants(schemas) if isinstance(constant, list)]
    bodies = ("InferenceRequest", "GenerateRequest", "GenerateStreamRequest", "InferenceStreamRequest")
    references = [option["$ref"] for body in bodies for option in schemas[body]["oneOf"]]
    names = [reference.removeprefix("#/components/schemas/") for reference in references]
    assert len(set(names)) == len(names) == 12
    assert all(schemas[name]["title"] == name for name in names)


async def test_a_server_that_is_not_ready_answers_as_documented() -> None:
    load = LoadsWhenTold()
    async with serve(load) as client:
        document = (await client.get("/openapi.json")).json()
        for path, name in (
            ("/v2/health/ready", "Ready"),
            ("/v2/models/sdxl/ready", "ModelReady"),
            ("/v1/models/sdxl", "ModelReady"),
        ):
            answer = await client.get(path)
            assert answer.status_code == 503
            validator(document, name).validate(answer.json())
        load.go.set()


async def test_every_status_that_an_error_can_have_is_documented(document: dict[str, Any]) -> None:
    startup: set[str] = {StartupError.code, *(error.code for error in StartupError.__subclasses__())}
    # Without a key nobody is turned away.
    statuses = {str(status) for code, status in edge.HTTP_STATUS.items() if code not in {*startup, "unauthorized"}}
    assert set(infer_operation(document)["responses"]) == {"200", *statuses}
    assert set(predict_operation(document)["responses"]) == {"200", *statuses}


async def test_every_documented_header_is_sent(client: httpx.AsyncClient, document: dict[str, Any]) -> None:
    responses = infer_operation(document)["responses"]
    answer = await client.post(INFER, json=infer_examples(document)["binary"])
    assert answer.headers["content-type"] in responses["200"]["content"]
    assert set(responses["200"]["headers"]) == {"X-Request-Id", "Inference-Header-Content-Length"}
    assert all(header in answer.headers for header in responses["200"]["headers"])
    assert set(responses["429"]["headers"]) == {"X-Request-Id", "Retry-After"}


async def test_with_a_key_the_document_says_where_it_is_needed() -> None:
    async with serve(api_key="secret") as client:
        assert (await client.get("/v2")).status_code == 401
        document = (await client.get("/openapi.json", headers={"Authorization": "Bearer secret"})).json()
    assert document["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}
    assert document["security"] == [{"key": []}]
    for path, methods in document["paths"].items():
        for operation in methods.values():
            is_open = path in edge.OPEN_PATHS
            assert (operation.get("security") == []) is is_open
            assert ("401" in operation["responses"]) is not is_open


async def test_without_a_key_the_document_speaks_of_none(document: dict[str, Any]) -> None:
    assert "security" not in document and "401" not in json.dumps(document["paths"])


# --- The page --------------------------------------------------------------------------------------------------


async def test_the_page_needs_nothing_but_this_server(client: httpx.AsyncClient, document: dict[str, Any]) -> None:
    page = (await client.get("/docs")).text
    assert document["info"]["title"] in page
    assert "//" not in re.sub(r"^ *//.*$", "", page, flags=re.MULTILINE)
    assert not re.findall(r'(?:src|href|url)(?:=|: )"', page)
    addresses = re.findall(r'(?:src|href|url): root \+ "([^"]+)"', page)
    assert "openapi.json" in addresses and len(addresses) == 4
    for address in addresses:
        answer = await client.get(f"/{address}")
        assert answer.status_code == 200 and answer.content


async def test_the_page_can_be_turned_off() -> None:
    async with serve(enable_docs_url=False) as client:
        for path in ("/docs", "/openapi.json", "/docs/files/swagger-ui.css"):
            answer = await client.get(path)
            assert answer.status_code == 404 and set(answer.json()) == {"error"}


async def test_a_page_that_is_turned_off_asks_browsers_for_no_password() -> None:
    async with serve(enable_docs_url=False, api_key="secret") as client:
        for password in ("secret", "another"):
            answer = await client.get("/docs", auth=("", password))
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"


async def test_a_method_that_a_path_lacks_is_told_with_those_that_it_has(client: httpx.AsyncClient) -> None:
    answer = await client.put(INFER)
    assert answer.status_code == 405 and answer.headers["allow"] == "POST" and set(answer.json()) == {"error"}


async def test_what_the_schema_leaves_to_the_text_is_read_as_the_text_says() -> None:
    """Several prompts, and values as inputs."""
    request = {
        "inputs": [
            {"name": "prompt", "shape": [2], "datatype": "BYTES", "data": ["one", "two"]},
            {"name": "seed", "shape": [2], "datatype": "INT64", "data": [1, 2]},
            {"name": "guidance_scale", "shape": [1], "datatype": "FP32", "data": [3.5]},
        ],
        "parameters": {"timeout": 1_000_000},
    }
    call = parse_infer(json.dumps(request).encode(), None)
    assert [(r.prompt, r.seed, r.guidance_scale) for r in call.requests] == [("one", 1, 3.5), ("two", 2, 3.5)]
    assert call.timeout == 1.0
    assert parse_infer(b"a prompt", "0").requests[0].prompt == "a prompt"
    with pytest.raises(InvalidRequest):
        parse_infer(b"{}", None)
