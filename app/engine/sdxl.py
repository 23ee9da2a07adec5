"""Stable Diffusion XL in the four stages of a family, built from a loaded pipeline's own components.

Alone, a job gives the picture that the stock pipeline's ``__call__`` gives for the same weights, seed and parameters.
"""

from __future__ import annotations

import collections
import functools
import inspect
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg
from diffusers.utils.torch_utils import randn_tensor

from app.engine import schedulers
from app.engine.family import Family, Job
from app.errors import GenerationFailed, InvalidRequest, OutOfMemory
from app.generation import GenerateRequest, describe

P = ParamSpec("P")
R = TypeVar("R")

EMBEDDING_CACHE_SIZE = 128
"""Prompts whose embeddings are kept; each takes about 0.3 MB for SDXL in half precision."""


def on_device(method: Callable[P, R]) -> Callable[P, R]:
    """Run without gradients, and report a full device as our own error."""

    @functools.wraps(method)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with torch.inference_mode():
                return method(*args, **kwargs)
        except torch.OutOfMemoryError:
            full = "The device has too little memory for this request; ask for a smaller size or fewer images."
        # Raised outside the except block: the old traceback would keep the tensors alive.
        torch.cuda.empty_cache()
        raise OutOfMemory(full)

    return wrapper


@dataclass(frozen=True, slots=True)
class Embedding:
    """What both text encoders say about one prompt.

    Attributes:
        hidden: ``[1, tokens, d1 + d2]``.
        pooled: ``[1, d]``, the second encoder's projection.
    """

    hidden: torch.Tensor
    pooled: torch.Tensor


@dataclass(frozen=True, slots=True)
class Conditioning:
    positive: Embedding
    negative: Embedding | None
    """``None`` where the request has no guidance."""


@dataclass(slots=True, kw_only=True)
class SdxlJob(Job):
    """One image on its way through the UNet.

    Attributes:
        latents: ``[1, c, h / 8, w / 8]``.
        timesteps: float32 ``[num_steps]`` on the device, so that no step waits for it.
        embeddings: ``[rows, tokens, d]``; a guided job has two rows, the negative one first.
        pooled: ``[rows, d]``.
        time_ids: ``[rows, 6]``: original size, crop, target size.
        guidance: ``[1, 1, 1, 1]``, float32 on the device.
        rescale: guidance rescale and 1 minus it, in the same shape.
    """

    latents: torch.Tensor
    scheduler: Any
    scheduler_timesteps: torch.Tensor
    step_options: dict[str, Any]
    timesteps: torch.Tensor
    embeddings: torch.Tensor
    pooled: torch.Tensor
    time_ids: torch.Tensor
    guided: bool
    guidance: torch.Tensor
    rescale: tuple[torch.Tensor, torch.Tensor] | None
    timestep_cond: torch.Tensor | None


class SdxlFamily(Family[SdxlJob]):
    """Stable Diffusion XL base.

    Args:
        pipeline: loaded, on its device; its components are used, its ``__call__`` never.
    """

    def __init__(self, pipeline: StableDiffusionXLPipeline) -> None:
        self._pipeline = pipeline
        self._unet = pipeline.unet
        self._vae = pipeline.vae
        self._device = pipeline.unet.device
        self._schedulers = schedulers.Schedulers(pipeline.scheduler)
        self._embeddings: collections.OrderedDict[Hashable, Embedding] = collections.OrderedDict()
        encoders = filter(None, (pipeline.text_encoder, pipeline.text_encoder_2))
        self.maxima = {"clip_skip": min(encoder.config.num_hidden_layers for encoder in encoders) - 1}
        self._default_size = pipeline.default_sample_size * pipeline.vae_scale_factor
        self._call_defaults = {
            name: parameter.default for name, parameter in inspect.signature(pipeline.__call__).parameters.items()
        }

    # --- resolve -----------------------------------------------------------------------------------------------

    def resolve(self, request: GenerateRequest) -> GenerateRequest:
        height = self._fit("height", request.height)
        width = self._fit("width", request.width)
        self._check_clip_skip(request.clip_skip)
        default = self._call_defaults
        return replace(
            request,
            height=height,
            width=width,
            num_inference_steps=_given(request.num_inference_steps, default["num_inference_steps"]),
            guidance_scale=_given(request.guidance_scale, default["guidance_scale"]),
            guidance_rescale=_given(request.guidance_rescale, default["guidance_rescale"]),
            original_size=request.original_size or (height, width),
            crops_coords_top_left=request.crops_coords_top_left or default["crops_coords_top_left"],
            target_size=request.target_size or (height, width),
            scheduler=self._schedulers.resolve(request.scheduler),
        )

    def _fit(self, name: str, size: int | None) -> int:
        factor: int = self._pipeline.vae_scale_factor
        if size is None:
            return int(self._default_size)
        if size % factor:
            below, above = size // factor * factor, (size // factor + 1) * factor
            fitting = f"{below} and {above}" if below else f"{above}"
            raise InvalidRequest(f"{name} must be a multiple of {factor}, not {size}; the nearest fitting: {fitting}.")
        return size

    def _check_clip_skip(self, clip_skip: int | None) -> None:
        most = self.maxima["clip_skip"]
        if clip_skip is not None and clip_skip > most:
            raise InvalidRequest(f"clip_skip must be at most {most} for this model, not {describe(clip_skip)}.")

    def warnings(self, request: GenerateRequest) -> tuple[str, ...]:
        sentences = []
        for name in ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2"):
            text = getattr(request, name)
            tokenizer = self._pipeline.tokenizer_2 if name.endswith("_2") else self._pipeline.tokenizer
            if text is not None:
                count, most = len(tokenizer(text).input_ids), tokenizer.model_max_length
                if count > most:
                    sentences.append(f"{name} has {count - 2} tokens, of which the model reads {most - 2}.")
        if not self._guided(request) and (request.negative_prompt or request.negative_prompt_2):
            sentences.append("The negative prompt has no effect without guidance.")
        elif request.negative_prompt is None and request.negative_prompt_2 and self._zero_negative():
            sentences.append("negative_prompt_2 has no effect without negative_prompt.")
        return tuple(sentences)

    def _guided(self, request: GenerateRequest) -> bool:
        # Models distilled for guidance take the scale as an input instead.
        return (request.guidance_scale or 0) > 1 and self._unet.config.time_cond_proj_dim is None

    def _zero_negative(self) -> bool:
        return bool(self._pipeline.config.force_zeros_for_empty_prompt)

    # --- encode ------------------------------------------------------------------------------------------------

    @on_device
    def encode(self, request: GenerateRequest) -> Conditioning:
        positive = self._embed(request.prompt, request.prompt_2, request.clip_skip)
        if not self._guided(request):
            return Conditioning(positive, None)
        if request.negative_prompt is None and self._zero_negative():
            zeros = Embedding(torch.zeros_like(positive.hidden), torch.zeros_like(positive.pooled))
            return Conditioning(positive, zeros)
        # The stock pipeline does not skip layers for the negative prompt.
        negative = self._embed(request.negative_prompt or "", request.negative_prompt_2, None)
        return Conditioning(positive, negative)

    def _embed(self, prompt: str, prompt_2: str | None, clip_skip: int | None) -> Embedding:
        key = (prompt, prompt_2 or prompt, clip_skip)
        if key in self._embeddings:
            self._embeddings.move_to_end(key)
            return self._embeddings[key]
        hidden, _, pooled, _ = self._pipeline.encode_prompt(
            prompt=prompt,
            prompt_2=prompt_2,
            device=self._device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            clip_skip=clip_skip,
        )
        embedding = self._embeddings[key] = Embedding(hidden, pooled)
        if len(self._embeddings) > EMBEDDING_CACHE_SIZE:
            self._embeddings.popitem(last=False)
        return embedding

    # --- begin -------------------------------------------------------------------------------------------------

    @on_device
    def begin(self, request: GenerateRequest, conditioning: Conditioning) -> SdxlJob:
        assert request.height and request.width and request.seed is not None and request.guidance_scale is not None
        generator = torch.Generator().manual_seed(request.seed)
        scheduler, timesteps = self._schedulers.begin(request, self._device)
        dtype = conditioning.positive.hidden.dtype
        factor = self._pipeline.vae_scale_factor
        shape = (1, self._unet.config.in_channels, request.height // factor, request.width // factor)
        # The noise comes from the CPU, so that a seed means the same picture on every device.
        latents = randn_tensor(shape, generator=generator, device=self._device, dtype=dtype)
        latents = latents * scheduler.init_noise_sigma

        embeddings = [conditioning.positive]
        if conditioning.negative is not None:
            embeddings.insert(0, conditioning.negative)
        rows = len(embeddings)
        guidance_rescale = request.guidance_rescale if rows == 2 else None
        return SdxlJob(
            request=request,
            num_steps=len(timesteps),
            latents=latents,
            scheduler=scheduler,
            scheduler_timesteps=timesteps,
            step_options=schedulers.step_options(scheduler, generator),
            timesteps=timesteps.to(torch.float32),
            embeddings=torch.cat([embedding.hidden for embedding in embeddings]),
            pooled=torch.cat([embedding.pooled for embedding in embeddings]),
            time_ids=self._time_ids(request, dtype).repeat(rows, 1),
            guided=rows == 2,
            guidance=self._scalar(request.guidance_scale),
            rescale=(self._scalar(guidance_rescale), self._scalar(1 - guidance_rescale)) if guidance_rescale else None,
            timestep_cond=self._timestep_cond(request.guidance_scale, dtype),
        )

    def _time_ids(self, request: GenerateRequest, dtype: torch.dtype) -> torch.Tensor:
        ids: torch.Tensor = self._pipeline._get_add_time_ids(
            request.original_size,
            request.crops_coords_top_left,
            request.target_size,
            dtype=dtype,
            text_encoder_projection_dim=self._pipeline.text_encoder_2.config.projection_dim,
        )
        return ids.to(self._device)

    def _scalar(self, value: float) -> torch.Tensor:
        return torch.full((1, 1, 1, 1), value, dtype=torch.float32, device=self._device)

    def _timestep_cond(self, guidance_scale: float, dtype: torch.dtype) -> torch.Tensor | None:
        dimension = self._unet.config.time_cond_proj_dim
        if dimension is None:
            return None
        scale = torch.tensor([guidance_scale - 1])
        embedding: torch.Tensor = self._pipeline.get_guidance_scale_embedding(scale, embedding_dim=dimension)
        return embedding.to(device=self._device, dtype=dtype)

    # --- step --------------------------------------------------------------------------------------------------

    def signature(self, job: SdxlJob) -> Hashable:
        return ("base", tuple(job.latents.shape), job.latents.dtype)

    @on_device
    def step(self, jobs: Sequence[SdxlJob]) -> None:
        # Rows: the negative ones of all guided jobs, then the positive ones of all jobs.
        guided = [job for job in jobs if job.guided]
        row_jobs = [*guided, *jobs]
        scaled = {
            id(job): job.scheduler.scale_model_input(job.latents, job.scheduler_timesteps[job.step_index])
            for job in jobs
        }
        negative = slice(0, 1)
        positive = slice(-1, None)
        parts = [(job, negative) for job in guided] + [(job, positive) for job in jobs]
        predicted = self._unet(
            torch.cat([scaled[id(job)] for job in row_jobs]),
            torch.stack([job.timesteps[job.step_index] for job in row_jobs]),
            encoder_hidden_states=torch.cat([job.embeddings[row] for job, row in parts]),
            timestep_cond=_cat_or_none([job.timestep_cond for job in row_jobs]),
            added_cond_kwargs={
                "text_embeds": torch.cat([job.pooled[row] for job, row in parts]),
                "time_ids": torch.cat([job.time_ids[row] for job, row in parts]),
            },
            return_dict=False,
        )[0]
        noise = dict(zip(map(id, jobs), predicted[len(guided) :].chunk(len(jobs)), strict=True))
        if guided:
            steered = self._guide(guided, predicted[: len(guided)], torch.cat([noise[id(job)] for job in guided]))
            noise.update(zip(map(id, guided), steered.chunk(len(guided)), strict=True))
        for job in jobs:
            timestep = job.scheduler_timesteps[job.step_index]
            stepped = job.scheduler.step(noise[id(job)], timestep, job.latents, **job.step_options, return_dict=False)
            job.latents = stepped[0]
            job.step_index += 1

    @staticmethod
    def _guide(jobs: Sequence[SdxlJob], negative: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
        """Classifier-free guidance with each job's own scale; ``[n, c, h, w]`` in and out."""
        scale = torch.cat([job.guidance for job in jobs]).to(negative.dtype)
        steered = negative + scale * (positive - negative)
        if not any(job.rescale for job in jobs):
            return steered
        parts = zip(jobs, steered.chunk(len(jobs)), positive.chunk(len(jobs)), strict=True)
        return torch.cat([_rescale(job, one, text) for job, one, text in parts])

    # --- decode ------------------------------------------------------------------------------------------------

    @on_device
    def decode(self, jobs: Sequence[SdxlJob], tiled: bool = False) -> np.ndarray:
        del tiled
        latents = torch.cat([job.latents for job in jobs]).to(self._vae.dtype)
        config = self._vae.config
        mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is not None and deviation is not None:
            view = (1, -1, 1, 1)
            latents = latents * latents.new_tensor(deviation).view(view) / config.scaling_factor
            latents = latents + latents.new_tensor(mean).view(view)
        else:
            latents = latents / config.scaling_factor
        image = self._vae.decode(latents, return_dict=False)[0]
        if not torch.isfinite(image).all():
            raise GenerationFailed(
                "The picture came out as numbers that are not finite; take another scheduler, more steps or less "
                "guidance, or serve the model with another dtype."
            )
        # As VaeImageProcessor rounds, without the detour over floats in numpy and PIL.
        image = (image * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float()
        pixels: np.ndarray = (image * 255).round().to(torch.uint8).cpu().numpy()
        return pixels


def _rescale(job: SdxlJob, steered: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    if job.rescale is None:
        return steered
    full: torch.Tensor = rescale_noise_cfg(steered, positive, guidance_rescale=1.0)
    amount, rest = (part.to(steered.dtype) for part in job.rescale)
    return amount * full + rest * steered


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def _cat_or_none(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None
