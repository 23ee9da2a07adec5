"""What SDXL's text encoders say about a prompt: as the stock pipeline asks them, in chunks where it is too long.

``(word:1.3)`` gives a weight to words; parentheses without a number are only parentheses. Knows no latents.

An encoder runs once for each chunk, and once more for each part of a prompt that weighs less than 1: what a caller may
ask of it is limited, and told before anything waits for the device.
"""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch

from app.engine.adapters import Loras
from app.engine.tokens import TokenCounter
from app.errors import InvalidRequest

CACHE_SIZE = 128
"""Prompts whose embeddings are kept."""
CACHE_BYTES = 64 * 1024**2
"""Of all of them; a short prompt takes about 0.3 MB for SDXL in half precision, the longest 12 MB."""
MAX_TOKENS = 3000
"""Of one prompt: 40 chunks of what CLIP reads at once."""
MAX_PASSES = 80
"""Of each encoder, for one prompt."""
WEIGHT = re.compile(r"(?<!\\)\(([^():]+):\s*(\d+(?:\.\d*)?|\.\d+)\s*\)")
MAX_WEIGHT = 10.0


@dataclass(frozen=True, slots=True)
class Embedding:
    """What the text encoders say about one prompt.

    Attributes:
        hidden: ``[1, tokens, d]``, side by side where there are two encoders.
        pooled: ``[1, d]``, the last encoder's projection.
    """

    hidden: torch.Tensor
    pooled: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.hidden.nbytes + self.pooled.nbytes


def fragments(prompt: str) -> tuple[list[str], list[float]]:
    """The parts of `prompt` and the weight of each.

    Raises:
        InvalidRequest: a weight that is too large to make sense.
    """
    texts: list[str] = []
    weights: list[float] = []
    position = 0
    for match in WEIGHT.finditer(prompt):
        # What has no words has no weight: compel fails on it.
        weight = float(match[2]) if match[1].strip() else 1.0
        if weight > MAX_WEIGHT:
            raise InvalidRequest(f"The weight of words must be at most {MAX_WEIGHT:g}, not {match[2][:20]}.")
        between = prompt[position : match.start()]
        texts += [between, match[1]] if between else [match[1]]
        weights += [1.0, weight] if between else [weight]
        position = match.end()
    rest = prompt[position:]
    if rest or not texts:
        texts.append(rest)
        weights.append(1.0)
    return texts, weights


def _encoders(pipeline: Any) -> list[tuple[Any, Any]]:
    """The tokenizers and text encoders of a pipeline; SDXL's refiner has only the second ones."""
    pairs = ((pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2))
    return [(tokenizer, encoder) for tokenizer, encoder in pairs if encoder is not None]


class PromptLimits:
    """Refuses prompts that the encoders of one pipeline cannot read or should not; any thread may ask.

    Args:
        pipeline: as for `PromptEncoder`.
    """

    def __init__(self, pipeline: Any) -> None:
        tokenizers = [tokenizer for tokenizer, _ in _encoders(pipeline)]
        self._counters = [TokenCounter(tokenizer) for tokenizer in tokenizers]
        self._at_once = min(tokenizer.model_max_length for tokenizer in tokenizers)

    def check(self, name: str, text: str, clip_skip: int | None = None) -> None:
        """
        Args:
            name: of the parameter that holds `text`.
            text: a prompt.
            clip_skip: for this prompt.

        Raises:
            InvalidRequest: it has too many tokens, weights that make no sense, or more than `clip_skip` goes with.
        """
        parts, weights = fragments(text)
        # Without the special tokens at both ends.
        count = max(sum(counter(part) - 2 for part in parts) for counter in self._counters)
        at_once = self._at_once - 2
        if count > MAX_TOKENS:
            raise InvalidRequest(f"{name} has {count} tokens, and at most {MAX_TOKENS} are read; shorten it.")
        chunks, light = max(1, math.ceil(count / at_once)), sum(weight < 1 for weight in weights)
        if chunks * (1 + light) > MAX_PASSES:
            raise InvalidRequest(
                f"{name} is read {at_once} tokens at a time and once more for each part with a weight below 1, which "
                f"with {count} tokens and {light} such parts is {chunks * (1 + light)} times; at most {MAX_PASSES} "
                "are done, so shorten it or leave out such weights."
            )
        if clip_skip is not None and (count > at_once or WEIGHT.search(text)):
            raise InvalidRequest(
                f"clip_skip does not go with weights like (word:1.3) or with more than {at_once} tokens, and {name} "
                "has one or the other."
            )


class _Encoder:
    """A text encoder for compel, asked in the stock pipeline's way, with a mask or without: compel's own ways are more,
    and each would be compiled for itself.

    Attributes:
        device: where it computes and its embeddings are wanted; its weights may wait elsewhere, or nowhere.
    """

    def __init__(self, module: Any, device: torch.device) -> None:
        self._module = module
        self.device = device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._module.dtype
        return dtype

    def __call__(self, token_ids: torch.Tensor, mask: torch.Tensor | None = None, **_: Any) -> Any:
        masks = () if mask is None else (mask,)
        return self._module(token_ids.long(), *masks, output_hidden_states=True)


class PromptEncoder:
    """The text encoders of one pipeline; used on the device thread alone.

    Args:
        pipeline: SDXL's base with two encoders, or its refiner with only the second.
        device: where embeddings are wanted.
    """

    def __init__(self, pipeline: Any, device: torch.device) -> None:
        self._pipeline = pipeline
        self._device = device
        self._encoders = _encoders(pipeline)
        self._cache: collections.OrderedDict[Hashable, Embedding] = collections.OrderedDict()
        self._cached_bytes = 0

    def encode(self, prompt: str, prompt_2: str | None, clip_skip: int | None, loras: Loras) -> Embedding:
        """The embedding of one prompt within `PromptLimits`, cached.

        Args:
            prompt: for the first encoder, or for the only one.
            prompt_2: for the second encoder; the prompt unless given.
            clip_skip: layers to skip, counted from the last but one.
            loras: the adapters that are active; a part of the cache's key.
        """
        key = (prompt, prompt_2 or prompt, clip_skip, loras)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        texts = [prompt, prompt_2 or prompt][: len(self._encoders)]
        if self._plain(texts):
            hidden, _, pooled, _ = self._pipeline.encode_prompt(
                prompt=prompt,
                prompt_2=prompt_2,
                device=self._device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
                clip_skip=clip_skip,
            )
            embedding = Embedding(hidden, pooled)
        else:
            embedding = self._chunked(texts)
        self._cache[key] = embedding
        self._cached_bytes += embedding.nbytes
        while self._cached_bytes > CACHE_BYTES or len(self._cache) > CACHE_SIZE:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= oldest.nbytes
        return embedding

    def _plain(self, texts: list[str]) -> bool:
        """Whether the stock pipeline reads all of it."""
        return not any(
            WEIGHT.search(text) or len(tokenizer(text).input_ids) > tokenizer.model_max_length
            for text, (tokenizer, _) in zip(texts, self._encoders, strict=True)
        )

    @functools.cached_property
    def _providers(self) -> list[Any]:
        # Imported for the first prompt that needs it: the start of the server does not wait for it.
        from compel import EmbeddingsProvider, ReturnedEmbeddingsType

        class Provider(EmbeddingsProvider):  # type: ignore[misc]
            def _find_next_best_split_point(self, token_ids: list[int], max_length: int, *rest: Any) -> int:
                # Only what one chunk holds can matter, but all that is left would be turned into words each time.
                split: int = super()._find_next_best_split_point(token_ids[: max_length + 1], max_length, *rest)
                return split

        return [
            Provider(
                tokenizer,
                _Encoder(encoder, self._device),
                truncate=False,
                returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
                device=self._device,
            )
            for tokenizer, encoder in self._encoders
        ]

    def _chunked(self, texts: list[str]) -> Embedding:
        parts = []
        for text, provider in zip(texts, self._providers, strict=True):
            words, weights = fragments(text)
            parts.append(provider.get_embeddings_for_weighted_prompt_fragments([words], [weights], device=self._device))
        longest = max(part.shape[1] for part in parts)
        parts = [
            torch.cat([part, *[provider.empty_z] * ((longest - part.shape[1]) // provider.empty_z.shape[1])], dim=1)
            for part, provider in zip(parts, self._providers, strict=True)
        ]
        # The projection reads one chunk; the first says what the picture is about.
        unweighted = "".join(fragments(texts[-1])[0])
        pooled = self._providers[-1].get_pooled_embeddings([unweighted], device=self._device)
        hidden = torch.cat(parts, dim=-1)
        return Embedding(hidden, pooled.to(hidden.dtype))

    def pad(self, embedding: Embedding, tokens: int, loras: Loras) -> Embedding:
        """`embedding` with empty chunks behind it up to `tokens`, so that both sides of guidance are as long."""
        missing = tokens - embedding.hidden.shape[1]
        if missing <= 0:
            return embedding
        empty = self.encode("", None, None, loras).hidden
        chunks = [empty] * (missing // empty.shape[1])
        return Embedding(torch.cat([embedding.hidden, *chunks], dim=1), embedding.pooled)
