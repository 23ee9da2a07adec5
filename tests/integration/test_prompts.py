"""Prompts of any length, and weights in them: nothing that a caller writes is dropped in silence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from app.engine import prompts
from app.engine.prompts import Embedding, fragments
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


@pytest.mark.parametrize("blank", [" ", "\t", " \n "])
def test_a_weight_of_no_words_changes_nothing(family: SdxlFamily, blank: str) -> None:
    weighted = ours(family, prompt=f"a red circle ({blank}:0.5) on white", seed=1, num_inference_steps=2)
    assert np.array_equal(
        weighted, ours(family, prompt=f"a red circle {blank} on white", seed=1, num_inference_steps=2)
    )


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


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"prompt": "a (cat:99)"}, "at most 10, not 99"),
        ({"prompt": FILLER, "clip_skip": 1}, "clip_skip does not go with .*, and prompt has one or the other"),
        ({"prompt": "a (red:1.2) cat", "clip_skip": 1}, "clip_skip does not go with"),
        ({"prompt": "a", "prompt_2": FILLER, "clip_skip": 1}, "prompt_2 has one or the other"),
        # Three times as many as they look like, as each is taken apart.
        ({"prompt": "a" + "\U0001d160" * 9_999}, r"prompt has \d+ tokens, and at most 3000"),
        ({"prompt": "a", "negative_prompt": "x " * 3_001}, "negative_prompt has 3001 tokens, and at most 3000"),
        ({"prompt": "a", "prompt_2": "x " * 3_001}, "prompt_2 has 3001 tokens"),
        ({"prompt": "a", "negative_prompt_2": "x " * 3_001}, "negative_prompt_2 has 3001 tokens"),
        ({"prompt": "(a:0.5) " * 80}, "with 80 tokens and 80 such parts is 162 times; at most 80 are done"),
        ({"prompt": "(a:0.5) " * 40 + "b " * 110}, "with 150 tokens and 40 such parts is 82 times"),
        ({"prompt": "(a:0.5) b " * 2 + "c " * 2_000}, "with 2004 tokens and 2 such parts is 81 times"),
    ],
)
def test_what_the_encoders_should_not_read_is_refused_before_they_do(
    family: SdxlFamily, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        family.resolve(GenerateRequest(**parameters))


def test_a_long_negative_prompt_goes_with_clip_skip(family: SdxlFamily) -> None:
    """Layers are skipped for the prompt alone, as in the stock pipeline."""
    picture = ours(family, prompt="a red circle", negative_prompt=FILLER, clip_skip=1, seed=1, num_inference_steps=1)
    assert picture.shape == (128, 128, 3)


@pytest.mark.parametrize("prompt", ["x " * 3_000, "x" * 2_999, "(a:0.5) " * 39 + "b " * 111, "(a:0.5) " + "b " * 2_999])
def test_the_longest_prompts_are_read_in_moments(family: SdxlFamily, prompt: str) -> None:
    """Not in time that grows with the square of their length: the device waits for them, and with it everybody."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    hooks = [encoder.register_forward_hook(count) for encoder in encoders(family)]
    try:
        picture = ours(family, prompt=prompt, negative_prompt=prompt, seed=1, num_inference_steps=1)
    finally:
        for hook in hooks:
            hook.remove()
    assert picture.shape == (128, 128, 3)
    # Two encoders, a prompt that is cached for both sides, and what an empty one and the projection want.
    assert calls <= 2 * (prompts.MAX_PASSES + 3)


def test_however_prompts_are_read_encoders_are_asked_in_two_ways(family: SdxlFamily) -> None:
    """With a mask and without: a start that compiles takes longer for each way."""
    ways: set[tuple[Any, ...]] = set()

    def watch(_: Any, args: tuple[torch.Tensor, ...], options: dict[str, Any]) -> None:
        tensors = tuple((each.dtype, tuple(each.shape)) for each in args)
        ways.add((tensors, tuple(sorted(options.items()))))

    hooks = [encoder.register_forward_pre_hook(watch, with_kwargs=True) for encoder in encoders(family)]
    try:
        for words in ("plain", "a (heavy:1.4) one", "a (light:0.3) one", FILLER):
            prompt = f"{words} asked for once"
            family.encode(family.resolve(GenerateRequest(prompt=prompt, negative_prompt=FILLER * 2 + prompt)))
    finally:
        for hook in hooks:
            hook.remove()
    ids = (torch.int64, (1, 77))
    assert ways == {((ids,), (("output_hidden_states", True),)), ((ids, ids), (("output_hidden_states", True),))}


def encoders(family: SdxlFamily) -> list[Any]:
    return [family._pipeline.text_encoder, family._pipeline.text_encoder_2]


def test_a_split_reads_no_more_than_what_one_chunk_holds(family: SdxlFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    tokenizer = family._pipeline.tokenizer
    words = type(tokenizer).convert_ids_to_tokens

    def watch(self: Any, ids: Any, *rest: Any) -> Any:
        lengths.append(len(ids) if isinstance(ids, list) else 1)
        return words(self, ids, *rest)

    monkeypatch.setattr(type(tokenizer), "convert_ids_to_tokens", watch)
    family.encode(family.resolve(GenerateRequest(prompt="y " * 2_999)))
    assert lengths and max(lengths) <= 76


def test_no_more_than_so_many_embeddings_are_kept(family: SdxlFamily) -> None:
    for number in range(prompts.CACHE_SIZE + 20):
        family.encode(family.resolve(GenerateRequest(prompt=f"number {number}")))
    assert len(family._base.prompts._cache) == prompts.CACHE_SIZE


def test_embeddings_are_kept_within_bytes(family: SdxlFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    def texts() -> list[Embedding]:
        return [*family._base.prompts._cache.values()]

    monkeypatch.setattr(prompts, "CACHE_BYTES", 2_000_000)
    before = ours(family, prompt="a red circle", seed=5, num_inference_steps=1)
    for number in range(8):
        family.encode(family.resolve(GenerateRequest(prompt=f"{number} " + FILLER * 9)))
        assert 0 < sum(each.nbytes for each in texts()) <= 2_000_000
    # One that is larger than the bound is painted all the same.
    assert ours(family, prompt=FILLER * 24, seed=1, num_inference_steps=1).shape == (128, 128, 3)
    assert sum(each.nbytes for each in texts()) <= 2_000_000
    assert np.array_equal(ours(family, prompt="a red circle", seed=5, num_inference_steps=1), before)
