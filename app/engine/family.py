"""The contract of a model family: how one request becomes pixels, one denoising step at a time.

A stock diffusers pipeline runs one request from start to end. A family offers the same work in stages, so that the
batcher can run many requests side by side: they join, leave and are cancelled between any two steps. Nothing here
knows queues, tickets or HTTP, and importing it does not import torch.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import numpy as np

from app.engine.scheduler_names import NAMES
from app.generation import PARAMETERS, GenerateRequest, Pixels

GREY, WHITE = b"\x80", b"\xff"


@dataclass(slots=True)
class Job:
    """One image on its way, owned by the device thread; families add what they need.

    Attributes:
        request: with every default filled in and the image's own seed.
        num_steps: forward passes from start to end.
        step_index: forward passes done.
    """

    request: GenerateRequest
    num_steps: int
    step_index: int = 0

    @property
    def done(self) -> bool:
        return self.step_index >= self.num_steps


J = TypeVar("J", bound=Job)


class Family(abc.ABC, Generic[J]):
    """One loaded model. Only the thread that loaded it calls it, except `resolve` and `steps`, which any thread may."""

    parameters: frozenset[str] = frozenset(PARAMETERS)
    """Names of the parameters that the model takes; requests with others are refused before `resolve`."""

    maxima: Mapping[str, int] = MappingProxyType({})
    """Largest values of parameters that the model itself bounds."""

    size_step: int = 8
    """Height and width are multiples of it."""

    schedulers: tuple[str, ...] = tuple(NAMES)
    """Names of the noise schedulers, as they are offered to callers; the model's own may be among them."""

    adapters: tuple[str, ...] = ()
    """Names of the LoRA adapters that are loaded."""

    only_inpaints: bool = False
    """Whether requests without an image and a mask are refused."""

    rehearsal_size: tuple[int, int] | None = None
    """Width and height of what the server paints for itself: where some sizes are compiled for, one of these. ``None``
    is what `resolve` fills in."""

    interleaves: bool = True
    """False where going from one job to another is costly, because weights move to the device and back: the batcher
    then finishes what it began before it lets others in."""

    decode_load: int = 1_048_576
    """Pixels of the pictures that are decoded at once, where one alone has not as many: a large picture fills a GPU,
    small ones share it well."""

    decode_retries: int = 0
    """Pictures that came out as no numbers in half precision and were decoded once more in float32; counts up."""

    unexpected_shapes: int = 0
    """Passes through a compiled part in a shape that it was not warmed with, and so as with nothing compiled; counts
    up."""

    # --- What a request means ----------------------------------------------------------------------------------

    @abc.abstractmethod
    def resolve(self, request: GenerateRequest) -> GenerateRequest:
        """Fill in the model's own defaults.

        Raises:
            InvalidRequest: the model cannot do this; the sentence says what it can do.
        """

    def steps(self, request: GenerateRequest) -> int:
        """Denoising steps that each picture of a resolved request will take."""
        return request.num_inference_steps or 1

    def lossy(self, request: GenerateRequest) -> tuple[str, ...]:
        """What is done for a resolved request at the price of its picture: ``fp8``, or a parameter's name."""
        del request
        return ()

    def warnings(self, request: GenerateRequest) -> tuple[str, ...]:
        """Sentences for the caller about what of a resolved request has no effect."""
        del request
        return ()

    # --- Getting ready -----------------------------------------------------------------------------------------

    def rehearsal(self, request: GenerateRequest) -> GenerateRequest:
        """`request`, which nobody sent, with what the model wants besides; not resolved.

        It gets the size of a rehearsal, unless it has one; where the model only inpaints, a grey picture and a mask
        that covers it, with all steps to do.
        """
        width, height = self.rehearsal_size or (None, None)
        request = replace(request, width=request.width or width, height=request.height or height)
        if not self.only_inpaints:
            return request
        assert request.width and request.height
        pixels = request.width * request.height
        image = Pixels(GREY * 3 * pixels, request.height, request.width)
        mask = Pixels(WHITE * pixels, request.height, request.width, channels=1)
        return replace(request, image=image, mask_image=mask, strength=1.0)

    def warm(self, report: Callable[[str], None]) -> None:
        """Compile what is to be compiled; called once, before anything else on the device.

        Args:
            report: hears what is being done.

        Raises:
            ModelLoadFailed: this machine cannot compile.
        """
        del report

    # --- From prompt to pixels ---------------------------------------------------------------------------------

    @abc.abstractmethod
    def encode(self, request: GenerateRequest) -> Any:
        """The text encoders' view of a resolved request; cached by prompt. Passed to `begin` as it is."""

    def encode_all(self, requests: Sequence[GenerateRequest]) -> list[Any]:
        """`encode` for each of `requests`; worth overriding where weights move to the device and back in between."""
        return [self.encode(request) for request in requests]

    @abc.abstractmethod
    def begin(self, request: GenerateRequest, conditioning: Any) -> J:
        """One image's latents, scheduler, timesteps and random numbers, all from the request's seed."""

    @abc.abstractmethod
    def signature(self, job: J) -> Hashable:
        """Jobs with equal signatures may share a forward pass."""

    def rows(self, job: J) -> int:
        """Rows that `job` brings to its next forward pass: two with classifier-free guidance, which may end midway."""
        del job
        return 1

    @abc.abstractmethod
    def step(self, jobs: Sequence[J]) -> None:
        """One forward pass for all `jobs`, which share a signature; each advances by one step.

        May return while the device is still at it, but not before the pass before this one is done. Where it raises,
        a job whose `step_index` has not moved must be as it was: it is tried again in smaller company.

        Raises:
            OutOfMemory: fewer jobs may fit.
        """

    def catch_up(self) -> None:
        """Wait for the device to be done with the last step, which may go on when `step` has returned."""

    @abc.abstractmethod
    def decode(self, jobs: Sequence[J], tiled: bool = False) -> np.ndarray:
        """The pictures of `jobs`, which share a signature: uint8 ``[n, h, w, 3]``, RGB.

        Args:
            jobs: done.
            tiled: in tiles, which takes little memory and may leave faint seams.

        Raises:
            OutOfMemory: tiles may help.
            GenerationFailed: there is no picture, such as for latents that are not finite.
        """

    def preview(self, job: J, whole: bool = False) -> np.ndarray | None:
        """What `job`'s latents show so far: uint8 ``[h, w, 3]``, small and cheap; ``None`` where nothing cheap is.

        Args:
            job: at any step; it is left as it is.
            whole: in full size, at the price of a decode.
        """
        return self.decode([job])[0] if whole else None

    # --- Several processes, and the end ------------------------------------------------------------------------

    def follow(self) -> None:
        """Take part in the forward passes of another process until it says goodbye.

        Only where several processes share a model.

        Raises:
            Exception: the others are lost, and so is this process.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Called when nothing will be done any more, and everything went well."""
