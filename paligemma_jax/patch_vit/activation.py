"""Maps of phrases over a picture, from patch embeddings that lie in the space of text embeddings.

Axes: B pictures or windows, N patches of a window in row-major order, G of a side, T phrases, R and C rows and columns
of a map, D width of the embeddings.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from PIL import Image

from paligemma_jax.errors import NumericsError
from paligemma_jax.patch_vit import windows
from paligemma_jax.patch_vit.models import Clip, Student, check_pair

_SCALE = 2.0  # of the dot products, as in the original


@dataclasses.dataclass(frozen=True)
class PhraseMaps:
    """Maps of some phrases over one picture.

    phrases: T texts.
    logits: 2 t . e_n, f32 [T, R, C]; averages of these where windows overlap.
    units: logits of patches that point where a phrase does, f32 [T]: 2 |t| times the length of the longest; None
      where that is not known.
    """

    phrases: tuple[str, ...]
    logits: np.ndarray
    units: np.ndarray | None = None

    @property
    def maps(self) -> np.ndarray:
        """Patch activations f32 [T, R, C]; each map sums to 1."""
        return softmax(self.logits)


def patch_logits(patches: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """2 t . e_n, f32 [B, T, N], of patch embeddings [B, N, D] and text embeddings [T, D], neither normalized."""
    return _SCALE * np.einsum("bnd,td->btn", np.asarray(patches, np.float32), np.asarray(texts, np.float32))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last two axes, f32 [..., R, C]."""
    logits = np.asarray(logits, np.float64)
    powers = np.exp(logits - logits.max(axis=(-2, -1), keepdims=True))
    return (powers / powers.sum(axis=(-2, -1), keepdims=True)).astype(np.float32)


def phrase_maps(
    student: Student,
    clip: Clip,
    images: Sequence[Image.Image],
    phrases: Sequence[str],
    choice: str | int = windows.AUTO,
    batch_size: int = 16,
) -> Iterator[PhraseMaps]:
    """The maps of phrases over each of some pictures.

    Args:
      student, clip: patches of the one are compared with texts of the other.
      images: RGB pictures of any size.
      phrases: T texts, at least one.
      choice: windows of a picture, see `windows.layout`.
      batch_size: windows that are embedded at once.

    Raises:
      NumericsError: an embedding is not finite.
      ConfigError: windows that cannot be; a CLIP that is not the student's teacher.
    """
    check_pair(student, clip)
    texts = embed_phrases(clip, phrases)
    side = student.config.grid
    placed = [windows.layout(image.size, side, student.config.image_size, choice) for image in images]
    pixels = (
        np.asarray(student.preprocess([part]), np.float32)[0]
        for image, layout in zip(images, placed, strict=True)
        for part in layout.cut(image)
    )
    embedded = in_batches(student.embed_patches, pixels, batch_size)
    for layout in placed:
        patches = np.stack([next(embedded) for _ in layout.corners])
        logits = patch_logits(require_finite(patches, "the student's patch embeddings"), texts)
        maps = windows.average(logits.reshape(*logits.shape[:2], side, side), layout)
        units = _SCALE * np.linalg.norm(texts, axis=1) * np.linalg.norm(patches, axis=2).max()
        yield PhraseMaps(tuple(phrases), maps, units)


def embed_phrases(clip: Clip, phrases: Sequence[str]) -> np.ndarray:
    """Text embeddings f32 [T, D], not normalized; NumericsError when one is not finite."""
    return require_finite(np.asarray(clip.embed_text(list(phrases)), np.float32), "the teacher's text embeddings")


def in_batches(
    function: Callable[[np.ndarray], np.ndarray], rows: Iterable[np.ndarray], batch_size: int
) -> Iterator[np.ndarray]:
    """What `function` gives for each row; so many are held and embedded at once."""
    rows = iter(rows)
    while batch := list(itertools.islice(rows, batch_size)):
        yield from function(np.stack(batch))


def require_finite(values: np.ndarray, what: str) -> np.ndarray:
    """The values; NumericsError when one is NaN or infinite."""
    if not np.isfinite(values).all():
        raise NumericsError(f"{what} are not finite: the weights are damaged, get them again")
    return values
