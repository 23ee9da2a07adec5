"""What a request means to FLUX: its defaults, what fits, and what of it has no effect. Nothing here computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline

from app.engine.adapters import resolve as resolve_loras
from app.engine.flow_schedulers import FlowSchedulers, first_step
from app.engine.resolving import given, picture_size, stock_defaults
from app.engine.tokens import TokenCounter
from app.errors import InvalidRequest
from app.generation import GenerateRequest, ImageTask
from app.sentences import no_effect

STOCK: Mapping[ImageTask, type[Any]] = MappingProxyType(
    {
        ImageTask.TEXT_TO_IMAGE: FluxPipeline,
        ImageTask.IMAGE_TO_IMAGE: FluxImg2ImgPipeline,
        ImageTask.INPAINT: FluxInpaintPipeline,
    }
)
"""The stock pipeline of each task; its ``__call__`` has the defaults."""
PARAMETERS = frozenset(
    {
        *("prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "max_sequence_length"),
        *("height", "width", "image", "mask_image", "strength", "seed", "num_images_per_prompt", "output_format"),
        *("num_inference_steps", "guidance_scale", "guidance_end", "true_cfg_scale", "loras"),
        *("scheduler", "sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
    }
)
WITHOUT_EFFECT = ("denoising_limit", "original_size", "crops_coords_top_left", "target_size")
"""What clients of SDXL send with every request: no reason to refuse it, but one to say that it does nothing."""


class FluxRequests:
    """Reads requests for one loaded model; any thread may.

    Args:
        pipeline: loaded.
        schedulers: made from the pipeline's own.
        adapters: names of the LoRA adapters that requests may name.
        least_tokens: of the picture, and of each prompt.
    """

    def __init__(
        self, pipeline: FluxPipeline, schedulers: FlowSchedulers, adapters: Sequence[str], least_tokens: int = 1
    ) -> None:
        self._schedulers = schedulers
        self._adapters = adapters
        self._least_tokens = least_tokens
        self.embeds_guidance = bool(pipeline.transformer.config.guidance_embeds)
        """Whether the transformer takes the guidance scale as an input; FLUX.1-dev does, schnell does not."""
        self.parameters = (PARAMETERS - (frozenset() if adapters else {"loras"})) | frozenset(WITHOUT_EFFECT)
        self._count_tokens = TokenCounter(pipeline.tokenizer_2)
        self._factor: int = pipeline.vae_scale_factor * 2
        self.own_size = _own_size(pipeline, self._factor)
        self._defaults = stock_defaults(STOCK)

    def resolve(self, request: GenerateRequest) -> GenerateRequest:
        default = self._defaults[request.task]
        steps = len(request.sigmas) if request.sigmas is not None else request.num_inference_steps
        height, width = picture_size(request, self._factor, self.own_size)
        resolved = replace(
            request,
            height=height,
            width=width,
            num_inference_steps=given(steps, default["num_inference_steps"]),
            # A model without a guidance embedding has no use for a default either.
            guidance_scale=given(request.guidance_scale, default["guidance_scale"] if self.embeds_guidance else None),
            true_cfg_scale=given(request.true_cfg_scale, default["true_cfg_scale"]),
            strength=given(request.strength, default["strength"]) if request.image is not None else None,
            max_sequence_length=given(request.max_sequence_length, default["max_sequence_length"]),
            scheduler=self._schedulers.resolve(request),
            loras=resolve_loras(request.loras, self._adapters) or None,
        )
        self._check_steps(resolved)
        self._check_lengths(resolved)
        self._check_shares(resolved)
        return resolved

    def _check_steps(self, request: GenerateRequest) -> None:
        assert request.num_inference_steps is not None
        if first_step(request) >= request.num_inference_steps:
            raise InvalidRequest("strength must be more than 0, or no step is left to do.")

    def _check_lengths(self, request: GenerateRequest) -> None:
        """Refuse prompts whose end T5 would not read. CLIP's 77 tokens are enough for its one pooled vector."""
        most = request.max_sequence_length
        assert most is not None
        texts = [("prompt_2", request.prompt_2) if request.prompt_2 else ("prompt", request.prompt)]
        if self.guided(request):
            second = request.negative_prompt_2
            texts.append(
                ("negative_prompt_2", second) if second else ("negative_prompt", request.negative_prompt or "")
            )
        for name, text in texts:
            count = self._count_tokens(text)
            if count > most:
                reason = "give a larger max_sequence_length" if count <= 512 else "shorten it"
                raise InvalidRequest(
                    f"{name} has {count} tokens, {count - most} more than max_sequence_length ({most}); {reason}."
                )

    def _check_shares(self, request: GenerateRequest) -> None:
        """Refuse what is too little for each of the processes that share a model to have a part of it."""
        assert request.height is not None and request.width is not None and request.max_sequence_length is not None
        least, factor = self._least_tokens, self._factor
        if request.max_sequence_length < least:
            raise InvalidRequest(
                f"max_sequence_length must be at least {least}, not {request.max_sequence_length}: so many processes "
                "share this model."
            )
        if request.height * request.width < least * factor**2:
            raise InvalidRequest(
                f"{request.height} x {request.width} pixels are too few for the {least} processes that share this "
                f"model; ask for at least {factor} x {least * factor}."
            )

    def warnings(self, request: GenerateRequest) -> tuple[str, ...]:
        sentences = []
        ignored = [name for name in WITHOUT_EFFECT if getattr(request, name) is not None]
        if ignored:
            have = "has" if len(ignored) == 1 else "have"
            sentences.append(f"{', '.join(ignored)} {have} no effect on FLUX.")
        if not self.embeds_guidance and (request.guidance_scale or 0) > 1:
            sentences.append("guidance_scale has no effect: this model was made to do without guidance.")
        if (request.true_cfg_scale or 1) > 1:
            if request.negative_prompt is None:
                sentences.append("true_cfg_scale has no effect without negative_prompt.")
        elif request.negative_prompt or request.negative_prompt_2:
            sentences.append("The negative prompt has no effect without a true_cfg_scale above 1.")
        if not self.guided(request) and request.guidance_end is not None and request.guidance_end < 1:
            sentences += no_effect(["guidance_end"], "without a true_cfg_scale above 1 and negative_prompt")
        return tuple(sentences)

    @staticmethod
    def guided(request: GenerateRequest) -> bool:
        """Whether each step asks for the negative prompt too."""
        return (request.true_cfg_scale or 1) > 1 and request.negative_prompt is not None


def _own_size(pipeline: FluxPipeline, factor: int) -> int:
    """Pixels along one side: what the VAE's configuration says that the model was made for, 1024 for FLUX.1.

    The stock pipelines take 1024 for every model, also for those that never saw so large a picture.
    """
    config = pipeline.vae.config
    if "sample_size" in config.get("_use_default_values", ()) or config.sample_size % factor:
        return int(pipeline.default_sample_size * pipeline.vae_scale_factor)
    return int(config.sample_size)
