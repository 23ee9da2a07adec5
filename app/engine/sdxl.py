"""Stable Diffusion XL in the four stages of a family: base, base with refiner, image to image, inpainting.

Built from loaded pipelines' own components. Alone, a job gives the picture that the stock pipelines' ``__call__`` gives
for the same weights, seed and parameters; with a refiner, the picture of the two in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline, StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg

from app import images
from app.engine import schedulers
from app.engine.adapters import Adapters, Loras
from app.engine.device import Pace, draw_noise, on_device, sending
from app.engine.family import Family
from app.engine.optimization import LOSSY_PARAMETERS, OFF, Optimization, guided_steps
from app.engine.prompts import Embedding
from app.engine.resolving import given
from app.engine.sdxl_job import Conditioning, Inpainting, Leg, Part, SdxlJob
from app.engine.sdxl_requests import SdxlRequests, zero_negative
from app.engine.sdxl_schedule import Stretch, parts_of, plan
from app.engine.vae import CPU_DECODE_LOAD
from app.engine.warming import warm
from app.generation import PARAMETERS, GenerateRequest, ImageTask

FLUX_ONLY_PARAMETERS = frozenset({"true_cfg_scale", "max_sequence_length"})


class SdxlFamily(Family[SdxlJob]):
    """Stable Diffusion XL.

    Args:
        pipeline: the base, loaded, on its device; its components are used, its ``__call__`` never.
        refiner: the same for the refiner.
        adapters: LoRA adapters of the base.
        optimization: how hard the device is made to work.
    """

    def __init__(
        self,
        pipeline: StableDiffusionXLPipeline,
        refiner: StableDiffusionXLImg2ImgPipeline | None = None,
        adapters: Adapters | None = None,
        optimization: Optimization = OFF,
    ) -> None:
        self._pipeline = pipeline
        self._device: torch.device = pipeline._execution_device
        self._pace = Pace(self._device)
        self._optimization = optimization
        self._compiler = optimization.compiler()
        how: Any = {"optimization": optimization, "compiler": self._compiler}
        self._base = Part("base", pipeline, self._device, **how)
        self._refiner = None if refiner is None else Part("refiner", refiner, self._device, self._base.vae, **how)
        self._adapters = adapters
        self._factor: int = pipeline.vae_scale_factor
        # Only for its helpers; the base's own pipeline has none that reads an image.
        self._inpaint = StableDiffusionXLInpaintPipeline(**pipeline.components)
        self._requests = SdxlRequests(self._base, self._refiner, adapters.names if adapters else ())
        self.maxima = {"clip_skip": self._requests.most_clip_skip}
        self.only_inpaints = self._requests.only_inpaints
        self.rehearsal_size = (self._requests.own_size, self._requests.own_size)
        # The refiner's stay without one: callers who do not know what is loaded send them all the same.
        self.parameters = frozenset(PARAMETERS) - FLUX_ONLY_PARAMETERS - (frozenset() if adapters else {"loras"})
        self.parameters -= frozenset() if optimization.lossy else LOSSY_PARAMETERS
        self.schedulers = self._base.schedulers.names
        self.size_step = self._factor
        if self._device.type == "cpu":
            self.decode_load = CPU_DECODE_LOAD
        self.adapters = tuple(adapters.names) if adapters else ()

    # --- resolve -----------------------------------------------------------------------------------------------

    def resolve(self, request: GenerateRequest) -> GenerateRequest:
        return self._requests.resolve(request)

    def steps(self, request: GenerateRequest) -> int:
        return self._requests.steps(request)

    def lossy(self, request: GenerateRequest) -> tuple[str, ...]:
        return self._optimization.losses(request, self.steps(request) if self._requests.guided(request) else 0)

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

    @on_device
    def encode(self, request: GenerateRequest) -> Conditioning:
        conditioning = Conditioning({}, {})
        for part in parts_of(request, self._base, self._refiner):
            # Adapters are the base's, also where it shares an encoder with the refiner.
            loras = (request.loras or ()) if part is self._base else ()
            self._activate(loras)
            # The refiner has only the second encoder, and reads the prompt with it.
            positive = part.prompts.encode(request.prompt, request.prompt_2, request.clip_skip, loras)
            if self._requests.guided(request):
                negative = self._negative(part, request, positive, loras)
                positive = part.prompts.pad(positive, negative.hidden.shape[1], loras)
                conditioning.negative[part.name] = negative
            conditioning.positive[part.name] = positive
        return conditioning

    def _negative(self, part: Part, request: GenerateRequest, positive: Embedding, loras: Loras) -> Embedding:
        if request.negative_prompt is None and zero_negative(part):
            return Embedding(torch.zeros_like(positive.hidden), torch.zeros_like(positive.pooled))
        # The stock pipeline does not skip layers for the negative prompt.
        negative = part.prompts.encode(request.negative_prompt or "", request.negative_prompt_2, None, loras)
        return part.prompts.pad(negative, positive.hidden.shape[1], loras)

    def _activate(self, loras: Loras) -> None:
        if self._adapters is not None:
            self._adapters.activate(loras)

    # --- begin -------------------------------------------------------------------------------------------------

    @on_device
    def begin(self, request: GenerateRequest, conditioning: Conditioning) -> SdxlJob:
        assert request.seed is not None and request.guidance_scale is not None
        generator = torch.Generator().manual_seed(request.seed)
        dtype = conditioning.positive[self._base.name].hidden.dtype
        way = plan(request, self._base, self._refiner)
        with sending(self._device):
            legs = [self._leg(stretch, request, conditioning, generator) for stretch in way]
            if request.mask_image is not None:
                for leg in legs:
                    leg.kept = self._kept(leg, dtype)
        latents, inpainting = self._latents(request, legs[0], generator, dtype)
        for leg in legs:
            schedulers.draw_on_host(leg.scheduler, latents, request.seed)
        guided = bool(conditioning.negative)
        rescale = request.guidance_rescale if guided else None
        steps = sum(len(leg.timesteps) for leg in legs)
        return SdxlJob(
            request=request,
            num_steps=steps,
            latents=latents,
            generator=generator,
            legs=legs,
            guided_steps=guided_steps(request, steps) if guided else 0,
            guidance=self._scalar(request.guidance_scale),
            rescale=(self._scalar(rescale), self._scalar(1 - rescale)) if rescale else None,
            inpainting=inpainting,
            loras=request.loras or (),
        )

    def _leg(
        self, stretch: Stretch, request: GenerateRequest, conditioning: Conditioning, generator: torch.Generator
    ) -> Leg:
        part, scheduler = stretch.part, stretch.scheduler
        positive, negative = conditioning.positive[part.name], conditioning.negative.get(part.name)
        embeddings = [positive] if negative is None else [negative, positive]
        time_ids = self._time_ids(part, request, positive.hidden.dtype)
        return Leg(
            part=part,
            scheduler=scheduler,
            scheduler_timesteps=stretch.timesteps,
            timesteps=stretch.timesteps.to(self._device, torch.float32),
            first_timestep=stretch.first_timestep,
            step_options=schedulers.step_options(scheduler, generator, request.eta or 0.0),
            embeddings=torch.cat([embedding.hidden for embedding in embeddings]),
            pooled=torch.cat([embedding.pooled for embedding in embeddings]),
            time_ids=time_ids if negative is not None else time_ids[1:],
            timestep_cond=self._timestep_cond(part, request, positive.hidden.dtype),
            start=stretch.start,
        )

    def _time_ids(self, part: Part, request: GenerateRequest, dtype: torch.dtype) -> torch.Tensor:
        """``[2, 6]``, the refiner's ``[2, 5]``: of the negative prompt and of the positive one."""
        assert request.original_size and request.target_size
        dimension = part.pipeline.text_encoder_2.config.projection_dim
        crops = request.crops_coords_top_left
        original, target = request.negative_original_size, request.negative_target_size
        negative_crops = request.negative_crops_coords_top_left or (0, 0)
        if part is self._base and request.task is ImageTask.TEXT_TO_IMAGE:
            # Here the stock pipeline wants both sizes, or none counts.
            conditions = [(request.original_size, crops, request.target_size)] * 2
            if original is not None and target is not None:
                conditions[0] = (original, negative_crops, target)
            rows = [
                self._pipeline._get_add_time_ids(*sizes, dtype=dtype, text_encoder_projection_dim=dimension)
                for sizes in conditions
            ]
        else:
            helper = self._inpaint if part is self._base else part.pipeline
            positive, negative = helper._get_add_time_ids(
                request.original_size,
                crops,
                request.target_size,
                given(request.aesthetic_score, 0.0),
                given(request.negative_aesthetic_score, 0.0),
                original or request.original_size,
                negative_crops,
                target or request.target_size,
                dtype=dtype,
                text_encoder_projection_dim=dimension,
            )
            rows = [negative, positive]
        return torch.cat(rows).to(self._device)

    def _scalar(self, value: float) -> torch.Tensor:
        return torch.full((1, 1, 1, 1), value, dtype=torch.float32, device=self._device)

    def _timestep_cond(self, part: Part, request: GenerateRequest, dtype: torch.dtype) -> torch.Tensor | None:
        dimension = part.unet.config.time_cond_proj_dim
        if dimension is None:
            return None
        assert request.guidance_scale is not None
        scale = torch.tensor([request.guidance_scale - 1])
        embedding: torch.Tensor = part.pipeline.get_guidance_scale_embedding(scale, embedding_dim=dimension)
        return embedding.to(device=self._device, dtype=dtype)

    # --- The first latents -------------------------------------------------------------------------------------

    def _latents(
        self, request: GenerateRequest, leg: Leg, generator: torch.Generator, dtype: torch.dtype
    ) -> tuple[torch.Tensor, Inpainting | None]:
        """Latents ``[1, c, h / 8, w / 8]`` before the first step, and what inpainting keeps.

        They begin as noise without an image, and where a mask comes with a strength of 1; else as the image's own
        latents with noise added. What a mask does not cover is kept of the image's latents; a UNet with nine channels
        reads the masked image's latents in their stead. Random numbers are drawn in the order of the stock pipelines.
        """
        assert request.height and request.width
        channels = leg.part.vae.module.config.latent_channels
        shape = (1, channels, request.height // self._factor, request.width // self._factor)
        scheduler = leg.scheduler
        if request.image is None:
            return draw_noise(shape, generator, self._device, dtype) * scheduler.init_noise_sigma, None

        assert not isinstance(request.image, bytes) and not isinstance(request.mask_image, bytes)
        vae = leg.part.vae
        picture = vae.preprocess(request.image, request.height, request.width)
        nine = leg.part.unet.config.in_channels != channels
        anew = request.mask_image is not None and request.strength == 1
        image_latents = None
        if not (nine and anew):  # there the stock pipeline draws nothing for what nobody would read
            image_latents = vae.encode(picture, generator, self._device, dtype)
        if image_latents is not None and request.mask_image is not None:
            # In the layout that the stock pipeline makes of them; another takes kernels that round differently.
            image_latents = image_latents.contiguous()
        noise = draw_noise(shape, generator, self._device, dtype)
        if anew or image_latents is None:
            latents = noise * scheduler.init_noise_sigma
        else:
            with sending(self._device):
                latents = scheduler.add_noise(image_latents, noise, leg.first_timestep)
        if request.mask_image is None:
            return latents, None
        mask = self._inpaint.mask_processor.preprocess(
            images.to_pil(request.mask_image), height=request.height, width=request.width
        )
        # Drawn also where no UNet asks for it, as the stock pipeline does: what follows has to meet the same numbers.
        masked_latents = vae.encode(picture * (mask < 0.5), generator, self._device, dtype)
        with sending(self._device):
            small = F.interpolate(mask, size=shape[2:]).to(device=self._device, dtype=dtype)
        kept = noise if image_latents is None else image_latents
        return latents, Inpainting(small, kept, noise, masked_latents if nine else None)

    def _kept(self, leg: Leg, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Asked of the scheduler once for all steps, and before it has anything on the device: its own way there goes
        through the host."""
        one, zero = torch.ones(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)
        pairs = []
        for index, timestep in enumerate(leg.scheduler_timesteps):
            scheduler = schedulers.snapshot(leg.scheduler)
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(leg.start + index)
            at = timestep.reshape(1)
            pairs.append(torch.cat([scheduler.add_noise(one, zero, at), scheduler.add_noise(zero, one, at)]))
        both = torch.stack(pairs).to(self._device) if pairs else torch.zeros(0, 2, 1, device=self._device)
        return both[:, 0, 0], both[:, 1, 0]

    # --- step --------------------------------------------------------------------------------------------------

    def signature(self, job: SdxlJob) -> Hashable:
        leg = job.leg
        return (leg.part.name, tuple(job.latents.shape), job.latents.dtype, leg.embeddings.shape[1], job.loras)

    def rows(self, job: SdxlJob) -> int:
        return 2 if job.guided else 1

    @on_device
    def step(self, jobs: Sequence[SdxlJob]) -> None:
        self._activate(jobs[0].loras)
        # Rows: the negative ones of all guided jobs, then the positive ones of all jobs.
        guided = [job for job in jobs if job.guided]
        row_jobs = [*guided, *jobs]
        inputs = {id(job): self._input(job) for job in jobs}
        negative, positive = slice(0, 1), slice(-1, None)
        rows = [(job.leg, negative) for job in guided] + [(job.leg, positive) for job in jobs]
        with self._optimization.attention(self._device, self._compiler):
            predicted = jobs[0].leg.part.predict(
                torch.cat([inputs[id(job)] for job in row_jobs]),
                torch.stack([job.leg.timesteps[job.leg_step] for job in row_jobs]),
                encoder_hidden_states=torch.cat([leg.embeddings[row] for leg, row in rows]),
                timestep_cond=_cat_or_none([job.leg.timestep_cond for job in row_jobs]),
                added_cond_kwargs={
                    "text_embeds": torch.cat([leg.pooled[row] for leg, row in rows]),
                    "time_ids": torch.cat([leg.time_ids[row] for leg, row in rows]),
                },
                return_dict=False,
            )[0]
        noise = dict(zip(map(id, jobs), predicted[len(guided) :].chunk(len(jobs)), strict=True))
        if guided:
            steered = self._guide(guided, predicted[: len(guided)], torch.cat([noise[id(job)] for job in guided]))
            noise.update(zip(map(id, guided), steered.chunk(len(guided)), strict=True))
        for job in jobs:
            self._advance(job, noise[id(job)])
        self._pace.wait()

    @staticmethod
    def _input(job: SdxlJob) -> torch.Tensor:
        scaled: torch.Tensor = job.leg.scheduler.scale_model_input(
            job.latents, job.leg.scheduler_timesteps[job.leg_step]
        )
        if job.inpainting is None or job.inpainting.masked_latents is None:
            return scaled
        return torch.cat([scaled, job.inpainting.mask, job.inpainting.masked_latents], dim=1)

    @staticmethod
    def _guide(jobs: Sequence[SdxlJob], negative: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
        """Classifier-free guidance with each job's own scale; ``[n, c, h, w]`` in and out."""
        # In float32, as torch multiplies by a number; in half precision the scale would be another one.
        scale = torch.cat([job.guidance for job in jobs])
        steered = negative + (scale * (positive - negative)).to(negative.dtype)
        if not any(job.rescale for job in jobs):
            return steered
        parts = zip(jobs, steered.chunk(len(jobs)), positive.chunk(len(jobs)), strict=True)
        return torch.cat([_rescale(job, one, text) for job, one, text in parts])

    def _advance(self, job: SdxlJob, noise: torch.Tensor) -> None:
        """All of a step or nothing: where memory ends in between, the job is tried again as it was."""
        leg = job.leg
        scheduler = schedulers.snapshot(leg.scheduler)
        drawn = job.generator.get_state()
        timestep = leg.scheduler_timesteps[job.leg_step]
        hands_over = job.leg_step + 1 == len(leg.timesteps) and job.leg_index + 1 < len(job.legs)
        inpainting = job.inpainting
        try:
            with sending(self._device):
                latents = scheduler.step(noise, timestep, job.latents, **leg.step_options, return_dict=False)[0]
                if inpainting is not None and inpainting.masked_latents is None:
                    latents = self._keep_unmasked(job, latents, inpainting)
                if inpainting is not None and hands_over:
                    # To the refiner, what the base has made so far is the picture.
                    fresh = draw_noise(latents.shape, job.generator, self._device, latents.dtype)
                    inpainting = Inpainting(inpainting.mask, latents, fresh, None)
        except BaseException:
            job.generator.set_state(drawn)
            raise
        leg.scheduler, job.latents, job.inpainting = scheduler, latents, inpainting
        job.step_index += 1
        job.leg_step += 1
        if hands_over:
            job.leg_index += 1
            job.leg_step = 0

    @staticmethod
    def _keep_unmasked(job: SdxlJob, latents: torch.Tensor, inpainting: Inpainting) -> torch.Tensor:
        """`latents` with what the mask does not cover put back, as noisy as the rest is."""
        kept, following = inpainting.image_latents, job.leg_step + 1
        if following < len(job.leg.timesteps):
            assert job.leg.kept is not None
            picture, noise = job.leg.kept
            kept = picture[following] * kept + noise[following] * inpainting.noise
        mixed: torch.Tensor = (1 - inpainting.mask) * kept + inpainting.mask * latents
        return mixed

    def catch_up(self) -> None:
        self._pace.catch_up()

    # --- decode ------------------------------------------------------------------------------------------------

    @on_device
    def decode(self, jobs: Sequence[SdxlJob], tiled: bool = False) -> np.ndarray:
        vae = jobs[0].leg.part.vae
        return vae.decode(torch.cat([job.latents for job in jobs]), tiled)

    @on_device
    def preview(self, job: SdxlJob, whole: bool = False) -> np.ndarray:
        leg, latents = job.leg, job.latents
        if job.leg_step < len(leg.timesteps):
            # As the UNet sees them: the schedulers that count in sigmas keep latents far larger than they mean.
            latents = leg.scheduler.scale_model_input(latents, leg.scheduler_timesteps[job.leg_step])
        picture: np.ndarray = leg.part.vae.decode(latents)[0] if whole else leg.part.vae.preview(latents)
        return picture

    @property
    def decode_retries(self) -> int:  # type: ignore[override]
        parts = [self._base] if self._refiner is None else [self._base, self._refiner]
        return sum(vae.retries for vae in {part.vae for part in parts})


def _rescale(job: SdxlJob, steered: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    if job.rescale is None:
        return steered
    full: torch.Tensor = rescale_noise_cfg(steered, positive, guidance_rescale=1.0)
    amount, rest = job.rescale
    return (amount * full).to(steered.dtype) + (rest * steered).to(steered.dtype)


def _cat_or_none(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None
