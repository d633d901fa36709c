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

from tqdm import tqdm

from paligemma_jax.errors import DataError, ImageError, PromptError
from paligemma_jax.files import read_lines
from paligemma_jax.processing.image import ImageSettings, load_image
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
