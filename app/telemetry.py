"""Metrics and logs: what an operator sees. Knows no model and no prompt.

Label values come from the server's own settings and code only, so that no request can make a new time series.
"""

from __future__ import annotations

import contextvars
import http.client
import json
import logging
import logging.config
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from app.errors import InvalidSettings
from app.settings import Settings
from app.start import PHASES

access_logger = logging.getLogger("app.access")
request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 180, 300, 600)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
METRICS_CONTENT_TYPE = CONTENT_TYPE_LATEST
REJECTED = ("invalid_request", "model_not_found", "model_not_ready", "overloaded", "shutting_down")
FAILED = ("generation_failed", "deadline_exceeded", "out_of_memory", "device_lost", "shutting_down")
"""Reasons that requests are turned away for, and fail for, most of all: codes of `app.errors`."""


class Telemetry:
    """All metrics of one server, in a registry of their own.

    The three ``request_*_seconds`` carry KServe's names and label, so that its dashboards draw them.
    """

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._model = {"model_name": model_name}

        def histogram(name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            metric = Histogram(name, text, ["model_name"], buckets=buckets, registry=self.registry)
            return metric.labels(**self._model)

        def counter(name: str, text: str, *labels: str) -> Counter:
            metric = Counter(name, text, ["model_name", *labels], registry=self.registry)
            return metric if labels else metric.labels(**self._model)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, ["model_name"], registry=self.registry).labels(**self._model)

        self.preprocess = histogram("request_preprocess_seconds", "Reading and checking a request.")
        self.predict = histogram("request_predict_seconds", "From acceptance to the last finished image.")
        self.postprocess = histogram("request_postprocess_seconds", "Writing the answer.")

        self.queue_wait = histogram("sdxl_queue_wait_seconds", "From acceptance until it leaves the queue.")
        self._stage = Histogram(
            "sdxl_stage_seconds", "Seconds per stage.", ["model_name", "stage"], buckets=SECONDS, registry=self.registry
        )
        self._pass_images = histogram("sdxl_images_per_forward_pass", "Images that shared one forward pass.", ROWS)
        self._pass_rows = histogram("sdxl_rows_per_forward_pass", "Rows of one forward pass.", ROWS)
        self.steps = counter("sdxl_steps_total", "Denoising steps taken, counted once for each image.")
        self.images = counter("sdxl_images_total", "Images finished.")
        self._rejected = counter("sdxl_rejected_total", "Requests not accepted.", "reason")
        self._failed = counter("sdxl_failed_total", "Accepted requests that failed.", "reason")
        self.cancelled = counter("sdxl_cancelled_total", "Accepted requests whose caller left or said stop.")
        self.pending = gauge("sdxl_pending_images", "Images accepted that are still in the queue.")
        self.running = gauge("sdxl_running_images", "Images that have left the queue and are not done.")
        self.queue_seconds = gauge("sdxl_queue_seconds", "Seconds until all accepted work is likely to be done.")
        self.admitted_seconds = counter(
            "sdxl_admitted_seconds_total", "Device seconds that accepted requests were estimated to take."
        )
        self.turn_switches = counter(
            "sdxl_turn_switches_total", "Forward passes that could not be shared with the one before."
        )
        self.pass_budget = gauge("sdxl_pass_budget_pixels", "Pixels times rows that one forward pass may have.")
        self._out_of_memory = counter(
            "sdxl_out_of_memory_total", "Passes that did not fit, and what was done.", "stage", "action"
        )
        self.unexpected_shapes = counter(
            "sdxl_unexpected_shapes_total",
            "Passes in a shape that nothing was compiled for.",
        )
        self.decode_retries = counter("sdxl_decode_retries_total", "Pictures decoded once more in float32.")
        self.hung_steps = counter("sdxl_hung_steps_total", "Times that a device took too long to be believed.")
        self._idempotent = counter("sdxl_idempotent_total", "Requests whose Idempotency-Key came before.", "outcome")
        self._previews = counter("sdxl_previews_total", "Previews that were wanted.", "outcome")
        self._stream_events = counter("sdxl_stream_events_total", "Events sent to streams.", "event")
        # Counters that are there from the start, at 0, are seen to rise by their first event too.
        for stage in ("text_encode", "begin", "denoise_step", "decode"):
            for action in ("split", "again", "tile", "refused"):
                self._out_of_memory.labels(**self._model, stage=stage, action=action)
        for reason in REJECTED:
            self._rejected.labels(**self._model, reason=reason)
        for reason in FAILED:
            self._failed.labels(**self._model, reason=reason)
        for outcome in ("joined", "replayed", "conflict"):
            self._idempotent.labels(**self._model, outcome=outcome)
        for outcome in ("shown", "left_out", "none", "failed"):
            self._previews.labels(**self._model, outcome=outcome)
        for event in ("queued", "step", "preview", "done", "error"):
            self._stream_events.labels(**self._model, event=event)
        self.streams = gauge("sdxl_open_streams", "Streams of events that are open.")
        self.ready = gauge("sdxl_model_ready", "1 when the model is ready, else 0.")
        self._load_seconds = gauge("sdxl_model_load_seconds", "Seconds from process start to ready.")
        self._start_seconds = Gauge(
            "sdxl_start_seconds",
            "Seconds from process start to ready, by what they went into.",
            ["model_name", "phase"],
            registry=self.registry,
        )

    def started(self, seconds: float, phases: Mapping[str, float]) -> None:
        """Tell how long the start took, and each phase of `app.start.PHASES`."""
        self._load_seconds.set(seconds)
        for phase in PHASES:
            self._start_seconds.labels(**self._model, phase=phase).set(phases.get(phase, 0.0))

    def stage(self, name: str, seconds: float) -> None:
        """Count `seconds` for one of the stages text_encode, begin, denoise_step, preview, decode, encode."""
        self._stage.labels(**self._model, stage=name).observe(seconds)

    def passed(self, images: int, rows: int) -> None:
        """Count one forward pass."""
        self._pass_images.observe(images)
        self._pass_rows.observe(rows)

    def out_of_memory(self, stage: str, action: str) -> None:
        """Count a pass that did not fit; the actions are split, again, tile and refused."""
        self._out_of_memory.labels(**self._model, stage=stage, action=action).inc()

    def idempotent(self, outcome: str) -> None:
        """Count a repeated key; the outcomes are joined, replayed and conflict."""
        self._idempotent.labels(**self._model, outcome=outcome).inc()

    def preview(self, outcome: str) -> None:
        """Count a preview; the outcomes are shown, left_out, none and failed."""
        self._previews.labels(**self._model, outcome=outcome).inc()

    def stream_event(self, event: str) -> None:
        self._stream_events.labels(**self._model, event=event).inc()

    def rejected(self, reason: str) -> None:
        self._rejected.labels(**self._model, reason=reason).inc()

    def failed(self, reason: str) -> None:
        self._failed.labels(**self._model, reason=reason).inc()

    def exposition(self) -> bytes:
        return generate_latest(self.registry)


# --- Logs ------------------------------------------------------------------------------------------------------


class _RequestIdFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if not hasattr(record, "request_id"):
            record.request_id = request_id.get()
        return True


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": getattr(record, "request_id", "-"),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class _TextFormatter(logging.Formatter):
    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s [%(request_id)s] %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        fields = getattr(record, "fields", {})
        return text + "".join(f" {name}={value}" for name, value in fields.items())


def configure_logging(settings: Settings) -> None:
    """Send everything to standard error in one shape, with the id of the request it belongs to."""
    if not settings.configure_logging:
        return
    if settings.log_config_file is not None:
        # Unless it says otherwise, those that are there already, most of the server's own, would fall silent.
        config = {"disable_existing_loggers": False, **_read_log_config(settings.log_config_file)}
        try:
            logging.config.dictConfig(config)
        except (ValueError, TypeError, AttributeError, ImportError) as error:
            raise InvalidSettings(f"log_config_file {settings.log_config_file} cannot be used: {error}.") from None
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_RequestIdFilter())
    handler.setFormatter(_JsonFormatter() if settings.log_format == "json" else _TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    logging.captureWarnings(True)  # libraries' too
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "transformers", "diffusers"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    # These tell of every request they make and every file they open.
    for name in ("httpx", "httpcore", "PIL", "urllib3", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)


@dataclass(frozen=True, slots=True)
class Access:
    """One answered request, as the access log tells it."""

    client: str = "-"
    method: str = "-"
    path: str = "-"
    query: str = ""
    protocol: str = "-"
    status: int = 500
    size: int = 0
    seconds: float = 0.0
    referer: str = "-"
    agent: str = "-"


class AccessLog:
    """One line for every request, in the format that KServe's servers take (asgi-logger's placeholders).

    Args:
        line_format: with placeholders such as ``%(h)s`` (client), ``%(r)s`` (request line), ``%(m)s`` (method),
            ``%(U)s`` (path), ``%(q)s`` (query), ``%(H)s`` (protocol), ``%(s)s`` (status), ``%(st)s`` (its name),
            ``%(b)s`` (bytes answered), ``%(t)s`` (time), ``%(L)s`` (seconds), ``%(M)s`` (milliseconds), ``%(D)s``
            (microseconds), ``%(a)s`` (user agent), ``%(f)s`` (referer), ``%(p)s`` (process id).

    Raises:
        InvalidSettings: a placeholder that is not known, or no format at all.
    """

    def __init__(self, line_format: str) -> None:
        self._format = line_format
        try:
            self._line(Access())
        except KeyError as unknown:
            known = ", ".join(f"%({name})s" for name in self._fields(Access()))
            raise InvalidSettings(
                f"access_log_format {line_format!r} has the placeholder {unknown}, which is unknown; known are {known}."
            ) from None
        except (ValueError, TypeError) as error:
            raise InvalidSettings(
                f"access_log_format {line_format!r} cannot be used ({error}); each placeholder must be like %(h)s, and "
                "a percent sign %%."
            ) from None

    def log(self, access: Access) -> None:
        access_logger.info("%s", self._line(access))

    def _line(self, access: Access) -> str:
        return self._format % self._fields(access)

    @staticmethod
    def _fields(access: Access) -> dict[str, object]:
        target = f"{access.path}?{access.query}" if access.query else access.path
        phrase = http.client.responses.get(access.status, "")
        return {
            "h": access.client,
            "client_addr": access.client,
            "l": "-",
            "u": "-",
            "t": time.strftime("[%d/%b/%Y:%H:%M:%S +0000]", time.gmtime()),
            "r": f"{access.method} {access.path} {access.protocol}",
            "R": f"{access.method} {target} {access.protocol}",
            "request_line": f"{access.method} {target} {access.protocol}",
            "m": access.method,
            "U": access.path,
            "Uq": target,
            "q": access.query,
            "H": access.protocol,
            "s": access.status,
            "status_code": f"{access.status} {phrase}",
            "st": phrase,
            "b": access.size,
            "B": access.size,
            "f": access.referer,
            "a": access.agent,
            "L": f"{access.seconds:.6f}",
            "T": int(access.seconds),
            "M": int(access.seconds * 1e3),
            "D": int(access.seconds * 1e6),
            "p": os.getpid(),
        }


def _read_log_config(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        config = yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InvalidSettings(f"log_config_file {path} cannot be read: {reason}.") from None
    if not isinstance(config, dict):
        raise InvalidSettings(f"log_config_file {path} holds no logging configuration.")
    return config
