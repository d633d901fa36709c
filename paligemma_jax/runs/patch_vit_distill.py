"""config.run=patch_vit_distill: a patch ViT from a CLIP."""

from ml_collections import ConfigDict

from paligemma_jax.errors import DataError
from paligemma_jax.patch_vit.distill import Settings, distill
from paligemma_jax.patch_vit.plateau import Recipe
from paligemma_jax.runs import settings


def run(config: ConfigDict) -> int:
    """Distil to the end, or to Ctrl-C; the same command goes on from there."""
    if not (config.train or config.extra):
        raise DataError("no pictures are given: name a folder with --config.train=DIR or --config.extra=DIR")
    distill(settings.from_config(Settings, config), settings.from_config(Recipe, config))
    return 0
