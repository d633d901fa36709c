"""Questions about photographs: VQAv2, TextVQA, ST-VQA, POPE and NLVR2."""

from pathlib import Path
from typing import Any

from paligemma_jax.errors import DataError
from paligemma_jax.evaluation.examples import Example, field, first_of, load_json, load_jsonl


def vqav2(root: Path, split: str) -> list[Example]:
    """Questions and annotations of visualqa.org with COCO's pictures; answer types are groups."""
    questions = first_of(root, [f"v2_OpenEnded_mscoco_{split}_questions.json"])
    annotations = first_of(root, [f"v2_mscoco_{split}_annotations.json"])
    folder = first_of(root, [split, f"images/{split}"])
    rows = field(load_json(annotations), "annotations", annotations)
    known = {field(row, "question_id", annotations): row for row in rows}
    return [
        Example(
            str(number := field(row, "question_id", questions)),
            (str(folder / f"COCO_{split}_{field(row, 'image_id', questions):012d}.jpg"),),
            {"question": field(row, "question", questions)},
            answers(_known(known, number, annotations), annotations),
            known[number].get("answer_type", ""),
        )
        for row in field(load_json(questions), "questions", questions)
    ]


def _known(rows: dict[Any, dict], number: Any, path: Path) -> dict:
    if number not in rows:
        raise DataError(f"{path} has nothing about question {number}: take the annotations of the same split")
    return rows[number]


def answers(row: dict[str, Any], path: Path) -> tuple[str, ...]:
    """The answers of a row: texts, or objects with the text as `answer`; DataError where a test split has none."""
    found = row.get("answers") or ()
    if not found:
        raise DataError(f"{path} has no answers, as test splits have not: give a split with answers, such as val")
    return tuple(str(answer["answer"] if isinstance(answer, dict) else answer) for answer in found)


def textvqa(root: Path, split: str) -> list[Example]:
    """`TextVQA_0.5.1_{split}.json`; val has its pictures in `train_images`."""
    path = first_of(root, [f"TextVQA_0.5.1_{split}.json"])
    folder = first_of(root, ["test_images" if split == "test" else "train_images"])
    return [
        Example(
            str(field(row, "question_id", path)),
            (str(folder / f"{field(row, 'image_id', path)}.jpg"),),
            {"question": field(row, "question", path)},
            answers(row, path),
        )
        for row in field(load_json(path), "data", path)
    ]


def stvqa(root: Path, split: str) -> list[Example]:
    """`{split}.json`, such as train_task_3, with the pictures' paths in it."""
    path = first_of(root, [f"{split}.json"])
    return [
        Example(
            str(field(row, "question_id", path)),
            (str(root / field(row, "file_path", path)),),
            {"question": field(row, "question", path)},
            answers(row, path),
        )
        for row in field(load_json(path), "data", path)
    ]


def pope(root: Path, split: str) -> list[Example]:
    """`coco_pope_{split}.json`, an object on each line; splits are random, popular and adversarial."""
    path = first_of(root, [f"coco_pope_{split}.json", f"coco/coco_pope_{split}.json"])
    folder = first_of(root, ["val2014", "images/val2014"])
    return [
        Example(
            str(field(row, "question_id", path)),
            (str(folder / field(row, "image", path)),),
            {"question": field(row, "text", path)},
            field(row, "label", path),
        )
        for row in load_jsonl(path)
    ]


def nlvr2(root: Path, split: str) -> list[Example]:
    """`{split}.json` (dev, test1), an object on each line; pictures in the split's folder, of train in `directory`."""
    path = first_of(root, [f"{split}.json", f"data/{split}.json"])
    folder = first_of(root, [split, f"images/{split}"])
    examples = []
    for row in load_jsonl(path):
        name = field(row, "identifier", path)
        stem, label = folder / str(row.get("directory", "")) / name.rsplit("-", 1)[0], str(field(row, "label", path))
        pictures = tuple(f"{stem}-img{side}.png" for side in (0, 1))  # left and right
        right = (label, label.lower())
        examples.append(Example(name, pictures, {"sentence": field(row, "sentence", path)}, right))
    return examples
