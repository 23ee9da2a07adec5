"""Every knob of the server, as one frozen class.

Each field is a flag (``--max_steps 40``, ``--max-steps=40``), an environment variable (``MAX_STEPS``) and a key of the
``.env`` file in the working directory; the first of these that is given wins. `settings_sources.py` reads them. Nothing
here knows what a setting does.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from app.generation import Limits

WARM_SIZE = re.compile(r"[1-9][0-9]{0,4}x[1-9][0-9]{0,4}")
ADAPTER = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_-]{0,99})=(.+)")
"""``NAME=PATH``, the path perhaps with ``:SCALE`` behind it. The name becomes one of torch's, which have no dots."""


class Settings(BaseModel):
    """What the server runs with; every field's description is its ``--help``."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    # The model
    model_name: str = Field("model", min_length=1, description="Name under which the model is served.")
    model_id: str = Field(
        "/mnt/models",
        min_length=1,
        description="Folder of the model in diffusers' layout, its name on the Hugging Face hub (ORGANISATION/NAME), "
        "or 'demo' for the small models that come along.",
    )
    single_file_model: Path | None = Field(
        None, description="The model as one .safetensors file; takes the place of model_id."
    )
    config_dir: Path | None = Field(
        None,
        description="Folder in diffusers' layout with the configurations and tokenizers for single_file_model; needed "
        "for architectures other than SDXL and FLUX.",
    )
    model_type: Literal["auto", "sdxl", "flux"] = Field(
        "auto",
        description="Family of the model; 'auto' reads it from model_index.json or from the names in a single file.",
    )
    use_refiner: bool = Field(False, description="Load an SDXL refiner that finishes what the base began.")
    refiner_id: str | None = Field(
        None, min_length=1, description="Folder of the refiner, its name on the hub, or 'demo'; see model_id."
    )
    refiner_single_file_model: Path | None = Field(None, description="The refiner as one .safetensors file.")
    refiner_config_dir: Path | None = Field(None, description="As config_dir, for refiner_single_file_model.")
    lora: tuple[str, ...] = Field(
        (),
        description="NAME=PATH or NAME=PATH:SCALE of a LoRA adapter that requests may name; repeatable, or separated "
        "by commas. SCALE multiplies what a request asks for.",
    )
    mount_timeout: float | None = Field(
        None,
        ge=0,
        description="Seconds to wait for folders and files that are not there yet, because they are mounted late; "
        "unless given, 60 for /mnt/models and what is in it, and 0 for all else.",
    )
    huggingface_token: SecretStr | None = Field(
        None, description="Token for downloads from the Hugging Face hub; HF_TOKEN is read too."
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:(0|[1-9]\d?))?|enable_(model_cpu|sequential_cpu|group)_offload)$",
        description="Where the model runs: auto (a GPU if there is one), cpu, cuda, cuda:N, or on a GPU that is too "
        "small for it: enable_model_cpu_offload, enable_sequential_cpu_offload, enable_group_offload.",
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="Number format of the weights; 'auto' is float32 on the CPU, bfloat16 or float16 on a GPU."
    )
    quantization: Literal["none", "fp8", "int8", "nf4"] = Field(
        "none",
        description="Smaller weights of the UNet or transformer: fp8 stores 8 bits and computes in dtype; int8 and nf4 "
        "need the extra 'quantization'.",
    )
    optimize: Literal["auto", "off", "safe", "compile", "max"] = Field(
        "auto",
        description="How hard the device is made to work. safe: nothing lost but other rounding. compile: minutes more "
        "at the first start. max: more memory, 8-bit matrix products where the GPU has them, and requests may trade "
        "their picture for speed. 'auto' is safe on a GPU and off on a CPU.",
    )
    warm_sizes: tuple[str, ...] = Field(
        (),
        description="WIDTHxHEIGHT of pictures that compile and max prepare for, repeatable, or separated by commas; "
        "the model's own size unless given. Other sizes are painted too, as with safe.",
    )
    cache_dir: Path | None = Field(
        None,
        description="Folder that keeps what was compiled for the next start, a volume that outlives the server; unless "
        "given, one of the user's caches.",
    )
    step_cache: int = Field(
        1,
        ge=1,
        le=4,
        description="FLUX: after the first quarter of a run, one of so many steps goes through the model's blocks, the "
        "others draw out what these added before: faster, at the price of a little of the picture. 1 takes all steps "
        "whole.",
    )
    vae_tiling: bool = Field(False, description="Decode large pictures in tiles: less memory, faint seams.")
    vae_slicing: bool = Field(False, description="Decode pictures one by one: less memory.")

    # What a request may ask for
    max_steps: int = Field(150, ge=1, le=1000, description="Most denoising steps of one request.")
    max_pixels: int = Field(4_194_304, ge=64, description="Most pixels (height times width) of one image.")
    max_side: int = Field(2048, ge=8, description="Most pixels of one side of an image.")
    max_images_per_request: int = Field(
        16, ge=1, description="Most images of one request, counting prompts times num_images_per_prompt."
    )
    max_prompt_length: int = Field(10_000, ge=1, description="Most characters of one prompt.")
    max_input_pixels: int = Field(
        16_777_216, ge=64, description="Most pixels of all input images of one request, before they are resized."
    )
    max_body_size: int = Field(
        33_554_432,
        ge=1024,
        description="Most bytes of a request body, also once unpacked. Eight such bodies, or more smaller ones, are "
        "held at a time; others wait.",
    )
    body_timeout: float = Field(
        30.0,
        gt=0,
        description="Seconds for the headers, and again for the body, of a request to arrive, and for a client to take "
        "something of its answer.",
    )
    request_timeout: float = Field(
        600.0, gt=0, description="Seconds from acceptance within which a request must be done, or it is given up."
    )

    # How work is grouped
    max_queue: int = Field(128, ge=1, description="Images accepted at the same time, waiting or running.")
    max_queue_seconds: float = Field(
        600.0, gt=0, description="Seconds of work accepted at the same time, estimated from what was measured here."
    )
    max_batch_size: int = Field(
        32, ge=1, description="Rows of one forward pass; an image with guidance takes two, and one image always goes."
    )
    max_batch_pixels: int = Field(
        16_777_216, ge=64, description="Pixels times rows of one forward pass; less is tried where memory is short."
    )
    replicas: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] = Field(
        1,
        description="Copies of the model on as many GPUs, cuda:0 and on; they share one queue. 'auto' is one for each "
        "GPU that is visible.",
    )
    step_timeout: float = Field(
        60.0,
        gt=0,
        description="Seconds beyond what is usual after which a step counts as hung; ten times as many for what was "
        "never done before.",
    )
    idempotency_seconds: float = Field(
        120.0, ge=0, description="Seconds for which a finished request answers others with its Idempotency-Key."
    )
    heartbeat_seconds: float = Field(
        15.0, gt=0, description="Seconds without an event after which a stream says that it is alive."
    )
    encode_threads: int = Field(
        2, ge=1, le=64, description="Threads that turn pixels into PNG, JPEG or WebP, and as many that read them."
    )
    warm_up: bool = Field(True, description="Run one short generation before the model counts as ready.")
    embed_metadata: bool = Field(True, description="Write prompt, parameters and seed into each PNG as text chunks.")

    # The server
    host: str = Field("0.0.0.0", min_length=1, description="Address to listen on; :: takes IPv4 too.")  # noqa: S104 (a container serves all)
    http_port: int = Field(
        8080, ge=0, le=65535, description="Port for HTTP, or for HTTPS, and then 8443 unless given; 0 picks a free one."
    )
    ssl_certfile: Path | None = Field(
        None,
        description="Certificate, in PEM format with all that lead to its root, to serve HTTPS with; needs "
        "ssl_keyfile. KSERVE_TLS_CERT_FILE is read too.",
    )
    ssl_keyfile: Path | None = Field(
        None,
        description="Private key of ssl_certfile, in PEM format without a password. KSERVE_TLS_KEY_FILE is read too.",
    )
    api_key: SecretStr | None = Field(
        None,
        description="Key that callers send as 'Authorization: Bearer KEY', and browsers to /docs as a password; health "
        "stays open. None: no key.",
    )
    enable_docs_url: bool = Field(True, description="Serve Swagger UI at /docs and the document at /openapi.json.")
    grace_period: float = Field(
        30.0,
        ge=0,
        description="Seconds from the signal to the end of the server; accepted requests get all but the last one.",
    )
    termination_log: Path | None = Field(
        Path("/dev/termination-log"),
        description="File that gets the reason when the server cannot run, if the file exists; Kubernetes shows it.",
    )
    timeout_keep_alive: int = Field(65, ge=1, description="Seconds that an idle connection stays open.")

    # Logs
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    log_format: Literal["text", "json"] = Field("text", description="One line of text or one JSON object per entry.")
    enable_latency_logging: bool = Field(True, description="Log one line with the seconds per stage for each request.")
    log_config_file: Path | None = Field(
        None, description="Logging configuration (dictConfig as JSON or YAML) that replaces log_level and log_format."
    )
    configure_logging: bool = Field(True, description="Set up logging at all; false leaves it to the environment.")
    access_log_format: str | None = Field(
        None, description="Format of the access log, such as '%(h)s %(r)s %(s)s %(L)s'; no access log unless given."
    )

    # KServe's other model server flags, accepted so that existing manifests start; the log says which do nothing.
    grpc_port: int = Field(8081, ge=0, le=65535, description="Accepted for KServe; there is no gRPC port.")
    enable_grpc: bool = Field(True, description="Accepted for KServe; there is no gRPC port.")
    grpc_max_send_message_length: int = Field(8_388_608, description="Accepted for KServe; there is no gRPC port.")
    grpc_max_receive_message_length: int = Field(8_388_608, description="Accepted for KServe; there is no gRPC port.")
    workers: int = Field(1, ge=1, description="Accepted for KServe; one process owns the device.")
    max_threads: int = Field(4, ge=1, description="Accepted for KServe; see encode_threads.")
    max_asyncio_workers: int | None = Field(None, description="Accepted for KServe; see encode_threads.")
    event_loop: Literal["auto", "asyncio", "uvloop"] = Field(
        "auto", description="Event loop of the HTTP server; 'auto' is uvloop where it is installed."
    )
    protocol: str = Field("v2", description="Accepted for KServe; Open Inference Protocol v2 is always served.")
    predictor_host: str | None = Field(None, description="Accepted for KServe; this is no transformer.")
    predictor_protocol: str = Field("v1", description="Accepted for KServe; this is no transformer.")
    predictor_use_ssl: bool = Field(False, description="Accepted for KServe; this is no transformer.")
    predictor_request_timeout_seconds: int = Field(600, description="Accepted for KServe; this is no transformer.")
    predictor_request_retries: int = Field(0, description="Accepted for KServe; this is no transformer.")
    enable_predictor_health_check: bool = Field(False, description="Accepted for KServe; this is no transformer.")

    @model_validator(mode="after")
    def _queue_holds_one_request(self) -> Settings:
        if self.max_images_per_request > self.max_queue:
            raise ValueError(
                f"max_images_per_request ({self.max_images_per_request}) must not be more than max_queue "
                f"({self.max_queue}), or such a request could never be accepted"
            )
        return self

    @model_validator(mode="after")
    def _warm_sizes_may_be_asked_for(self) -> Settings:
        for size, sides in zip(self.warm_sizes, self.warm_pictures, strict=True):
            limit = None
            if max(sides) > self.max_side:
                limit = f"one side may have at most {self.max_side} pixels (max_side)"
            elif math.prod(sides) > self.max_pixels:
                limit = f"a picture may have at most {self.max_pixels} pixels (max_pixels)"
            if limit is not None:
                raise ValueError(f"--warm_sizes names {size}, which no request may ask for: {limit}")
        return self

    @model_validator(mode="after")
    def _replicas_choose_their_gpus(self) -> Settings:
        if self.replicas not in (1, "auto") and self.device not in ("auto", "cuda", "cpu"):
            raise ValueError(f"replicas ({self.replicas}) choose their GPUs themselves; leave device at auto or cuda")
        return self

    @model_validator(mode="after")
    def _certificate_and_key_come_together(self) -> Settings:
        for name, other in (("ssl_certfile", "ssl_keyfile"), ("ssl_keyfile", "ssl_certfile")):
            path = getattr(self, name)
            if path is not None and getattr(self, other) is None:
                raise ValueError(f"--{name} is {path}, but there is no --{other}; name both for HTTPS, or none of them")
        return self

    @field_validator("device", mode="before")
    @classmethod
    def _devices_may_be_in_capitals(cls, device: object) -> object:
        return device.lower() if isinstance(device, str) else device

    @field_validator("model_name")
    @classmethod
    def _name_fits_into_a_path(cls, name: str) -> str:
        if "/" in name or name in (".", ".."):
            raise ValueError("it must not contain '/' or be '.' or '..', or no path would lead to the model")
        return name

    @field_validator("api_key", "huggingface_token")
    @classmethod
    def _secret_fits_into_a_header(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret is not None and not secret.get_secret_value().isprintable():
            raise ValueError("must be one line of printable characters, or no request could carry it")
        return secret

    @field_validator("huggingface_token")
    @classmethod
    def _token_is_in_ascii(cls, token: SecretStr | None) -> SecretStr | None:
        if token is not None and not token.get_secret_value().isascii():
            raise ValueError("must be the token alone, in ASCII and without typographic quotes around it")
        return token

    @field_validator("warm_sizes")
    @classmethod
    def _sizes_are_read(cls, sizes: tuple[str, ...]) -> tuple[str, ...]:
        for size in sizes:
            if not WARM_SIZE.fullmatch(size):
                raise ValueError("it must be WIDTHxHEIGHT in pixels, such as 1024x1024, or several with commas between")
        return sizes

    @field_validator("lora")
    @classmethod
    def _adapters_have_names(cls, references: tuple[str, ...]) -> tuple[str, ...]:
        for reference in references:
            if not ADAPTER.fullmatch(reference):
                raise ValueError(
                    "it must be NAME=PATH or NAME=PATH:SCALE, or several with commas between; a name has letters, "
                    "digits, - and _"
                )
        return references

    @property
    def warm_pictures(self) -> tuple[tuple[int, int], ...]:
        """Width and height of each of the `warm_sizes`."""
        return tuple((int(width), int(height)) for width, height in (size.split("x") for size in self.warm_sizes))

    def for_replica(self, index: int, replicas: int) -> Settings:
        """These settings for one of so many copies of the model, with their number instead of ``auto``."""
        if replicas == 1 or self.device not in ("auto", "cuda"):
            return self
        return self.model_copy(update={"device": f"cuda:{index}", "replicas": replicas})

    @property
    def limits(self) -> Limits:
        return Limits(
            self.max_steps,
            self.max_pixels,
            self.max_images_per_request,
            self.max_prompt_length,
            self.max_side,
            self.max_input_pixels,
        )

    def ignored(self) -> list[str]:
        """Names of the settings that were given but do nothing here."""
        return sorted(
            name
            for name, field in type(self).model_fields.items()
            if name in self.model_fields_set and (field.description or "").startswith("Accepted for KServe")
        )

    @property
    def compiles(self) -> bool:
        """Whether something is compiled, which `warm_sizes` and `cache_dir` are for."""
        return self.optimize in ("compile", "max")
