"""The tables of the pages, made from the code and the results: ``python -m tests.readme`` writes, a test compares."""

from __future__ import annotations

import json
import re
from pathlib import Path

from app.engine.flux_requests import PARAMETERS as FLUX_PARAMETERS
from app.engine.optimization import LOSSY_PARAMETERS
from app.engine.scheduler_names import NAMES
from app.engine.sdxl import FLUX_ONLY_PARAMETERS
from app.engine.sdxl_requests import SCORES
from app.generation import PARAMETERS, Kind
from app.main import create_app
from app.settings import Settings
from deploy.replicas import Plan
from tests.benchmarks.gpu_report import TITLES

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SCALING = ROOT / "deploy" / "scaling.md"
RESULTS = ROOT / "tests" / "benchmarks" / "results"
FIGURES = {
    "load": "Share of pictures by latency, with 16 callers",
    "soak": "Resident memory over twenty minutes",
}
"""Benchmarks that draw one, and what it shows."""
DEMANDS = (1.0, 10.0, 100.0)
"""Images per second that replicas are counted for."""
DATATYPES = {
    Kind.TEXT: "BYTES",
    Kind.INTEGER: "integer",
    Kind.NUMBER: "number",
    Kind.BOOLEAN: "BOOL",
    Kind.PAIR: "integers, `[2]`",
    Kind.LIST: "numbers, `[k]`",
    Kind.ADAPTERS: "BYTES",
    Kind.IMAGE: "BYTES or UINT8",
}


def table(header: str, rows: list[list[str]]) -> str:
    columns = header.split("|")
    lines = [header, "|".join("---" for _ in columns), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


def parameters() -> str:
    rows = [[f"`{p.name}`", DATATYPES[p.kind], p.description, _model(p.name)] for p in PARAMETERS.values()]
    return table("name | datatype | meaning | only for", rows)


def _model(name: str) -> str:
    """Which model a parameter is for, where it is not for every one."""
    if name in ("denoising_limit", *SCORES):
        return "SDXL with a refiner"
    if name == "loras":
        return "servers with `--lora`"
    if name in LOSSY_PARAMETERS:
        return "servers with `--optimize max`"
    return "FLUX" if name in FLUX_ONLY_PARAMETERS else "SDXL" if name not in FLUX_PARAMETERS else ""


def schedulers() -> str:
    return ", ".join(f"`{name}`" for name in NAMES) + "."


def routes() -> str:
    document = create_app(Settings()).openapi()
    rows = [
        [f"`{method.upper()} {path}`", operation["summary"]]
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    rows += [["`GET /docs`", "Swagger UI"], ["`GET /openapi.json`", "OpenAPI document"]]
    return table("path | answers", rows)


def settings() -> str:
    rows = []
    for name, field in Settings.model_fields.items():
        default = str(field.default).lower() if isinstance(field.default, bool) else field.default
        rows.append([f"`{name}`", "" if default in (None, ()) else f"`{default}`", field.description or ""])
    return table("name | default | meaning", rows)


def benchmarks() -> str:
    """The committed results, with the command that makes them."""
    parts = []
    for name, title in (
        ("solo", "One request through the server beside the stock pipeline's call"),
        ("probes", "`/v2/health/live` while eight requests run"),
        ("load", "Many callers at once, beside KServe's model server"),
        ("overload", "Three times too many requests"),
        ("soak", "Memory over time"),
        ("start", "How long a start takes"),
        ("lossy", "What is changed of a picture by the choices that cost a little of it"),
        ("memory", "What each model needs in memory, computed from the full-size configurations"),
    ):
        text = (RESULTS / f"{name}.md").read_text(encoding="utf-8").strip()
        parts.append(f"{title} (`python -m tests.benchmarks.{name}`):\n\n{text}")
        if name in FIGURES:
            parts.append(f"![{FIGURES[name]}](tests/benchmarks/results/{name}.svg)")
    parts.append(on_gpus(RESULTS))
    return "\n\n".join(parts)


def on_gpus(results: Path) -> str:
    """What was measured on GPUs, a table and a figure for each, or that nothing was."""
    tables = _of_gpus(results, "md")
    if not tables:
        return (
            "Nothing was measured on a GPU yet: `make bench-gpu` does it where there is one, without a download, and "
            "its results appear here."
        )
    parts = ["Full-size models on GPUs, at every level of `--optimize` (`make bench-gpu`):"]
    for path in tables:
        figure = path.with_suffix(".svg").relative_to(ROOT) if path.is_relative_to(ROOT) else path.with_suffix(".svg")
        parts.append(f"{path.read_text(encoding='utf-8').strip()}\n\n![Seconds and pictures a second]({figure})")
    return "\n\n".join(parts)


def _of_gpus(results: Path, kind: str) -> list[Path]:
    """Files of that kind with what `make bench-gpu` measured, without those of small runs."""
    return sorted(path for path in results.glob(f"gpu-*.{kind}") if not path.stem.endswith("-small"))


def measured() -> str:
    """How many replicas the measured images per second make, with one spare."""
    painted = json.loads((RESULTS / "load.json").read_text(encoding="utf-8"))["16"]["servers"]["ours"]
    demo = ("the demo, 10 to 30 steps", "two CPU cores", float(painted["images_per_second"]))
    rows = [
        [what, device, f"{rate:.3g}", *(str(Plan(demand, rate, spare=1).replicas) for demand in DEMANDS)]
        for what, device, rate in (demo, *fastest_on_gpus(RESULTS))
    ]
    demands = " | ".join(f"for {demand:g} a second" for demand in DEMANDS)
    return table(f"model | on | one replica, images/s | {demands}", rows)


def fastest_on_gpus(results: Path) -> list[tuple[str, str, float]]:
    """Each model and its steps, the GPU, and the most images per second that were measured with ``compile``."""
    found = []
    for path in _of_gpus(results, "json"):
        run = json.loads(path.read_text(encoding="utf-8"))
        rows = [row for row in run["rows"] if row["level"] == "compile" and "images_per_second" in row]
        best = {row["model"]: row for row in sorted(rows, key=lambda row: row["images_per_second"])}
        found += [
            (f"{title}, {best[model]['steps']} steps", run["device"], best[model]["images_per_second"])
            for model, title in TITLES.items()
            if model in best
        ]
    return found


PAGES = {README: (parameters, schedulers, routes, settings, benchmarks), SCALING: (measured,)}


def written(page: Path) -> str:
    """A page as it should be."""
    text = page.read_text(encoding="utf-8")
    for make in PAGES[page]:
        marks = re.compile(rf"<!-- {make.__name__} -->.*?<!-- end -->", re.DOTALL)
        block = f"<!-- {make.__name__} -->\n\n{make()}\n\n<!-- end -->"
        text, count = marks.subn(block.replace("\\", r"\\"), text)
        assert count == 1, f"{page.name} has no place for {make.__name__}"
    return text


if __name__ == "__main__":
    for each in PAGES:
        each.write_text(written(each), encoding="utf-8")
