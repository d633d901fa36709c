"""config.run=heatmap: where phrases are in pictures, as overlays, strips, films and arrays."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from paligemma_jax.errors import ConfigError
from paligemma_jax.files import expanded, write_array, write_arrays
from paligemma_jax.patch_vit import drawing
from paligemma_jax.patch_vit.activation import PhraseMaps, phrase_maps
from paligemma_jax.runs import pair
from paligemma_jax.runs.sources import Source

_KINDS = (".png", ".gif", ".npy", ".npz")


def run(config: ConfigDict) -> int:
    """Draw, and return the exit status: 1 when a picture could not be read."""
    pair.check(config)
    phrases, only = pair.phrases(config), expanded(config.output) if config.output else None
    if only and only.suffix.lower() not in _KINDS:
        raise ConfigError(f"output={config.output!r} is of no known kind: let it end in one of {', '.join(_KINDS)}")
    pictures = pair.Pictures(config.image)
    if only and len(pictures.names) > 1:
        raise ConfigError(f"output is one file, and {config.image} {len(pictures.names)} pictures: set output_dir")
    drawings = pair.claim(config, pictures.names) if only is None else None
    student, clip = pair.load(config)
    if only:
        only.parent.mkdir(parents=True, exist_ok=True)
    else:
        drawings.begin()
    for group in pictures.groups(config.batch_size):
        images = [source.image for _, source in group]
        maps = phrase_maps(student, clip, images, phrases, config.windows, config.batch_size)
        for (stem, source), found in zip(group, maps, strict=True):
            files = [only] if only else drawings.own(_files(drawings.directory, stem, phrases))
            for file in files:
                _write(file, source.image, found)
            _report(config, source, found, files, several=len(pictures.names) > 1)
    return 1 if pictures.failed else 0


def _files(directory: Path, stem: str, phrases: Sequence[str]) -> list[Path]:
    kinds = ["_strip.png", "_maps.npz"] + ["_film.gif"] * (len(phrases) > 1)
    return [directory / f"{stem}{kind}" for kind in kinds]


def _write(file: Path, image: Image.Image, found: PhraseMaps) -> None:
    """Write maps in the form that the file's suffix says."""
    match file.suffix.lower():
        case ".npy":
            write_array(file, found.maps)
        case ".npz":
            write_arrays(file, {"maps": found.maps, "phrases": np.array(found.phrases)})
        case ".gif":
            drawing.save_film(drawing.film(image, found.maps, found.phrases), file)
        case _:
            drawing.save_png(drawing.strip(image, found.maps, found.phrases), file)


def _report(config: ConfigDict, source: Source, found: PhraseMaps, files: list[Path], several: bool) -> None:
    """Say where each map is highest, and what was written."""
    peaks = [_peak(values, source.image.size) for values in found.maps]
    if config.format == "json":
        about = [
            {"phrase": phrase, "box": box, "share": round(share, 4)}
            for phrase, (box, share) in zip(found.phrases, peaks, strict=True)
        ]
        rows, columns = found.maps.shape[1:]
        record = {"image": source.name, "prompt": config.prompt, "grid": [rows, columns], "peaks": about}
        print(json.dumps(record | {"files": list(map(str, files))}, ensure_ascii=False), flush=True)
        return
    if several:
        print(f"==> {source.name} <==")
    for phrase, ((x0, y0, x1, y1), share) in zip(found.phrases, peaks, strict=True):
        print(f"{phrase}: highest at x {x0:.0f}..{x1:.0f}, y {y0:.0f}..{y1:.0f}, {share:.0%} of the map")
    print(f"wrote {', '.join(map(str, files))}", flush=True)


def _peak(values: np.ndarray, size: tuple[int, int]) -> tuple[list[float], float]:
    """The highest cell of a map [R, C] as a box in pixels, and its value."""
    row, column = divmod(int(values.argmax()), values.shape[1])
    across, down = size[0] / values.shape[1], size[1] / values.shape[0]
    box = [column * across, row * down, (column + 1) * across, (row + 1) * down]
    return [round(v, 2) for v in box], float(values.max())
