"""config.run=train: fine-tune on JSON lines."""

from ml_collections import ConfigDict

from paligemma_jax.errors import ConfigError, DataError
from paligemma_jax.runs import model as models
from paligemma_jax.runs import settings
from paligemma_jax.training.finetune import Recipe, Settings, finetune


def run(config: ConfigDict) -> int:
    """Train to the end, or to Ctrl-C; the same command goes on from there."""
    if not config.data:
        raise DataError("no data is given: name a .jsonl file with --config.data=FILE")
    if not config.output_dir:
        raise ConfigError("output_dir is empty: name a folder for the tuned model")
    models.check_weights(config)
    finetune(settings.from_config(Settings, config), settings.from_config(Recipe, config))
    return 0
