"""The rows of a run: what was asked about a picture, what came of it, and as which types it is stored."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from paligemma_jax.annotate.sources import parquet
from paligemma_jax.files import read_text
from paligemma_jax.tasks import coco, export
from paligemma_jax.tasks.detection import Detection
from paligemma_jax.tasks.output import Output
from paligemma_jax.tasks.prompts import Prompt

Row = dict[str, Any]

OK, FAILED = "ok", "failed"
VERSION = 1  # of the rows: whoever changes what is in them counts up, so that no run goes on with others
FORMATS = ("jsonl", "parquet")


def answered(
    key: str, image: str, size: tuple[int, int], prompt: Prompt, output: Output, objects: Sequence[Detection]
) -> Row:
    """The row of an answer.

    Args:
      key: of `key_of`.
      size: (width, height) of the upright picture in pixels; boxes are in these.
      objects: those of the answer that are kept.

    Raises:
      ConfigError: an object has a mask, and pycocotools is not installed.
    """
    boxes = [
        {"label": box["label"], "score": box["score"]} | dict(zip(("x0", "y0", "x1", "y1"), box["box"], strict=True))
        for box in export.to_json(objects)["boxes"]
    ]
    masks = [None if item.mask is None else coco.encode_mask(item.mask) for item in objects]
    return _row(key, image, prompt) | {
        "width": size[0],
        "height": size[1],
        "text": _storable(output.text),
        "boxes": [box | {"label": _storable(box["label"])} for box in boxes],
        "masks": masks if any(masks) else [],
        "num_tokens": len(output.tokens),
        "finish_reason": output.finish_reason,
    }


def failed(key: str, image: str, size: tuple[int, int] | None, prompt: Prompt, error: str) -> Row:
    """The row of a prompt that could not be answered, with what went wrong; `size` as far as it is known."""
    width, height = size or (None, None)
    return _row(key, image, prompt) | {"status": FAILED, "error": _storable(error), "width": width, "height": height}


def key_of(content: Any, image: str, prompt: str) -> str:
    """SHA-256 of a picture's bytes and the prompt behind them; of its name in their place where it has no bytes.

    Args:
      content: the `hashlib` object that has been given the bytes, or None.
    """
    digest = hashlib.sha256(image.encode(errors="replace")) if content is None else content.copy()
    digest.update(prompt.encode(errors="replace"))
    return digest.hexdigest()


def _row(key: str, image: str, prompt: Prompt) -> Row:
    return {
        "key": key,
        "image": _storable(image),
        "width": None,
        "height": None,
        "task": prompt.task.name if prompt.task else None,
        "prompt": _storable(prompt.text),
        "text": None,
        "status": OK,
        "error": None,
        "boxes": [],
        "masks": [],
        "num_tokens": None,
        "finish_reason": None,
    }


def _storable(text: str) -> str:
    """A text as UTF-8 can say it: file names may hold bytes that are none."""
    return text.encode(errors="replace").decode()


def write(path: Path, rows: Iterable[Row], form: str) -> None:
    """Rows as a JSON object on each line, or as a Parquet table."""
    if form == "jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return
    writer = parquet()
    import pyarrow as pa

    box = pa.struct([("label", pa.string()), *((name, pa.float64()) for name in ("score", "x0", "y0", "x1", "y1"))])
    mask = pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])
    types = {"width": pa.int32(), "height": pa.int32(), "num_tokens": pa.int32()}
    types |= {"boxes": pa.list_(box), "masks": pa.list_(mask)}
    names = ("key", "image", "width", "height", "task", "prompt", "text", "status", "error", "boxes", "masks")
    names += ("num_tokens", "finish_reason", "model", "run_id")
    schema = pa.schema([(name, types.get(name, pa.string())) for name in names])
    writer.write_table(pa.Table.from_pylist(list(rows), schema), path, compression="zstd")


def read(path: Path) -> list[Row]:
    """The rows of a file of `write`."""
    if path.suffix == ".parquet":
        return parquet().read_table(path).to_pylist()
    return [json.loads(line) for line in read_text(path).split("\n") if line]
