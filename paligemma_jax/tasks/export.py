"""Objects to JSON records, mask files and supervision; `coco` and `yolo` hold the forms of those two."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from paligemma_jax.errors import ConfigError
from paligemma_jax.files import replacing
from paligemma_jax.tasks.classes import number_of, numbered
from paligemma_jax.tasks.detection import Detection
from paligemma_jax.tasks.select import known_score

if TYPE_CHECKING:
    import supervision


def record(
    image: str,
    prompt: str,
    answer: Any,
    objects: Sequence[Detection],
    dropped: Sequence[str],
    mask_files: Sequence[str | Path] = (),
    load_s: float = 0.0,
) -> dict[str, Any]:
    """One answer as the JSON object that the command line prints.

    Args:
      image, prompt: what was asked.
      answer: an `tasks.output.Output`.
      objects: those that are kept of it, in pixels.
      dropped: the text of each incomplete object.
      mask_files: what `save_masks` returned for them.
      load_s: seconds that loading the model took.
    """
    return {
        "image": image,
        "prompt": prompt,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "mean_logprob": None if answer.mean_logprob is None else round(answer.mean_logprob, 4),
        **to_json(objects, mask_files),
        "details": to_details(objects),
        "dropped": list(dropped),
        "timing": {"load_s": load_s, **dataclasses.asdict(answer.timing)},
    }


def to_json(detections: Sequence[Detection], mask_files: Sequence[str | Path] = ()) -> dict[str, list[dict[str, Any]]]:
    """The `boxes` and `masks` of one picture's JSON record.

    Every object is among the boxes [{label, box, score}], one with a mask also among the masks, with its `file`. Boxes
    are x0, y0, x1, y1 in pixels, to a hundredth; an unknown score is null.

    Args:
      detections: objects of one picture.
      mask_files: what `save_masks` returned for them; without it every `file` is null.
    """
    boxes = [
        {
            "label": item.label,
            "box": [round(float(v), 2) for v in item.box],
            "score": None if item.score is None else round(float(item.score), 4),
        }
        for item in detections
    ]
    masked = [box for box, item in zip(boxes, detections, strict=True) if item.mask is not None]
    files = [str(file) for file in mask_files] or [None] * len(masked)
    return {"boxes": boxes, "masks": [box | {"file": file} for box, file in zip(masked, files, strict=True)]}


def to_details(detections: Sequence[Detection]) -> list[dict[str, Any]]:
    """What else is known of each box: the probability of each side, and the expected box in pixels; null if unknown."""
    return [
        {
            "side_probabilities": None
            if item.side_probabilities is None
            else [round(float(p), 4) for p in item.side_probabilities],
            "expected_box": None if item.expected_box is None else [round(float(v), 2) for v in item.expected_box],
        }
        for item in detections
    ]


def save_masks(detections: Sequence[Detection], directory: str | Path, stem: str) -> list[Path]:
    """Writes each mask as a black and white PNG of the picture's size, `{stem}_mask_{i}.png`; the paths in order.

    Files of that name with higher numbers, which an earlier answer left, are removed.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    files = []
    for mask in (item.mask for item in detections if item.mask is not None):
        files.append(directory / f"{stem}_mask_{len(files)}.png")
        with replacing(files[-1]) as temporary:
            Image.fromarray(mask.astype(np.uint8) * 255).save(temporary, format="PNG")
    stale = len(files)
    while (old := directory / f"{stem}_mask_{stale}.png").exists():  # of an earlier answer with more masks
        old.unlink()
        stale += 1
    return files


def to_supervision(detections: Sequence[Detection], classes: Sequence[str]) -> "supervision.Detections":
    """The objects for Roboflow's supervision, whose annotators, trackers and metrics take them.

    Args:
      detections: objects of one picture.
      classes: names by their number, `class_id`; the names themselves are in `data["class_name"]`.

    Returns:
      xyxy f32 [N, 4] in pixels; mask bool [N, H, W], all False for an object without one, or None when none has any;
      confidence f32 [N], 0 where it is unknown, or None when it is for all.

    Raises:
      ConfigError: supervision is not installed.
      DataError: a label is not among the classes.
    """
    try:
        import supervision
    except ImportError:
        raise ConfigError("to_supervision needs supervision: pip install supervision") from None
    numbers = numbered(classes)
    masks = [item.mask for item in detections]
    shape = next((mask.shape for mask in masks if mask is not None), None)
    filled = [np.zeros(shape, bool) if mask is None else mask for mask in masks] if shape else None
    is_scored = any(item.score is not None for item in detections)
    return supervision.Detections(
        xyxy=np.array([item.box for item in detections], np.float32).reshape(-1, 4),
        mask=None if filled is None else np.stack(filled).astype(bool),
        confidence=np.array([known_score(item) for item in detections], np.float32) if is_scored else None,
        class_id=np.array(class_ids := [number_of(item.label, numbers) for item in detections], int),
        data={"class_name": np.array([classes[class_id] for class_id in class_ids], str)},
    )
