"""The same kinds of scenes drawn by a second, independent program: an out-of-distribution test set for either world.

Written from a description of the images alone. Shapes are signed distances with smooth edges, colours are named
swatches with jitter; proportions, backgrounds and placement are its own. Nothing comes from `scenes.py` and its like.

Axes: H and W of an image, P corners of a shape.
"""

import colorsys
import io

import numpy as np
from PIL import Image

from paligemma_jax.shapes_world.foreign_backdrops import paint_backdrop, photograph
from paligemma_jax.shapes_world.samples import Sample
from paligemma_jax.tasks.detection import Box

_SHAPES = ("circle", "square", "triangle", "star", "diamond")
_SIZES = (1 / 8, 1 / 2)  # greater side of a shape's box, of the image's shorter side
_MAX_ROTATION = 15.0  # degrees, in the calm world
_SLIM = (0.55, 0.72)  # shorter diagonal of a diamond by the longer, in the calm world
_GAP = 0.025  # free space between shapes, of the image's shorter side
_WIDE_ASPECT = 4 / 3  # longest side by the shortest, in the wide world
_VISIBLE = 0.97  # share of a shape's surroundings from which it must stand out, in the wide world

_SWATCHES = {  # what people call by these names: CSS, plotting libraries, crayons
    "red": "ff0000 dc143c d62728 e31a1c c1121f e6194b cc0000 ee2222 b22222",
    "green": "008000 228b22 32cd32 2e8b57 00b050 3cb44b 2ca02c 00dd00 4c9a2a",
    "blue": "0000ff 4169e1 1e90ff 0000cd 1f77c4 0057b8 2a52be 4363d8 3b7dd8",
    "yellow": "ffff00 ffd900 ffe119 fff200 fce205 f7e03c ffef5a fddc1c",
    "purple": "800080 9932cc 9400d3 663399 8a2be2 7b2d8e ba55d3 6a0dad 911eb4",
    "orange": "ffa500 ff8c00 ff7f0e f28c28 f58231 ff7518 fd8a1e ff9a1f",
}
_LIMITS = {  # hue in degrees, least saturation, least and greatest value: beyond lie pink, brown, olive, cyan ...
    "red": (-12, 8, 0.75, 0.65, 1.0),
    "green": (88, 158, 0.50, 0.42, 1.0),
    "blue": (207, 243, 0.62, 0.58, 1.0),
    "yellow": (50, 62, 0.60, 0.92, 1.0),
    "purple": (267, 302, 0.45, 0.45, 0.90),
    "orange": (22, 40, 0.78, 0.92, 1.0),
}


def foreign_sample(seed: int, index: int) -> Sample:
    """An image of this program with one to four objects; every other one was compressed as JPEG."""
    rng = np.random.default_rng((seed, index))
    width, height = _image_size(rng)
    canvas, shades = _background(height, width, rng)
    figures: list[_Figure] = []
    kinds: list[tuple[str, str]] = []
    for _ in range(int(rng.integers(1, 5))):
        color, shape, rgb = _next_kind(kinds, shades, rng)
        figure = _placed(shape, figures, (width, height), rng)
        if figure is not None:
            figures.append(figure)
            kinds.append((color, shape))
            _fill(canvas, figure, rgb)
    return _developed(canvas, figures, kinds, rng)


def wide_foreign_sample(seed: int, index: int) -> Sample:
    """An image of the wider world: up to five objects at any rotation on a busy background, or none."""
    rng = np.random.default_rng((seed, index))
    width, height = _image_size(rng, _WIDE_ASPECT)
    canvas = paint_backdrop(height, width, rng)
    slim = _wide_slim((width, height))
    figures: list[_Figure] = []
    kinds: list[tuple[str, str]] = []
    count = 0 if rng.random() < 0.12 else int(rng.integers(1, 6))
    for _ in range(40 * count):
        if len(figures) == count:
            break
        color, shape = _pick_kind(kinds, rng)
        figure = _placed(shape, figures, (width, height), rng, 180.0, slim)
        if figure is None:  # no room for any more
            break
        rgb = _sample_color(color, rng)
        if np.mean(_stands_out(rgb, _surroundings(canvas, figure))) >= _VISIBLE:
            figures.append(figure)
            kinds.append((color, shape))
            _fill(canvas, figure, rgb)
    return _developed(photograph(canvas, rng), figures, kinds, rng)


def _wide_slim(size: tuple[int, int]) -> tuple[float, float]:
    """Bounds of a diamond's shorter diagonal by the longer.

    Stretched to a square, as models see images, it must not look like a square on its corner in a longer image.
    """
    return 0.4, 0.66 * min(size) / max(size)


class _Figure:
    """A shape in pixels: corners [P, 2], or a centre and a radius."""

    def __init__(
        self, shape: str, extent: float, rng: np.random.Generator, most_degrees: float, slim: tuple[float, float]
    ):
        self.center, self.radius = np.zeros(2), extent / 2
        self.corners = _corners(shape, rng, slim)
        if self.corners is not None:
            angle = np.radians(rng.uniform(-most_degrees, most_degrees))
            self.corners = self.corners @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
            self.corners *= extent / np.ptp(self.corners, axis=0).max()
        self.move(-np.array(self.box[:2]))

    @property
    def box(self) -> Box:
        """Tight box x0, y0, x1, y1."""
        if self.corners is None:
            low, high = self.center - self.radius, self.center + self.radius
        else:
            low, high = self.corners.min(axis=0), self.corners.max(axis=0)
        return (*low.tolist(), *high.tolist())

    def move(self, step: np.ndarray) -> None:
        self.center = self.center + step
        if self.corners is not None:
            self.corners = self.corners + step

    def distance(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Signed distance of points to the outline, negative inside."""
        if self.corners is None:
            return np.hypot(x - self.center[0], y - self.center[1]) - self.radius
        shape = np.broadcast_shapes(x.shape, y.shape)
        nearest, inside = np.full(shape, np.inf), np.zeros(shape, bool)
        for (ax, ay), (bx, by) in zip(self.corners, np.roll(self.corners, -1, axis=0), strict=True):
            ex, ey = bx - ax, by - ay
            px, py = x - ax, y - ay
            along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
            nearest = np.minimum(nearest, (px - along * ex) ** 2 + (py - along * ey) ** 2)
            # A ray to the right crosses this edge: even-odd rule.
            inside ^= ((ay > y) != (by > y)) & ((px * ey - py * ex < 0) == (ey > 0))
        return np.where(inside, -1.0, 1.0) * np.sqrt(nearest)


def _developed(
    canvas: np.ndarray, figures: list[_Figure], kinds: list[tuple[str, str]], rng: np.random.Generator
) -> Sample:
    """The finished image, half of the time as JPEG keeps it, and its truth."""
    height, width = canvas.shape[:2]
    y, x = np.mgrid[:height, :width] + 0.5
    masks = np.array([figure.distance(x, y) < 0 for figure in figures], bool).reshape(-1, height, width)
    image = Image.fromarray(np.round(np.clip(canvas, 0, 1) * 255).astype(np.uint8))
    if rng.random() < 0.5:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(rng.integers(70, 96)))
        image = Image.open(file)
        image.load()
    return Sample(image, kinds, [figure.box for figure in figures], masks)


def _corners(shape: str, rng: np.random.Generator, slim: tuple[float, float]) -> np.ndarray | None:
    """Corners of a shape of any size around its centre; None for a circle."""
    if shape == "circle":
        return None
    if shape == "square":
        return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], float)
    if shape == "diamond":
        width = rng.uniform(*slim)
        return np.array([[0, -1], [width, 0], [0, 1], [-width, 0]], float)
    radii = np.array([1.0] * 3 if shape == "triangle" else [1.0, rng.uniform(0.37, 0.44)] * 5)
    angle = 2 * np.pi * np.arange(len(radii)) / len(radii)
    return np.stack([np.sin(angle), -np.cos(angle)], axis=-1) * radii[:, None]  # the first corner points up


def _placed(
    shape: str,
    others: list[_Figure],
    size: tuple[int, int],
    rng: np.random.Generator,
    most_degrees: float = _MAX_ROTATION,
    slim: tuple[float, float] = _SLIM,
) -> _Figure | None:
    """The shape at a free position inside the image, smaller where it is crowded; None when there is no room."""
    side, largest = min(size), _SIZES[1]
    for _ in range(40):
        figure = _Figure(shape, side * rng.uniform(_SIZES[0], largest), rng, most_degrees, slim)
        room = np.array(size) - np.array(figure.box[2:])
        for _ in range(12):
            figure.move(rng.uniform(0.5, room - 0.5) - np.array(figure.box[:2]))
            if not any(_touch(figure, other, _GAP * side) for other in others):
                return figure
        largest = max(1.3 * _SIZES[0], 0.94 * largest)
    return None


def _touch(a: _Figure, b: _Figure, gap: float) -> bool:
    """Whether some point of `b` is nearer to `a` than `gap`, looked at on a grid."""
    x0, y0, x1, y1 = b.box
    x, y = np.meshgrid(np.linspace(x0, x1, 40), np.linspace(y0, y1, 40))
    return bool(((a.distance(x, y) < gap) & (b.distance(x, y) < gap / 2)).any())


def _fill(canvas: np.ndarray, figure: _Figure, rgb: np.ndarray) -> None:
    """Paint a figure on a canvas [H, W, 3] in 0..1, a pixel's share of it taken from the distance of its centre."""
    x0, y0, x1, y1 = (int(edge) for edge in figure.box)
    top, left = max(0, y0 - 2), max(0, x0 - 2)
    part = canvas[top : y1 + 3, left : x1 + 3]
    y, x = np.mgrid[: part.shape[0], : part.shape[1]] + 0.5
    cover = np.clip(0.5 - figure.distance(x + left, y + top), 0, 1)[:, :, None]
    part[:] = part * (1 - cover) + rgb * cover


def _next_kind(
    kinds: list[tuple[str, str]], shades: np.ndarray, rng: np.random.Generator
) -> tuple[str, str, np.ndarray]:
    """Colour name, shape and colour; now and then those of an earlier object, so that objects repeat."""
    while True:
        color, shape = _pick_kind(kinds, rng)
        for _ in range(20):
            rgb = _sample_color(color, rng)
            if np.all(_stands_out(rgb, shades)):
                return color, shape, rgb


def _pick_kind(kinds: list[tuple[str, str]], rng: np.random.Generator) -> tuple[str, str]:
    """Colour name and shape, new ones or an earlier object's."""
    color, shape = str(rng.choice(list(_SWATCHES))), str(rng.choice(_SHAPES))
    echo = rng.random()
    if kinds and echo < 0.3:
        old_color, shape = kinds[rng.integers(len(kinds))]
        color = old_color if echo < 0.18 else color
    return color, shape


def _surroundings(canvas: np.ndarray, figure: _Figure) -> np.ndarray:
    """Some colours [n, 3] of the canvas in and just around a figure's box."""
    x0, y0, x1, y1 = figure.box
    step, margin = max(1, int(max(x1 - x0, y1 - y0) / 30)), 0.15 * max(x1 - x0, y1 - y0)
    top, left = max(0, int(y0 - margin)), max(0, int(x0 - margin))
    return canvas[top : int(y1 + margin) : step, left : int(x1 + margin) : step].reshape(-1, 3)


def _sample_color(name: str, rng: np.random.Generator) -> np.ndarray:
    """An sRGB colour [3] in 0..1 that goes by this name."""
    low, high, least_saturation, least_value, most_value = _LIMITS[name]
    while True:
        swatch = bytes.fromhex(str(rng.choice(_SWATCHES[name].split())))
        hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in swatch))
        hue = (hue * 360 + rng.normal(0, 3) + 40) % 360 - 40  # reds lie on both sides of 0
        saturation, value = min(1.0, saturation + rng.normal(0, 0.05)), min(1.0, value + rng.normal(0, 0.05))
        if low <= hue <= high and saturation >= least_saturation and least_value <= value <= most_value:
            return np.array(colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value))


def _stands_out(rgb: np.ndarray, shades: np.ndarray) -> np.ndarray:
    """Whether a person sees a colour at once on each shade [..., 3]; lightness counts for more than hue. Bool [...]."""
    difference = _lab(shades) - _lab(rgb)
    lightness, chroma = difference[..., 0], np.hypot(difference[..., 1], difference[..., 2])
    return np.hypot(1.5 * lightness, 0.5 * chroma) >= 32


def _lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of sRGB [..., 3] in 0..1."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
    t = xyz / np.array([0.9505, 1.0, 1.089])
    f = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def _image_size(rng: np.random.Generator, most: float = 2) -> tuple[int, int]:
    """Width and height from 200 to 900 pixels, at most 1:2, or 1 to `most`."""
    while True:
        side, aspect = np.exp(rng.uniform(np.log(200), np.log(900))), most ** rng.uniform(-1, 1)
        width, height = round(side * aspect**0.5), round(side / aspect**0.5)
        if min(width, height) >= 200 and max(width, height) <= min(900, most * min(width, height)):
            return width, height


def _background(height: int, width: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Colours [H, W, 3] in 0..1, plain or a gradient, with or without a texture; and the shades [3, 3] among them."""
    saturation, value = {
        "light": ((0, 0.06), (0.8, 1)),
        "pale": ((0.08, 0.28), (0.85, 1)),
        "dark": ((0, 0.6), (0.03, 0.27)),
    }[str(rng.choice(["light", "dark", "pale"]))]
    first, second = (
        np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value))) for _ in range(2)
    )
    y, x = np.mgrid[:height, :width]
    y, x = y / height - 0.5, x / width - 0.5
    fill = rng.choice(["plain", "linear", "radial"], p=[0.5, 0.3, 0.2])
    if fill == "plain":
        blend, second = np.zeros((height, width)), first
    elif fill == "linear":
        angle = rng.uniform(0, 2 * np.pi)
        blend = x * np.cos(angle) + y * np.sin(angle)
    else:
        blend = np.hypot(x - rng.uniform(-0.4, 0.4), y - rng.uniform(-0.4, 0.4))
    blend = (blend - blend.min()) / max(np.ptp(blend), 1e-9)
    canvas = first + blend[:, :, None] * (second - first)
    if rng.random() < 0.45:
        canvas = canvas + _texture(height, width, rng)
    return canvas, np.stack([first, second, (first + second) / 2])


def _texture(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A light texture [H, W, 1] to add to colours in 0..1."""
    kind = rng.choice(["grain", "clouds", "stripes", "weave", "speckles"])
    y, x = np.mgrid[:height, :width]
    if kind == "grain":
        values = rng.standard_normal((height, width))
    elif kind == "clouds":
        grid = rng.uniform(-1, 1, (int(rng.integers(4, 12)), int(rng.integers(4, 12)))).astype(np.float32)
        values = np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))
    elif kind == "stripes":
        angle, period = rng.uniform(0, np.pi), rng.uniform(5, 40)
        values = np.sin((x * np.cos(angle) + y * np.sin(angle)) * (2 * np.pi / period))
    elif kind == "weave":
        period = rng.uniform(4, 16)
        values = np.sin(x * (2 * np.pi / period)) * np.sin(y * (2 * np.pi / period))
    else:
        values = np.where(rng.random((height, width)) < rng.uniform(0.01, 0.06), 2.5, 0) * rng.choice([-1, 1])
    return (values * rng.uniform(0.012, 0.03))[:, :, None]
