"""Files of all objects of a run, for other tools, made of its records."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from paligemma_jax.annotate.exports import export
from paligemma_jax.annotate.rows import OK, Row
from paligemma_jax.runs.folder import Folder, Record
from paligemma_jax.runs.notes import note
from paligemma_jax.runs.sources import Source
from paligemma_jax.tasks import coco
from paligemma_jax.tasks.detection import Detection
from paligemma_jax.tasks.prompts import Prompt


def write(kinds: Iterable[str], folder: Folder, prompts: Iterable[Prompt]) -> None:
    """Write the files of each kind, of `annotate.exports.EXPORTS`, and say which.

    Classes are numbered as the prompts name them, then as they turn up. Several prompts about a picture add up.
    """

    kinds = list(kinds)

    def rows() -> Iterator[Row]:
        answered = (record for record in folder.records() if "error" not in record)
        return (_row(folder.path, record, "coco" in kinds) for record in answered)

    if written := export(kinds, folder.path, rows, prompts, tell=note):
        folder.own(written)
        count = folder.done - folder.failed
        note(f"wrote {', '.join(map(str, written))}, of {count:,} picture{'s' * (count != 1)}")


def write_rows(kinds: Iterable[str], directory: Path, rows: Sequence[Row], labels: Sequence[str]) -> list[Path]:
    """The same for rows of `row_of`; classes are numbered as `labels`, then as they turn up. Returns the files."""
    asked = [Prompt(" ; ".join(labels), None, tuple(labels))]
    written = export(kinds, directory, lambda: iter(rows), asked, tell=note)
    if written:
        note(f"wrote {', '.join(map(str, written))}, of {len(rows):,} picture{'s' * (len(rows) != 1)}")
    return written


def row_of(source: Source, objects: Sequence[Detection], with_masks: bool) -> Row:
    """The objects of a picture as a row of `run=annotate`; masks need pycocotools."""
    corners = [dict(zip(("x0", "y0", "x1", "y1"), item.box, strict=True)) for item in objects]
    boxes = [{"label": item.label, "score": item.score} | at for item, at in zip(objects, corners, strict=True)]
    masks = [coco.encode_mask(item.mask) if with_masks and item.mask is not None else None for item in objects]
    return _about(source.name, source.image.size, source.stem) | {"boxes": boxes, "masks": masks if any(masks) else []}


def _about(name: str, size: Sequence[int], stem: str, text: str = "", model: str = "") -> Row:
    return {
        **{"image": name, "width": size[0], "height": size[1], "stem": stem, "status": OK},
        **{"text": text, "model": model},
    }


def _row(directory: Path, record: Record, with_masks: bool) -> Row:
    """A record as a row of `run=annotate`; masks need pycocotools."""
    boxes, masks = [], iter(record["masks"])
    coming, found = next(masks, None), []
    for box, exact in zip(record["boxes"], record["exact_boxes"], strict=True):
        # Objects with a mask are listed again, in the same order.
        has_mask = coming is not None and box == {key: coming[key] for key in box}
        found.append(_mask(directory, coming) if has_mask and with_masks else None)
        coming = next(masks, None) if has_mask else coming
        corners = dict(zip(("x0", "y0", "x1", "y1"), exact, strict=True))
        boxes.append({"label": box["label"], "score": box["score"]} | corners)
    about = _about(record["image"], record["size"], record["stem"], record["text"], record["model"])
    return about | {"boxes": boxes, "masks": found if any(found) else []}


def _mask(directory: Path, entry: dict[str, Any]) -> coco.Record:
    with Image.open(directory / Path(entry["file"]).name) as file:
        return coco.encode_mask(np.asarray(file) > 0)


def check(kinds: Iterable[str], prompts: Iterable[Prompt]) -> None:
    """Raise a ConfigError, before the model is loaded, when masks are asked for that could not be written."""
    if "coco" in kinds and any(prompt.task and prompt.task.num_codes for prompt in prompts):
        coco.require()
