"""config.run=make_tiny: build the shipped model from a seed."""

from ml_collections import ConfigDict

from paligemma_jax.errors import ConfigError
from paligemma_jax.runs import settings
from paligemma_jax.shapes_world import stages


def run(config: ConfigDict) -> int:
    """Run the stages that are not done yet."""
    settings.one_of(config, "mask_vae", ("keep", "train"))
    if not 0 <= config.wide_share <= 1:
        raise ConfigError(f"wide_share={config.wide_share} is not possible: give a number from 0 to 1")
    stages.build(config.work_dir, config.output_dir, settings.from_config(stages.Recipe, config))
    return 0
