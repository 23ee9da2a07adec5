"""Writes the files in deploy/ that are made from others: ``python -m deploy.generate``.

| file | made from |
|---|---|
| monitoring/dashboard.json | the panels below |
| monitoring/prometheusrule.yaml | monitoring/rules.yaml |
| runtime/openshift-ai/template.yaml | runtime/base/servingruntime.yaml and the patch in runtime/openshift-ai |

A test compares them with what is committed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
RATE = "$__rate_interval"
SERVICE = 'namespace=~"$namespace", model_name=~"$model"'
"""Which series a panel shows; every metric of the server carries model_name, and a pod monitor adds the rest."""

Panel = dict[str, Any]


# --- The dashboard ---------------------------------------------------------------------------------------------


def once(query: str) -> str:
    """A replica's series once, however many monitors scrape it; these labels are what tells their copies apart."""
    return f"max without (job, service, endpoint, container) ({query})"


def summed(query: str, by: str) -> str:
    return f"sum{f' by ({by}) ' if by else ''}({once(query)})"


def rate(metric: str, by: str = "model_name", matchers: str = "") -> str:
    return summed(f"rate({metric}{{{SERVICE}{matchers}}}[{RATE}])", by)


def increase(metric: str, by: str = "") -> str:
    return summed(f"increase({metric}{{{SERVICE}}}[{RATE}])", by)


def total(metric: str, by: str = "") -> str:
    return summed(f"{metric}{{{SERVICE}}}", by)


def share(metric: str, by: str) -> str:
    """For one side of a ratio, in which it does not matter how often both are counted."""
    return f"sum by ({by}) (rate({metric}{{{SERVICE}}}[{RATE}]))"


def quantiles(histogram: str) -> list[tuple[str, str]]:
    buckets = share(f"{histogram}_bucket", "le")
    return [(f"histogram_quantile({q}, {buckets})", f"p{q * 100:.0f}") for q in (0.5, 0.9, 0.99)]


def mean(histogram: str, by: str) -> str:
    return f"{share(f'{histogram}_sum', by)} / {share(f'{histogram}_count', by)}"


def panel(kind: str, title: str, description: str, unit: str, *queries: tuple[str, str], stack: bool = False) -> Panel:
    custom = {"fillOpacity": 20 if stack else 0, "stacking": {"mode": "normal" if stack else "none"}}
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "fieldConfig": {
            "defaults": {"unit": unit, "min": 0, "custom": custom if kind == "timeseries" else {}},
            "overrides": [],
        },
        "options": {} if kind == "stat" else {"tooltip": {"mode": "multi"}, "legend": {"displayMode": "list"}},
        "targets": [
            {"refId": chr(ord("A") + number), "expr": expr, "legendFormat": legend}
            for number, (expr, legend) in enumerate(queries)
        ],
    }


def stat(title: str, description: str, unit: str, query: str) -> Panel:
    return panel("stat", title, description, unit, (query, "{{model_name}}"))


def graph(title: str, description: str, unit: str, *queries: tuple[str, str], stack: bool = False) -> Panel:
    return panel("timeseries", title, description, unit, *queries, stack=stack)


def own(metric: str) -> str:
    """A metric of the process itself, which has no model_name, for our servers only."""
    return once(f"{metric} and on (job, instance) sdxl_model_ready{{{SERVICE}}}")


ROWS: list[tuple[str, list[Panel]]] = [
    (
        "Now",
        [
            stat("Ready replicas", "", "none", total("sdxl_model_ready", "model_name")),
            stat("Images per minute", "", "none", f"60 * {rate('sdxl_images_total')}"),
            stat(
                "Work ahead",
                "Until all accepted work is likely to be done, on the busiest replica.",
                "s",
                f"max by (model_name) (sdxl_queue_seconds{{{SERVICE}}})",
            ),
            stat("Requests turned away per minute", "", "none", f"60 * {rate('sdxl_rejected_total')} or vector(0)"),
        ],
    ),
    (
        "Load",
        [
            graph(
                "Images in the house",
                "Waiting images have not taken a step yet.",
                "none",
                (total("sdxl_running_images"), "running"),
                (total("sdxl_pending_images"), "waiting"),
                stack=True,
            ),
            graph(
                "Requests per second",
                "Rejected: never accepted, such as an invalid one or one too many. Failed: accepted, and no picture.",
                "reqps",
                (rate("request_predict_seconds_count"), "finished"),
                (rate("sdxl_failed_total", "reason"), "failed: {{reason}}"),
                (rate("sdxl_rejected_total", "reason"), "rejected: {{reason}}"),
                (rate("sdxl_cancelled_total"), "cancelled"),
                stack=True,
            ),
            graph(
                "Work ahead, by replica",
                "Seconds until all accepted work is likely to be done. Autoscaling looks at it.",
                "s",
                (once(f"sdxl_queue_seconds{{{SERVICE}}}"), "{{pod}} {{instance}}"),
            ),
        ],
    ),
    (
        "Time",
        [
            graph("Request", "From acceptance to the last finished image.", "s", *quantiles("request_predict_seconds")),
            graph("Waiting", "From acceptance until it leaves the queue.", "s", *quantiles("sdxl_queue_wait_seconds")),
            graph(
                "Stages, on average",
                "Most are for all images that shared a pass; encode is for one image.",
                "s",
                (mean("sdxl_stage_seconds", "stage"), "{{stage}}"),
            ),
            graph(
                "Reading and writing, on average",
                "What the server adds on the way in and out.",
                "s",
                (mean("request_preprocess_seconds", "model_name"), "reading"),
                (mean("request_postprocess_seconds", "model_name"), "writing"),
            ),
        ],
    ),
    (
        "Device",
        [
            graph(
                "Work done and work accepted, per second",
                "One replica does one second of work in a second: where more is accepted for long, the queue grows.",
                "none",
                (rate("sdxl_stage_seconds_sum", "", ', stage!="encode"'), "done"),
                (rate("sdxl_admitted_seconds_total", ""), "accepted"),
                (total("sdxl_model_ready"), "replicas"),
            ),
            graph(
                "Forward passes, on average",
                "Images and rows that shared one; an image with guidance takes two rows. Switches: the share of passes "
                "that could not be shared with the one before.",
                "none",
                (mean("sdxl_images_per_forward_pass", "model_name"), "images"),
                (mean("sdxl_rows_per_forward_pass", "model_name"), "rows"),
                (
                    f"{share('sdxl_turn_switches_total', 'model_name')}"
                    f" / {share('sdxl_rows_per_forward_pass_count', 'model_name')}",
                    "switches",
                ),
            ),
            graph("Steps per second", "Counted once for each image.", "none", (rate("sdxl_steps_total"), "steps")),
            graph(
                "Short of memory",
                "Passes that did not fit, and what was done about it; the pixels times rows that are still tried.",
                "none",
                (increase("sdxl_out_of_memory_total", "stage, action"), "{{stage}}: {{action}}"),
                (f"min(sdxl_pass_budget_pixels{{{SERVICE}}}) / 1e6", "budget, megapixels"),
            ),
        ],
    ),
    (
        "Particulars",
        [
            graph(
                "Streams",
                "Open ones, and the events that they got per second.",
                "none",
                (total("sdxl_open_streams"), "open"),
                (rate("sdxl_stream_events_total", "event"), "{{event}}"),
            ),
            graph(
                "Previews per second", "", "none", (rate("sdxl_previews_total", "outcome"), "{{outcome}}"), stack=True
            ),
            graph(
                "Repeated idempotency keys per second",
                "",
                "none",
                (rate("sdxl_idempotent_total", "outcome"), "{{outcome}}"),
                stack=True,
            ),
            graph(
                "Second tries, shapes not compiled for and hung steps",
                "Pictures decoded once more in float32, passes in a shape that nothing was compiled for, and steps "
                "that took too long to be believed.",
                "none",
                (increase("sdxl_decode_retries_total"), "decoded again"),
                (increase("sdxl_unexpected_shapes_total"), "shape not compiled"),
                (increase("sdxl_hung_steps_total"), "hung"),
            ),
        ],
    ),
    (
        "Process",
        [
            graph("Memory", "", "bytes", (own("process_resident_memory_bytes"), "{{pod}} {{instance}}")),
            graph("CPU", "", "none", (own(f"rate(process_cpu_seconds_total[{RATE}])"), "{{pod}} {{instance}}")),
            graph("Open files", "", "none", (own("process_open_fds"), "{{pod}} {{instance}}")),
            graph(
                "Time to ready",
                "From the start of the process to the ready model, and the longest of each part of it.",
                "s",
                (once(f"sdxl_model_load_seconds{{{SERVICE}}}"), "{{pod}} {{instance}}"),
                (f"max by (phase) (sdxl_start_seconds{{{SERVICE}}})", "{{phase}}"),
            ),
        ],
    ),
]


def variable(name: str, label: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label.capitalize(),
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": f"label_values(sdxl_model_ready, {label})",
        "includeAll": True,
        "multi": True,
        # Also where there is no such label, as without a cluster.
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
        "sort": 1,
    }


def dashboard() -> dict[str, Any]:
    """Rows of panels, side by side on Grafana's grid of 24 columns."""
    panels: list[Panel] = []
    top = 0
    for title, row in ROWS:
        panels.append(
            {"type": "row", "title": title, "collapsed": False, "gridPos": {"x": 0, "y": top, "w": 24, "h": 1}}
        )
        width, height = 24 // len(row), 4 if row[0]["type"] == "stat" else 8
        for column, each in enumerate(row):
            panels.append(each | {"gridPos": {"x": column * width, "y": top + 1, "w": width, "h": height}})
        top += 1 + height
    return {
        "uid": "sdxl-runtime",
        "title": "Stable Diffusion XL Runtime",
        "tags": ["kserve", "sdxl-runtime"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
                variable("namespace", "namespace"),
                variable("model", "model_name"),
            ]
        },
        "panels": [each | {"id": number} for number, each in enumerate(panels, start=1)],
    }


# --- Alerts for Prometheus Operator, template for OpenShift AI -------------------------------------------------


def prometheus_rule() -> dict[str, Any]:
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {
            "name": "sdxl-runtime",
            "labels": {"app.kubernetes.io/name": "sdxl-runtime", "monitoring.opendatahub.io/scrape": "true"},
        },
        "spec": read("monitoring/rules.yaml"),
    }


def openshift_template() -> dict[str, Any]:
    runtime = read("runtime/base/servingruntime.yaml")
    patch = yaml.safe_load(read("runtime/openshift-ai/kustomization.yaml")["patches"][0]["patch"])
    for part in ("labels", "annotations"):
        runtime["metadata"][part] = runtime["metadata"].get(part, {}) | patch["metadata"][part]
    return {
        "apiVersion": "template.openshift.io/v1",
        "kind": "Template",
        "metadata": {
            "name": "sdxl-runtime-template",
            "labels": {"opendatahub.io/dashboard": "true"},
            "annotations": {
                "description": "Serves Stable Diffusion XL and FLUX over the Open Inference Protocol",
                "openshift.io/display-name": patch["metadata"]["annotations"]["openshift.io/display-name"],
                "opendatahub.io/apiProtocol": "REST",
                "opendatahub.io/model-type": '["generative"]',
                "opendatahub.io/modelServingSupport": '["single"]',
                "tags": "kserve,servingruntime,diffusers,sdxl,flux",
            },
        },
        "objects": [runtime],
        "parameters": [],
    }


# --- Files -----------------------------------------------------------------------------------------------------


def read(path: str) -> Any:
    return yaml.safe_load((HERE / path).read_text(encoding="utf-8"))


def as_yaml(content: dict[str, Any], source: str) -> str:
    text = yaml.safe_dump(content, sort_keys=False, width=120, allow_unicode=True)
    return f"# Made from {source} by deploy/generate.py; change it there.\n{text}"


def files() -> dict[Path, str]:
    """Every generated file with its text."""
    return {
        HERE / "monitoring/dashboard.json": json.dumps(dashboard(), indent=2) + "\n",
        HERE / "monitoring/prometheusrule.yaml": as_yaml(prometheus_rule(), "rules.yaml"),
        HERE / "runtime/openshift-ai/template.yaml": as_yaml(openshift_template(), "../base/servingruntime.yaml"),
    }


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
