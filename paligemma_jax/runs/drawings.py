"""What a run without records writes: drawings and arrays, which one with other settings replaces only if it is told to.

    .run/RUN.json   {"settings", "files"}: how the files of the last such run in the folder were made, and their names

Runs of several kinds may share a folder, as their files have different names.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from paligemma_jax.annotate.fingerprint import differences, named
from paligemma_jax.errors import ConfigError
from paligemma_jax.files import read_json, write_json
from paligemma_jax.runs.command_line import UNUSED
from paligemma_jax.runs.folder import is_inside, make_folder, refuse_used

# What no file depends on.
_IMMATERIAL = {"run", "platform", "compilation_cache", "batch_size", "output_dir", "overwrite", "resume", "format"}
_IMMATERIAL |= {"report"}  # which comes beside the others
_NAMES = {
    "heatmap": ("*_strip.png", "*_film.gif", "*_maps.npz"),
    "compare": ("*_compare.png", "*_compare.npz"),
    "locate": ("*_drawn.png", "*_mask_*.png", "coco_*.json", "classes.txt", "labels"),
    "swap": ("a.npy", "b.npy"),
    "inspect": ("report.html", "lens*", "norms*", "attention*", "similarity*", "occlusion*", "embeddings*"),
}


@dataclasses.dataclass
class Drawings:
    """The files of one run in a folder; `earlier` are those of the run before it."""

    directory: Path
    marker: Path
    settings: dict[str, Any]
    earlier: list[str]
    files: list[str] = dataclasses.field(default_factory=list)

    def begin(self) -> None:
        """Have the folder ready: files of a run with other settings go now, when nothing else can be wrong."""
        for name in self.earlier:
            if is_inside(name):
                (self.directory / name).unlink(missing_ok=True)
        self._write()

    def own(self, files: Iterable[Path]) -> list[Path]:
        """Note files, before they are written or soon after; returns them. Of a folder, which is ours, those in it."""
        files = list(files)
        each = [item for file in files for item in (sorted(file.iterdir()) if file.is_dir() else (file,))]
        self.files = list(dict.fromkeys([*self.files, *(str(item.relative_to(self.directory)) for item in each)]))
        self._write()
        return files

    def _write(self) -> None:
        self.marker.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.marker, {"settings": self.settings, "files": self.files})


def claim(config: ConfigDict, directory: Path) -> Drawings:
    """The place of a run's files, where nothing of another run would be lost or mixed with it.

    Raises:
      ConfigError: the folder cannot be made, has records of a run, or files of such a run with other settings, or
        files with names of this one's that no run says it has written.
    """
    make_folder(directory)
    refuse_used(directory)
    marker = directory / ".run" / f"{config.run}.json"
    immaterial = {*_IMMATERIAL, *UNUSED.get(config.run, ())}
    settings = {key: value for key, value in sorted(config.to_dict().items()) if key not in immaterial}
    before = read_json(marker) if marker.exists() else {}
    earlier, changed = before.get("files", []), differences(before.get("settings", {}), settings)
    strange = (file for pattern in _NAMES[config.run] for file in sorted(directory.glob(pattern)))
    if not before and (found := next(strange, None)):
        raise ConfigError(f"{directory} has {found.name}, which no run says it has written: name another output_dir")
    if before and changed and not config.overwrite and any((directory / name).exists() for name in earlier):
        raise ConfigError(
            f"{directory} has what run={config.run} wrote with another {named(changed)}: name another output_dir, "
            "or add overwrite=True to replace it"
        )
    return Drawings(directory, marker, settings, earlier if changed else [], [] if changed else earlier)
