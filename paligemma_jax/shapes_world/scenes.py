"""Synthetic scenes: images of one to four coloured shapes, with exact boxes and masks.

A `Scene` is plain data drawn from a random generator, so the same seed always gives the same image; `draw` turns it
into an image, `Scene.box` and `masks` into exact labels. What people ask about a scene is in `questions.py`.
Coordinates are pixels with (0, 0) at the top left corner of the image, x to the right and y down.
"""

import colorsys
import dataclasses
import io
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SHAPES = ("circle", "square", "triangle", "star", "diamond")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
MAX_OBJECTS = 4

# Hue in degrees, saturation and value: what people call by the name, with room between neighbours.
_COLOR_RANGES = {
    "red": ((-13, 9), (0.72, 1.0), (0.62, 1.0)),
    "green": ((92, 152), (0.5, 1.0), (0.38, 0.95)),
    "blue": ((205, 246), (0.58, 1.0), (0.5, 1.0)),
    "yellow": ((47, 62), (0.68, 1.0), (0.86, 1.0)),
    "purple": ((267, 302), (0.42, 1.0), (0.42, 0.92)),
    "orange": ((21, 39), (0.8, 1.0), (0.86, 1.0)),
}
_SIZES = (1 / 8, 1 / 2)  # of the image's shorter side
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
    background: np.ndarray  # corner colours [2, 2, 3], uint8
    texture: float  # standard deviation in grey levels, 0 for none
    style_seed: int


def _polygon(shape: str, rng: np.random.Generator) -> np.ndarray:
    """Corners [P, 2] of an upright shape within about [-1, 1]; proportions vary as they do from hand to hand."""
    if shape == "circle":
        return _ring(96, 1.0, 0.0)
    if shape == "square":
        return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)
    if shape == "triangle":
        height = rng.uniform(math.sqrt(3), 2.0)
        return np.array([(0, -height / 2), (1, height / 2), (-1, height / 2)], float)
    if shape == "diamond":
        narrow = rng.uniform(0.6, 1.0)
        return np.array([(0, -1), (narrow, 0), (0, 1), (-narrow, 0)], float)
    if shape == "star":
        corners = _ring(10, 1.0, -90.0)
        corners[1::2] *= rng.uniform(0.36, 0.5)
        return corners
    raise ValueError(f"unknown shape {shape!r}")


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


def _sample_background(rng: np.random.Generator) -> np.ndarray:
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


def _sample_kinds(count: int, rng: np.random.Generator) -> list[tuple[str, str]]:
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


def sample_scene(
    rng: np.random.Generator, *, num_objects: int | None = None, max_side: int = 640, min_side: int = 96
) -> Scene:
    """A random scene: `num_objects` shapes (one to four if None) that do not touch, wholly inside the image."""
    aspect = 1.0 if rng.random() < 0.4 else 2.0 ** rng.uniform(-1, 1)
    longer = math.exp(rng.uniform(math.log(min_side * 1.2), math.log(max_side)))
    width = round(longer if aspect >= 1 else longer * aspect)
    height = round(longer / aspect if aspect >= 1 else longer)
    background = _sample_background(rng)
    count = int(rng.integers(1, MAX_OBJECTS + 1)) if num_objects is None else num_objects
    kinds = _sample_kinds(count, rng)
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
            corners = _polygon(shape, rng)
            angle = np.radians(rng.uniform(-_MAX_ROTATION, _MAX_ROTATION))
            rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
            corners = corners @ rotation
            extent = np.ptp(corners, axis=0)
            corners = (corners - corners.min(axis=0)) * (side * rng.uniform(*_SIZES) / extent.max())
            room = np.array(size) - np.ptp(corners, axis=0)
            candidate = Shape(shape, color, rgb, corners + rng.uniform(0, 1, 2) * room)
            if all(_are_apart(candidate.box, other.box, gap) for other in placed):
                placed.append(candidate)
                break
        else:
            return None
    return tuple(placed)


def _contrast(rgb: tuple[int, int, int], background: np.ndarray) -> float:
    """Smallest distance in RGB between a colour and the corners of the background."""
    return float(np.sqrt(((background.astype(float) - rgb) ** 2).sum(axis=-1)).min())


def _are_apart(a: tuple[float, ...], b: tuple[float, ...], gap: float) -> bool:
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


def masks(scene: Scene) -> np.ndarray:
    """Exact masks of the shapes, bool [K, H, W]: pixels covered by at least a half."""
    width, height = scene.size
    out = np.zeros((len(scene.shapes), height, width), bool)
    for i, shape in enumerate(scene.shapes):
        out[i] = np.asarray(coverage(shape.outline, scene.size, _SUPERSAMPLE)) >= 128
    return out


def unit_mask(shape: Shape, side: int = 64) -> np.ndarray:
    """The shape's mask stretched to its own box, float32 [side, side] in 0..1: what the mask VQ-VAE encodes."""
    low, high = shape.outline.min(axis=0), shape.outline.max(axis=0)
    corners = (shape.outline - low) / (high - low) * side
    return np.asarray(coverage(corners, (side, side), _SUPERSAMPLE), np.float32) / 255


def scene_at(seed: int, index: int, **kwargs) -> Scene:
    """The scene of an index in the endless list that a seed stands for."""
    return sample_scene(np.random.default_rng((seed, index)), **kwargs)
