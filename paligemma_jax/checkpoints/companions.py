"""Files that lie beside the weights: tokenizer, processor, generation settings, mask VQ-VAE."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from paligemma_jax import files
from paligemma_jax.checkpoints import config_json
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.processing.image import PREPROCESSOR_NAME, PROCESSOR_NAME
from paligemma_jax.processing.tokenizer import TOKENIZER_FILES
from paligemma_jax.processing.vocabulary import CONFIG_FILE

MASK_VAE_NAME, GENERATION = "vae-oid.npz", "generation_config.json"
_IMAGES = (PREPROCESSOR_NAME, PROCESSOR_NAME)
# What belongs together is taken from one directory: the first that has one of the files that make the group.
_GROUPS = (
    (TOKENIZER_FILES, (*TOKENIZER_FILES, CONFIG_FILE, "special_tokens_map.json", "added_tokens.json")),
    (_IMAGES, _IMAGES),
    ((GENERATION,), (GENERATION,)),
    ((MASK_VAE_NAME,), (MASK_VAE_NAME,)),
)


def tokenizer_dir(directories: Sequence[Path]) -> Path:
    """The first directory that has a tokenizer; the last where none has."""
    return _first(directories, TOKENIZER_FILES) or directories[-1]


def image_settings_dir(directories: Sequence[Path]) -> Path:
    """The first directory that says how pictures are prepared; the last where none does."""
    return _first(directories, _IMAGES) or directories[-1]


def mask_vae_beside(directories: Sequence[Path]) -> Path | None:
    """The mask VQ-VAE that lies beside the weights."""
    directory = _first(directories, (MASK_VAE_NAME,))
    return directory and directory / MASK_VAE_NAME


def copy(directories: Sequence[Path], target: Path, replace: bool = True) -> list[str]:
    """Copy the companions that the directories have; returns their names.

    Without `replace` a group of which `target` has a file already is left as it is. With it, other files of a group in
    `target` are removed: they would be read with the new ones.
    """
    copied = []
    for makers, names in _GROUPS:
        source = _first(directories, makers)
        if source is None or not (replace or _first([target], makers) is None):
            continue
        for name in names:
            if (source / name).is_file():
                with files.replacing(target / name) as temporary:
                    shutil.copyfile(source / name, temporary)
                copied.append(name)
            else:
                (target / name).unlink(missing_ok=True)
    return copied


def with_generation(config: PaliGemmaConfig, directory: Path) -> PaliGemmaConfig:
    """`config` with what ends an answer by the generation_config.json of a directory, if there is one."""
    path = directory / GENERATION
    return config_json.with_generation(config, files.read_json(path), str(path)) if path.is_file() else config


def write_eos(directory: Path, config: PaliGemmaConfig) -> None:
    """Have generation_config.json, which wins where it is there, say what ends an answer of this model.

    One is written for ids that are not the usual one alone: beside an .npz nothing else says them.
    """
    path, ids = directory / GENERATION, list(config.eos_token_ids)
    if not path.is_file() and ids == [PaliGemmaConfig().eos_token_id]:
        return
    value = files.read_json(path) if path.is_file() else {}
    eos = ids if len(ids) > 1 else ids[0]
    if value.get("eos_token_id") != eos:
        files.write_json(path, value | {"eos_token_id": eos})


def _first(directories: Sequence[Path], names: Sequence[str]) -> Path | None:
    return next((d for d in directories if any((d / name).is_file() for name in names)), None)
