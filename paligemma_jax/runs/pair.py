"""A patch ViT with its teacher, phrases and pictures, as the runs of configs/patch_vit.py are given them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from paligemma_jax import patch_vit
from paligemma_jax.errors import ConfigError, ImageError, PromptError, error_line
from paligemma_jax.files import Stems, expanded
from paligemma_jax.patch_vit import windows
from paligemma_jax.processing.find import find_images
from paligemma_jax.runs import drawings, settings, sources
from paligemma_jax.runs.drawings import Drawings
from paligemma_jax.runs.folder import make_folder, refuse_inputs, refuse_used
from paligemma_jax.runs.notes import note
from paligemma_jax.tasks.prompts import split_labels

_FPS = 1.0  # frames looked at of each second of a video


def load(config: ConfigDict) -> tuple[patch_vit.Student, patch_vit.Clip]:
    """Both models; ConfigError and CheckpointError."""
    same_norm = {"auto": None, "on": True, "off": False}[settings.one_of(config, "same_norm", ("auto", "on", "off"))]
    for key in ("student", "clip"):
        if not config[key]:
            raise ConfigError(f"{key} is empty: name a directory or a hub id with --config.{key}=...")
    student, clip = patch_vit.load(config.student, same_norm=same_norm), patch_vit.load_clip(config.clip)
    patch_vit.check_pair(student, clip)
    return student, clip


def phrases(config: ConfigDict) -> tuple[str, ...]:
    """What the prompt names; PromptError when it is nothing."""
    if not (found := split_labels(config.prompt)):
        raise PromptError(f"prompt={config.prompt!r} names nothing: give phrases, as in 'red circle ; star'")
    return found


def check(config: ConfigDict) -> None:
    """What all runs need: format, windows, batch_size and output_dir."""
    settings.one_of(config, "format", ("text", "json"))
    windows.layout((1, 1), 1, 1, config.windows)
    if config.batch_size < 1:
        raise ConfigError(f"batch_size={config.batch_size} is not possible: give an integer of at least 1")
    if not config.output_dir:
        raise ConfigError("output_dir is empty: give a folder for the pictures")


def folder(config: ConfigDict, names: Sequence[str]) -> Path:
    """The folder for pictures about those of some names, which is there: a bad place is known before the work."""
    directory = expanded(config.output_dir)
    refuse_used(directory)
    refuse_inputs(directory, names)
    return make_folder(directory)


def claim(config: ConfigDict, names: Sequence[str]) -> Drawings:
    """The same for a run whose drawings are not to be replaced in silence."""
    return drawings.claim(config, folder(config, names))


class Pictures:
    """The pictures of a run, read as they are needed; the only one that cannot be read is an error, others are noted.

    Those that could not be read are counted in `failed` once they were passed by.
    """

    def __init__(self, pattern: str):
        self.names = find_images(pattern, tell=note)
        self.failed = 0
        self._stems = Stems()

    def groups(self, size: int) -> Iterator[list[tuple[str, sources.Source]]]:
        """So many pictures at a time."""
        return sources.in_groups(iter(self), size)

    def __iter__(self) -> Iterator[tuple[str, sources.Source]]:
        """Pairs of a stem for files, each another one, and a picture."""
        for item in sources.read(self.names, _FPS):
            if not isinstance(item, ImageError):
                yield self._stems.new(sources.plain(item.stem)), item
            elif len(self.names) == 1:
                raise item
            else:
                self.failed += 1
                note(error_line(item))
