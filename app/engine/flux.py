"""FLUX in the four stages of a family: text to image, image to image and inpainting, from a loaded pipeline's parts.

Alone, a job gives the picture that the stock pipelines' ``__call__`` gives for the same weights, seed and parameters.
"""

from __future__ import annotations

import collections
import copy
import inspect
import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline
from diffusers.utils.torch_utils import randn_tensor

from app import images
from app.engine import adapters, schedulers
from app.engine.adapters import Adapters, Loras
from app.engine.device import on_device
from app.engine.family import Family, Job
from app.engine.flow_schedulers import FlowSchedulers, first_step
from app.engine.vae import Vae
from app.errors import InvalidRequest
from app.generation import GenerateRequest, ImageTask

EMBEDDING_CACHE_SIZE = 32
"""Prompts whose embeddings are kept; each takes 4 MB for FLUX.1 in half precision."""
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
        *("num_inference_steps", "guidance_scale", "true_cfg_scale", "loras"),
        *("scheduler", "sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
    }
)
WITHOUT_EFFECT = ("denoising_limit", "original_size", "crops_coords_top_left", "target_size")
"""What clients of SDXL send with every request: no reason to refuse it, but one to say that it does nothing."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """What both text encoders say about one prompt.

    Attributes:
        hidden: ``[1, tokens, d]``, T5's.
        pooled: ``[1, d]``, CLIP's.
        ids: ``[tokens, 3]``, the positions of the tokens, which are all 0.
    """

    hidden: torch.Tensor
    pooled: torch.Tensor
    ids: torch.Tensor


@dataclass(frozen=True, slots=True)
class Conditioning:
    positive: Embedding
    negative: Embedding | None
    """``None`` where the request has no true classifier-free guidance."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What inpainting keeps of the input image.

    Attributes:
        latents: of the image, packed.
        noise: what `latents` are noised with before they take part in a step.
        mask: 1 where to paint, 0 where to keep; all three ``[1, tokens, c]``.
        noise_levels: ``[n]`` on the device, one for each of the scheduler's steps and the last, 0.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    mask: torch.Tensor
    noise_levels: torch.Tensor


@dataclass(slots=True, kw_only=True)
class FluxJob(Job):
    """One image on its way through the transformer.

    Attributes:
        latents: ``[1, tokens, 4 c]``, packed: one token holds two by two latents.
        scheduler_timesteps: ``[num_steps]`` on the CPU, as the scheduler wants them.
        timesteps: ``[num_steps]`` on the device, between 0 and 1, as the transformer wants them.
        guidance: ``[1]``, float32 on the device, or ``None`` where the transformer has no guidance embedding.
        true_cfg_scale: counts where `conditioning` has a negative prompt.
        image_ids: ``[tokens, 3]``, the row and column of every token.
    """

    conditioning: Conditioning
    latents: torch.Tensor
    scheduler: Any
    scheduler_timesteps: torch.Tensor
    step_options: dict[str, Any]
    timesteps: torch.Tensor
    guidance: torch.Tensor | None
    true_cfg_scale: float
    image_ids: torch.Tensor
    kept: Kept | None
    loras: Loras


class FluxFamily(Family[FluxJob]):
    """FLUX.1 dev, schnell and their relatives.

    Args:
        pipeline: loaded, on its device; its components are used, its ``__call__`` never.
        loaded: LoRA adapters of the pipeline.
    """

    def __init__(self, pipeline: FluxPipeline, loaded: Adapters | None = None) -> None:
        self._pipeline = pipeline
        self._adapters = loaded
        self._transformer = pipeline.transformer
        self._device: torch.device = pipeline._execution_device
        # Only for its helpers; the pipeline itself has none that reads an image.
        self._inpaint = FluxInpaintPipeline(**pipeline.components)
        self._vae = Vae(pipeline.vae, self._inpaint.image_processor)
        self.parameters = (PARAMETERS - (frozenset() if loaded else {"loras"})) | frozenset(WITHOUT_EFFECT)
        self._schedulers = FlowSchedulers(pipeline.scheduler)
        self._embeddings: collections.OrderedDict[Hashable, Embedding] = collections.OrderedDict()
        # `resolve` counts tokens on any thread, while the device thread has the pipeline's own tokenizer.
        self._tokenizer = copy.deepcopy(pipeline.tokenizer_2)
        self._tokenizer_lock = threading.Lock()
        self._factor: int = pipeline.vae_scale_factor * 2
        self._default_size = self._read_default_size()
        self._call_defaults = {
            task: {name: each.default for name, each in inspect.signature(stock.__call__).parameters.items()}
            for task, stock in STOCK.items()
        }

    def _read_default_size(self) -> int:
        """Pixels along one side: what the VAE's configuration says that the model was made for, 1024 for FLUX.1.

        The stock pipelines take 1024 for every model, also for those that never saw so large a picture.
        """
        config = self._vae.module.config
        if "sample_size" in config.get("_use_default_values", ()) or config.sample_size % self._factor:
            return int(self._pipeline.default_sample_size * self._pipeline.vae_scale_factor)
        return int(config.sample_size)

    # --- resolve -----------------------------------------------------------------------------------------------

    def resolve(self, request: GenerateRequest) -> GenerateRequest:
        default = self._call_defaults[request.task]
        steps = len(request.sigmas) if request.sigmas is not None else request.num_inference_steps
        height, width = self._size(request)
        resolved = replace(
            request,
            height=height,
            width=width,
            num_inference_steps=_given(steps, default["num_inference_steps"]),
            # A model without a guidance embedding has no use for a default either.
            guidance_scale=_given(request.guidance_scale, default["guidance_scale"] if self._embeds_guidance else None),
            true_cfg_scale=_given(request.true_cfg_scale, default["true_cfg_scale"]),
            strength=_given(request.strength, default["strength"]) if request.image is not None else None,
            max_sequence_length=_given(request.max_sequence_length, default["max_sequence_length"]),
            scheduler=self._schedulers.resolve(request),
            loras=adapters.resolve(request.loras, self._adapters.names if self._adapters else ()) or None,
        )
        self._check_steps(resolved)
        self._check_lengths(resolved)
        return resolved

    @property
    def _embeds_guidance(self) -> bool:
        return bool(self._transformer.config.guidance_embeds)

    def _size(self, request: GenerateRequest) -> tuple[int, int]:
        """Height and width: as asked, or the input image's own, or the model's."""
        sides = {"height": request.height, "width": request.width}
        own = request.image
        assert not isinstance(own, bytes)
        for name, size in sides.items():
            if size is not None:
                self._check_side(name, size)
            elif own is None:
                sides[name] = self._default_size
            else:
                sides[name] = getattr(own, name)
                if getattr(own, name) % self._factor:
                    fitting = f"{self._nearest(own.height)} and {self._nearest(own.width)}"
                    raise InvalidRequest(
                        f"The image is {own.height} pixels high and {own.width} wide, and both must be multiples of "
                        f"{self._factor}; give height and width, such as {fitting}, to have it resized."
                    )
        assert sides["height"] is not None and sides["width"] is not None
        return sides["height"], sides["width"]

    def _nearest(self, size: int) -> int:
        return max(1, round(size / self._factor)) * self._factor

    def _check_side(self, name: str, size: int) -> None:
        factor = self._factor
        if size % factor:
            below, above = size // factor * factor, (size // factor + 1) * factor
            fitting = f"{below} and {above}" if below else f"{above}"
            raise InvalidRequest(f"{name} must be a multiple of {factor}, not {size}; the nearest fitting: {fitting}.")

    def _check_steps(self, request: GenerateRequest) -> None:
        assert request.num_inference_steps is not None
        if first_step(request) >= request.num_inference_steps:
            raise InvalidRequest("strength must be more than 0, or no step is left to do.")

    def _check_lengths(self, request: GenerateRequest) -> None:
        """Refuse prompts whose end T5 would not read. CLIP's 77 tokens are enough for its one pooled vector."""
        most = request.max_sequence_length
        assert most is not None
        texts = [("prompt_2", request.prompt_2) if request.prompt_2 else ("prompt", request.prompt)]
        if self._guided(request):
            second = request.negative_prompt_2
            texts.append(
                ("negative_prompt_2", second) if second else ("negative_prompt", request.negative_prompt or "")
            )
        for name, text in texts:
            with self._tokenizer_lock:
                count = len(self._tokenizer(text, truncation=False, verbose=False).input_ids)
            if count > most:
                reason = "give a larger max_sequence_length" if count <= 512 else "shorten it"
                raise InvalidRequest(
                    f"{name} has {count} tokens, {count - most} more than max_sequence_length ({most}); {reason}."
                )

    def warnings(self, request: GenerateRequest) -> tuple[str, ...]:
        sentences = []
        ignored = [name for name in WITHOUT_EFFECT if getattr(request, name) is not None]
        if ignored:
            have = "has" if len(ignored) == 1 else "have"
            sentences.append(f"{', '.join(ignored)} {have} no effect on FLUX.")
        if not self._embeds_guidance and (request.guidance_scale or 0) > 1:
            sentences.append("guidance_scale has no effect: this model was made to do without guidance.")
        if (request.true_cfg_scale or 1) > 1:
            if request.negative_prompt is None:
                sentences.append("true_cfg_scale has no effect without negative_prompt.")
        elif request.negative_prompt or request.negative_prompt_2:
            sentences.append("The negative prompt has no effect without a true_cfg_scale above 1.")
        return tuple(sentences)

    @staticmethod
    def _guided(request: GenerateRequest) -> bool:
        return (request.true_cfg_scale or 1) > 1 and request.negative_prompt is not None

    # --- encode ------------------------------------------------------------------------------------------------

    @on_device
    def encode(self, request: GenerateRequest) -> Conditioning:
        self._activate(request.loras or ())
        positive = self._embed(request, request.prompt, request.prompt_2)
        if not self._guided(request):
            return Conditioning(positive, None)
        return Conditioning(positive, self._embed(request, request.negative_prompt or "", request.negative_prompt_2))

    def _activate(self, loras: Loras) -> None:
        if self._adapters is not None:
            self._adapters.activate(loras)

    def _embed(self, request: GenerateRequest, prompt: str, prompt_2: str | None) -> Embedding:
        # Adapters may change the text encoders too.
        key = (prompt, prompt_2 or prompt, request.max_sequence_length, request.loras)
        if key in self._embeddings:
            self._embeddings.move_to_end(key)
            return self._embeddings[key]
        embedding = Embedding(
            *self._pipeline.encode_prompt(
                prompt, prompt_2, self._device, max_sequence_length=request.max_sequence_length
            )
        )
        self._embeddings[key] = embedding
        if len(self._embeddings) > EMBEDDING_CACHE_SIZE:
            self._embeddings.popitem(last=False)
        return embedding

    # --- begin -------------------------------------------------------------------------------------------------

    @on_device
    def begin(self, request: GenerateRequest, conditioning: Conditioning) -> FluxJob:
        assert request.seed is not None and request.true_cfg_scale is not None
        rows, columns = self._grid(request)
        dtype = conditioning.positive.hidden.dtype
        # The noise comes from the CPU, so that a seed means the same picture on every device.
        generator = torch.Generator().manual_seed(request.seed)
        scheduler, timesteps = self._schedulers.begin(request, rows * columns)
        latents, kept = self._start(request, scheduler, generator, dtype)
        guidance = None
        if self._embeds_guidance:
            assert request.guidance_scale is not None
            guidance = torch.full([1], request.guidance_scale, device=self._device, dtype=torch.float32)
        return FluxJob(
            request=request,
            num_steps=len(timesteps),
            conditioning=conditioning,
            latents=latents,
            scheduler=scheduler,
            scheduler_timesteps=timesteps,
            step_options=schedulers.step_options(scheduler, generator, eta=0.0),
            timesteps=timesteps.to(device=self._device, dtype=dtype) / 1000,
            guidance=guidance,
            true_cfg_scale=request.true_cfg_scale,
            image_ids=self._pipeline._prepare_latent_image_ids(1, rows, columns, self._device, dtype),
            kept=kept,
            loras=request.loras or (),
        )

    def _grid(self, request: GenerateRequest) -> tuple[int, int]:
        """Rows and columns of tokens."""
        assert request.height is not None and request.width is not None
        return request.height // self._factor, request.width // self._factor

    def _start(
        self, request: GenerateRequest, scheduler: Any, generator: torch.Generator, dtype: torch.dtype
    ) -> tuple[torch.Tensor, Kept | None]:
        """Packed latents before the first step, and what inpainting keeps; draws in the stock pipelines' order."""
        rows, columns = self._grid(request)
        channels = self._transformer.config.in_channels // 4
        shape = (1, channels, 2 * rows, 2 * columns)
        if request.image is None:
            return self._pack(randn_tensor(shape, generator=generator, device=self._device, dtype=dtype)), None

        assert not isinstance(request.image, bytes) and not isinstance(request.mask_image, bytes)
        assert request.height is not None and request.width is not None
        picture = self._vae.preprocess(request.image, request.height, request.width)
        image_latents = self._vae.encode(picture, generator, self._device, dtype)
        noise = randn_tensor(shape, generator=generator, device=self._device, dtype=dtype)
        latents = scheduler.scale_noise(image_latents, scheduler.timesteps[first_step(request)].reshape(1), noise)
        if request.mask_image is None:
            return self._pack(latents), None

        mask = self._inpaint.mask_processor.preprocess(
            images.to_pil(request.mask_image), height=request.height, width=request.width
        )
        mask = torch.nn.functional.interpolate(mask, size=shape[2:]).to(device=self._device, dtype=dtype)
        kept = Kept(
            latents=self._pack(image_latents),
            noise=self._pack(noise),
            mask=self._pack(mask.repeat(1, channels, 1, 1)),
            noise_levels=scheduler.sigmas.to(device=self._device, dtype=dtype),
        )
        return self._pack(latents), kept

    def _pack(self, latents: torch.Tensor) -> torch.Tensor:
        packed: torch.Tensor = self._pipeline._pack_latents(latents, *latents.shape)
        return packed

    # --- step --------------------------------------------------------------------------------------------------

    def signature(self, job: FluxJob) -> Hashable:
        # The transformer takes one set of positions for all rows, so tokens must lie in the same grid.
        return (self._grid(job.request), job.conditioning.positive.hidden.shape[1], job.latents.dtype, job.loras)

    def rows(self, job: FluxJob) -> int:
        return 1 if job.conditioning.negative is None else 2

    @on_device
    def step(self, jobs: Sequence[FluxJob]) -> None:
        self._activate(jobs[0].loras)
        # Rows: the positive ones of all jobs, then the negative ones of those that have any.
        rows = [(job, job.conditioning.positive) for job in jobs]
        rows += [(job, job.conditioning.negative) for job in jobs if job.conditioning.negative is not None]
        # Alone, a job gets a pass for each of its rows, as in the stock pipelines; in company all rows go together.
        passes = [[row] for row in rows] if len(jobs) == 1 else [rows]
        predicted = [direction for each in passes for direction in self._predict(each)]
        directions = dict(zip(map(id, jobs), predicted, strict=False))
        for (job, _), away in zip(rows[len(jobs) :], predicted[len(jobs) :], strict=True):
            directions[id(job)] = away + job.true_cfg_scale * (directions[id(job)] - away)
        for job in jobs:
            self._advance(job, directions[id(job)])

    def _predict(self, rows: Sequence[tuple[FluxJob, Embedding]]) -> tuple[torch.Tensor, ...]:
        """One forward pass: the direction from picture to noise for each of `rows`, ``[1, tokens, 4 c]``."""
        job, embedding = rows[0]
        predicted: torch.Tensor = self._transformer(
            hidden_states=torch.cat([job.latents for job, _ in rows]),
            timestep=torch.stack([job.timesteps[job.step_index] for job, _ in rows]),
            guidance=_cat_or_none([job.guidance for job, _ in rows]),
            pooled_projections=torch.cat([embedding.pooled for _, embedding in rows]),
            encoder_hidden_states=torch.cat([embedding.hidden for _, embedding in rows]),
            txt_ids=embedding.ids,
            img_ids=job.image_ids,
            return_dict=False,
        )[0]
        return predicted.chunk(len(rows))

    @staticmethod
    def _advance(job: FluxJob, direction: torch.Tensor) -> None:
        timestep = job.scheduler_timesteps[job.step_index]
        latents = job.scheduler.step(direction, timestep, job.latents, **job.step_options, return_dict=False)[0]
        job.step_index += 1
        if job.kept is not None:
            kept = job.kept.latents
            if not job.done:
                level = job.kept.noise_levels[job.scheduler.step_index]
                kept = level * job.kept.noise + (1.0 - level) * kept
            latents = (1 - job.kept.mask) * kept + job.kept.mask * latents
        job.latents = latents

    # --- decode ------------------------------------------------------------------------------------------------

    @on_device
    def decode(self, jobs: Sequence[FluxJob], tiled: bool = False) -> np.ndarray:
        return self._vae.decode(torch.cat([self._unpack(job) for job in jobs]), tiled)

    def _unpack(self, job: FluxJob) -> torch.Tensor:
        """Latents as the VAE has them, ``[1, c, h / 8, w / 8]``."""
        latents: torch.Tensor = self._pipeline._unpack_latents(
            job.latents, job.request.height, job.request.width, self._pipeline.vae_scale_factor
        )
        return latents

    @on_device
    def preview(self, job: FluxJob) -> np.ndarray:
        return self._vae.preview(self._unpack(job))

    @property
    def decode_retries(self) -> int:  # type: ignore[override]
        return self._vae.retries


def _cat_or_none(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value
