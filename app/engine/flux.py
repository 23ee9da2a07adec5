"""FLUX in the four stages of a family: text to image, image to image and inpainting, from a loaded pipeline's parts.

Alone, a job gives the picture that the stock pipelines' ``__call__`` gives for the same weights, seed and parameters.
"""

from __future__ import annotations

import collections
import contextlib
import copy
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from diffusers import FluxInpaintPipeline, FluxPipeline

from app import images
from app.engine import schedulers
from app.engine.adapters import Adapters, Loras
from app.engine.company import round_as_alone
from app.engine.device import Pace, draw_noise, on_device, sending
from app.engine.family import Family
from app.engine.flow_schedulers import NAMES, FlowSchedulers, first_step
from app.engine.flux_job import Conditioning, Embedding, FluxJob, Kept, Prompt
from app.engine.flux_requests import FluxRequests
from app.engine.fp8 import use_fp8
from app.engine.optimization import LOSSY_PARAMETERS, OFF, Optimization, guided_steps
from app.engine.step_cache import SHORTEST, Added, StepCache, plan
from app.engine.vae import CPU_DECODE_LOAD, Vae
from app.engine.warming import warm
from app.generation import GenerateRequest

if TYPE_CHECKING:
    from app.engine.parallel import Parallel

EMBEDDING_CACHE_SIZE = 32
"""Prompts whose embeddings are kept; each takes 4 MB for FLUX.1 in half precision."""


class Row(NamedTuple):
    """What one job brings to a forward pass for one of its prompts."""

    job: FluxJob
    embedding: Embedding
    added: Added


class FluxFamily(Family[FluxJob]):
    """FLUX.1 dev, schnell and their relatives.

    Args:
        pipeline: loaded, on its device; its components are used, its ``__call__`` never.
        adapters: LoRA adapters of the pipeline.
        optimization: how hard the device is made to work.
        parallel: the processes that share the transformer's forward passes.

    Raises:
        ModelLoadFailed: they cannot share it.
    """

    def __init__(
        self,
        pipeline: FluxPipeline,
        adapters: Adapters | None = None,
        optimization: Optimization = OFF,
        parallel: Parallel | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._adapters = adapters
        self._transformer = pipeline.transformer
        self._optimization = optimization
        self._compiler = optimization.compiler()
        optimization.arrange(pipeline.vae)
        if optimization.fp8:
            use_fp8(self._transformer, optimization.cache_dir)
        self._predict_rows: Callable[..., Any] = self._transformer
        if self._compiler is not None:
            # It is nearly all blocks of two kinds; compiling them takes seconds, the whole takes a minute.
            self._predict_rows = self._compiler.compile_blocks(self._transformer)
            for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
                self._compiler.compile_encoder(encoder)
        self._parallel = parallel
        if parallel is not None:
            parallel.split(self._transformer, adapters)
            self._predict_rows = parallel
        self._cache = StepCache(self._transformer) if optimization.step_cache > 1 else None
        self._device: torch.device = pipeline._execution_device
        self._pace = Pace(self._device)
        if self._device.type == "cpu" and self._compiler is None:
            round_as_alone(self._transformer, rows=1)
        # Only for its helpers; the pipeline itself has none that reads an image.
        self._inpaint = FluxInpaintPipeline(**pipeline.components)
        self._vae = Vae(pipeline.vae, self._inpaint.image_processor, self._compiler)
        self._factor: int = pipeline.vae_scale_factor * 2
        self._schedulers = FlowSchedulers(pipeline.scheduler)
        self._requests = FluxRequests(
            pipeline,
            self._schedulers,
            adapters.names if adapters else (),
            least_tokens=parallel.size if parallel else 1,
        )
        self.parameters = self._requests.parameters - (frozenset() if optimization.lossy else LOSSY_PARAMETERS)
        self.size_step = self._factor
        if self._device.type == "cpu":
            self.decode_load = CPU_DECODE_LOAD
        self.schedulers = tuple(NAMES)
        self.adapters = tuple(adapters.names) if adapters else ()
        self._embeddings: collections.OrderedDict[Prompt, Embedding] = collections.OrderedDict()

    # --- resolve -----------------------------------------------------------------------------------------------

    def resolve(self, request: GenerateRequest) -> GenerateRequest:
        return self._requests.resolve(request)

    def steps(self, request: GenerateRequest) -> int:
        return self._schedulers.passes(request)

    def lossy(self, request: GenerateRequest) -> tuple[str, ...]:
        losses = self._optimization.losses(request, self.steps(request) if self._requests.guided(request) else 0)
        return (*losses, f"step_cache {self._optimization.step_cache}") if self._leaves_out(request) else losses

    def _leaves_out(self, request: GenerateRequest) -> bool:
        """Whether some of a request's steps do without the transformer's blocks."""
        assert request.num_inference_steps is not None
        return self._cache is not None and request.num_inference_steps - first_step(request) >= SHORTEST

    def warnings(self, request: GenerateRequest) -> tuple[str, ...]:
        return self._requests.warnings(request)

    def warm(self, report: Callable[[str], None]) -> None:
        if self._compiler is not None:
            side = self._requests.own_size
            warm(self, self._compiler, self._optimization, (side, side), report)

    @property
    def unexpected_shapes(self) -> int:  # type: ignore[override]
        return self._compiler.unexpected if self._compiler else 0

    # --- encode ------------------------------------------------------------------------------------------------

    def encode(self, request: GenerateRequest) -> Conditioning:
        return self.encode_all([request])[0]

    @on_device
    def encode_all(self, requests: Sequence[GenerateRequest]) -> list[Conditioning]:
        prompts = [self._prompts(request) for request in requests]
        embeddings = self._embed(dict.fromkeys(prompt for each in prompts for prompt in each))
        return [
            Conditioning(embeddings[positive], embeddings[negative[0]] if negative else None)
            for positive, *negative in prompts
        ]

    def _prompts(self, request: GenerateRequest) -> list[Prompt]:
        """The positive one, and the negative one where it counts."""
        assert request.max_sequence_length is not None
        length, loras = request.max_sequence_length, request.loras or ()
        prompts = [Prompt(request.prompt, request.prompt_2 or request.prompt, length, loras)]
        if self._requests.guided(request):
            negative = request.negative_prompt or ""
            prompts.append(Prompt(negative, request.negative_prompt_2 or negative, length, loras))
        return prompts

    def _embed(self, prompts: Iterable[Prompt]) -> dict[Prompt, Embedding]:
        """First all that CLIP has to read, then all for T5: where they take turns on the device, each comes once."""
        known = {prompt: self._embeddings[prompt] for prompt in prompts if prompt in self._embeddings}
        missing = [prompt for prompt in prompts if prompt not in known]
        pooled = []
        for prompt in missing:
            self._activate(prompt.loras)
            pooled.append(self._pipeline._get_clip_prompt_embeds(prompt.clip, device=self._device))
        for prompt, vector in zip(missing, pooled, strict=True):
            hidden = self._pipeline._get_t5_prompt_embeds(
                prompt.t5, max_sequence_length=prompt.length, device=self._device
            )
            ids = torch.zeros(prompt.length, 3, device=self._device, dtype=vector.dtype)
            known[prompt] = Embedding(hidden, vector, ids)
        for prompt, embedding in known.items():
            self._embeddings[prompt] = embedding
            self._embeddings.move_to_end(prompt)
        while len(self._embeddings) > EMBEDDING_CACHE_SIZE:
            self._embeddings.popitem(last=False)
        return known

    def _activate(self, loras: Loras) -> None:
        if self._adapters is not None:
            self._adapters.activate(loras)

    # --- begin -------------------------------------------------------------------------------------------------

    @on_device
    def begin(self, request: GenerateRequest, conditioning: Conditioning) -> FluxJob:
        assert request.seed is not None and request.true_cfg_scale is not None
        rows, columns = self._grid(request)
        dtype = conditioning.positive.hidden.dtype
        generator = torch.Generator().manual_seed(request.seed)
        scheduler, timesteps = self._schedulers.begin(request, rows * columns)
        latents, kept = self._start(request, scheduler, generator, dtype)
        guidance = None
        if self._requests.embeds_guidance:
            assert request.guidance_scale is not None
            guidance = torch.full([1], request.guidance_scale, device=self._device, dtype=torch.float32)
        with sending(self._device):
            sent = timesteps.to(device=self._device, dtype=dtype) / 1000
            image_ids = self._pipeline._prepare_latent_image_ids(1, rows, columns, self._device, dtype)
        return FluxJob(
            request=request,
            num_steps=len(timesteps),
            conditioning=conditioning,
            latents=latents,
            scheduler=scheduler,
            scheduler_timesteps=timesteps,
            step_options=schedulers.step_options(scheduler, generator, eta=0.0),
            timesteps=sent,
            guidance=guidance,
            guided_steps=guided_steps(request, len(timesteps)),
            true_cfg_scale=request.true_cfg_scale,
            image_ids=image_ids,
            kept=kept,
            loras=request.loras or (),
            reach=plan(timesteps.tolist(), self._optimization.step_cache) if self._leaves_out(request) else (),
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
            return self._pack(draw_noise(shape, generator, self._device, dtype)), None

        assert not isinstance(request.image, bytes) and not isinstance(request.mask_image, bytes)
        assert request.height is not None and request.width is not None
        picture = self._vae.preprocess(request.image, request.height, request.width)
        image_latents = self._vae.encode(picture, generator, self._device, dtype)
        noise = draw_noise(shape, generator, self._device, dtype)
        with sending(self._device):
            begins_at = scheduler.timesteps[scheduler.begin_index].reshape(1)
            latents = scheduler.scale_noise(image_latents, begins_at, noise)
        if request.mask_image is None:
            return self._pack(latents), None

        mask = self._inpaint.mask_processor.preprocess(
            images.to_pil(request.mask_image), height=request.height, width=request.width
        )
        with sending(self._device):
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
        tokens = job.conditioning.positive.hidden.shape[1]
        return (self._grid(job.request), tokens, job.latents.dtype, job.loras, job.without_blocks)

    def rows(self, job: FluxJob) -> int:
        return 1 if job.negative is None else 2

    @on_device
    def step(self, jobs: Sequence[FluxJob]) -> None:
        self._activate(jobs[0].loras)
        # Rows: the positive ones of all jobs, then the negative ones of those that have any.
        rows = [Row(job, job.conditioning.positive, job.added[0]) for job in jobs]
        rows += [Row(job, job.negative, job.added[1]) for job in jobs if job.negative is not None]
        # Alone, a job gets a pass for each of its rows, as in the stock pipelines; in company all rows go together.
        passes = [[row] for row in rows] if len(jobs) == 1 else [rows]
        predicted = [direction for each in passes for direction in self._predict(each)]
        directions = dict(zip(map(id, jobs), predicted, strict=False))
        for row, away in zip(rows[len(jobs) :], predicted[len(jobs) :], strict=True):
            directions[id(row.job)] = away + row.job.true_cfg_scale * (directions[id(row.job)] - away)
        for job in jobs:
            self._advance(job, directions[id(job)])
        self._pace.wait()

    def _predict(self, rows: Sequence[Row]) -> tuple[torch.Tensor, ...]:
        """One forward pass: the direction from picture to noise for each of `rows`, ``[1, tokens, 4 c]``."""
        job, embedding, _ = rows[0]
        inputs: dict[str, Any] = {
            "hidden_states": torch.cat([row.job.latents for row in rows]),
            "timestep": torch.stack([row.job.timesteps[row.job.step_index] for row in rows]),
            "guidance": _cat_or_none([row.job.guidance for row in rows]),
            "pooled_projections": torch.cat([row.embedding.pooled for row in rows]),
        }
        if self._cache is not None and job.without_blocks:
            added = torch.cat([row.added.drawn(row.job.reach[row.job.step_index] or 0.0) for row in rows])
            return self._cache.predict(**inputs, added=added).chunk(len(rows))
        with self._attention():
            predicted: torch.Tensor = self._predict_rows(
                **inputs,
                encoder_hidden_states=torch.cat([row.embedding.hidden for row in rows]),
                txt_ids=embedding.ids,
                img_ids=job.image_ids,
                return_dict=False,
            )[0]
        if self._cache is not None:
            for row, added in zip(rows, self._cache.added().chunk(len(rows)), strict=True):
                if row.job.reach:
                    row.added.note(row.job.step_index, added)
        return predicted.chunk(len(rows))

    def _attention(self) -> contextlib.AbstractContextManager[None]:
        # A fifth of the work, and all of it in one shape for each size and number of rows.
        return self._optimization.attention(self._device, self._compiler, few_shapes=True)

    @staticmethod
    def _advance(job: FluxJob, direction: torch.Tensor) -> None:
        # All of it or nothing: where memory ends in between, the job is tried again as it was.
        scheduler = copy.copy(job.scheduler)
        timestep = job.scheduler_timesteps[job.step_index]
        latents = scheduler.step(direction, timestep, job.latents, **job.step_options, return_dict=False)[0]
        if job.kept is not None:
            kept = job.kept.latents
            if job.step_index + 1 < job.num_steps:
                level = job.kept.noise_levels[scheduler.step_index]
                kept = level * job.kept.noise + (1.0 - level) * kept
            latents = (1 - job.kept.mask) * kept + job.kept.mask * latents
        job.scheduler, job.latents = scheduler, latents
        job.step_index += 1

    def catch_up(self) -> None:
        self._pace.catch_up()

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
    def preview(self, job: FluxJob, whole: bool = False) -> np.ndarray:
        latents = self._unpack(job)
        picture: np.ndarray = self._vae.decode(latents)[0] if whole else self._vae.preview(latents)
        return picture

    @on_device
    def follow(self) -> None:
        assert self._parallel is not None
        with self._attention():
            self._parallel.follow()

    def close(self) -> None:
        if self._parallel is not None:
            self._parallel.close()

    @property
    def decode_retries(self) -> int:  # type: ignore[override]
        return self._vae.retries


def _cat_or_none(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None
