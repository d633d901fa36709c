"""Our own format: JSON lines with image, prefix, and suffix or answers."""

from pathlib import Path

from paligemma_jax.errors import DataError
from paligemma_jax.evaluation.examples import Example, field, first_of, load_jsonl


def jsonl(root: Path, split: str) -> list[Example]:
    """`{split}.jsonl` in a folder, or the file itself: `image` (one or a list), `prefix`, and `suffix` or `answers`."""
    path = root if root.is_file() else first_of(root, [f"{split}.jsonl"])
    examples = []
    for i, row in enumerate(load_jsonl(path)):
        images = field(row, "image", path)
        right = row.get("answers", row.get("suffix"))
        if right is None or right == []:
            raise DataError(f"{path} row {i + 1} has neither suffix nor answers: write what is right")
        names = tuple(str(path.parent / name) for name in (images if isinstance(images, list) else [images]))
        right = right if isinstance(right, str) else tuple(map(str, right))
        examples.append(Example(str(row.get("id", i)), names, {"prefix": field(row, "prefix", path)}, right))
    return examples
