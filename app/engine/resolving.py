"""What filling in a request has in common for all models: the stock pipelines' defaults, and sizes that fit."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from app.errors import InvalidRequest
from app.generation import GenerateRequest, ImageTask


def stock_defaults(pipelines: Mapping[ImageTask, type[Any]]) -> dict[ImageTask, dict[str, Any]]:
    """The defaults of each stock pipeline's ``__call__``, by name."""
    return {
        task: {name: each.default for name, each in inspect.signature(pipeline.__call__).parameters.items()}
        for task, pipeline in pipelines.items()
    }


def given(value: Any, default: Any) -> Any:
    """`value`, unless there is none."""
    return default if value is None else value


def picture_size(request: GenerateRequest, step: int, own_size: int) -> tuple[int, int]:
    """Height and width: as asked, or the input image's own, or the model's.

    Args:
        request: its input images are read.
        step: both have to be multiples of it.
        own_size: pixels along one side, where nothing else is said.

    Raises:
        InvalidRequest: they are not; the sentence names some that are.
    """
    image = request.image
    assert not isinstance(image, bytes)
    sides = []
    for name in ("height", "width"):
        side = getattr(request, name)
        if side is not None:
            _check_side(name, side, step)
        elif image is None:
            side = own_size
        else:
            side = getattr(image, name)
            if side % step:
                fitting = f"{_nearest(image.height, step)} and {_nearest(image.width, step)}"
                raise InvalidRequest(
                    f"The image is {image.height} pixels high and {image.width} wide, and both must be multiples of "
                    f"{step}; give height and width, such as {fitting}, to have it resized."
                )
        sides.append(side)
    height, width = sides
    return height, width


def _check_side(name: str, size: int, step: int) -> None:
    if size % step:
        below, above = size // step * step, (size // step + 1) * step
        fitting = f"{below} and {above}" if below else f"{above}"
        raise InvalidRequest(f"{name} must be a multiple of {step}, not {size}; the nearest fitting: {fitting}.")


def _nearest(size: int, step: int) -> int:
    return max(1, round(size / step)) * step
