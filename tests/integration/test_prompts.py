"""Prompts of any length, and weights in them: nothing that a caller writes is dropped in silence."""

from __future__ import annotations

import numpy as np
import pytest

from app.engine.prompts import fragments
from app.engine.sdxl import SdxlFamily
from app.errors import InvalidRequest
from app.generation import GenerateRequest
from tests.integration.stock import ours

FILLER = "a photo of the big plain picture, " * 12
"""More than the 75 tokens that CLIP reads at once."""


def test_words_behind_the_75th_token_count(family: SdxlFamily) -> None:
    pictures = [
        ours(family, prompt=FILLER + end, seed=3, num_inference_steps=4)
        for end in ("a red circle on a white background", "a blue star on a black background")
    ]
    assert np.abs(pictures[0].astype(int) - pictures[1]).mean() > 5


def test_a_long_negative_prompt_goes_with_a_short_prompt_and_the_other_way_round(family: SdxlFamily) -> None:
    common = {"seed": 3, "num_inference_steps": 2}
    for prompt, negative in ((FILLER * 3, "blue"), ("a red circle", FILLER * 3), (FILLER, FILLER * 4)):
        picture = ours(family, prompt=prompt, negative_prompt=negative, **common)
        assert picture.shape == (128, 128, 3)


def test_both_encoders_may_read_prompts_of_different_lengths(family: SdxlFamily) -> None:
    common = {"seed": 3, "num_inference_steps": 2}
    assert ours(family, prompt="a red circle", prompt_2=FILLER, **common).shape == (128, 128, 3)
    assert ours(family, prompt=FILLER, prompt_2="a red circle", **common).shape == (128, 128, 3)


@pytest.mark.parametrize("prompt", ["x" * 2000, "é" * 500, "," * 300, "日本語" * 100, "a" + " " * 3000 + "b"])
def test_text_without_words_is_read_too(family: SdxlFamily, prompt: str) -> None:
    assert ours(family, prompt=prompt, seed=1, num_inference_steps=1).shape == (128, 128, 3)


def test_a_weight_of_one_changes_nothing_and_others_do(family: SdxlFamily) -> None:
    common = {"seed": 3, "num_inference_steps": 4}
    plain = ours(family, prompt="a red circle on a white background", **common).astype(int)
    one = ours(family, prompt="a (red:1.0) circle on a white background", **common)
    heavy = ours(family, prompt="a (red:1.6) circle on a white background", **common)
    light = ours(family, prompt="a (red:0.2) circle on a white background", **common)
    assert np.abs(plain - one).max() <= 2
    assert np.abs(plain - heavy).mean() > 0.5
    assert np.abs(plain - light).mean() > 0.5


def test_the_same_words_in_company_give_the_same_picture(family: SdxlFamily) -> None:
    requests = [
        family.resolve(GenerateRequest(prompt=prompt, seed=seed, num_inference_steps=3))
        for seed, prompt in enumerate((FILLER, FILLER + "a red (circle:1.4)"))
    ]
    jobs = [family.begin(request, family.encode(request)) for request in requests]
    assert family.signature(jobs[0]) == family.signature(jobs[1])
    while not jobs[0].done:
        family.step(jobs)
    for request, job in zip(requests, jobs, strict=True):
        alone = ours(family, prompt=request.prompt, seed=request.seed, num_inference_steps=3)
        assert np.abs(family.decode([job])[0].astype(int) - alone).max() <= 2


@pytest.mark.parametrize(
    ("prompt", "texts", "weights"),
    [
        ("a cat", ["a cat"], [1.0]),
        ("", [""], [1.0]),
        ("a (cat:1.3)", ["a ", "cat"], [1.0, 1.3]),
        ("(cat:.5) on (a mat: 2)!", ["cat", " on ", "a mat", "!"], [0.5, 1.0, 2.0, 1.0]),
        ("(a cat)", ["(a cat)"], [1.0]),
        (r"\(cat:1.3)", [r"\(cat:1.3)"], [1.0]),
        ("ratio (16:9)", ["ratio ", "16"], [1.0, 9.0]),
        ("(cat:-1)", ["(cat:-1)"], [1.0]),
    ],
)
def test_weights_are_read_where_a_number_stands(prompt: str, texts: list[str], weights: list[float]) -> None:
    assert fragments(prompt) == (texts, weights)


def test_a_weight_without_measure_is_refused(family: SdxlFamily) -> None:
    with pytest.raises(InvalidRequest, match="at most 10, not 99"):
        family.encode(family.resolve(GenerateRequest(prompt="a (cat:99)")))


def test_clip_skip_does_not_go_with_chunks(family: SdxlFamily) -> None:
    with pytest.raises(InvalidRequest, match="clip_skip does not go with"):
        family.encode(family.resolve(GenerateRequest(prompt=FILLER, clip_skip=1)))
