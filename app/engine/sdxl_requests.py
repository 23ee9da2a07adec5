"""What a request means to SDXL: its defaults, which sizes fit, and what of it has no effect. Nothing here computes."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from diffusers import (
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)

from app.engine.adapters import resolve as resolve_loras
from app.engine.prompts import PromptLimits
from app.engine.resolving import given, picture_size, stock_defaults
from app.engine.schedulers import CUSTOM, OPTIONS
from app.engine.sdxl_job import Part
from app.engine.sdxl_schedule import parts_of, plan
from app.errors import InvalidRequest
from app.generation import GenerateRequest, ImageTask
from app.sentences import counted, describe, no_effect

DENOISING_LIMIT = 0.8
"""Where the refiner takes over unless a request says; its authors' value."""
STOCK = {
    ImageTask.TEXT_TO_IMAGE: StableDiffusionXLPipeline,
    ImageTask.IMAGE_TO_IMAGE: StableDiffusionXLImg2ImgPipeline,
    ImageTask.INPAINT: StableDiffusionXLInpaintPipeline,
}
"""The stock pipeline of each task; its ``__call__`` has the defaults."""
SCORES = ("aesthetic_score", "negative_aesthetic_score")
NEGATIVE_SIZES = ("negative_original_size", "negative_crops_coords_top_left", "negative_target_size")
SCHEDULE = ("scheduler", *OPTIONS, *CUSTOM, "num_inference_steps", "strength", "denoising_limit", "denoising_end")
"""Parameters that say which steps there are."""


class SdxlRequests:
    """Reads requests for one loaded model; any thread may.

    Args:
        base: its first part.
        refiner: its second, where there is one.
        adapters: names of the LoRA adapters that requests may name.
    """

    def __init__(self, base: Part, refiner: Part | None, adapters: Sequence[str]) -> None:
        self._base = base
        self._refiner = refiner
        self._adapters = adapters
        self._factor: int = base.pipeline.vae_scale_factor
        self.own_size = int(base.pipeline.default_sample_size * self._factor)
        channels = base.vae.module.config.latent_channels
        self.only_inpaints: bool = base.unet.config.in_channels != channels
        encoders = filter(None, (base.pipeline.text_encoder, base.pipeline.text_encoder_2))
        self.most_clip_skip = min(encoder.config.num_hidden_layers for encoder in encoders) - 1
        self._defaults = stock_defaults(STOCK)
        self._prompt_limits = PromptLimits(base.pipeline)
        self._count = functools.lru_cache(maxsize=256)(self._count_steps)

    def resolve(self, request: GenerateRequest) -> GenerateRequest:
        default = self._defaults[request.task]
        height, width = picture_size(request, self._factor, self.own_size)
        self._check_clip_skip(request.clip_skip)
        self._check_prompts(request)
        resolved = replace(
            request,
            height=height,
            width=width,
            num_inference_steps=self._asked_steps(request, default["num_inference_steps"]),
            guidance_scale=given(request.guidance_scale, default["guidance_scale"]),
            guidance_rescale=given(request.guidance_rescale, default["guidance_rescale"]),
            strength=given(request.strength, default["strength"]) if request.image is not None else None,
            original_size=request.original_size or (height, width),
            crops_coords_top_left=request.crops_coords_top_left or default["crops_coords_top_left"],
            target_size=request.target_size or (height, width),
            scheduler=self._base.schedulers.resolve(request),
            loras=resolve_loras(request.loras, self._adapters) or None,
        )
        if self._refiner is not None:
            resolved = self._resolve_refiner(resolved)
        self._check_image(resolved)
        # What the scheduler cannot do is found out here, and not once others share its device.
        self.steps(resolved)
        return resolved

    @staticmethod
    def _asked_steps(request: GenerateRequest, default: int) -> int:
        if request.timesteps:
            return len(request.timesteps)
        if request.sigmas:
            if len(request.sigmas) < 2:
                raise InvalidRequest("sigmas must have at least 2 numbers: each step goes from one to the next.")
            return len(request.sigmas) - 1
        return default if request.num_inference_steps is None else request.num_inference_steps

    def steps(self, request: GenerateRequest) -> int:
        """Denoising steps of one picture of a resolved request, through all parts.

        Raises:
            InvalidRequest: the scheduler cannot do them.
        """
        return self._count(*(getattr(request, name) for name in SCHEDULE))

    def _count_steps(self, *schedule: Any) -> int:
        request = GenerateRequest(prompt="", seed=0, **dict(zip(SCHEDULE, schedule, strict=True)))
        return sum(len(stretch.timesteps) for stretch in plan(request, self._base, self._refiner))

    def _resolve_refiner(self, request: GenerateRequest) -> GenerateRequest:
        default = self._defaults[ImageTask.IMAGE_TO_IMAGE]
        # Who says where to stop, wants the base's latents as they are then.
        limit = DENOISING_LIMIT if request.denoising_end is None else 1.0
        return replace(
            request,
            denoising_limit=given(request.denoising_limit, limit),
            aesthetic_score=given(request.aesthetic_score, default["aesthetic_score"]),
            negative_aesthetic_score=given(request.negative_aesthetic_score, default["negative_aesthetic_score"]),
        )

    def _check_clip_skip(self, clip_skip: int | None) -> None:
        most = self.most_clip_skip
        if clip_skip is not None and clip_skip > most:
            raise InvalidRequest(f"clip_skip must be at most {most} for this model, not {describe(clip_skip)}.")

    def _check_prompts(self, request: GenerateRequest) -> None:
        for name in ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2"):
            text = getattr(request, name)
            if text:
                # The stock pipeline does not skip layers for the negative prompt.
                skips = None if name.startswith("negative") else request.clip_skip
                self._prompt_limits.check(name, text, skips)

    def _check_image(self, request: GenerateRequest) -> None:
        if self.only_inpaints and request.mask_image is None:
            raise InvalidRequest("This model only inpaints; give the inputs image and mask_image.")
        if request.strength is not None and request.num_inference_steps is not None:
            steps = request.num_inference_steps
            if int(steps * request.strength) < 1:
                raise InvalidRequest(
                    f"strength {request.strength:g} of {counted(steps, 'step')} leaves no step to do; take more steps, "
                    f"or a strength of at least {math.ceil(1000 / steps) / 1000:g}."
                )

    def warnings(self, request: GenerateRequest) -> tuple[str, ...]:
        sentences = []
        guided = self.guided(request)
        if not guided and (request.negative_prompt or request.negative_prompt_2):
            sentences.append("The negative prompt has no effect without guidance.")
        elif request.negative_prompt is None and request.negative_prompt_2 and zero_negative(self._base):
            sentences.append("negative_prompt_2 has no effect without negative_prompt.")
        if not guided:
            names = ["guidance_rescale"] if request.guidance_rescale else []
            names += ["guidance_end"] if given(request.guidance_end, 1.0) < 1 else []
            names += [name for name in NEGATIVE_SIZES if getattr(request, name) is not None]
            sentences += no_effect(names, "without guidance")
        elif request.task is ImageTask.TEXT_TO_IMAGE:
            sentences += self._lone_sizes(request)
        elif self._only_base(request) and request.negative_crops_coords_top_left is not None:
            # The stock pipelines give the negative prompt the prompt's own.
            sentences += no_effect(["negative_crops_coords_top_left"], "with an image")
        sentences += self._idle_refiner(request, guided)
        sentences += self._base.schedulers.warnings(request)
        if request.sigmas and request.sigmas[-1] > 0:
            sentences.append(f"sigmas end with {request.sigmas[-1]:g} and not 0, so that the picture keeps this noise.")
        if not self.steps(request):
            # Inpainting in full begins with nothing else.
            is_noise = request.image is None or (request.mask_image is not None and request.strength == 1)
            what = "noise" if is_noise else "the image with noise on it"
            sentences.append(f"denoising_end leaves no step to do, so that the picture is {what}.")
        return tuple(sentences)

    def _idle_refiner(self, request: GenerateRequest, guided: bool) -> list[str]:
        """About what is the refiner's, where there is none or it has nothing to do."""
        if self._refiner is None:
            names = [name for name in ("denoising_limit", *SCORES) if getattr(request, name) is not None]
            return no_effect(names, "without a refiner")
        default = self._defaults[ImageTask.IMAGE_TO_IMAGE]
        scores = [name for name in SCORES if getattr(request, name) != default[name]]
        if len(parts_of(request, self._base, self._refiner)) > 1:
            negative = [name for name in scores if name == "negative_aesthetic_score"]
            return [] if guided else no_effect(negative, "without guidance")
        sentences = no_effect(scores, "where the refiner has no steps to do")
        if request.denoising_limit is not None and request.denoising_limit < 1:
            sentences += no_effect(["denoising_limit"], "where denoising_end is not behind it")
        return sentences

    def _lone_sizes(self, request: GenerateRequest) -> list[str]:
        """The stock base wants both sizes of the negative prompt, or none of its three counts."""
        given_sizes = [name for name in NEGATIVE_SIZES if getattr(request, name) is not None]
        missing = [name for name in ("negative_original_size", "negative_target_size") if name not in given_sizes]
        if not self._only_base(request):
            # The refiner reads the other two by themselves.
            given_sizes = [name for name in given_sizes if name == "negative_target_size"]
        return no_effect(given_sizes, f"without {' and '.join(missing)}") if missing else []

    def _only_base(self, request: GenerateRequest) -> bool:
        return len(parts_of(request, self._base, self._refiner)) == 1

    def guided(self, request: GenerateRequest) -> bool:
        """Whether each step asks for the negative prompt too."""
        # Models distilled for guidance take the scale as an input instead.
        return (request.guidance_scale or 0) > 1 and self._base.unet.config.time_cond_proj_dim is None


def zero_negative(part: Part) -> bool:
    """Whether no negative prompt means zeros, and not the embedding of an empty one."""
    return bool(part.pipeline.config.force_zeros_for_empty_prompt)
