"""Embeddings of a run's pictures: saved to a file, or taken from one in their place."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

import paligemma_jax as pj
from paligemma_jax.errors import ConfigError, ImageError
from paligemma_jax.files import expanded
from paligemma_jax.inspection import embeddings as em
from paligemma_jax.runs.notes import note
from paligemma_jax.runs.settings import one_of


class Embedded:
    """What the keys save_embeddings, load_embeddings and embeddings ask for.

    What is saved is what the pictures themselves gave; answers are about what was loaded. Both may be the same file.

    Args:
      config: of the run.
      count: how many pictures it has; None when that is not known.

    Raises:
      ConfigError, DataError, ImageError: the settings or the file, before a model is needed.
    """

    def __init__(self, config: ConfigDict, count: int | None):
        self._projected = one_of(config, "embeddings", ("projected", "features")) == "projected"
        self._file = expanded(config.save_embeddings) if config.save_embeddings else None
        self._saved: list[np.ndarray] = []
        self._loaded = em.load(expanded(config.load_embeddings)) if config.load_embeddings else None
        self._used = self._skipped = 0
        if self.asked and count is None:
            raise ConfigError(
                "save_embeddings and load_embeddings are for pictures: give the frames of a video as a folder"
            )
        if self._loaded is not None and len(self._loaded) != count:
            raise ImageError(
                f"{config.load_embeddings} holds the embeddings of {len(self._loaded)} pictures, shape "
                f"{self._loaded.shape}, and image names {count}: give as many"
            )
        if self._file:
            if self._file.suffix != ".npy":
                raise ConfigError(f"save_embeddings={self._file} is not possible: give a file that ends in .npy")
            self._file.parent.mkdir(parents=True, exist_ok=True)  # a bad place is known before the work

    @property
    def asked(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._file) or self._loaded is not None

    def soft_tokens(self, model: pj.PaliGemma, pictures: Sequence[Image.Image | None]) -> jax.Array | None:
        """Soft tokens [I, N, D] to use for the next pictures of the run; None leaves them to the model.

        A picture that could not be read is None, and has none.
        """
        places = [self._used + i for i, picture in enumerate(pictures) if picture is not None]
        self._used += len(pictures)
        self._skipped += len(pictures) - len(places)
        if not (self.asked and places):
            return None
        own = None
        if self._file:
            readable = [picture for picture in pictures if picture is not None]
            own = model.embed_image(readable, projected=self._projected)
            self._saved.append(np.asarray(own, np.float32))
        given = own if self._loaded is None else self._loaded[places]
        return jnp.asarray(given) if self._projected else model.project(given)

    def close(self) -> None:
        """Write the file, and say what is in it."""
        if self._file and self._saved:
            values = np.concatenate(self._saved)
            em.save(self._file, values)
            missing = f", without {self._skipped} that could not be read" if self._skipped else ""
            note(f"saved {self._file}, embeddings of shape {values.shape}{missing}")
