"""Painting for nobody, so that everything is compiled before the first request comes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from app.engine.compiled import Compiler
from app.engine.family import Family
from app.engine.optimization import Optimization
from app.errors import OutOfMemory
from app.generation import GenerateRequest
from app.sentences import counted

logger = logging.getLogger(__name__)

PROMPTS = ("", "(weighted:1.1) words")
"""What has weights is read in another way."""
LONG_PROMPTS = ("a " * 100,)
"""Of twice as many tokens. What is compiled takes any number of them, but for attention that makes plans, which wants
to have met each. Longer ones are rare."""
STEPS = 2


def warm(
    family: Family[Any],
    compiler: Compiler,
    optimization: Optimization,
    own_size: tuple[int, int],
    report: Callable[[str], None],
) -> None:
    """Go once through everything with each size and number of rows that `optimization` prepares for.

    Args:
        family: whose parts `compiler` compiles.
        own_size: width and height that the model is made for.
        report: hears of each.

    Raises:
        ModelLoadFailed: this machine cannot compile.
        InvalidRequest: the model cannot paint one of the sizes.
        OutOfMemory: the device cannot hold a single row.
    """
    # FLUX reads as many tokens of every prompt.
    longer = optimization.plans and "max_sequence_length" not in family.parameters
    with compiler.warm():
        for width, height in optimization.sizes or (own_size,):
            too_many = math.inf
            for rows in optimization.row_counts(width * height, compiler.graphs):
                if rows >= too_many:
                    continue
                what = f"{width} x {height} pixels, {counted(rows, 'row')}"
                logger.info("compiling for %s", what)
                report(f"compiling for {what}")
                try:
                    for _ in range(compiler.runs):
                        _paint(family, width, height, rows, PROMPTS)
                        if longer:
                            _paint(family, width, height, rows, LONG_PROMPTS)
                except OutOfMemory:
                    if rows == 1:
                        raise
                    # No request will be painted in passes of so many either.
                    logger.warning("the device has too little memory for %s: passes will have fewer", what)
                    too_many = rows


def _paint(family: Family[Any], width: int, height: int, rows: int, prompts: Sequence[str]) -> None:
    # Without guidance, so that each image brings one row.
    size: dict[str, Any] = {"width": width, "height": height}
    if "denoising_limit" in family.parameters:
        size["denoising_limit"] = 0.5  # a step for the base and one for the refiner, however they are spaced
    asked = [
        GenerateRequest(
            prompt=prompts[seed % len(prompts)], seed=seed, num_inference_steps=STEPS, guidance_scale=1.0, **size
        )
        for seed in range(rows)
    ]
    requests = [family.resolve(family.rehearsal(request)) for request in asked]
    conditionings = family.encode_all(requests)
    jobs = [family.begin(*each) for each in zip(requests, conditionings, strict=True)]
    while not jobs[0].done:
        family.step(jobs)
    family.decode(jobs[: max(1, family.decode_load // (width * height))])
