"""The results of `tests.benchmarks.gpu` as tables and as a figure. Knows no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from app.sentences import counted

TITLES = {
    "sdxl": "SDXL",
    "sdxl-refiner": "SDXL with refiner",
    "flux-dev": "FLUX.1 dev",
    "flux-schnell": "FLUX.1 schnell",
}
COLOURS = {
    "off": "#9a9a9a",
    "safe": "#4c78a8",
    "compile": "#f2a33a",
    "max": "#b5322d",
    "guidance_end": "#7a4b94",
    "step_cache": "#59935a",
}
NOTHING = "–"

Row = Mapping[str, Any]


# --- Tables ----------------------------------------------------------------------------------------------------


def table(results: Mapping[str, Any]) -> str:
    """Markdown: what was measured on what, one picture alone, and many at a time."""
    return "\n\n".join((_note(results), _alone(results), _together(results))) + "\n"


def _note(results: Mapping[str, Any]) -> str:
    run = results["runs"][-1]
    rates = sorted({float(f"{each['rate_tflops']:.3g}") for each in results["runs"]})
    rate = f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:g} to {rates[-1]:g}"
    what = "the demo's configurations" if results["small"] else "full-size models"
    rounds = counted(run["rounds"], "round")
    return (
        f"{results['device']}, {run['dtype']}, torch {run['torch']}: {what} with random weights, "
        f"{results['side']} x {results['side']}, through the batcher with a server's own settings; medians of "
        f"{rounds} in which the levels take turns. *floor*: what this device would need if it did "
        f"nothing but matrix products in {run['dtype']}, at the {rate} TFLOP/s that were measured for large ones. "
        "*difference*: ‖out − reference‖ / ‖reference‖ from float32: the median over the steps of that of the "
        "prediction, each from the reference's own latents and embeddings, and that of the latents after the last step "
        "of the same request from the same noise. *peak*: as if the level had the device for itself. `guidance_end`: "
        "`max`, with requests that say `guidance_end: 0.5`; `step_cache`: `safe` with `--step_cache 2`. Both leave out "
        "a part of the work that the floor is of."
    )


def _alone(results: Mapping[str, Any]) -> str:
    header = (
        "model | steps | level | picture, s | file, s | floor, s | times the floor | encode, ms | step, ms | "
        "decode, ms | peak, GiB | warm-up, s | difference of a step | at the end"
    )
    lines = [f"| {header} |", "|---|--:|---|" + "--:|" * 11]
    levels = {(each["model"], each["level"]): each for each in results["levels"]}
    groups = _groups([row for row in results["rows"] if row["images"] == 1], "model", "steps")
    rows = [row for _, group in groups for row in group]
    absent = [
        {"steps": NOTHING, **each}
        for key, each in levels.items()
        if "unavailable" in each and not any((row["model"], row["level"]) == key for row in rows)
    ]
    for row in (*rows, *absent):
        level = levels.get((row["model"], row["level"]), {})
        cells = [TITLES[row["model"]], str(row["steps"]), _level(row), *_cells(row, level)]
        lines.append(f"| {' | '.join(cells)} |")
    return "One picture at a time:\n\n" + "\n".join(lines)


def _level(*rows: Row) -> str:
    """Its name, and whether it was what it should be."""
    unexpected = sum(row.get("unexpected_shapes", 0) for row in rows)
    return f"`{rows[0]['level']}`" + (f" ({unexpected} passes were not compiled)" if unexpected else "")


def _cells(row: Row, level: Row) -> list[str]:
    if "unavailable" in row:
        return [row["unavailable"], *[NOTHING] * 10]
    stages = row["stages"]
    predictions = sorted(level.get("predictions", ()))
    return [
        *(f"{row[name]:.3f}" for name in ("seconds", "latency")),
        f"{row['floor']:.3g}",
        f"{row['seconds'] / row['floor']:.3g}",
        *(f"{1000 * stages[name]:.1f}" for name in ("encode", "step", "decode")),
        NOTHING if row["memory_gib"] is None else f"{row['memory_gib']:.1f}",
        f"{level['warm_up']:.0f}" if "warm_up" in level else NOTHING,
        f"{predictions[len(predictions) // 2]:.1e}" if predictions else NOTHING,
        f"{level['latents']:.1e}" if "latents" in level else NOTHING,
    ]


def _together(results: Mapping[str, Any]) -> str:
    counts = sorted({row["images"] for row in results["rows"]})
    lines = [
        f"| {' | '.join(('model', 'steps', 'level', *(f'{count} at a time' for count in counts), 'at the floor'))} |",
        "|---|--:|---|" + "--:|" * (len(counts) + 1),
    ]
    for (model, steps), rows in _groups(results["rows"], "model", "steps"):
        for _, of_level in _groups(rows, "level"):
            found = {row["images"]: row for row in of_level}
            cells = [_rate(found.get(count)) for count in counts]
            floor = max((row["images"] / row["floor"] for row in found.values() if "floor" in row), default=None)
            cells.append(NOTHING if floor is None else f"{floor:.3g}")
            lines.append(f"| {TITLES[model]} | {steps} | {_level(*of_level)} | {' | '.join(cells)} |")
    return (
        "Pictures a second, where so many are painted at a time; in brackets the rows of the largest forward pass, two "
        "for each picture with guidance by a negative prompt:\n\n" + "\n".join(lines)
    )


def _rate(row: Row | None) -> str:
    if row is None:
        return NOTHING
    return str(row.get("unavailable") or f"{row['images_per_second']:.3g} ({row['rows']})")


def _groups(rows: Iterable[Row], *names: str) -> list[tuple[tuple[Any, ...], list[Row]]]:
    """`rows` by the values of `names`, in the order in which these come first."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(groups.items())


# --- The figure ------------------------------------------------------------------------------------------------


def draw(results: Mapping[str, Any], path: Path) -> None:
    """For each model the seconds of one picture, and the pictures a second of many at a time, beside their floors."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    models = _groups([row for row in results["rows"] if "floor" in row], "model")
    with plt.rc_context({"svg.hashsalt": "benchmark", "svg.fonttype": "none"}):
        columns = max(1, len(models))
        size = (max(6.0, 3.4 * columns), 6.0)
        figure, axes = plt.subplots(2, columns, figsize=size, squeeze=False, layout="constrained")
        for (model,), rows in models:
            above, below = axes[:, [each for (each,), _ in models].index(model)]
            above.set_title(TITLES[model])
            _draw_alone(above, [row for row in rows if row["images"] == 1])
            _draw_together(below, rows)
        axes[0, 0].set_ylabel("seconds of one picture")
        axes[1, 0].set_ylabel("pictures a second")
        known = {
            label: line for below in axes[1] for line, label in zip(*below.get_legend_handles_labels(), strict=True)
        }
        named = {label: known[label] for label in (*COLOURS, "floor") if label in known}
        if named:
            figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=len(named), frameon=False)
        figure.suptitle(results["device"])
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def _draw_alone(axes: Any, rows: Sequence[Row]) -> None:
    """A bar for each level, in groups of equal steps, with a dashed line across each group at its floor."""
    width = 0.8 / len(COLOURS)
    groups = _groups(rows, "steps")
    for i, (_, of_steps) in enumerate(groups):
        for row in of_steps:
            place = i + (list(COLOURS).index(row["level"]) - (len(COLOURS) - 1) / 2) * width
            bar = axes.bar(place, row["seconds"], width * 0.9, color=COLOURS[row["level"]])
            axes.bar_label(bar, fmt="%.3g", fontsize=7, padding=1)
        axes.hlines(of_steps[0]["floor"], i - 0.45, i + 0.45, color="black", linestyle="--", linewidth=1)
    axes.set_xticks(range(len(groups)), [f"{steps} steps" for (steps,), _ in groups])
    axes.margins(y=0.12)
    _tidy(axes)


def _draw_together(axes: Any, rows: Sequence[Row]) -> None:
    """A line for each level; the floor is the same however many are painted at a time."""
    steps = max((row["steps"] for row in rows if row["images"] > 1), default=max(row["steps"] for row in rows))
    rows = [row for row in rows if row["steps"] == steps]
    for (level,), of_level in _groups(rows, "level"):
        counts = [row["images"] for row in of_level]
        rates = [row["images_per_second"] for row in of_level]
        axes.plot(counts, rates, marker="o", markersize=4, color=COLOURS[level], label=level)
    floor = max(row["images"] / row["floor"] for row in rows)
    axes.axhline(floor, color="black", linestyle="--", linewidth=1, label="floor")
    counts = sorted({row["images"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlabel(f"pictures at a time, {steps} steps")
    axes.set_ylim(bottom=0)
    _tidy(axes)


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
