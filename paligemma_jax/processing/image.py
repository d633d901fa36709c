"""Pictures from wherever they come to RGB, and RGB to pixels as a checkpoint wants them."""

import contextlib
import dataclasses
import functools
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, get_args

import numpy as np
from PIL import Image

from paligemma_jax.errors import ConfigError, ImageError, one_line
from paligemma_jax.files import expanded, read_json, write_json
from paligemma_jax.processing.decode import STORED_MODE, STORED_NAME, decode, to_rgb
from paligemma_jax.processing.fetch import fetch, is_url, label


class ArrayLike(Protocol):
    """What numpy makes an array of: JAX arrays, torch tensors on the CPU."""

    def __array__(self) -> np.ndarray: ...


ImageSource = Image.Image | str | os.PathLike[str] | bytes | BinaryIO | np.ndarray | ArrayLike
Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
Channels = tuple[float, float, float]

PREPROCESSOR_NAME, PROCESSOR_NAME = "preprocessor_config.json", "processor_config.json"

_RESAMPLE = {name: Image.Resampling[name.upper()] for name in get_args(Resample)}
_TYPES = ("SiglipImageProcessor", "SiglipImageProcessorFast", "SiglipImageProcessorPil")
_STEPS = ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_pad", "default_to_square")
_DEFAULTS: dict[str, Any] = {  # of transformers' SiglipImageProcessor
    "image_processor_type": _TYPES[0],
    **dict.fromkeys(_STEPS[:4], True),
    **dict.fromkeys(_STEPS[4:], False),
    "resample": Image.Resampling.BICUBIC.value,
    "rescale_factor": 1 / 255,
    "image_mean": 0.5,
    "image_std": 0.5,
    "crop_size": None,
    "pad_size": None,
}
_MOST = float(np.finfo(np.float32).max)


def load_image(source: ImageSource) -> Image.Image:
    """Load a picture as an upright 8 bit RGB image.

    Args:
        source: a PIL image; a path; an http(s) URL or a data URI; the bytes of a picture's file, or a file opened in
            binary mode, which is read from its start where it can be rewound, else from where it is, and stays open;
            or a uint8 array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] (RGBA) of numpy, JAX or the like.

    Raises:
        ImageError: when it cannot be fetched or read, is empty, or has more than `decode.MAX_PIXELS` pixels.
    """
    if isinstance(source, Image.Image):
        return to_rgb(source, getattr(source, "filename", "") or "the given picture")
    if isinstance(source, str) and is_url(source):
        return decode(io.BytesIO(fetch(source)), label(source))
    if isinstance(source, str | os.PathLike):
        return _from_path(expanded(source))
    if isinstance(source, bytes | bytearray | memoryview):
        return decode(io.BytesIO(source), "the given data")
    if callable(getattr(source, "read", None)):
        return _from_file(source)
    if hasattr(source, "__array__"):
        return to_rgb(_from_array(source), "the given array")
    kinds = "a PIL image, a path, a URL, bytes, an open file or a uint8 array"
    raise ImageError(f"a {type(source).__name__} is not a picture: give {kinds}")


def _from_path(path: Path) -> Image.Image:
    with opened(path) as file:
        return decode(file, str(path))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file of a picture, opened for reading; ImageError when it cannot be opened or read."""
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist: give the path of a picture") from None
    except IsADirectoryError:
        raise ImageError(f"{path} is a folder: give one picture, or the pictures in it as a list") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise ImageError(f"{str(path)!r} cannot be opened: {one_line(error)}") from None


def _from_file(file: Any) -> Image.Image:
    name = str(getattr(file, "name", "") or "the given file")
    try:
        if (seekable := getattr(file, "seekable", None)) and seekable():
            file.seek(0)
        content = file.read()
    except (OSError, ValueError) as error:  # ValueError: it is closed
        raise ImageError(f"{name} cannot be read: {one_line(error)}") from None
    if not isinstance(content, bytes):
        raise ImageError(f'{name} gives {type(content).__name__} instead of bytes: open it in binary mode, "rb"')
    return decode(io.BytesIO(content), name)


def _from_array(source: Any) -> Image.Image:
    try:
        array = np.asarray(source)
    except Exception as error:  # of a library that is not known here: a tensor on a GPU, a tracer
        raise ImageError(f"a {type(source).__name__} gives no array: {one_line(error)}; give a uint8 array") from None
    expected = "expected [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]"
    whose = f"the given array is {list(array.shape)}"
    if array.ndim == 4:
        raise ImageError(f"{whose}, {expected}: give the pictures of a batch one by one, as list(array)")
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        raise ImageError(f"{whose}, channels first, {expected}: use array.transpose(1, 2, 0)")
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))):
        raise ImageError(f"{whose}: {expected}")
    if array.size == 0:
        raise ImageError(f"{whose}: it has no pixels")
    if array.dtype != np.uint8:
        in_unit = array.dtype == bool or _is_in_unit(array)
        remedy = "(255 * array).round().astype('uint8')" if in_unit else "scaled to that, array.astype('uint8')"
        values = f"{array.dtype} from 0 to 1" if in_unit else str(array.dtype)
        raise ImageError(f"the given array is {values}: pictures are uint8 from 0 to 255, give {remedy}")
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _is_in_unit(array: np.ndarray) -> bool:
    """Whether an array holds fractions, all of them from 0 to 1."""
    try:
        return array.dtype.kind not in "iu" and bool(((array >= 0) & (array <= 1)).all())
    except Exception:  # what it holds are no numbers
        return False


def to_pixels(
    image: Image.Image,
    size: int,
    resample: Resample = "bicubic",
    mean: Channels = (0.5, 0.5, 0.5),
    std: Channels = (0.5, 0.5, 0.5),
    rescale_factor: float = 1 / 255,
) -> np.ndarray:
    """RGB image to float32 [size, size, 3], (x * rescale_factor - mean) / std: in [-1, 1] by default.

    The picture is squeezed to a square and resampled by PIL, with antialiasing in 8 bits: bit for bit what transformers
    computes with its PIL backend (the slow image processor). Its torchvision backend resamples a little differently.
    """
    values = np.asarray(image.resize((size, size), _RESAMPLE[resample]))
    tables = _value_tables(mean, std, rescale_factor)
    return np.stack([table[values[..., c]] for c, table in enumerate(tables)], axis=-1)


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """How a checkpoint wants its pictures.

    size: side of the square input in pixels.
    resample: the filter.
    mean, std, rescale_factor: as in `to_pixels`.
    shapes: which pictures are taken: any; square ones, where the file says how long the shorter side becomes; or those
      of `size` already, where it says that nothing is resized. The network has a square input: others do not fit.
    convert_rgb: pictures that are stored in other modes (grey, transparent, palette, CMYK) are taken too.
    source: the file that says so, for messages.
    """

    size: int
    resample: Resample = "bicubic"
    mean: Channels = (0.5, 0.5, 0.5)
    std: Channels = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    shapes: Literal["any", "square", "same"] = "any"
    convert_rgb: bool = True
    source: str = dataclasses.field(default=PREPROCESSOR_NAME, compare=False)

    def resized(self, image: Image.Image) -> Image.Image:
        """RGB image, of `load_image`, to one of [size, size] that `to_pixels` gives the same pixels of.

        Raises:
            ImageError: a picture that these settings leave in another shape, or whose mode they do not convert.
        """
        mode, name = image.info.get(STORED_MODE, image.mode), image.info.get(STORED_NAME, "a picture")
        if mode != "RGB" and not self.convert_rgb:
            remedy = "convert it to RGB, or set do_convert_rgb to true"
            raise ImageError(f"{name} has mode {mode}, and do_convert_rgb is false in {self.source}: {remedy}")
        shape = f"{name} is {image.width} x {image.height}"
        if self.shapes == "square" and image.width != image.height:
            remedy = f"give square pictures, or set it to {json.dumps(_square(self.size))}"
            raise ImageError(f"{shape}, and size is a shortest_edge in {self.source}: {remedy}")
        if self.shapes == "same" and image.size != (self.size, self.size):
            remedy = f"give pictures of {self.size} x {self.size}, or set do_resize to true"
            raise ImageError(f"{shape}, and do_resize is false in {self.source}: {remedy}")
        return image.resize((self.size, self.size), _RESAMPLE[self.resample])

    def to_pixels(self, image: Image.Image) -> np.ndarray:
        """RGB image, of `load_image`, to float32 [size, size, 3]; ImageError as of `resized`."""
        image = self.resized(image)
        return to_pixels(image, self.size, self.resample, self.mean, self.std, self.rescale_factor)

    @classmethod
    def from_dir(cls, directory: str | os.PathLike[str], size: int) -> "ImageSettings":
        """Settings of a checkpoint whose config.json says `size`; the defaults when it has no file for them.

        As in transformers 5, the `image_processor` in processor_config.json comes before preprocessor_config.json.

        Raises:
            CheckpointError: a file is no JSON object.
            ConfigError: the file asks for what the model cannot have, such as another size than `size`.
        """
        path = Path(directory) / PROCESSOR_NAME
        if path.exists() and (fields := read_json(path).get("image_processor")) is not None:
            if not isinstance(fields, dict):
                raise ConfigError(f"{path}: image_processor is {fields!r:.80}, expected an object")
            return cls.from_json(fields, size, str(path))
        path = Path(directory) / PREPROCESSOR_NAME
        return cls.from_json(read_json(path), size, str(path)) if path.exists() else cls(size)

    @classmethod
    def from_json(cls, fields: dict[str, Any], size: int, source: str = PREPROCESSOR_NAME) -> "ImageSettings":
        """Settings out of the fields of a file; one that is absent has the default of transformers' SigLIP.

        A step that is null is not done, as in transformers; but a null `do_convert_rgb`, which the released checkpoints
        have, is true: transformers fails then at pictures that are not RGB. How many tokens a picture becomes follows
        from config.json: `image_seq_length` is not looked at.
        """
        fields = _DEFAULTS | {"size": _square(size)} | fields

        def check(holds: bool, key: str, expected: str) -> None:
            if not holds:
                raise ConfigError(f"{source}: {key} is {json.dumps(fields[key]):.80}, expected {expected}")

        kind = fields["image_processor_type"]
        check(kind is None or kind in _TYPES, "image_processor_type", f"{_TYPES[0]}, whose settings these have to be")
        for step in _STEPS:
            check(fields[step] is None or isinstance(fields[step], bool), step, "true or false")

        whole = f"a square of {size}, as in config.json: {json.dumps(_square(size))}"
        resample, shapes = cls.resample, "same"
        if fields["do_resize"]:
            given = _sides(fields["size"], fields["default_to_square"])
            check(given in ({"shortest_edge": size}, _square(size)), "size", whole)
            shapes = "any" if given == _square(size) else "square"
            names: dict[Any, Resample] = {filter_.value: name for name, filter_ in _RESAMPLE.items()}
            code = fields["resample"]
            check(type(code) is int and code in names, "resample", f"a number of PIL's, 0 to {max(names)}")
            resample = names[code]
        if fields["do_center_crop"]:  # it would cut off what answers are about, and boxes would be of the rest
            remedy = f"{whole}, or do_center_crop false, as a crop would lose what is near the edges"
            check(_sides(fields["crop_size"]) == _square(size), "crop_size", remedy)
        if fields["do_pad"]:
            check(_sides(fields["pad_size"] or size) == _square(size), "pad_size", f"{whole}, or do_pad false")

        factor, mean, std = 1.0, (0.0,) * 3, (1.0,) * 3
        if fields["do_rescale"]:
            factor = fields["rescale_factor"]
            check(_is_number(factor) and factor != 0, "rescale_factor", "a number other than 0")
        if fields["do_normalize"]:
            for key in ("image_mean", "image_std"):
                values = fields[key] if isinstance(fields[key], list) else [fields[key]] * 3
                check(len(values) == 3 and all(map(_is_number, values)), key, "one number or three")
                mean, std = std, tuple(map(float, values))
        with np.errstate(all="ignore"):
            is_finite = np.isfinite(_value_tables(mean, std, float(factor))).all()
        check(bool(is_finite), "image_std", "numbers with which pixels stay finite")
        convert = fields["do_convert_rgb"] is not False
        return cls(size, resample, mean, std, float(factor), shapes, convert, source)

    def save(self, directory: str | os.PathLike[str], num_tokens: int) -> None:
        """Write preprocessor_config.json, for pictures that become `num_tokens` tokens.

        All versions of transformers that know PaliGemma read it. A processor_config.json with image settings, which
        would come before it, is removed: versions before 5 do not read that one.
        """
        fields = self.to_json() | {"image_seq_length": num_tokens}  # transformers' processor needs it
        write_json(Path(directory) / PREPROCESSOR_NAME, fields)
        other = Path(directory) / PROCESSOR_NAME
        if other.exists() and "image_processor" in read_json(other):
            other.unlink()

    def to_json(self) -> dict[str, Any]:
        """The contents of a preprocessor_config.json that transformers reads too."""
        return {
            "image_processor_type": _TYPES[0],
            "processor_class": "PaliGemmaProcessor",
            "do_convert_rgb": self.convert_rgb,
            "do_resize": self.shapes != "same",
            "size": {"shortest_edge": self.size} if self.shapes == "square" else _square(self.size),
            "resample": _RESAMPLE[self.resample].value,
            "do_rescale": True,
            "rescale_factor": self.rescale_factor,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }


def _square(size: int) -> dict[str, int]:
    return {"height": size, "width": size}


def _sides(size: Any, default_to_square: bool = True) -> Any:
    """A size in transformers' full form: an integer is a square, or else the shorter side; a list is height, width."""
    if type(size) is int:
        return _square(size) if default_to_square else {"shortest_edge": size}
    if isinstance(size, list):
        return dict(zip(("height", "width"), size, strict=False))
    return {key: value for key, value in size.items() if value is not None} if isinstance(size, dict) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MOST


@functools.cache
def _value_tables(mean: Channels, std: Channels, rescale_factor: float) -> np.ndarray:
    """What each of the 256 values becomes, float32 [channel, value]: exact, and faster than arithmetic per pixel."""
    unit = (np.arange(256) * rescale_factor).astype(np.float32)
    return (unit - np.asarray(mean, np.float32)[:, None]) / np.asarray(std, np.float32)[:, None]
