"""Where a data set lies and what it is, and how it is to be read."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from paligemma_jax.errors import DataError
from paligemma_jax.training.data.detection import DetectionSet, Encode
from paligemma_jax.training.data.examples import not_there

TASKS = ("auto", "detect", "segment")  # values of data_task


@dataclasses.dataclass(frozen=True)
class Found:
    """A data set, or one split of it.

    kind: its format, a key of `sources.READERS`.
    files: what its examples are written in, in a fixed order.
    root: the folder that pictures are named from.
    split: "train", "valid" or "test"; "" when there are none.
    others: files of the other splits, which may name more classes.
    """

    kind: str
    files: tuple[Path, ...]
    root: Path
    split: str = ""
    others: tuple[Path, ...] = ()


def refuse(error: DataError) -> None:
    """The first bad row ends reading."""
    raise error


@dataclasses.dataclass(frozen=True)
class ReadSettings:
    """How data sets are read.

    image_root: the folder that pictures are named from instead, if any.
    task: what objects become: "detect", "segment", or "auto", which is detect.
    encode: masks to codes, for segment.
    tell: called with a line about what was passed over.
    bad_row: called with what is wrong with a row; when it returns, the row is left out.
    """

    image_root: Path | None = None
    task: str = "auto"
    encode: Encode | None = None
    tell: Callable[[str], None] = lambda line: None
    bad_row: Callable[[DataError], None] = refuse

    @contextlib.contextmanager
    def row(self) -> Iterator[None]:
        """Where one row is read: what is wrong with it is given to `bad_row`."""
        try:
            yield
        except DataError as error:
            self.bad_row(error)

    def detection_set(self, classes: Iterable[str]) -> DetectionSet:
        return DetectionSet(list(classes), self.encode, "segment" if self.task == "segment" else "detect")

    def done(self, examples: DetectionSet, found: Found) -> DetectionSet:
        """The set itself, when it has examples; what was odd in it is told."""
        if not len(examples):
            raise DataError(f"{found.files[0]} names no pictures: give a data set that does")
        for kind, count in examples.odd.items():
            self.tell(f"{found.files[0]}: boxes {kind}: {count}, {_DONE[kind]}")
        return examples


_DONE = {
    "without numbers": "left out",
    "reversed": "put right",
    "partly outside": "clipped",
    "without area": "left out",
    "of crowds": "left out",
}


def picture_in(folder: Path, name: str, where: str) -> str:
    """The path of a picture; DataError when it is not there."""
    path = folder / name
    if not path.is_file():
        raise DataError(f"{where} names {path}, which is {not_there(str(path))}")
    return str(path)
