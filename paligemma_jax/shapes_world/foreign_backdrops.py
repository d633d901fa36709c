"""Backgrounds of the wider world for the second drawing program, from formulas of its own.

Marble, pebbles, grass, foliage, sky, skin of light spots and paper: computed at every pixel, in colours of low chroma.
Nothing comes from `backdrops.py`.

Axes: H and W of an image.
"""

import colorsys

import numpy as np

_CHROMA = 0.42  # most saturation of a colour


def paint_backdrop(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Colours [H, W, 3] in 0..1 of a random background."""
    painters = (_marble, _pebbles, _grass, _foliage, _sky, _spots, _paper)
    return np.clip(painters[rng.integers(len(painters))](height, width, rng), 0, 1)


def photograph(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Darker corners, and noise that grows with the light, as a camera has them; `canvas` is [H, W, 3] in 0..1."""
    height, width = canvas.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    distance = ((2 * y / height - 1) ** 2 + (2 * x / width - 1) ** 2) / 2
    canvas = canvas * (1 - rng.uniform(0, 0.1) * distance)[:, :, None]
    spread = rng.uniform(0.004, 0.03) * (0.5 + canvas.mean(axis=2, keepdims=True))
    return canvas + spread * rng.standard_normal((height, width, 3 if rng.random() < 0.5 else 1), np.float32)


def _tint(rng: np.random.Generator, hue: float, low: float, high: float) -> np.ndarray:
    """A dull colour [3] near a hue in turns, between two values."""
    return np.array(
        colorsys.hsv_to_rgb((hue + rng.normal(0, 0.04)) % 1, _CHROMA * rng.random(), rng.uniform(low, high))
    )


def _tones(rng: np.random.Generator, count: int) -> np.ndarray:
    """Colours [count, 3] of one hue, dark or middling or light."""
    hue, low = rng.random(), rng.choice([0.05, 0.3, 0.6])
    return np.stack([_tint(rng, hue, low, low + 0.35) for _ in range(count)])


def _spectral(height: int, width: int, rng: np.random.Generator, falloff: float) -> np.ndarray:
    """Noise [H, W] of mean 0 and deviation 1 whose amplitude falls as a power of the frequency."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((height, width))) * frequency**-falloff
    values = np.fft.irfft2(spectrum, s=(height, width))
    return (values - values.mean()) / values.std()


def _mix(first: np.ndarray, second: np.ndarray, amount: np.ndarray) -> np.ndarray:
    return first + np.clip(amount, 0, 1)[..., None] * (second - first)


def _marble(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Veins: stripes bent by noise."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    angle = rng.uniform(0, np.pi)
    bent = x * np.cos(angle) + y * np.sin(angle) + rng.uniform(0.05, 0.15) * _spectral(height, width, rng, 1.6)
    return _mix(*_tones(rng, 2), np.abs(np.sin(np.pi * rng.uniform(3, 9) * bent)) ** rng.uniform(0.4, 2))


def _pebbles(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Cells around random points with dark joints: cracked earth, pebbles, scales."""
    step = max(height, width) / rng.uniform(10, 20)
    rows, columns = int(height / step) + 3, int(width / step) + 3
    points = np.stack(np.mgrid[:rows, :columns], axis=-1) - 1 + rng.uniform(0, 1, (rows, columns, 2))
    tone = rng.uniform(0, 1, (rows, columns))
    y, x = np.mgrid[:height, :width] / step
    row, column = y.astype(int) + 1, x.astype(int) + 1
    first, second, shade = np.full((height, width), np.inf), np.full((height, width), np.inf), np.zeros((height, width))
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            r, c = np.minimum(row + dy, rows - 1), np.minimum(column + dx, columns - 1)
            distance = np.hypot(points[r, c, 0] - y, points[r, c, 1] - x)
            shade = np.where(distance < first, tone[r, c], shade)
            second = np.minimum(second, np.maximum(first, distance))
            first = np.minimum(first, distance)
    return _mix(*_tones(rng, 2), shade) * np.clip(0.55 + 2.5 * (second - first), 0, 1)[:, :, None]


def _grass(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Upright fibres: noise that is much longer than wide."""
    tall = _spectral(max(8, height // int(rng.integers(8, 20))), width, rng, 0.4)
    place = np.linspace(0, len(tall) - 1, height)
    low = np.minimum(place.astype(int), len(tall) - 2)
    fibres = tall[low] + (place - low)[:, None] * (tall[low + 1] - tall[low])
    hue = rng.choice([rng.uniform(0.1, 0.35), rng.random()])
    light = 0.5 + 0.25 * fibres + 0.15 * _spectral(height, width, rng, 1.5)
    return _mix(_tint(rng, hue, 0.1, 0.3), _tint(rng, hue, 0.4, 0.8), light)


def _foliage(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Leaves, each where two circles overlap, painted from the back to the front."""
    hue, side = rng.choice([0.3, 0.25, 0.1]), min(height, width)
    canvas = _mix(_tint(rng, hue, 0.02, 0.15), _tint(rng, hue, 0.1, 0.3), _spectral(height, width, rng, 1.5))
    half = side * rng.uniform(0.035, 0.055)
    for _ in range(int(0.6 * height * width / half**2)):
        length, slim, angle = half * rng.uniform(0.6, 1), rng.uniform(0.35, 0.6), rng.uniform(0, np.pi)
        cy, cx = rng.uniform(0, height), rng.uniform(0, width)
        top, left = max(0, int(cy - length)), max(0, int(cx - length))
        part = canvas[top : int(cy + length) + 1, left : int(cx + length) + 1]
        y, x = np.ogrid[: part.shape[0], : part.shape[1]]
        y, x = y + (top - cy), x + (left - cx)
        along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        radius = length * (1 + slim**2) / (2 * slim)
        inside = np.clip(radius - np.hypot(along, np.abs(across) + radius - slim * length), 0, 1)[:, :, None]
        color = _tint(rng, hue, 0.15, 0.7) * (1 - 0.25 * (np.abs(across) < 0.06 * length))[:, :, None]
        part[:] = part * (1 - inside) + color * inside
    return canvas


def _sky(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Heaps of soft puffs before a gradient."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    hue = rng.choice([0.58, 0.6, 0.07])
    canvas = _mix(_tint(rng, hue, 0.45, 0.9), _tint(rng, hue, 0.75, 1), y * max(height, width) / height)
    cloud = np.zeros((height, width))
    for _ in range(int(rng.integers(2, 6))):
        middle = rng.uniform(0, 1, 2)
        for _ in range(int(rng.integers(5, 12))):
            puff = middle + rng.normal(0, (0.03, 0.09))
            cloud += np.exp(-((y - puff[0]) ** 2 / 1.5 + (x - puff[1]) ** 2 / 4) / rng.uniform(0.015, 0.04) ** 2)
    cloud *= 0.8 + 0.35 * _spectral(height, width, rng, 1.4)
    return _mix(canvas, np.full(3, rng.uniform(0.75, 1)) - 0.1 * y[:, :, None], cloud)


def _spots(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Lights out of focus: many Gaussians."""
    y, x = np.arange(height)[:, None] / max(height, width), np.arange(width) / max(height, width)
    tones = _tones(rng, 3)
    canvas = np.broadcast_to(tones[0], (height, width, 3))
    for _ in range(int(rng.integers(10, 30))):
        cy, cx, radius = rng.random(), rng.random(), rng.uniform(0.04, 0.15)
        spot = np.exp(-((y - cy) ** 2) / radius**2) * np.exp(-((x - cx) ** 2) / radius**2)
        canvas = _mix(canvas, tones[rng.integers(1, 3)], 0.8 * spot)
    return canvas


def _paper(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Rough paper or plaster lit from one side: the slope of a noisy surface."""
    surface = _spectral(height, width, rng, rng.uniform(0.9, 1.5))
    angle = rng.uniform(0, 2 * np.pi)
    slope = np.cos(angle) * np.gradient(surface, axis=1) + np.sin(angle) * np.gradient(surface, axis=0)
    return _tones(rng, 1)[0] * (1 + rng.uniform(0.03, 0.12) * slope / slope.std())[:, :, None]
