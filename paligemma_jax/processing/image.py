"""Pictures of every kind to RGB, and RGB to pixels.

Transparency is dropped, not blended: what lies under a transparent pixel is seen, as in PIL's `convert("RGB")` and in
transformers. Of an animation or a document with several pages the first picture is taken.
"""

import contextlib
import dataclasses
import functools
import glob
import http.client
import io
import math
import os
import re
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from paligemma_jax.errors import ConfigError, ImageError, one_line
from paligemma_jax.files import read_json, write_json

ImageSource = Image.Image | str | os.PathLike[str] | np.ndarray
Resample = Literal["bicubic", "bilinear"]

MAX_PIXELS = 2**27  # 134 million, 400 MB as RGB; the largest phone pictures have 108 million
MAX_DOWNLOAD_BYTES = 64 * 2**20
DOWNLOAD_TIMEOUT_S = 20.0

_RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_SUFFIXES = (".avif", ".bmp", ".gif", ".ico", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm")
_SUFFIXES += (".tga", ".tif", ".tiff", ".webp")
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {  # EXIF orientation -> what turns the stored picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(source: ImageSource) -> Image.Image:
    """Load a picture as an upright 8 bit RGB image.

    Args:
        source: a PIL image, a path, an http(s) URL, or a uint8 array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] (RGBA).

    Raises:
        ImageError: when it cannot be fetched or read, is empty, or has more than MAX_PIXELS pixels.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, getattr(source, "filename", "") or "the given picture")
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source), "the given array")
    if isinstance(source, str) and is_url(source):
        return _decode(io.BytesIO(_download(source)), source)
    if not isinstance(source, str | os.PathLike):
        raise ImageError(
            f"a {type(source).__name__} is not a picture: give a PIL image, a path, a URL or a uint8 array"
        )
    path = Path(source).expanduser()
    try:
        with path.open("rb") as file:
            return _decode(file, str(path))
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist: give the path of a picture") from None
    except IsADirectoryError:
        raise ImageError(f"{path} is a folder: give one picture, or the pictures in it as a list") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise ImageError(f"{str(path)!r} cannot be opened: {one_line(error)}") from None


def to_pixels(
    image: Image.Image,
    size: int,
    resample: Resample = "bicubic",
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
    std: tuple[float, float, float] = (0.5, 0.5, 0.5),
) -> np.ndarray:
    """RGB image to float32 [size, size, 3], (x / 255 - mean) / std: in [-1, 1] by default.

    The picture is squeezed to a square and resampled with antialiasing in 8 bits, as transformers' SigLIP does.
    """
    values = np.asarray(image.resize((size, size), _RESAMPLE[resample]))
    return np.stack([table[values[..., c]] for c, table in enumerate(_value_tables(mean, std))], axis=-1)


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """How a checkpoint wants its pictures."""

    size: int  # pixels, the input is square
    resample: Resample = "bicubic"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def to_pixels(self, image: Image.Image) -> np.ndarray:
        """RGB image to float32 [size, size, 3]."""
        return to_pixels(image, self.size, self.resample, self.mean, self.std)

    @classmethod
    def from_dir(cls, directory: str | os.PathLike[str], size: int) -> "ImageSettings":
        """Settings of a checkpoint whose config.json says `size`; the defaults when it has no file for them."""
        for name in ("preprocessor_config.json", "processor_config.json"):  # the second since transformers 5
            if (path := Path(directory) / name).exists():
                return cls.from_json(path, size)
        return cls(size)

    @classmethod
    def from_json(cls, path: str | os.PathLike[str], size: int) -> "ImageSettings":
        """Read preprocessor_config.json, or the `image_processor` part of processor_config.json.

        Raises:
            ConfigError: when the file asks for what the model cannot have, such as another size than `size`.
        """
        fields = read_json(Path(path))
        if isinstance(nested := fields.get("image_processor"), dict):
            fields = nested

        def check(holds: bool, key: str, expected: str) -> None:
            if not holds:
                raise ConfigError(f"{path}: {key} is {fields.get(key)!r}, expected {expected}")

        check(_square_side(fields.get("size", size)) == size, "size", f"a square of {size}, as in config.json")
        names = {filter_.value: name for name, filter_ in _RESAMPLE.items()}
        code = fields.get("resample", Image.Resampling.BICUBIC.value)
        check(isinstance(code, int) and code in names, "resample", "3 (bicubic) or 2 (bilinear)")
        factor = fields.get("rescale_factor", 1 / 255)
        check(_is_number(factor) and math.isclose(factor, 1 / 255, rel_tol=1e-6), "rescale_factor", "1/255")
        for step in ("do_resize", "do_rescale", "do_normalize"):
            check(fields.get(step, True) is not False, step, "true")
        for key in ("image_mean", "image_std"):
            values = fields.get(key, [0.5] * 3)
            check(isinstance(values, list) and len(values) == 3 and all(map(_is_number, values)), key, "three numbers")
        mean, std = (tuple(map(float, fields.get(key, [0.5] * 3))) for key in ("image_mean", "image_std"))
        check(all(value > 0 for value in std), "image_std", "three numbers above 0")
        return cls(size, names[code], mean, std)

    def save(self, directory: str | os.PathLike[str], num_tokens: int) -> None:
        """Write preprocessor_config.json, for pictures that become `num_tokens` tokens.

        A processor_config.json with image settings of its own is removed.
        """
        fields = self.to_json() | {"image_seq_length": num_tokens}  # transformers' processor needs it
        write_json(Path(directory) / "preprocessor_config.json", fields)
        other = Path(directory) / "processor_config.json"
        if other.exists() and "image_processor" in read_json(other):
            other.unlink()

    def to_json(self) -> dict[str, Any]:
        """The contents of a preprocessor_config.json that transformers reads too."""
        return {
            "image_processor_type": "SiglipImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": self.size, "width": self.size},
            "resample": _RESAMPLE[self.resample].value,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }


def find_images(pattern: str, also: Sequence[str] = ()) -> list[str]:
    """Pictures named by a path, URL, folder or glob (`**` goes into subfolders), in natural order: 2.png before 10.png.

    From folders and globs only files with a picture's suffix are taken, from globs those with one of `also` as well.

    Raises:
        ImageError: when there is none.
    """
    path = os.path.expanduser(pattern)
    if is_url(path) or os.path.isfile(path):
        return [path]
    is_folder = os.path.isdir(path)
    names = glob.glob(os.path.join(glob.escape(path), "*") if is_folder else path, recursive=True)
    suffixes = _SUFFIXES if is_folder else (*_SUFFIXES, *also)
    found = [name for name in names if Path(name).suffix.lower() in suffixes and os.path.isfile(name)]
    if found:
        return sorted(found, key=_natural_key)
    if is_folder:
        raise ImageError(f"{pattern} holds no pictures: give a folder with files such as .jpg or .png")
    if glob.has_magic(path):
        raise ImageError(f"{pattern} matches no pictures: quote the pattern and check the folder")
    raise ImageError(f"{pattern!r} does not exist: give a picture, a folder, a glob or a URL")


def _natural_key(name: str) -> tuple[list[str | int], str]:
    parts: list[str | int] = re.split(r"([0-9]+)", name.casefold())
    parts[1::2] = map(int, parts[1::2])
    return parts, name


def is_url(text: str) -> bool:
    """Whether a name of a picture is an address to fetch it from."""
    return text.lower().startswith(("http://", "https://"))


def _download(url: str) -> bytes:
    deadline = time.monotonic() + DOWNLOAD_TIMEOUT_S
    data = bytearray()
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "paligemma-jax"})
        with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT_S) as response:
            while chunk := response.read1(2**16):  # the socket's timeout alone never stops a server that drips
                data += chunk
                if len(data) > MAX_DOWNLOAD_BYTES:
                    limit = MAX_DOWNLOAD_BYTES // 2**20
                    raise ImageError(f"{url} is larger than {limit} MiB: download it and make it smaller")
                if time.monotonic() > deadline:
                    raise TimeoutError
    except urllib.error.HTTPError as error:
        with error:
            raise ImageError(f"{url} answered {error.code} {error.reason}: check the address") from None
    except TimeoutError:
        raise ImageError(f"{url} took more than {DOWNLOAD_TIMEOUT_S:g} s: try again or download it first") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ImageError(f"{url} cannot be fetched: {one_line(reason)}; check address and network") from None
    return bytes(data)


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8:
        raise ImageError(f"the given array is {array.dtype}: pictures are uint8 arrays, scale it to 0..255 first")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ImageError(f"the given array is {list(array.shape)}: expected [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]")
    if array.size == 0:
        raise ImageError(f"the given array is {list(array.shape)}: it has no pixels")
    return Image.fromarray(array)


def _decode(stream: BinaryIO, name: str) -> Image.Image:
    """Read an encoded picture from an open, seekable stream."""
    if not stream.read(1):
        raise ImageError(f"{name} is empty: give the path of a picture")
    stream.seek(0)
    try:
        with _quiet():
            image = Image.open(stream)
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not a picture, or one of an unknown kind: convert it to PNG or JPEG") from None
    except Image.DecompressionBombError:
        raise _too_many_pixels(name) from None
    except Exception as error:  # a damaged file can fail anywhere in a decoder
        raise _damaged(name, error) from None
    with image:
        return _to_rgb(image, name)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height == 0:
        raise ImageError(f"{name} is {width} x {height}: it has no pixels")
    if width * height > MAX_PIXELS:
        raise _too_many_pixels(name, image.size)
    try:
        image.load()
        if (turn := _UPRIGHT.get(_orientation(image))) is not None:
            image = image.transpose(turn)
        return _convert(image, name)
    except ImageError:
        raise
    except Exception as error:  # a damaged file can fail anywhere in a decoder
        raise _damaged(name, error) from None


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) when there is none or it cannot be read: the picture is whole all the same."""
    try:
        with _quiet():
            return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # EXIF is free-form bytes; its reader raises whatever it stumbles over
        return 1


def _convert(image: Image.Image, name: str) -> Image.Image:
    """Any mode to a new RGB image; ImageError for one that PIL cannot convert."""
    mode = image.mode
    if mode.startswith("I;16"):
        return _grey(np.asarray(image), white=65535)
    if mode in ("I", "F"):  # the range is not stored: take the smallest usual one that holds the values
        values = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
        usual = (255, 65535) if mode == "I" else (1, 255, 65535)
        return _grey(values, white=next((white for white in usual if values.max() <= white), values.max()))
    if mode == "La":
        image = image.convert("LA")
    elif mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns about going to RGB at once; the colours are the same
    try:
        image = image.convert("RGB")
    except (ValueError, ImportError):  # LAB: an old PIL, or one without its colour management
        raise ImageError(f"{name} has colours of mode {mode}, which cannot be converted: save it as RGB") from None
    image.info = {}  # a stale transparency or profile says nothing about the new pixels
    return image


def _grey(values: np.ndarray, white: float) -> Image.Image:
    scaled = np.clip(np.asarray(values, np.float64) * (255 / white), 0, 255)
    return Image.fromarray(np.round(scaled).astype(np.uint8)).convert("RGB")


def _too_many_pixels(name: str, size: tuple[int, int] | None = None) -> ImageError:
    is_too_large = f"{name} is {size[0]} x {size[1]}" if size else f"{name} is too large"
    return ImageError(f"{is_too_large}: at most {MAX_PIXELS // 10**6} million pixels can be read, make it smaller")


def _damaged(name: str, error: Exception) -> ImageError:
    return ImageError(f"{name} is damaged or truncated ({one_line(error)}): save or download it again")


def _square_side(size: Any) -> Any:
    if isinstance(size, dict):
        return size.get("height") if size.get("height") == size.get("width") else None
    return size


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@functools.cache
def _value_tables(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """What each of the 256 values becomes, float32 [channel, value]: exact, and faster than arithmetic per pixel."""
    unit = (np.arange(256) / 255).astype(np.float32)
    return (unit - np.asarray(mean, np.float32)[:, None]) / np.asarray(std, np.float32)[:, None]


_filters_lock = threading.Lock()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence PIL's remarks on odd headers; the lock is there because warning filters belong to the whole process."""
    with _filters_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
