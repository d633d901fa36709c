"""The handles of a student and of a CLIP: loading, pixels, embeddings, saving.

Axes: B images or texts, S side in pixels, N patches row by row, D the shared text space.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paligemma_jax import ops
from paligemma_jax.buckets import sequence
from paligemma_jax.checkpoints import huggingface, resolve
from paligemma_jax.errors import CheckpointError, ConfigError, ImageError
from paligemma_jax.files import read_json
from paligemma_jax.patch_vit import weights
from paligemma_jax.patch_vit.clip import ClipModel
from paligemma_jax.patch_vit.config import ClipConfig, StudentConfig, clip_from_json, student_from_json
from paligemma_jax.patch_vit.network import Network
from paligemma_jax.patch_vit.preprocess import PixelSettings
from paligemma_jax.patch_vit.student import PatchViT
from paligemma_jax.patch_vit.tokenizer import ClipTokenizer
from paligemma_jax.processing.image import ImageSource


class Student:
    """A patch ViT. `config` has its geometry, `params` its parameters, f32."""

    def __init__(self, config: StudentConfig, params: Any, target: ops.Target | None = None):
        self.config, self.settings = config, PixelSettings(config.image_size)
        self._network = Network(PatchViT(config), params, target)

    @property
    def params(self) -> Any:
        return self._network.params

    def preprocess(self, images: ImageSource | Sequence[ImageSource]) -> np.ndarray:
        """One picture or a list to pixels f32 [B, S, S, 3], squeezed to the square input; ImageError."""
        return self.settings(images)

    def embed(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels to image embeddings f32 [B, D], not normalised, and each patch's share of them f32 [B, N]."""
        return self._network("embed", _checked(pixels, self.config.image_size))

    def embed_patches(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels to patch embeddings f32 [B, N, D]."""
        return self._network("__call__", _checked(pixels, self.config.image_size))[0]

    def save(self, directory: str | Path, dtype: str | None = None) -> None:
        """Write model.safetensors, with the original's names, and config.json; `dtype` of the weights, None: float32.

        Raises:
          CheckpointError: they cannot be written.
        """
        weights.write_directory(Path(directory), self.params, self.config.to_json(), weights.student_key, dtype)


class Clip:
    """CLIP's two towers with their tokenizer. `config` has the geometry, `params` the parameters, f32."""

    def __init__(
        self,
        config: ClipConfig,
        params: Any,
        tokenizer: ClipTokenizer,
        settings: PixelSettings | None = None,
        target: ops.Target | None = None,
    ):
        self.config, self.tokenizer = config, tokenizer
        self.settings = settings or PixelSettings(config.vision.image_size, "bicubic", crop=True)
        self._network = Network(ClipModel(config), params, target)

    @property
    def params(self) -> Any:
        return self._network.params

    def preprocess(self, images: ImageSource | Sequence[ImageSource]) -> np.ndarray:
        """One picture or a list to pixels f32 [B, S, S, 3] as the checkpoint wants them; ImageError."""
        return self.settings(images)

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        """Texts to f32 [B, D], not normalised; TokenizerError for what is no text."""
        rows = self.tokenizer.encode([texts] if isinstance(texts, str) else texts)
        longest = sequence(max(map(len, rows), default=1))
        return self._network("embed_text", self.tokenizer.pad(rows, min(longest, self.config.text.context)))

    def embed_image(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels to f32 [B, D], not normalised."""
        return self._network("embed_image", _checked(pixels, self.config.vision.image_size))

    def cls_attention(self, pixels: np.ndarray) -> np.ndarray:
        """How much the class token of the last layer looks at each patch, the mean over heads: f32 [B, N]."""
        return self._network("cls_attention", _checked(pixels, self.config.vision.image_size))

    def before_last(self, pixels: np.ndarray) -> np.ndarray:
        """What enters the last layer of the image tower, the class token first: f32 [B, 1 + N, width]."""
        return self._network("before_last", _checked(pixels, self.config.vision.image_size))

    def self_self_attention_patches(self, pixels: np.ndarray) -> np.ndarray:
        """Patches in the text space without training: f32 [B, N, D].

        The last layer's values are mixed by query-query and key-key attention, without residual and MLP, then projected
        (after ClearCLIP, arXiv 2407.12442).
        """
        return self._network("self_self_attention_patches", _checked(pixels, self.config.vision.image_size))

    def save(self, directory: str | Path, dtype: str | None = None) -> None:
        """Write a Hugging Face directory: weights, config.json, tokenizer and preprocessor settings."""
        directory = Path(directory)
        weights.write_directory(directory, self.params, self.config.to_json(), weights.clip_key, dtype)
        self.tokenizer.save(directory)
        self.settings.save(directory)


def load(path: str | Path, same_norm: bool | None = None, masked: bool | None = None) -> Student:
    """A student of a directory with safetensors, of a hub id, or of one of the original's `.pt` files.

    Args:
      path: where it is; see `checkpoints.resolve`.
      same_norm, masked: override what config.json says, or what a `.pt` implies: both where it has the parameter
        `scale`, else none.

    Raises:
      ConfigError, CheckpointError: see the message; nothing in a `.pt` is run.
    """
    found = resolve(path)
    if found.is_dir():
        file = found / huggingface.CONFIG
        config = student_from_json(read_json(file), str(file))
        params = weights.read_directory(found, weights.student_shapes(config), weights.student_key)
    else:
        config, params = weights.read_pt(found)
    changes = {"same_norm": same_norm, "masked": masked}
    return Student(config.replaced(**{name: value for name, value in changes.items() if value is not None}), params)


def load_clip(path: str | Path) -> Clip:
    """CLIP in Hugging Face layout: a directory or hub id, with its own tokenizer files.

    Raises:
      ConfigError, CheckpointError, TokenizerError: see the message.
    """
    directory = resolve(path)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is a file: give the directory of a CLIP in Hugging Face layout")
    file = directory / huggingface.CONFIG
    config = clip_from_json(read_json(file), str(file))
    tokenizer = ClipTokenizer.from_dir(directory, config.text.context)
    if (largest := max(tokenizer.vocabulary.values())) >= config.text.vocab_size:
        raise ConfigError(
            f"{directory}: the tokenizer has the id {largest}, config.json a vocab_size of "
            f"{config.text.vocab_size}: take both from one checkpoint"
        )
    params = weights.read_directory(directory, weights.clip_shapes(config), weights.clip_key)
    return Clip(config, params, tokenizer, PixelSettings.from_dir(directory, config.vision.image_size))


def check_pair(student: Student, clip: Clip) -> None:
    """ConfigError when a CLIP cannot be, or be compared with, the student's teacher: their spaces have other widths."""
    if (wide := clip.config.projection_dim) != (wanted := student.config.embed_dim):
        raise ConfigError(
            f"this CLIP has embeddings of {wide} numbers, the student of {wanted}: give the teacher it was distilled "
            "from; of OpenAI's CLIPs, ViT-B/32 and B/16 have 512, and L/14 has 768"
        )


def _checked(pixels: np.ndarray, side: int) -> np.ndarray:
    pixels = np.asarray(pixels, np.float32)
    if pixels.ndim != 4 or pixels.shape[1:] != (side, side, 3):
        raise ImageError(f"pixels are {list(pixels.shape)}, expected [B, {side}, {side}, 3]: use preprocess(images)")
    return pixels
