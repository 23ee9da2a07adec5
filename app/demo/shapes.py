"""The captioned pictures that the demo models learn, and the judge that says what a picture shows.

Plain drawing with Pillow and numpy; nothing here knows torch or a model.
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (50, 90, 220),
    "yellow": (240, 210, 50),
    "purple": (140, 60, 180),
    "orange": (240, 140, 40),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
SIZES: dict[str, tuple[float, float]] = {"small": (0.16, 0.20), "": (0.25, 0.30), "large": (0.36, 0.40)}
"""Size word to the range of the radius, as a fraction of the picture's shorter side."""

PICTURE_SIZE = 128
"""Height and width in pixels of the pictures that the demo models learn."""

_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Drawing:
    """What one picture shows: everything that its caption says."""

    colour: str
    shape: str
    background: str
    size: str = ""

    @property
    def caption(self) -> str:
        """The sentence the demo models learn, such as ``a small red star on a white background``."""
        size = f"{self.size} " if self.size else ""
        return f"a {size}{self.colour} {self.shape} on a {self.background} background"


def random_drawing(rng: random.Random) -> Drawing:
    """Any drawing whose shape can be told from its background."""
    colour, background = rng.sample(sorted(COLOURS), 2)
    return Drawing(colour, rng.choice(SHAPES), background, rng.choice(sorted(SIZES)))


def draw(drawing: Drawing, width: int, height: int, rng: random.Random) -> Image.Image:
    """Paint `drawing` near the centre of a ``width`` by ``height`` picture.

    Args:
        drawing: what to paint.
        width: in pixels.
        height: in pixels.
        rng: decides the exact radius and a small shift from the centre.

    Returns:
        An RGB picture with smooth edges.
    """
    side = min(width, height)
    radius = rng.uniform(*SIZES[drawing.size]) * side
    shift = 0.06 * side
    centre_x = width / 2 + rng.uniform(-shift, shift)
    centre_y = height / 2 + rng.uniform(-shift, shift)

    scale = _SUPERSAMPLING
    mask = _mask(drawing.shape, width * scale, height * scale, centre_x * scale, centre_y * scale, radius * scale)
    mask = mask.resize((width, height), Image.Resampling.BOX)
    picture = Image.new("RGB", (width, height), COLOURS[drawing.background])
    picture.paste(COLOURS[drawing.colour], mask=mask)
    return picture


def _mask(shape: str, width: int, height: int, x: float, y: float, radius: float) -> Image.Image:
    """The shape in white on black; `radius` is that of the circle around it, in pixels."""
    mask = Image.new("L", (width, height), 0)
    pen = ImageDraw.Draw(mask)

    def disc(r: float, fill: int) -> None:
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)

    def polygon(corners: int, radii: tuple[float, ...]) -> None:
        # Corner 0 points up; the radii alternate, so two of them make a star.
        points = []
        for i in range(corners):
            angle = 2 * math.pi * i / corners
            r = radii[i % len(radii)]
            points.append((x + r * math.sin(angle), y - r * math.cos(angle)))
        pen.polygon(points, fill=255)

    def box(half_width: float, half_height: float) -> None:
        pen.rectangle((x - half_width, y - half_height, x + half_width, y + half_height), fill=255)

    match shape:
        case "circle":
            disc(radius, 255)
        case "square":
            box(0.85 * radius, 0.85 * radius)
        case "triangle":
            polygon(3, (1.1 * radius,))
        case "star":
            polygon(10, (1.15 * radius, 0.46 * radius))
        case "ring":
            disc(radius, 255)
            disc(0.55 * radius, 0)
        case "cross":
            box(radius, 0.33 * radius)
            box(0.33 * radius, radius)
        case _:
            raise ValueError(f"no shape is called {shape!r}")
    return mask


# --- The judge -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What the judge sees in a picture: colour words, and the shape whose outline fits best."""

    colour: str
    shape: str
    background: str


def judge(picture: Image.Image) -> Verdict:
    """Say what `picture` shows, by colour in the corners and the middle and by comparing outlines.

    The background is the commonest named colour along the border. The figure is whatever differs from it; its
    colour is the commonest named colour there; its shape is the one whose drawn outline, moved and scaled to the
    figure's own box and area, overlaps it best.
    """
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    names = sorted(COLOURS)
    palette = np.array([COLOURS[name] for name in names], dtype=np.float32)
    nearest = np.linalg.norm(pixels[:, :, None, :] - palette, axis=-1).argmin(axis=-1)

    border = np.concatenate(
        [nearest[:4].ravel(), nearest[-4:].ravel(), nearest[:, :4].ravel(), nearest[:, -4:].ravel()]
    )
    background = int(np.bincount(border, minlength=len(names)).argmax())

    # Closer to the figure's colour than to the background's: halfway between the two, as anti-aliasing has it.
    inside = np.bincount(nearest[nearest != background].ravel(), minlength=len(names))
    colour = int(inside.argmax()) if inside.any() else background
    to_figure = np.linalg.norm(pixels - palette[colour], axis=-1)
    to_background = np.linalg.norm(pixels - palette[background], axis=-1)
    figure = to_figure < to_background
    if figure.sum() < 16:
        return Verdict(names[colour], "none", names[background])

    scores = {shape: _best_overlap(figure, shape) for shape in SHAPES}
    return Verdict(names[colour], max(scores, key=scores.__getitem__), names[background])


def _best_overlap(figure: np.ndarray, shape: str) -> float:
    """The best intersection over union of `figure` and the outline of `shape`, over sizes and small shifts."""
    rows, columns = np.nonzero(figure)
    height, width = figure.shape
    area = float(figure.sum())
    centre_x, centre_y = float(columns.mean()), float(rows.mean())
    unit_area, offset_y = _unit(shape)
    best = 0.0
    for factor in (0.92, 1.0, 1.08):
        radius = factor * math.sqrt(area / unit_area)
        for shift_x in (-2.0, 0.0, 2.0):
            for shift_y in (-2.0, 0.0, 2.0):
                x, y = centre_x + shift_x, centre_y - offset_y * radius + shift_y
                outline = np.asarray(_mask(shape, width, height, x, y, radius)) > 127
                union = float((outline | figure).sum())
                best = max(best, float((outline & figure).sum()) / union)
    return best


@functools.cache
def _unit(shape: str) -> tuple[float, float]:
    """Area and vertical offset of the centroid of `shape` at radius 1."""
    radius = 100.0
    outline = np.asarray(_mask(shape, 300, 300, 150.0, 150.0, radius)) > 127
    rows, _ = np.nonzero(outline)
    return float(outline.sum()) / radius**2, (float(rows.mean()) - 150.0) / radius
