"""Alerts, dashboard and autoscaling ask for what the server really tells, seen through a real Prometheus."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import math
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from app import errors
from app.telemetry import Telemetry
from tests.deploy.manifests import DEPLOY, examples, render
from tests.e2e.conftest import Server, running_server

PROMETHEUS = shutil.which("prometheus")
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")
needs_prometheus = pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed (Debian: prometheus)")

ALERTS = {
    rule["alert"]: rule
    for group in yaml.safe_load((DEPLOY / "monitoring/rules.yaml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
}
PANELS = [
    panel
    for panel in json.loads((DEPLOY / "monitoring/dashboard.json").read_text(encoding="utf-8"))["panels"]
    if panel["type"] != "row"
]


def keda_queries() -> list[str]:
    """What autoscaling asks about a service called sdxl, by the component and by the example in the page about it."""
    text = (DEPLOY / "components/keda/autoscaling.yaml").read_text(encoding="utf-8").replace('"any"', '"sdxl"')
    return [
        each["external"]["metric"]["query"]
        for service in (yaml.safe_load(text), *examples(DEPLOY / "scaling.md"))
        for each in service["spec"]["predictor"].get("autoScaling", {}).get("metrics", [])
    ]


def panel_queries() -> list[tuple[str, str]]:
    return [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]


def filled_in(query: str) -> str:
    """A panel's query with a value for every variable of the dashboard."""
    for variable, text in {"$__rate_interval": "1m", "$namespace": ".*", "$model": ".*"}.items():
        query = query.replace(variable, text)
    return query


def queries() -> list[tuple[str, str]]:
    """Every query in deploy/, by the name of what asks it."""
    alerts = [(name, rule["expr"]) for name, rule in ALERTS.items()]
    return [*alerts, *panel_queries(), *[("KEDA", query) for query in keda_queries()]]


# --- Names -----------------------------------------------------------------------------------------------------


def exported() -> set[str]:
    """The names of all series that the server can have."""
    names = set()
    for family in Telemetry("sdxl").registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        names |= {family.name + suffix for suffix in suffixes}
    return names


def test_every_metric_that_is_asked_for_exists() -> None:
    for source, query in queries():
        asked = set(re.findall(r"\b(?:sdxl|request|process)_[a-z_]+\b", query))
        assert asked, source
        assert asked <= exported(), source


def test_every_reason_that_is_asked_for_exists() -> None:
    faults = [
        each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, errors.RuntimeFault)
    ]
    codes = {each.code for each in faults}
    for source, query in queries():
        assert set(re.findall(r'reason!?="(\w+)"', query)) <= codes, source


def test_the_dashboard_shows_every_metric_of_ours_or_an_alert_does() -> None:
    asked = " ".join(query for _, query in queries())
    for name in exported():
        if name.startswith(("sdxl_", "request_")) and not name.endswith("_created"):
            family = re.sub(r"_(bucket|sum|count)$", "", name)
            assert family in asked, name


def test_panels_lie_side_by_side_on_the_grid() -> None:
    places: set[tuple[int, int]] = set()
    for panel in PANELS:
        x, y, w, h = (panel["gridPos"][key] for key in "xywh")
        assert x + w <= 24
        cells = {(column, row) for column in range(x, x + w) for row in range(y, y + h)}
        assert not cells & places, panel["title"]
        places |= cells


# --- Rules -----------------------------------------------------------------------------------------------------


@needs_promtool
def test_the_rules_are_right_for_prometheus() -> None:
    promtool("check", "rules", str(DEPLOY / "monitoring/rules.yaml"))


@needs_promtool
def test_every_alert_fires_when_it_should_and_only_then(tmp_path: Path) -> None:
    # Without the texts, which promtool would want to be spelled out in every test.
    rules = {"groups": [{"name": "rules", "rules": [without_texts(rule) for rule in ALERTS.values()]}]}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules), encoding="utf-8")
    shutil.copy(Path(__file__).with_name("alerts.yaml"), tmp_path)
    promtool("test", "rules", str(tmp_path / "alerts.yaml"))


@needs_promtool
def test_a_replica_that_two_monitors_scrape_counts_once(tmp_path: Path) -> None:
    """As on OpenShift AI, which makes a service monitor beside our pod monitor."""
    series = {
        'sdxl_queue_seconds{model_name="sdxl", ': "10x40",
        'sdxl_pending_images{model_name="sdxl", ': "3x40",
        'sdxl_running_images{model_name="sdxl", ': "2x40",
        'sdxl_model_ready{model_name="sdxl", ': "1x40",
        'sdxl_images_total{model_name="sdxl", ': "0+15x40",
        'sdxl_rejected_total{model_name="sdxl", reason="overloaded", ': "0+15x40",
        'sdxl_rejected_total{model_name="sdxl", reason="invalid_request", ': "0+30x40",
    }
    monitors = (
        'job="ns/sdxl-runtime", endpoint="http1"}',
        'job="sdxl-metrics", endpoint="sdxl-runtime-metrics", service="sdxl-metrics"}',
    )
    replicas = [f'namespace="ns", pod="{pod}", instance="{pod}:8080", container="kserve-container", ' for pod in "ab"]
    panels = {title: filled_in(query) for title, query in panel_queries()}
    expected = {
        **dict(zip(keda_queries(), (20, 10, 20), strict=True)),
        panels["Ready replicas"]: 2,
        panels["Images per minute"]: 120,
        panels["Requests turned away per minute"].removesuffix(" or vector(0)"): 360,
    }
    cases = [
        {
            "expr": query,
            "eval_time": "5m",
            "exp_samples": [{"labels": '{model_name="sdxl"}' if "by (model_name)" in query else "{}", "value": value}],
        }
        for query, value in expected.items()
    ]
    inputs = [
        {"series": metric + replica + monitor, "values": values}
        for metric, values in series.items()
        for replica in replicas
        for monitor in monitors
    ]
    test = {"interval": "15s", "input_series": inputs, "promql_expr_test": cases}
    (tmp_path / "twice.yaml").write_text(yaml.safe_dump({"tests": [test]}), encoding="utf-8")
    promtool("test", "rules", str(tmp_path / "twice.yaml"))


def test_every_alert_has_a_test_in_which_it_fires() -> None:
    tests = yaml.safe_load(Path(__file__).with_name("alerts.yaml").read_text(encoding="utf-8"))["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == set(ALERTS)


def without_texts(rule: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in rule.items() if key != "annotations"}


def promtool(*arguments: str) -> None:
    assert PROMTOOL is not None
    result = subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


# --- A real Prometheus over a real server ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prometheus that has watched a server under load."""
    assert PROMETHEUS is not None
    folder = tmp_path_factory.mktemp("prometheus")
    annotations = render("runtime/base")[0]["spec"]["annotations"]
    assert annotations["prometheus.io/scrape"] == "true"
    flags = ("--max_queue", "4", "--max_images_per_request", "4", "--max_batch_size", "2")
    with running_server(tmp_path_factory.mktemp("server"), *flags) as server, contextlib.ExitStack() as stack:
        # The labels that a pod monitor adds in a cluster.
        target = {"targets": [server.host], "labels": {"namespace": "default", "pod": "sdxl-predictor-0"}}
        job = {"job_name": "sdxl", "metrics_path": annotations["prometheus.io/path"], "static_configs": [target]}
        configuration = {"global": {"scrape_interval": "1s"}, "scrape_configs": [job]}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration), encoding="utf-8")
        port = free_port()
        log = stack.enter_context((folder / "log").open("wb"))
        process = subprocess.Popen(
            [
                PROMETHEUS,
                f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(lambda: value(address, "up") == [1.0], "Prometheus has not scraped the server")
            load(server)
            # Twice more, so that the last events count too.
            time.sleep(3)
            yield address
        finally:
            process.terminate()
            process.wait(30)


def load(server: Server) -> None:
    """Every kind of request for a few seconds: painted, too many, wrong, late and left."""
    url = f"{server.url}/v2/models/sdxl/infer"

    def body(number: int, parameters: dict[str, Any]) -> dict[str, Any]:
        prompt = {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a red circle on a white background"]}
        return {"inputs": [prompt], "parameters": {"num_inference_steps": 4, "seed": number} | parameters}

    def ask(number: int, **parameters: Any) -> int:
        return httpx.post(url, json=body(number, parameters), timeout=60).status_code

    def leave() -> None:
        with contextlib.suppress(httpx.ReadTimeout):
            httpx.post(url, json=body(0, {"num_inference_steps": 150}), timeout=0.3)

    wanted = {200, 400, 429, 504}
    seen: set[int] = set()
    rounds = 0
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        # Four rounds, so that there are seconds between first and last; more where the machine has much else to do.
        while rounds < 4 or (seen != wanted and rounds < 12):
            seen |= set(pool.map(ask, range(rounds * 8, rounds * 8 + 8)))
            seen.add(ask(0, num_inference_steps=10_000))
            seen.add(ask(0, num_inference_steps=100, timeout=200_000))
            leave()
            time.sleep(1)
            rounds += 1
    assert seen == wanted


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_for(condition: Any, sentence: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if condition():
                return
        time.sleep(0.2)
    raise AssertionError(sentence)


def value(address: str, query: str) -> list[float]:
    """The values of an instant query."""
    answer = httpx.get(f"{address}/api/v1/query", params={"query": query}, timeout=30).json()
    assert answer["status"] == "success", f"{query}: {answer.get('error')}"
    return [float(series["value"][1]) for series in answer["data"]["result"]]


@needs_prometheus
@pytest.mark.parametrize(("title", "query"), panel_queries(), ids=lambda text: text[:24])
def test_every_panel_has_data(prometheus: str, title: str, query: str) -> None:
    query = filled_in(query)
    found = value(prometheus, query)
    assert found and not all(math.isnan(each) for each in found), f"{title}: {query}"


@needs_prometheus
@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_looks_at_data(prometheus: str, name: str) -> None:
    """With the comparison left out, and in place of failures that the demo does not have, with those that it had."""
    query = re.sub(r" (?:[<>]=?|==) [\d.]+", "", ALERTS[name]["expr"])
    query = query.replace('!="deadline', '="deadline')
    found = value(prometheus, query)
    assert found and not all(math.isnan(each) for each in found), query


@needs_prometheus
@pytest.mark.parametrize("query", keda_queries(), ids=lambda text: text[:24])
def test_autoscaling_sees_the_load_come_and_go(prometheus: str, query: str) -> None:
    assert value(prometheus, query) == [0.0]
    assert value(prometheus, f"max_over_time(({query})[1m:1s])")[0] > 0


@needs_prometheus
def test_no_alert_about_a_healthy_server(prometheus: str) -> None:
    """Those without a waiting time would fire at once."""
    for name, rule in ALERTS.items():
        if "for" not in rule:
            assert value(prometheus, rule["expr"]) == [], name
