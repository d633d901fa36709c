"""What is in some data and what is wrong with it, as one JSON object."""

import dataclasses
import hashlib
import io
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from paligemma_jax.errors import DataError, ImageError, PromptError
from paligemma_jax.processing.decode import decode
from paligemma_jax.processing.image import opened
from paligemma_jax.processing.processor import Processor
from paligemma_jax.tasks.detection import NUM_LOCS, parse
from paligemma_jax.tasks.prompts import read_prompt
from paligemma_jax.tasks.reading import read
from paligemma_jax.training.data.detection import DetectionSet
from paligemma_jax.training.data.examples import Examples, Picture, distinct
from paligemma_jax.training.data.regions import UNIT

TINY = 4 / NUM_LOCS  # of a picture's side: what is narrower is rarely meant
BINS = 10  # of the histogram of lengths
UNBALANCED = 100  # times as many objects of one class as of another
_OUTSIDE = ("partly outside", "without area", "without numbers")  # what data sets count
_THREADS = 4
_CHUNK = 512
_LISTED = 1000  # places of each kind of warning; counts are of all, and errors are all named


@dataclasses.dataclass
class Fault:
    """One kind of fault: how often it is there, and where: the first `most` places."""

    count: int = 0
    places: list[str] = dataclasses.field(default_factory=list)
    most: dataclasses.InitVar[int] = _LISTED

    def __post_init__(self, most: int):
        self._most = most

    def add(self, place: str) -> None:
        self.count += 1
        if len(self.places) < self._most:
            self.places.append(place)


ERRORS = {  # kinds of faults that stop training or spoil it, and what they are
    "bad_rows": "rows that cannot be used",
    "too_long": "examples longer than text_length",
    "unknown_tokens": "texts with tokens that the model does not have",
    "unreadable": "pictures that cannot be read",
    "incomplete_objects": "suffixes with incomplete objects",
}
WARNINGS = {
    "empty_suffixes": "examples whose answer is empty (nothing to detect)",
    "unknown_characters": "texts with characters that the tokenizer does not have",
    "unknown_labels": "objects whose label the prefix does not name",
    "no_objects": "answers to detect or segment without any object",
    "reversed_boxes": "boxes with corners in the wrong order",
    "boxes_outside": "boxes that reach outside their picture, or have no area in it",
    "tiny_boxes": "boxes narrower than 4 locations",
    "repeated_boxes": "examples with a box that is there twice",
    "other_sizes": "pictures whose size is not the one that the data say",
    "duplicates": "pictures that are there before, by their contents",
}


def check_data(
    splits: Mapping[str, Callable[[Callable[[DataError], None]], Examples]], processor: Processor, text_length: int
) -> dict[str, Any]:
    """Look at every example and every picture.

    Args:
      splits: by name, what opens one; it is given what to call with each bad row.
      processor: of the model that is to be trained.
      text_length: the most tokens of an example's texts.

    Returns:
      "splits": for each its counts, classes, histogram of lengths and faults; "between": pictures that are in two
      splits; "errors" and "warnings": numbers of kinds of faults. All values are JSON's.
    """
    seen: dict[bytes, tuple[str, str]] = {}
    between = Fault()
    found = {}
    for name, open_split in splits.items():
        faults = {kind: Fault(most=sys.maxsize) for kind in ERRORS} | {kind: Fault() for kind in WARNINGS}
        try:
            examples = open_split(lambda error, faults=faults: faults["bad_rows"].add(str(error)))
        except DataError as error:  # nothing is left of it
            faults["bad_rows"].add(str(error))
            found[name] = _record({"examples": 0}, faults)
            continue
        counts = _look_at_texts(examples, processor, text_length, faults)
        counts["pictures"] = _look_at_pictures(name, examples, processor, seen, faults, between)
        found[name] = _record(counts, faults)
    records = list(found.values())
    return {
        "splits": found,
        "between": dataclasses.asdict(between),
        "errors": sum(len(record["errors"]) for record in records),
        "warnings": sum(len(record["warnings"]) for record in records) + bool(between.count),
    }


def _record(counts: dict[str, Any], faults: Mapping[str, Fault]) -> dict[str, Any]:
    def there(kinds: Sequence[str]) -> dict[str, Any]:
        return {kind: dataclasses.asdict(faults[kind]) for kind in kinds if faults[kind].count}

    return counts | {"errors": there(list(ERRORS)), "warnings": there(list(WARNINGS))}


def _look_at_texts(
    examples: Examples, processor: Processor, text_length: int, faults: Mapping[str, Fault]
) -> dict[str, Any]:
    """Counts of examples and objects; faults are added."""
    lengths = np.zeros(len(examples), np.int32)
    classes: Counter[str] = Counter()
    tasks: Counter[str] = Counter()
    num_objects = 0
    encode, decode_ids = processor.tokenizer.encode, processor.tokenizer.decode
    for index in tqdm(range(len(examples)), unit="example", disable=None):
        example = examples.draft(index)
        prefix, suffix, where = example.prefix, example.suffix, example.where
        prompt = read_prompt(prefix)
        tasks[prompt.task.name if prompt.task else "other"] += 1
        classes.update(dict.fromkeys(prompt.labels, 0))
        try:
            lengths[index] = processor.count_prefix(prefix, len(example.images)) + processor.count_suffix(suffix)
        except PromptError as error:
            faults["unknown_tokens"].add(f"{where}: {error}")
            continue
        if any(decode_ids(encode(text)) != text for text in (prefix, suffix)):
            faults["unknown_characters"].add(f"{where}: {suffix!r:.60}")
        if lengths[index] > text_length:
            faults["too_long"].add(f"{where}: {lengths[index]} tokens")
        if not suffix.strip():
            faults["empty_suffixes"].add(where)
        elif prompt.labels and "<loc" not in suffix:
            faults["no_objects"].add(f"{where}: {suffix!r:.60}")
        if "<loc" in suffix or "<seg" in suffix:
            labels = _look_at_objects(where, suffix, prompt.labels, faults)
            classes.update(labels)
            num_objects += len(labels)
    if isinstance(examples, DetectionSet):
        faults["reversed_boxes"].count += examples.odd["reversed"]
        faults["boxes_outside"].count += sum(examples.odd[kind] for kind in _OUTSIDE)
    width = -(-(int(lengths.max(initial=0)) + 1) // BINS)
    counts = np.bincount(lengths // width, minlength=BINS)
    return {
        "examples": len(examples),
        "tasks": dict(tasks.most_common()),
        "objects": num_objects,
        "classes": dict(classes.most_common()),
        "unbalanced": _is_unbalanced(classes),
        "longest": int(lengths.max(initial=0)),
        "lengths": {"width": width, "counts": counts.tolist()},  # of bins of so many tokens, from 0 on
        "repeated_share": round(faults["repeated_boxes"].count / max(len(examples), 1), 4),
    }


def _look_at_objects(where: str, suffix: str, asked: Sequence[str], faults: Mapping[str, Fault]) -> list[str]:
    """The labels of the objects of a suffix."""
    items = [item for item in read(suffix, asked) if item.locs]
    if parse(suffix, UNIT, labels=asked)[1]:
        faults["incomplete_objects"].add(f"{where}: {suffix!r:.80}")
    if any(item.locs[0] > item.locs[2] or item.locs[1] > item.locs[3] for item in items):
        faults["reversed_boxes"].add(where)
    if any(min(abs(item.locs[2] - item.locs[0]), abs(item.locs[3] - item.locs[1])) < TINY * NUM_LOCS for item in items):
        faults["tiny_boxes"].add(where)
    if len({(item.locs, item.label) for item in items}) < len(items):
        faults["repeated_boxes"].add(where)
    if asked and (strange := [item.label for item in items if item.label not in asked]):
        faults["unknown_labels"].add(f"{where}: {strange[0]!r}")
    return [item.label for item in items]


def _is_unbalanced(classes: Mapping[str, int]) -> bool:
    numbers = list(classes.values())
    return len(numbers) > 1 and max(numbers) >= UNBALANCED * max(min(numbers), 1)


def _look_at_pictures(
    split: str,
    examples: Examples,
    processor: Processor,
    seen: dict[bytes, tuple[str, str]],
    faults: Mapping[str, Fault],
    between: Fault,
) -> int:
    """The number of distinct pictures; faults are added, and what is in another split too to `between`."""

    def look(item: tuple[Picture, str]) -> tuple[bytes, tuple[int, int] | None, str]:
        picture, name = item
        content = picture if isinstance(picture, bytes) else b""
        try:
            if not content:
                with opened(Path(picture)) as file:
                    content = file.read()
            image = decode(io.BytesIO(content), name)
            processor.image_settings.resized(image)
            return _digest(content), image.size, ""
        except ImageError as error:
            return b"", None, str(error)

    taken: set[int] = set()
    count = 0
    with ThreadPoolExecutor(_THREADS) as pool, tqdm(total=len(examples), unit="picture", disable=None) as bar:
        for start in range(0, len(examples), _CHUNK):
            part = [examples.draft(i) for i in range(start, min(start + _CHUNK, len(examples)))]
            sizes = {example.where: example.size for example in part}
            new = list(distinct(part, taken))
            names = [where if isinstance(picture, bytes) else picture for picture, where in new]
            looks = pool.map(look, zip((picture for picture, _ in new), names, strict=True))
            for name, (_, where), (digest, size, problem) in zip(names, new, looks, strict=True):
                if problem:
                    faults["unreadable"].add(f"{where}: {problem}")
                    continue
                other_split, first = seen.setdefault(digest, (split, name))
                if other_split != split:
                    between.add(f"{name} ({split}) is {first} ({other_split})")
                elif first != name:
                    faults["duplicates"].add(f"{name} is {first}")
                if sizes[where] not in (None, size):
                    faults["other_sizes"].add(f"{where}: {name} is {size[0]} x {size[1]}, and not {sizes[where]}")
            count += len(new)
            bar.update(len(part))
    return count


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=12).digest()
