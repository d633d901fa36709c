"""config.run=make_patch_vit: build the shipped patch ViT and its teacher from a seed."""

from ml_collections import ConfigDict

from paligemma_jax.runs import settings
from paligemma_jax.shapes_world import patch_vit_stage


def run(config: ConfigDict) -> int:
    """Run the stages that are not done yet."""
    patch_vit_stage.build(config.work_dir, config.output_dir, settings.from_config(patch_vit_stage.Recipe, config))
    return 0
