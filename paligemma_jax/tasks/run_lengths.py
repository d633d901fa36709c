"""Run-length encoded masks, as COCO's files have them, read by numpy alone: damaged ones are errors."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from paligemma_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class Runs:
    """Run-length encoded mask, as COCO stores it.

    counts: lengths of runs of 0 and 1 in turn, down the columns.
    height, width: of the mask, which spans the whole picture.
    """

    counts: np.ndarray
    height: int
    width: int


def read_runs(value: Mapping[str, Any]) -> Runs:
    """COCO's {size: [H, W], counts}, whose counts are a list, or compressed to a text."""
    height, width = value["size"]
    counts = value["counts"]
    lengths = read_counts(counts) if isinstance(counts, str) else np.array(counts, np.int64)
    return Runs(lengths.astype(np.int32), height, width)


def decode_runs(runs: Runs) -> np.ndarray:
    """The mask, bool [H, W]; DataError when the runs do not fill it."""
    counts = np.asarray(runs.counts, np.int64)
    if (counts < 0).any() or counts.sum() != runs.height * runs.width:
        raise DataError(f"run lengths do not fill a mask of {runs.width} x {runs.height}: the file is damaged")
    values = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return values.reshape(runs.width, runs.height).T


def read_counts(text: str) -> np.ndarray:
    """Run lengths out of COCO's compressed text: 5 bits a letter, differences from the run before the last.

    Source: pycocotools, rleFrString.
    """
    counts: list[int] = []
    place = 0
    while place < len(text):
        value = shift = 0
        more = True
        while more:
            if place == len(text):
                raise DataError("run lengths end too early: the file is damaged")
            bits = ord(text[place]) - 48
            value |= (bits & 0x1F) << shift
            shift, place, more = shift + 5, place + 1, bool(bits & 0x20)
            if not more and bits & 0x10:
                value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    return np.array(counts, np.int64)
