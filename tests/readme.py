"""The README's tables, made from the code: ``python -m tests.readme`` writes them, a test compares them."""

from __future__ import annotations

import re
from pathlib import Path

from app.engine.flux_requests import PARAMETERS as FLUX_PARAMETERS
from app.engine.optimization import LOSSY_PARAMETERS
from app.engine.scheduler_names import NAMES
from app.engine.sdxl import OTHERS_PARAMETERS
from app.engine.sdxl_requests import SCORES
from app.generation import PARAMETERS, Kind
from app.main import create_app
from app.settings import Settings

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "tests" / "benchmarks" / "results"
FIGURES = {
    "load": "Share of pictures by latency, with 16 callers",
    "soak": "Resident memory over twenty minutes",
}
"""Benchmarks that draw one, and what it shows."""
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
    if name in LOSSY_PARAMETERS:
        return "servers with `--optimize max`"
    return "FLUX" if name in OTHERS_PARAMETERS else "SDXL" if name not in FLUX_PARAMETERS else ""


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
    tables = sorted(path for path in results.glob("gpu-*.md") if not path.stem.endswith("-small"))
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


def written() -> str:
    """The README as it should be."""
    text = README.read_text(encoding="utf-8")
    for make in (parameters, schedulers, routes, settings, benchmarks):
        marks = re.compile(rf"<!-- {make.__name__} -->.*?<!-- end -->", re.DOTALL)
        block = f"<!-- {make.__name__} -->\n\n{make()}\n\n<!-- end -->"
        text, count = marks.subn(lambda _, block=block: block, text)
        assert count == 1, f"the README has no place for {make.__name__}"
    return text


if __name__ == "__main__":
    README.write_text(written(), encoding="utf-8")
