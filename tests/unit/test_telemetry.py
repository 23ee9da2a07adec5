"""Logs: one shape, the request's id on every line, and an access log in the format that was asked for."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.errors import InvalidSettings
from app.settings import Settings
from app.telemetry import Access, AccessLog, Telemetry, configure_logging, request_id


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    """The root logger, put back as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def test_libraries_warnings_have_the_same_shape(root_logger: logging.Logger) -> None:
    configure_logging(Settings(log_format="json"))
    stream = io.StringIO()
    (handler,) = root_logger.handlers
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(stream)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn("Should have ta>=t0", UserWarning, stacklevel=1)
    assert "Should have ta>=t0" in json.loads(stream.getvalue())["message"]


def test_what_requests_are_turned_away_and_fail_for_is_there_before_the_first() -> None:
    text = Telemetry("m").exposition().decode()
    for sample in ('sdxl_rejected_total{model_name="m",reason="overloaded"} 0.0', 'reason="out_of_memory"} 0.0'):
        assert sample in text


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_every_line_carries_the_request_id_and_its_fields(root_logger: logging.Logger, log_format: str) -> None:
    configure_logging(Settings(log_format=log_format))
    stream = io.StringIO()
    (handler,) = root_logger.handlers
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(stream)
    token = request_id.set("abc")
    try:
        logging.getLogger("x").info("painted", extra={"fields": {"images": 2}})
    finally:
        request_id.reset(token)
    line = stream.getvalue()
    if log_format == "json":
        entry = json.loads(line)
        assert (entry["message"], entry["request_id"], entry["images"], entry["level"]) == ("painted", "abc", 2, "info")
    else:
        assert "[abc] painted images=2" in line


@pytest.mark.usefixtures("root_logger")
def test_a_logging_configuration_silences_who_is_there_already_only_where_it_says_so(tmp_path: Path) -> None:
    """Python's own default is that it always does."""
    path, early = tmp_path / "log.json", logging.getLogger("app.early")
    every = [logger for logger in logging.Logger.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    try:
        for extra, silenced in (({}, False), ({"disable_existing_loggers": True}, True)):
            path.write_text(json.dumps({"version": 1, "root": {"level": "INFO"}, **extra}))
            configure_logging(Settings(log_config_file=path))
            assert early.disabled is silenced
    finally:
        for logger in every:
            logger.disabled = False


def test_the_access_log_is_written_as_asked(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        AccessLog('%(h)s "%(r)s" %(s)s %(b)s %(L)s').log(
            Access(client="10.0.0.1", method="GET", path="/v2", protocol="HTTP/1.1", status=200, size=99, seconds=0.25)
        )
    assert caplog.messages == ['10.0.0.1 "GET /v2 HTTP/1.1" 200 99 0.250000']


def test_the_access_log_takes_asgi_loggers_long_names_too(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        AccessLog('%(client_addr)s "%(request_line)s" %(status_code)s').log(
            Access(client="10.0.0.1", method="GET", path="/v2", query="a=1", protocol="HTTP/1.1", status=200)
        )
    assert caplog.messages == ['10.0.0.1 "GET /v2?a=1 HTTP/1.1" 200 OK']


def test_a_placeholder_that_is_not_known_is_told_with_those_that_are() -> None:
    with pytest.raises(InvalidSettings, match=r"placeholder 'asctime', which is unknown; known are %\(h\)s, "):
        AccessLog("%(asctime)s")


@pytest.mark.parametrize("line_format", ["%(unknown)s", "%(h)", "%s %s", "%(h)d"])
def test_an_access_log_format_that_cannot_be_used_is_refused_at_the_start(line_format: str) -> None:
    with pytest.raises(InvalidSettings, match="access_log_format"):
        AccessLog(line_format)


def test_buckets_reach_ten_minutes() -> None:
    telemetry = Telemetry("m")
    telemetry.predict.observe(500)
    assert b'request_predict_seconds_bucket{le="600.0",model_name="m"} 1.0' in telemetry.exposition()
