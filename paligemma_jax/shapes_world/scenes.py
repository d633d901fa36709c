"""Synthetic scenes: images of coloured shapes, with exact boxes and masks.

Two worlds are drawn: the calm one, of this module, has one to four shapes that stand nearly upright on plain or lightly
textured backgrounds; scenes of the wide one come from `wide_scenes.py`. A `Scene` is plain data drawn from a random
generator, so the same seed always gives the same image; `draw` turns it into an image, `Scene.box` and `masks` into
exact labels. What people ask about a scene is in `questions.py`. Coordinates are pixels with (0, 0) at the top left
corner of the image, x to the right and y down.
"""

import colorsys
import dataclasses
import io
import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SHAPES = ("circle", "square", "triangle", "star", "diamond")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
MAX_OBJECTS = 5  # in a scene of either world

# Hue in degrees, saturation and value: what people call by the name, with room between neighbours.
_COLOR_RANGES = {
    "red": ((-13, 9), (0.72, 1.0), (0.62, 1.0)),
    "green": ((92, 152), (0.5, 1.0), (0.38, 0.95)),
    "blue": ((205, 246), (0.58, 1.0), (0.5, 1.0)),
    "yellow": ((47, 62), (0.68, 1.0), (0.86, 1.0)),
    "purple": ((267, 302), (0.42, 1.0), (0.42, 0.92)),
    "orange": ((21, 39), (0.8, 1.0), (0.86, 1.0)),
}
SIZES = (1 / 8, 1 / 2)  # greater side of a shape's box, of the image's shorter side
_MAX_CALM_OBJECTS = 4
_MAX_ROTATION = 15.0  # degrees
_SUPERSAMPLE = 4


@dataclasses.dataclass(frozen=True)
class Shape:
    """One coloured shape; `outline` is its border as a polygon [P, 2] of (x, y) pixels (a circle has many corners)."""

    shape: str
    color: str
    rgb: tuple[int, int, int]
    outline: np.ndarray

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Tight box x0, y0, x1, y1 in pixels."""
        return (*self.outline.min(axis=0).tolist(), *self.outline.max(axis=0).tolist())

    @property
    def kind(self) -> tuple[str, str]:
        return self.color, self.shape


@dataclasses.dataclass(frozen=True)
class Scene:
    """Shapes on a background; `style_seed` fixes the texture, the edges and the compression of the image."""

    size: tuple[int, int]  # width, height
    shapes: tuple[Shape, ...]
    background: np.ndarray  # [h, w, 3], uint8, stretched over the image: the corner colours, or a small picture
    texture: float  # standard deviation in grey levels, 0 for none
    style_seed: int
    noise: float = 0.0  # of a camera's sensor: standard deviation in grey levels, 0 for none
    light: float = 0.0  # how much brighter one side of the image is than its middle, 0 for even light


class Proportions(NamedTuple):
    """Bounds of what varies in the shapes: sides by the half base, diagonals by each other, radii by each other."""

    triangle: tuple[float, float]  # height, over half the base
    diamond: tuple[float, float]  # shorter diagonal, over the longer
    star: tuple[float, float]  # inner radius, over the outer


_CALM = Proportions(triangle=(math.sqrt(3), 2.0), diamond=(0.6, 1.0), star=(0.36, 0.5))


def polygon(shape: str, rng: np.random.Generator, proportions: Proportions = _CALM) -> np.ndarray:
    """Corners [P, 2] of an upright shape within about [-1, 1]; proportions vary as they do from hand to hand."""
    if shape == "circle":
        return _ring(96, 1.0, 0.0)
    if shape == "square":
        return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)
    if shape == "triangle":
        height = rng.uniform(*proportions.triangle)
        return np.array([(0, -height / 2), (1, height / 2), (-1, height / 2)], float)
    if shape == "diamond":
        narrow = rng.uniform(*proportions.diamond)
        return np.array([(0, -1), (narrow, 0), (0, 1), (-narrow, 0)], float)
    if shape == "star":
        corners = _ring(10, 1.0, -90.0)
        corners[1::2] *= rng.uniform(*proportions.star)
        return corners
    raise ValueError(f"unknown shape {shape!r}")


def rotated(corners: np.ndarray, degrees: float) -> np.ndarray:
    """Points [P, 2] turned about (0, 0)."""
    angle = np.radians(degrees)
    return corners @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def _ring(count: int, radius: float, start: float) -> np.ndarray:
    angle = np.radians(start) + np.arange(count) * (2 * np.pi / count)
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def sample_color(color: str, rng: np.random.Generator) -> tuple[int, int, int]:
    """A red, green or blue ... within what people call by that name, as RGB."""
    hue, saturation, value = (rng.uniform(*bounds) for bounds in _COLOR_RANGES[color])
    return _rgb(hue, saturation, value)


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def sample_background(rng: np.random.Generator) -> np.ndarray:
    """Four corner colours: plain, or a gradient between two shades of one family (light, pale, grey or dark)."""
    family = rng.choice(["light", "pale", "grey", "dark"], p=[0.35, 0.25, 0.1, 0.3])
    saturation, value = {
        "light": ((0, 0.06), (0.85, 1.0)),
        "pale": ((0.06, 0.3), (0.8, 1.0)),
        "grey": ((0, 0.08), (0.35, 0.75)),
        "dark": ((0, 0.45), (0.0, 0.28)),
    }[str(family)]
    hue = rng.uniform(0, 360)
    first, second = (_rgb(hue + rng.uniform(-25, 25), rng.uniform(*saturation), rng.uniform(*value)) for _ in range(2))
    style = rng.choice(["plain", "horizontal", "vertical", "diagonal"], p=[0.55, 0.15, 0.15, 0.15])
    if style == "plain":
        second = first
    if rng.random() < 0.1:  # pure white and pure black are what many programs draw on
        first = second = (255, 255, 255) if family != "dark" else (0, 0, 0)
    middle = tuple((a + b) // 2 for a, b in zip(first, second, strict=True))
    corners = {
        "horizontal": [[first, second], [first, second]],
        "vertical": [[first, first], [second, second]],
        "diagonal": [[first, middle], [middle, second]],
    }.get(str(style), [[first, first], [first, first]])
    return np.array(corners, np.uint8)


def sample_kinds(count: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Colours and shapes; now and then one comes back whole or in part, so that counting has to be learnt."""
    kinds: list[tuple[str, str]] = []
    for _ in range(count):
        color, shape = str(rng.choice(COLORS)), str(rng.choice(SHAPES))
        if kinds:
            old_color, old_shape = kinds[rng.integers(len(kinds))]
            echo = rng.random()
            color = old_color if echo < 0.35 else color
            shape = old_shape if echo < 0.25 or 0.35 <= echo < 0.5 else shape
        kinds.append((color, shape))
    return kinds


def sample_size(rng: np.random.Generator, aspect: float, min_side: int, max_side: int) -> tuple[int, int]:
    """Width and height, at most `aspect` times as long as wide or as wide as long; often square."""
    ratio = 1.0 if rng.random() < 0.4 else aspect ** rng.uniform(-1, 1)
    longer = math.exp(rng.uniform(math.log(min_side * 1.2), math.log(max_side)))
    width = round(longer if ratio >= 1 else longer * ratio)
    height = round(longer / ratio if ratio >= 1 else longer)
    return width, height


def sample_scene(
    rng: np.random.Generator, *, num_objects: int | None = None, max_side: int = 640, min_side: int = 96
) -> Scene:
    """A random calm scene: `num_objects` shapes (one to four if None) that do not touch, wholly inside the image."""
    width, height = sample_size(rng, 2.0, min_side, max_side)
    background = sample_background(rng)
    count = int(rng.integers(1, _MAX_CALM_OBJECTS + 1)) if num_objects is None else num_objects
    kinds = sample_kinds(count, rng)
    while True:  # start again when the first shapes leave no room for the last
        shapes = _place_shapes(kinds, (width, height), background, rng)
        if shapes is not None:
            break
    texture = rng.uniform(1, 10) if rng.random() < 0.35 else 0.0
    return Scene((width, height), shapes, background, texture, int(rng.integers(2**32)))


def _place_shapes(
    kinds: list[tuple[str, str]], size: tuple[int, int], background: np.ndarray, rng: np.random.Generator
) -> tuple[Shape, ...] | None:
    side = min(size)
    gap = side * rng.uniform(0.0, 0.03) + 1.0
    placed: list[Shape] = []
    for color, shape in kinds:
        rgb = sample_color(color, rng)
        while _contrast(rgb, background) < 60:
            rgb = sample_color(color, rng)
        for _ in range(20):
            corners = rotated(polygon(shape, rng), rng.uniform(-_MAX_ROTATION, _MAX_ROTATION))
            candidate = Shape(shape, color, rgb, scattered(corners, size, rng))
            if all(are_apart(candidate.box, other.box, gap) for other in placed):
                placed.append(candidate)
                break
        else:
            return None
    return tuple(placed)


def scattered(corners: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Corners [P, 2] scaled to a random size that is usual and moved anywhere inside an image."""
    extent = np.ptp(corners, axis=0)
    corners = (corners - corners.min(axis=0)) * (min(size) * rng.uniform(*SIZES) / extent.max())
    return corners + rng.uniform(0, 1, 2) * (np.array(size) - np.ptp(corners, axis=0))


def _contrast(rgb: tuple[int, int, int], background: np.ndarray) -> float:
    """Smallest distance in RGB between a colour and the corners of the background."""
    return float(np.sqrt(((background.astype(float) - rgb) ** 2).sum(axis=-1)).min())


def are_apart(a: tuple[float, ...], b: tuple[float, ...], gap: float) -> bool:
    return a[0] > b[2] + gap or b[0] > a[2] + gap or a[1] > b[3] + gap or b[1] > a[3] + gap


def coverage(outline: np.ndarray, size: tuple[int, int], supersample: int) -> Image.Image:
    """How much of each pixel of an image of this size the polygon covers, 0 to 255.

    PIL's polygons are up to half a subpixel too wide, which matters when pixels are few and `supersample` is low.
    """
    canvas = Image.new("L", (size[0] * supersample, size[1] * supersample))
    # PIL puts integer coordinates at pixel centres.
    ImageDraw.Draw(canvas).polygon([tuple(p) for p in outline * supersample - 0.5], fill=255)
    return canvas.reduce(supersample) if supersample > 1 else canvas


def draw(scene: Scene) -> Image.Image:
    """The image, RGB. Edges are smooth or hard, with or without a rim, slightly noisy or compressed: as files are."""
    rng = np.random.default_rng(scene.style_seed)
    image = Image.fromarray(scene.background).resize(scene.size, Image.Resampling.BILINEAR)
    if scene.texture:
        image = _textured(image, scene.texture, rng)
    supersample = 1 if rng.random() < 0.2 else _SUPERSAMPLE
    rim = rng.uniform(0.3, 1.4) if rng.random() < 0.12 else None  # brightness of an outline around each shape
    for shape in scene.shapes:
        left, top = np.floor(shape.outline.min(axis=0)).astype(int) - 1
        right, bottom = np.ceil(shape.outline.max(axis=0)).astype(int) + 1
        local = shape.outline - (left, top)
        mask = coverage(local, (right - left, bottom - top), supersample)
        if rim is not None:
            image.paste(tuple(min(255, round(c * rim)) for c in shape.rgb), (left, top), mask)
            centre = local.mean(axis=0)
            mask = coverage(centre + (local - centre) * 0.92, (right - left, bottom - top), supersample)
        image.paste(shape.rgb, (left, top), mask)
    if scene.noise or scene.light:
        image = _photographed(image, scene.noise, scene.light, rng)
    finish = rng.random()
    if finish < 0.2:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=int(rng.integers(55, 96)))
        image = Image.open(buffer)
        image.load()
    elif finish < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(min(scene.size) * rng.uniform(0.001, 0.006)))
    return image


def _textured(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Add grain, soft blotches or stripes of a given standard deviation in grey levels."""
    width, height = image.size
    kind = rng.choice(["grain", "blotches", "stripes"])
    if kind == "stripes":
        cells = np.tile(rng.choice([0.0, 1.0], size=(1, 64)), (64, 1)) * 2 - 1
        cells = cells.T if rng.random() < 0.5 else cells
    else:
        cells = rng.standard_normal((96, 96) if kind == "grain" else (8, 8))
    cells = np.clip(cells * strength + 128, 0, 255).astype(np.uint8)
    noise = Image.fromarray(cells).resize((width, height), Image.Resampling.BILINEAR)
    shifted = np.asarray(image, np.int16) + np.asarray(noise, np.int16)[:, :, None] - 128
    return Image.fromarray(np.clip(shifted, 0, 255).astype(np.uint8))


def _photographed(image: Image.Image, noise: float, light: float, rng: np.random.Generator) -> Image.Image:
    """As a camera takes it: light from one side, fine noise in brightness and coarser noise in colour."""
    width, height = image.size
    pixels = np.asarray(image, np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    across, down = np.linspace(-1, 1, width, dtype=np.float32), np.linspace(-1, 1, height, dtype=np.float32)
    slope = light / math.sqrt(2)
    pixels = pixels * (1 + slope * (math.cos(angle) * across + math.sin(angle) * down[:, None]))[:, :, None]
    pixels += noise * rng.standard_normal((height, width, 1), np.float32)
    coarse = rng.normal(128, noise, (height // 3 + 1, width // 3 + 1, 3)).clip(0, 255).astype(np.uint8)
    pixels += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR), np.float32) - 128
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def masks(scene: Scene) -> np.ndarray:
    """Exact masks of the shapes, bool [K, H, W]: pixels covered by at least a half."""
    width, height = scene.size
    out = np.zeros((len(scene.shapes), height, width), bool)
    for i, shape in enumerate(scene.shapes):
        out[i] = np.asarray(coverage(shape.outline, scene.size, _SUPERSAMPLE)) >= 128
    return out


def unit_mask(shape: Shape, side: int = 64) -> np.ndarray:
    """The shape's mask stretched to its own box, float32 [side, side] in 0..1: what the mask VQ-VAE encodes."""
    return outline_mask(shape.outline, side)


def outline_mask(outline: np.ndarray, side: int) -> np.ndarray:
    """The same of a polygon [P, 2]."""
    low, high = outline.min(axis=0), outline.max(axis=0)
    corners = (outline - low) / (high - low) * side
    return np.asarray(coverage(corners, (side, side), _SUPERSAMPLE), np.float32) / 255


def scene_at(seed: int, index: int, **kwargs) -> Scene:
    """The scene of an index in the endless list that a seed stands for."""
    return sample_scene(np.random.default_rng((seed, index)), **kwargs)
