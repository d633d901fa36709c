"""Objects in the two JSON forms of COCO: results, which COCOeval measures, and datasets, which trainers read.

Boxes are x, y, width and height in pixels, clipped to the picture. Masks are run-length encoded as pycocotools
writes them, and need it (`pip install -e ".[export]"`); boxes do not. An unknown score is 0.
Source: https://cocodataset.org/#format-data and #format-results.
"""

from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from paligemma_jax.errors import ConfigError
from paligemma_jax.tasks.classes import number_of, numbered
from paligemma_jax.tasks.detection import Box, Detection
from paligemma_jax.tasks.overlap import clip_box
from paligemma_jax.tasks.select import known_score

Record = dict[str, Any]


def image(image_id: int, name: str, size: tuple[int, int]) -> Record:
    """What a dataset says about a picture: its file, and its (width, height) in pixels."""
    return {"id": image_id, "file_name": name, "width": size[0], "height": size[1]}


def annotate(
    detections: Iterable[Detection], image_id: int, size: tuple[int, int], classes: Sequence[str]
) -> list[Record]:
    """What is known about each object of a picture: image_id, category_id, bbox, area and score, and segmentation.

    The area is the mask's, else the box's; an object without a mask has no segmentation.

    Args:
      detections: boxes in pixels; masks, where present, of the picture's size.
      image_id: number of the picture.
      size: its (width, height) in pixels.
      classes: names by their number, `category_id`, counted from 1.

    Raises:
      ConfigError: there is a mask, and pycocotools is not installed.
      DataError: a label is not among the classes.
    """
    numbers = numbered(classes, first=1)
    return [
        {
            "image_id": image_id,
            "category_id": number_of(item.label, numbers),
            "bbox": (corner := _corner_and_size(item.box, size)),
            "area": round(corner[2] * corner[3], 2) if item.mask is None else int(item.mask.sum()),
            "score": round(float(known_score(item)), 4),
        }
        | ({} if item.mask is None else {"segmentation": encode_mask(item.mask)})
        for item in detections
    ]


def to_results(annotations: Iterable[Record]) -> list[Record]:
    """The results form of what `annotate` gave: image_id, category_id, bbox, score, and segmentation if any."""
    return [{key: value for key, value in fields.items() if key != "area"} for fields in annotations]


def to_dataset(
    images: Sequence[Record], annotations: Iterable[Record], classes: Sequence[str]
) -> dict[str, list[Record]]:
    """The dataset form of what `image` and `annotate` gave, as if the objects were the truth.

    An object without a mask has an empty list for a segmentation. Boxes that have no area in their picture are left
    out: trainers fail on them.
    """
    solid = [fields for fields in annotations if fields["bbox"][2] * fields["bbox"][3] > 0]
    return {
        "images": list(images),
        "annotations": [
            {"id": i, "segmentation": [], "iscrowd": 0} | {k: v for k, v in fields.items() if k != "score"}
            for i, fields in enumerate(solid, 1)
        ],
        "categories": [
            {"id": number, "name": name, "supercategory": ""} for name, number in numbered(classes, first=1).items()
        ],
    }


def encode_mask(mask: np.ndarray) -> Record:
    """A mask, bool [H, W], as {size: [H, W], counts: text}, compressed run lengths down the columns.

    Raises:
      ConfigError: pycocotools is not installed.
    """
    encoded = require().encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(v) for v in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def require() -> ModuleType:
    """pycocotools.mask; ConfigError when it is not installed."""
    try:
        from pycocotools import mask
    except ImportError:
        raise ConfigError('masks in COCO files need pycocotools: pip install -e ".[export]"') from None
    return mask


def _corner_and_size(box: Box, size: tuple[int, int]) -> list[float]:
    """x, y, width and height of a box in the picture, to a hundredth of a pixel."""
    x0, y0, x1, y1 = (round(v, 2) for v in clip_box(box, size))
    return [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)]
