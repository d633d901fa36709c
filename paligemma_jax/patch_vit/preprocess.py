"""Pictures to the pixels that CLIP and the patch ViT want, on the shared decoder and resampler.

Axes: B images, S side in pixels.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from paligemma_jax.errors import ConfigError
from paligemma_jax.files import read_json, write_json
from paligemma_jax.processing.image import PREPROCESSOR_NAME, Channels, ImageSource, Resample, load_image, to_pixels

MEAN: Channels = (0.48145466, 0.4578275, 0.40821073)
STD: Channels = (0.26862954, 0.26130258, 0.27577711)
_RESAMPLE: dict[int, Resample] = {int(Image.Resampling[name.upper()]): name for name in ("bilinear", "bicubic")}


@dataclasses.dataclass(frozen=True)
class PixelSettings:
    """How a network wants its pictures.

    size: side of its square input.
    crop: the shorter side becomes `size` and the middle is kept, as CLIP does it; else the picture is squeezed.
    """

    size: int
    resample: Resample = "bilinear"
    crop: bool = False
    mean: Channels = MEAN
    std: Channels = STD

    def __call__(self, images: ImageSource | Sequence[ImageSource]) -> np.ndarray:
        """One picture or several, each as for `load_image`, to pixels f32 [B, S, S, 3]; ImageError as of there."""
        several = images if isinstance(images, list | tuple) else [images]
        return np.stack([self.one(load_image(image)) for image in several]) if several else self._none()

    def one(self, image: Image.Image) -> np.ndarray:
        """An RGB picture to f32 [S, S, 3]."""
        return to_pixels(self.cropped(image) if self.crop else image, self.size, self.resample, self.mean, self.std)

    def cropped(self, image: Image.Image) -> Image.Image:
        """The middle of a picture whose shorter side became `size`, as transformers' CLIPImageProcessor cuts it."""
        shorter = min(image.size)
        width, height = (int(self.size * side / shorter) for side in image.size)
        image = image.resize((width, height), Image.Resampling[self.resample.upper()])
        left, top = (width - self.size) // 2, (height - self.size) // 2
        return image.crop((left, top, left + self.size, top + self.size))

    def _none(self) -> np.ndarray:
        return np.zeros((0, self.size, self.size, 3), np.float32)

    def to_json(self) -> dict[str, Any]:
        """As transformers' CLIPImageProcessor has it."""
        square = {"height": self.size, "width": self.size}
        codes = {name: code for code, name in _RESAMPLE.items()}
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": self.size} if self.crop else square,
            "resample": codes[self.resample],
            "do_center_crop": self.crop,
            "crop_size": square,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def save(self, directory: Path) -> None:
        """Write preprocessor_config.json."""
        write_json(directory / PREPROCESSOR_NAME, self.to_json())

    @classmethod
    def from_dir(cls, directory: Path, size: int) -> "PixelSettings":
        """Settings of a checkpoint whose config.json says `size`; CLIP's own when it has no file for them.

        Raises:
          ConfigError: the file asks for what is not done here.
        """
        path = directory / PREPROCESSOR_NAME
        default = cls(size, "bicubic", crop=True)
        if not path.is_file():
            return default
        fields = default.to_json() | read_json(path)
        crop = fields["do_center_crop"] is not False
        sides = (size, {"shortest_edge": size}) if crop else ({"height": size, "width": size},)
        for key, allowed in (
            ("do_resize", (True,)),
            ("do_rescale", (True,)),
            ("do_normalize", (True,)),
            ("size", sides),
            ("resample", tuple(_RESAMPLE)),
            ("crop_size", (size, {"height": size, "width": size})),
        ):
            if fields[key] not in allowed:
                expected = " or ".join(map(str, allowed))
                raise ConfigError(f"{path}: {key} is {str(fields[key])[:60]}, expected {expected}")
        channels = []
        for key in ("image_mean", "image_std"):
            values = fields[key]
            if not (isinstance(values, list) and len(values) == 3 and all(isinstance(v, int | float) for v in values)):
                raise ConfigError(f"{path}: {key} is {str(values)[:60]}, expected three numbers")
            channels.append(tuple(map(float, values)))
        if not all(channels[1]):
            raise ConfigError(f"{path}: image_std holds 0, expected three other numbers")
        return cls(size, _RESAMPLE[fields["resample"]], crop, *channels)
