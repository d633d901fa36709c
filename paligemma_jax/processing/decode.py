"""Encoded pictures of every kind, and pictures of every mode, to upright RGB.

Transparency is dropped, not blended: what lies under a transparent pixel is seen, as in PIL's `convert("RGB")`, in
big_vision, and wherever transformers reads a file; given a PIL image, late versions of transformers 5 blend it with
white. Of an animation or a document with several pages the first picture is taken.
"""

import contextlib
import functools
import importlib
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from paligemma_jax.errors import DamagedImageError, ImageError, one_line

MAX_PIXELS = 2**27  # 134 million, 400 MB as RGB; the largest phone pictures have 108 million
STORED_MODE, STORED_NAME = "stored mode", "stored name"  # what `info` of a picture of `to_rgb` holds
HEIF_REMEDY = 'pip install -e ".[heif]"'
AVIF_REMEDY = "pip install -U pillow"

_HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis"}
_AVIF_BRANDS = {b"avif", b"avis"}
# Of what PIL says it opens: scientific data and films that it only recognizes, and programs that Ghostscript would run.
_NO_PICTURES = ("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF")
_PAGES = {b"%!": "PostScript", b"\xc5\xd0\xd3\xc6": "PostScript", b"%PDF": "PDF"}  # by how they begin
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


def decode(
    stream: BinaryIO, name: str, max_pixels: int = MAX_PIXELS, kinds: Sequence[str] | None = None
) -> Image.Image:
    """Read an encoded picture from an open, seekable stream, as a new upright RGB image.

    Args:
        name: what messages call it.
        max_pixels: one with more, by its header, is not decoded.
        kinds: formats by PIL's names that are tried; all by default.

    Raises:
        ImageError: it is empty, no picture or damaged, has too many pixels, or its kind needs a package.
    """
    head = stream.read(64)
    if not head:
        raise ImageError(f"{name} is empty: give a picture")
    if page := next((kind for start, kind in _PAGES.items() if head.lstrip().startswith(start)), None):
        raise ImageError(f"{name} is {page}, which is not read: convert it to PNG first")
    brands = _brands(head)
    if brands & _HEIF_BRANDS and not has_heif():
        raise ImageError(f"{name} is HEIF, which needs pillow-heif: {HEIF_REMEDY}, or convert it to PNG or JPEG")
    if brands & _AVIF_BRANDS and not features.check("avif"):
        raise ImageError(f"{name} is AVIF, which needs a newer Pillow: {AVIF_REMEDY}")
    stream.seek(0)
    try:
        with _quiet():
            image = Image.open(stream, formats=kinds or pil_kinds())
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not a picture, or one of an unknown kind: convert it to PNG or JPEG") from None
    except Image.DecompressionBombError:
        raise _too_many_pixels(name, max_pixels) from None
    except Exception as error:  # a damaged file can fail anywhere in a decoder
        raise _damaged(name, error) from None
    with image:
        return to_rgb(image, name, max_pixels)


def looks_like_picture(path: str) -> bool:
    """Whether a file is a picture by how it begins, whatever its name; it may be damaged further on."""
    try:
        with open(path, "rb") as file:
            if _brands(file.read(64)) & (_HEIF_BRANDS | _AVIF_BRANDS):
                return True
            file.seek(0)
            with _quiet(), Image.open(file, formats=pil_kinds()):
                return True
    except Image.DecompressionBombError:
        return True
    except Exception:  # the decoders raise whatever they stumble over
        return False


def pil_kinds() -> tuple[str, ...]:
    """The formats that are read, by PIL's names in its order; HEIF is there once `has_heif` was asked."""
    Image.init()
    return tuple(kind for kind in Image.ID if kind in Image.OPEN and kind not in _NO_PICTURES)


@functools.cache
def has_heif() -> bool:
    """Whether pillow-heif is installed; PIL knows of it then."""
    try:
        heif = importlib.import_module("pillow_heif")
    except ImportError:
        return False
    heif.register_heif_opener()
    return True


def _brands(head: bytes) -> set[bytes]:
    """The kinds that an ISO media file says it is of, none for other files."""
    if head[4:8] != b"ftyp":
        return set()
    head = head[: int.from_bytes(head[:4], "big")]
    return {head[i : i + 4] for i in (8, *range(16, len(head), 4))}


def to_rgb(image: Image.Image, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A new upright RGB image of one of any mode; its `info` says which it had, and what it is called."""
    width, height = image.size
    if width * height == 0:
        raise ImageError(f"{name} is {width} x {height}: it has no pixels")
    if width * height > max_pixels:
        raise _too_many_pixels(name, max_pixels, image.size)
    try:
        image.load()
        image = upright(image)
        info = {STORED_MODE: image.mode, STORED_NAME: name}  # a stale profile says nothing about the new pixels
        info |= {key: image.info[key] for key in info if key in image.info}  # it was converted before
        converted = _convert(image, name)
    except ImageError:
        raise
    except Exception as error:  # a damaged file can fail anywhere in a decoder
        raise _damaged(name, error) from None
    converted.info = info
    return converted


def upright(image: Image.Image) -> Image.Image:
    """A picture turned as its EXIF data says; itself where there is nothing to turn."""
    turn = _UPRIGHT.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


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
        return image.convert("RGB")
    except (ValueError, ImportError):  # LAB: an old PIL, or one without its colour management
        raise ImageError(f"{name} has colours of mode {mode}, which cannot be converted: save it as RGB") from None


def _grey(values: np.ndarray, white: float) -> Image.Image:
    scaled = np.clip(np.asarray(values, np.float64) * (255 / white), 0, 255)
    return Image.fromarray(np.round(scaled).astype(np.uint8)).convert("RGB")


def _too_many_pixels(name: str, most: int, size: tuple[int, int] | None = None) -> ImageError:
    is_too_large = f"{name} is {size[0]} x {size[1]}" if size else f"{name} is too large"
    limit = f"{most // 10**6} million" if most >= 10**6 else str(most)
    return ImageError(f"{is_too_large}: at most {limit} pixels can be read, make it smaller")


def _damaged(name: str, error: Exception) -> ImageError:
    if "cannot find loader" in str(error):  # PIL knows the name of the format, and nothing else
        return ImageError(f"{name} is of a kind that is not read ({one_line(error)}): convert it to PNG or JPEG")
    return DamagedImageError(f"{name} is damaged or truncated ({one_line(error)}): save or download it again")


_filters_lock = threading.Lock()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence PIL's remarks on odd headers; the lock is there because warning filters belong to the whole process."""
    with _filters_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
