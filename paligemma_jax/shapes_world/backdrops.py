"""Backgrounds of the wide world: cloth, stone, wood, bricks, leaves, clouds, landscapes and what is out of focus.

Their colours are muted (`_MOST_SATURATION`), those of the shapes are not, so a shape can be told by its colour from
what lies behind it. Nothing here is as large as a shape and has its outline. All are small pictures that `scenes.draw`
stretches over the image.

Axes: h, w of the small picture.
"""

import colorsys
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

_LONGEST = 256  # pixels of the longer side
_MOST_SATURATION = 0.45


def backdrop(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A background for an image of a size (width, height): u8 [h, w, 3] of the same proportions."""
    scale = min(1.0, _LONGEST / max(size))
    width, height = (max(2, round(side * scale)) for side in size)
    paint = _PAINTERS[rng.choice(len(_PAINTERS), p=_WEIGHTS)]
    return (paint(height, width, rng).clip(0, 1) * 255).round().astype(np.uint8)


def _muted(rng: np.random.Generator, hue: float | None = None, value: tuple[float, float] = (0.1, 0.95)) -> np.ndarray:
    """A colour [3] in 0..1 that is not strong, of a hue in degrees or of any."""
    hue = rng.uniform(0, 360) if hue is None else hue + rng.normal(0, 12)
    return np.array(colorsys.hsv_to_rgb(hue / 360 % 1, rng.uniform(0, _MOST_SATURATION), rng.uniform(*value)))


def _shades(rng: np.random.Generator, count: int) -> np.ndarray:
    """Colours [count, 3] that go together: of like lightness, and often of like hue."""
    middle = rng.uniform(0.12, 0.92)
    bounds = max(0.03, middle - 0.18), min(1.0, middle + 0.18)
    hue = rng.uniform(0, 360) if rng.random() < 0.7 else None
    return np.stack([_muted(rng, hue, bounds) for _ in range(count)])


def _stretched(cells: np.ndarray, height: int, width: int) -> np.ndarray:
    image = Image.fromarray(cells.astype(np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def fractal(
    height: int, width: int, rng: np.random.Generator, coarse: float = 3.0, stretch: float = 1.0, rough: float = 0.55
) -> np.ndarray:
    """Noise [h, w] in 0..1 at all scales; the coarsest has about `coarse` waves over the longer side.

    Each finer scale counts `rough` times as much; `stretch` lengthens all of it across.
    """
    total, weight, waves = np.zeros((height, width), np.float32), 1.0, coarse
    while waves < max(height, width) / 2:
        cells = (
            math.ceil(waves * height / max(height, width)) + 2,
            math.ceil(waves * width / stretch / max(height, width)) + 2,
        )
        total += weight * _stretched(rng.standard_normal(cells), height, width)
        weight, waves = weight * rough, waves * 2
    low, high = np.quantile(total[::4, ::4], (0.02, 0.98))
    return ((total - low) / max(high - low, 1e-6)).clip(0, 1)


def _blend(amount: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Colours [h, w, 3] along a path through `colors` [n, 3], by `amount` [h, w] in 0..1."""
    place = np.linspace(0, 1, len(colors))
    return np.stack([np.interp(amount, place, channel) for channel in colors.T], axis=-1)


def _stone(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    amount = fractal(height, width, rng, rng.uniform(2, 12), 2 ** rng.uniform(0, 1.5), rng.uniform(0.5, 0.8))
    return _blend(amount, _shades(rng, int(rng.integers(2, 4))))


def _wood(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Rings cut lengthwise, or across."""
    upright = rng.random() < 0.5
    long, short = (height, width) if upright else (width, height)
    rings = np.linspace(0, rng.uniform(3, 9), short)[:, None] + 1.5 * fractal(short, long, rng, 2, 5.0, 0.4)
    amount = 0.6 * (0.5 + 0.5 * np.sin(2 * np.pi * rings)) + 0.4 * fractal(short, long, rng, 24, 8.0, 0.7)
    first = _muted(rng, rng.uniform(15, 45), (0.25, 0.85))
    picture = _blend(amount, np.stack([first, first * rng.uniform(0.65, 0.85)]))
    return picture.transpose(1, 0, 2) if upright else picture


def _cloth(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Threads over and under each other, with soft folds."""
    y, x = np.arange(height)[:, None], np.arange(width)
    period = rng.uniform(2.5, 9)
    angle = rng.uniform(0, np.pi / 2)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    threads = np.sin(2 * np.pi * u / period), np.sin(2 * np.pi * v / period)
    weave = np.maximum(*threads) if rng.random() < 0.5 else threads[0] * threads[1]
    amount = 0.25 + 0.2 * weave + 0.5 * fractal(height, width, rng, 2, 1.5, 0.4)
    return _blend(amount, _shades(rng, 2))


def _bricks(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    rows = int(rng.integers(10, 18))
    tall = height / rows
    long = tall * rng.uniform(2.2, 3.2)
    row = (np.arange(height) / tall).astype(int)[:, None]
    place = np.arange(width) / long + 0.5 * (row % 2) + 1
    column = place.astype(int)
    tone = rng.normal(0, 0.06, (rows + 2, int(width / long) + 4))[row, column]
    first, mortar = _shades(rng, 2)
    picture = first * (1 + tone[:, :, None])
    joint = ((np.arange(height) % tall)[:, None] < 0.14 * tall) | ((place - column) * long < 0.14 * tall)
    picture = np.where(joint[:, :, None], mortar, picture)
    return picture * (0.85 + 0.3 * fractal(height, width, rng, 8, 1.0, 0.8)[:, :, None])


def _leaves(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Many pointed leaves with a midrib over each other, fresh or in autumn, on dark ground."""
    hue = rng.choice([rng.uniform(75, 130), rng.uniform(25, 60)], p=[0.7, 0.3])
    ground = _muted(rng, hue, (0.05, 0.3))
    image = Image.fromarray(np.full((height, width, 3), (ground * 255).round(), np.uint8))
    canvas, side = ImageDraw.Draw(image), min(height, width)
    half = np.linspace(-1, 1, 7)
    rim = np.concatenate([half, half[-2:0:-1]])
    bulge = np.concatenate([1 - half**2, -(1 - half[-2:0:-1] ** 2)])
    slim = rng.uniform(0.22, 0.4)
    length = side * rng.uniform(0.035, 0.06)  # half of it
    count = int(rng.uniform(0.4, 0.9) * height * width / (slim * length**2))
    angle, size = rng.uniform(0, 2 * np.pi, count), length * rng.uniform(0.6, 1.1, count)
    cosine, sine = np.cos(angle) * size, np.sin(angle) * size
    centre = rng.uniform((0, 0), (width, height), (count, 2))
    across = centre[:, :1] + rim * cosine[:, None] - slim * bulge * sine[:, None]
    down = centre[:, 1:] + rim * sine[:, None] + slim * bulge * cosine[:, None]
    outlines = np.stack([across, down], axis=-1).reshape(count, -1).tolist()
    ribs = np.concatenate([centre - np.stack([cosine, sine], 1), centre + np.stack([cosine, sine], 1)], 1).tolist()
    colors = np.stack([_muted(rng, hue, (0.15, 0.75)) for _ in range(40)])[rng.integers(40, size=count)] * 255
    fills, rib_fills = colors.astype(int).tolist(), (colors * 0.8).astype(int).tolist()
    for outline, rib, fill, rib_fill in zip(outlines, ribs, fills, rib_fills, strict=True):
        canvas.polygon(outline, fill=tuple(fill))
        canvas.line(rib, fill=tuple(rib_fill))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2))), float) / 255


def _clouds(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """White to grey clouds in a sky that is paler at the horizon."""
    hue = rng.choice([rng.uniform(200, 225), rng.uniform(0, 40)], p=[0.8, 0.2])
    top, bottom = _muted(rng, hue, (0.5, 0.95)), _muted(rng, hue, (0.75, 1.0))
    sky = _blend(np.broadcast_to(np.linspace(0, 1, height)[:, None], (height, width)), np.stack([top, bottom]))
    cover, softness = rng.uniform(0.3, 0.65), rng.uniform(0.1, 0.35)
    thickness = fractal(height, width, rng, rng.uniform(2, 4), rng.uniform(1, 2.2))
    opacity = ((thickness - cover) / softness).clip(0, 1)[:, :, None]
    light = rng.uniform(0.75, 1.0) - 0.2 * fractal(height, width, rng, 4)[:, :, None] * rng.random()
    return sky * (1 - opacity) + light * opacity


def _landscape(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Clouds over one to three ridges of land."""
    picture = _clouds(height, width, rng)
    rows = np.arange(height)[:, None]
    horizon = height * rng.uniform(0.25, 0.6)
    for _ in range(int(rng.integers(1, 4))):
        ridge = horizon - height * rng.uniform(0.05, 0.25) * fractal(2, width, rng, rng.uniform(1.5, 4))[0]
        land = _blend(fractal(height, width, rng, rng.uniform(5, 15), 2.0, 0.7), _shades(rng, 2))
        picture = np.where((rows > ridge)[:, :, None], land, picture)
        horizon += height * rng.uniform(0.1, 0.3)
    return picture


def _out_of_focus(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Large soft spots of light and dark, as a near camera sees a room or a garden."""
    colors = _shades(rng, 4)
    image = Image.fromarray((_blend(fractal(height, width, rng, 2, 1.0, 0.4), colors[:2]) * 255).astype(np.uint8))
    canvas, side = ImageDraw.Draw(image), min(height, width)
    for _ in range(int(rng.integers(12, 40))):
        radius, x, y = side * rng.uniform(0.03, 0.15), rng.uniform(0, width), rng.uniform(0, height)
        color = (colors[rng.integers(4)] * rng.uniform(0.7, 1.2) * 255).clip(0, 255).astype(int).tolist()
        canvas.ellipse((x - radius, y - radius * rng.uniform(0.5, 1), x + radius, y + radius), fill=tuple(color))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(side * rng.uniform(0.04, 0.08))), float) / 255


_PAINTERS = (_stone, _wood, _cloth, _bricks, _leaves, _clouds, _landscape, _out_of_focus)
_WEIGHTS = (0.2, 0.1, 0.1, 0.06, 0.16, 0.14, 0.12, 0.12)
