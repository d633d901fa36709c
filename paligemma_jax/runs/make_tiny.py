"""config.run=make_tiny: build the shipped model from a seed."""

import dataclasses

from ml_collections import ConfigDict

from paligemma_jax.shapes_world import stages


def run(config: ConfigDict) -> int:
    """Run the stages that are not done yet."""
    recipe = stages.Recipe(**{field.name: config[field.name] for field in dataclasses.fields(stages.Recipe)})
    stages.build(config.work_dir, config.output_dir, recipe)
    return 0
