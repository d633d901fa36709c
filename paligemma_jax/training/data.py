"""Examples for fine-tuning: JSON lines with `image`, `prefix` and `suffix`.

Everything that can be wrong is found before training starts: texts when the file is read, pictures by
`check_pictures`. Pictures are read again when they are needed.
"""

import dataclasses
import difflib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grain.python as grain
import numpy as np
from tqdm import tqdm

from paligemma_jax.errors import DataError, ImageError, PromptError
from paligemma_jax.files import read_lines
from paligemma_jax.processing.image import ImageSettings, load_image
from paligemma_jax.processing.processor import Processor
from paligemma_jax.tasks.prompts import plain, read_prompt

_KEYS = ("image", "prefix", "suffix")
_READERS = 4  # pictures that are checked at once


@dataclasses.dataclass(frozen=True)
class Example:
    """One line: paths of the pictures seen together, the prompt (see `tasks.prompts.plain`) and the answer.

    where: the file and the line, for messages.
    """

    images: tuple[str, ...]
    prefix: str
    suffix: str
    where: str = dataclasses.field(default="", compare=False)


def read_jsonl(path: str | Path, image_root: str | Path | None = None) -> list[Example]:
    """All examples of a file; pictures are named from `image_root`, by default from the file's own folder.

    Raises:
      DataError: the file or a picture is missing, or a line is not what it should be; the line is named.
    """
    path = Path(path)
    root = Path(image_root) if image_root else path.parent
    try:
        lines = read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}): give a .jsonl file as data") from None
    examples = [_example(line, f"{path} line {i}", root) for i, line in enumerate(lines, 1) if line.strip()]
    if not examples:
        raise DataError(f"{path} is empty: give one JSON object with image, prefix and suffix on each line")
    return examples


def _example(line: str, where: str, root: Path) -> Example:
    try:
        value = json.loads(line, strict=False)  # a form feed or tab in a string does no harm
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise DataError(f"{where} holds a JSON {type(value).__name__} instead of an object")
    if unknown := next((key for key in value if key not in _KEYS), None):
        close = difflib.get_close_matches(unknown, _KEYS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"a line has {', '.join(_KEYS)} only"
        raise DataError(f"{where} has an unknown key {unknown!r}: {hint}")
    images = value.get("image")
    images = images if isinstance(images, list) else [images]
    texts = [value.get("prefix"), value.get("suffix")]
    if not images or not all(isinstance(text, str) for text in (*images, *texts)):
        raise DataError(f"{where} needs image (a path or a list of paths), prefix and suffix (texts)")
    paths = tuple(str(root / image) for image in images)
    if missing := [image for image in paths if not Path(image).is_file()]:
        raise DataError(f"{where} names {missing[0]}, which is missing: set image_root to the folder of the pictures")
    try:
        prompt = read_prompt(texts[0], len(paths))
    except PromptError as error:
        raise DataError(f"{where}: {error}") from None
    if not texts[1].strip() and not prompt.labels:  # what is not there is nothing to detect
        raise DataError(f"{where} has an empty suffix: write the answer, or remove the line")
    return Example(paths, plain(texts[0], len(paths)), texts[1], where)


def check_pictures(examples: Sequence[Example], settings: ImageSettings) -> None:
    """Read each picture once, so that none ends training after hours.

    Raises:
      DataError: some cannot be read; the first is named, with its line, and how many there are.
    """

    def problem(name: str) -> str:
        try:
            settings.resized(load_image(name))
        except ImageError as error:
            return str(error)
        return ""

    lines = {name: example.where for example in reversed(examples) for name in example.images}
    names = list(dict.fromkeys(name for example in examples for name in example.images))
    with ThreadPoolExecutor(_READERS) as pool, tqdm(total=len(names), unit="picture", disable=None) as bar:
        bad: list[tuple[str, str]] = []
        for name, error in zip(names, pool.map(problem, names), strict=True):
            bar.update()
            if error:
                bad.append((name, error))
    if bad:
        name, error = bad[0]
        more = f" ({len(bad)} of {len(names)} pictures cannot be read)" if len(bad) > 1 else ""
        raise DataError(f"{lines[name]}: {error}{more}")


@dataclasses.dataclass(frozen=True)
class Batches:
    """Batches of examples as a function of the step, every epoch in an order of its own.

    All have the same shapes: rows of `num_tokens`, and as many pictures as the fullest batch could hold. The longest
    suffix has `num_answers` tokens, its end included.
    """

    order: grain.MapDataset
    processor: Processor
    num_tokens: int
    num_pictures: int
    num_answers: int

    def __len__(self) -> int:
        return len(self.order)

    def __call__(self, step: int) -> dict[str, Any]:
        examples: list[Example] = self.order[step]
        batch = self.processor(
            [list(example.images) for example in examples],
            [example.prefix for example in examples],
            [example.suffix for example in examples],
            pad_to=self.num_tokens,
        )
        pixels = np.zeros((self.num_pictures, *batch.pixels.shape[1:]), np.float32)
        pixels[: len(batch.pixels)] = batch.pixels
        return {**vars(batch), "pixels": pixels}


def make_batches(
    examples: list[Example], processor: Processor, *, batch_size: int, epochs: int, text_length: int, seed: int
) -> Batches:
    """Lay out training.

    Raises:
      DataError: an example, the first such one is named, has more than `text_length` tokens of bos, prefix, line break,
        suffix and eos; or the examples are too few for a batch, or their pictures too many for the model.
    """
    num_answers = 0
    for example in examples:
        row = processor.layout([[0] * len(example.images)], example.prefix, example.suffix)
        count = int(row.length[0]) - len(example.images) * processor.config.vision.num_tokens
        if count > text_length:
            place = f"{example.where}: " if example.where else ""
            raise DataError(
                f"{place}{example.prefix!r:.60} with its suffix has {count} tokens, more than "
                f"text_length={text_length}: raise text_length or shorten it"
            )
        num_answers = max(num_answers, int(row.length[0] - row.prefix_length[0]))
    if len(examples) * epochs < batch_size:
        raise DataError(
            f"{len(examples)} examples and epochs={epochs} do not fill one batch of {batch_size}: lower batch_size"
        )
    most = max(len(example.images) for example in examples)
    num_tokens = most * processor.config.vision.num_tokens + text_length
    limit = processor.config.text.max_positions
    if num_tokens > limit:
        raise DataError(
            f"{most} pictures in one example and text_length={text_length} make {num_tokens} tokens, the model has "
            f"{limit} positions: lower one of them"
        )
    order = shuffled(examples, batch_size, epochs, seed)
    return Batches(order, processor, num_tokens, most * batch_size, num_answers)


def shuffled(examples: Sequence[Any], batch_size: int, epochs: int, seed: int) -> grain.MapDataset:
    """Lists of `batch_size` examples by the step, every epoch in an order of its own; a remainder is left out."""
    order = grain.MapDataset.source(examples).seed(seed).shuffle().repeat(epochs)
    return order.batch(batch_size, drop_remainder=True, batch_fn=list)
