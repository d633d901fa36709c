"""config.run=make_tiny: build the shipped model from a seed."""

from ml_collections import ConfigDict

from paligemma_jax.runs import settings
from paligemma_jax.shapes_world import stages


def run(config: ConfigDict) -> int:
    """Run the stages that are not done yet."""
    stages.build(config.work_dir, config.output_dir, settings.from_config(stages.Recipe, config))
    return 0
