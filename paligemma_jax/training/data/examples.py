"""Examples for fine-tuning, and the rules for their texts.

Everything that can be wrong is found before training starts: texts when a data set is opened, pictures by
`check_pictures`. Pictures are read again when they are needed.
"""

import abc
import dataclasses
import functools
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import overload

import numpy as np
from tqdm import tqdm

from paligemma_jax.errors import DataError, ImageError, PromptError
from paligemma_jax.processing.image import ImageSettings, load_image
from paligemma_jax.tasks.prompts import Prompt, plain, read_prompt
from paligemma_jax.tasks.reading import NUM_CODES, NUM_SIDES
from paligemma_jax.training.data.regions import Region

_READERS = 4  # pictures that are checked at once
_CHUNK = 1024  # pictures whose names are held meanwhile
_ALL, _SAMPLE = 20_000, 2_000  # of more examples than the first so many are checked before training

_LOC = re.compile(r"<loc(?:0\d{3}|10[01]\d|102[0-3])>")
_SEG = re.compile(r"<seg(?:0\d{2}|1[01]\d|12[0-7])>")
_BROKEN = re.compile(r"<(?:loc|seg)[^<>\s]{0,12}>?")

Picture = str | bytes


@dataclasses.dataclass(frozen=True)
class Example:
    """Pictures seen together, the prompt (see `tasks.prompts.plain`) and the answer.

    images: paths, or the bytes of pictures' files.
    where: the file and the line, for messages.
    regions: the objects that the suffix was written of; None where the suffix is what the data say.
    size: (width, height) in pixels that the data say the picture has, if they do.
    """

    images: tuple[Picture, ...]
    prefix: str
    suffix: str
    where: str = dataclasses.field(default="", compare=False)
    regions: tuple[Region, ...] | None = dataclasses.field(default=None, compare=False)
    size: tuple[int, int] | None = dataclasses.field(default=None, compare=False)


class Examples(Sequence[Example], abc.ABC):
    """Examples that are read when they are asked for."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def at(self, index: int) -> Example:
        """The example at 0 <= index < len."""

    def draft(self, index: int) -> Example:
        """The same, but perhaps with other mask codes, as many: for looking at texts, without working them out."""
        return self.at(index)

    def bounds(self) -> np.ndarray:
        """i32 [N, 3]: for each example its pictures, and the most tokens that prefix and suffix can have."""
        return text_bounds(map(self.draft, range(len(self))))

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self.at(i) for i in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return self.at(place)

    def __iter__(self) -> Iterator[Example]:
        return map(self.at, range(len(self)))


def text_bounds(examples: Iterable[Example]) -> np.ndarray:
    """`Examples.bounds` of any examples."""
    return np.fromiter(map(sizes_of, examples), np.dtype((np.int32, 3))).reshape(-1, 3)


def sizes_of(example: Example) -> tuple[int, int, int]:
    """A row of `Examples.bounds`."""
    return len(example.images), token_bound(example.prefix), token_bound(example.suffix)


def token_bound(text: str) -> int:
    """The most tokens that a text can have: a location or mask code is one, and any other has a byte at least."""
    count = len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
    return count - 8 * len(_LOC.findall(text)) - 7 * len(_SEG.findall(text)) if "<" in text else count


def make_example(images: tuple[Picture, ...], prefix: str, suffix: str, where: str) -> Example:
    """An example out of the texts of a row.

    Raises:
      DataError: a model could not learn from it; `where` it stands is named.
    """
    try:
        text, prompt = _read_prefix(prefix, len(images))
    except PromptError as error:
        raise DataError(f"{where}: {error}") from None
    if not suffix.strip() and not prompt.labels:  # what is not there is nothing to detect
        raise DataError(f"{where} has an empty suffix: write the answer, or remove the line")
    if "<" in suffix or "<" in text:
        _check_tokens(text + " " + suffix, where)
    if prompt.task is not None and prompt.task.num_codes and suffix.strip():
        _check_codes(suffix, where)
    return Example(images, text, suffix, where)


@functools.lru_cache(4096)
def _read_prefix(prefix: str, num_images: int) -> tuple[str, Prompt]:
    return plain(prefix, num_images), read_prompt(prefix, num_images)


def broken_tokens(text: str) -> list[str]:
    """What looks like a location or mask code and is none: a tokenizer would cut it into letters."""
    return _BROKEN.findall(_SEG.sub("", _LOC.sub("", text))) if "<" in text else []


def _check_tokens(text: str, where: str) -> None:
    if broken := broken_tokens(text):
        raise DataError(
            f"{where} has {broken[0]!r}, which is no token: locations are <loc0000> to <loc1023>, "
            "mask codes <seg000> to <seg127>"
        )


def _check_codes(suffix: str, where: str) -> None:
    num_locs, num_codes = len(_LOC.findall(suffix)), len(_SEG.findall(suffix))
    if not num_locs or num_locs % NUM_SIDES or num_codes * NUM_SIDES != num_locs * NUM_CODES:
        raise DataError(
            f"{where} asks to segment, and its suffix has {num_locs} locations and {num_codes} mask codes: a mask is 4 "
            "<loc....> and 16 <seg...>; polygons are encoded when they are given as COCO or YOLO with data_task=segment"
        )


def check_pictures(examples: Sequence[Example], settings: ImageSettings) -> None:
    """Read each picture once, so that none ends training after hours; of very many examples an even sample.

    Raises:
      DataError: some cannot be read; the first is named, with its line, and how many there are.
    """
    places: Sequence[int] = range(len(examples))
    if len(examples) > _ALL:
        places = np.linspace(0, len(examples) - 1, _SAMPLE).astype(int).tolist()
        print(f"the pictures of {_SAMPLE} of {len(examples)} examples are read; run=check reads all", file=sys.stderr)
    bad: list[tuple[str, str]] = []
    count = 0
    for _, where, error in picture_problems((examples[i] for i in places), settings, len(places)):
        count += 1
        if error:
            bad.append((where, error))
    if bad:
        where, error = bad[0]
        more = f" ({len(bad)} of {count} pictures cannot be read)" if len(bad) > 1 else ""
        raise DataError(f"{where}: {error}{more}")


def picture_problems(
    examples: Iterator[Example], settings: ImageSettings, total: int
) -> Iterator[tuple[Picture, str, str]]:
    """Every distinct picture, where it is named first, and what is wrong with it, "" when it can be read.

    Args:
      total: number of the examples, for the progress bar.
    """

    def problem(item: tuple[Picture, str]) -> str:
        try:
            settings.resized(load_image(item[0]))
        except ImageError as error:
            return str(error)
        return ""

    seen: set[int] = set()
    new = distinct(examples, seen)
    with ThreadPoolExecutor(_READERS) as pool, tqdm(total=total, unit="picture", disable=None) as bar:
        while chunk := list(islice(new, _CHUNK)):
            for (picture, where), error in zip(chunk, pool.map(problem, chunk), strict=True):
                bar.update()
                yield picture, where, error


def distinct(examples: Iterator[Example], seen: set[int]) -> Iterator[tuple[Picture, str]]:
    """Each picture once, and where it is named; `seen` keeps hashes, as the names of millions would be too long."""
    for example in examples:
        for picture in example.images:
            if (key := hash(picture)) not in seen:
                seen.add(key)
                yield picture, example.where


def not_there(path: str) -> str:
    """What is wrong with the path of a picture that is no file, and the remedy."""
    if os.path.isdir(path):
        return "a folder: name a picture"
    return "missing: set image_root to the folder of the pictures"


def check_on_disk(example: Example) -> None:
    """DataError unless all pictures that an example names are there."""
    for picture in example.images:
        if isinstance(picture, str) and not os.path.isfile(picture):
            raise DataError(f"{example.where} names {picture}, which is {not_there(picture)}")
