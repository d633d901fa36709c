"""Questions about documents, charts and diagrams: DocVQA, InfoVQA, ChartQA, AI2D and ScienceQA."""

from pathlib import Path

from paligemma_jax.evaluation.datasets.questions import answers
from paligemma_jax.evaluation.examples import Example, field, first_of, load_json
from paligemma_jax.files import read_lines

_CHART_PARTS = ("human", "augmented")


def docvqa(root: Path, split: str) -> list[Example]:
    """`{split}_v1.0_withQT.json` or `{split}_v1.0.json`; pictures are named from the folder, as `documents/1.png`."""
    path = first_of(root, [f"{split}_v1.0_withQT.json", f"{split}_v1.0.json"])
    return [
        Example(
            str(field(row, "questionId", path)),
            (str(root / field(row, "image", path)),),
            {"question": field(row, "question", path)},
            answers(row, path),
        )
        for row in field(load_json(path), "data", path)
    ]


def infovqa(root: Path, split: str) -> list[Example]:
    """`infographicsVQA_{split}_v1.0_withQT.json` or without `_withQT`, pictures in `infographicsvqa_images`."""
    path = first_of(root, [f"infographicsVQA_{split}_v1.0_withQT.json", f"infographicsVQA_{split}_v1.0.json"])
    folder = first_of(root, ["infographicsvqa_images", "images"])
    return [
        Example(
            str(field(row, "questionId", path)),
            (str(folder / field(row, "image_local_name", path)),),
            {"question": field(row, "question", path)},
            answers(row, path),
        )
        for row in field(load_json(path), "data", path)
    ]


def chartqa(root: Path, split: str) -> list[Example]:
    """`{split}/{split}_human.json` and `_augmented.json`, which are groups, pictures in `{split}/png`."""
    examples = []
    for part in _CHART_PARTS:
        path = first_of(root, [f"{split}/{split}_{part}.json"])
        for i, row in enumerate(load_json(path)):
            picture = root / split / "png" / field(row, "imgname", path)
            question = {"question": field(row, "query", path)}
            examples.append(Example(f"{part}-{i}", (str(picture),), question, str(field(row, "label", path)), part))
    return examples


def science_qa(root: Path, split: str) -> list[Example]:
    """`problems.json` and `pid_splits.json`: the questions that have a picture, `{split}/{number}/image.png`."""
    problems, splits = root / "problems.json", root / "pid_splits.json"
    rows, examples = load_json(problems), []
    folder = first_of(root, [split, f"images/{split}"])
    for number in map(str, field(load_json(splits), split, splits)):
        row = field(rows, number, problems)
        if not row.get("image"):
            continue
        choices = field(row, "choices", problems)
        fields = {
            "question": field(row, "question", problems),
            "hint": row.get("hint", ""),
            "options": ", ".join(f"({_letter(i)}) {choice}" for i, choice in enumerate(choices)),
        }
        picture = folder / number / row["image"]
        examples.append(Example(number, (str(picture),), fields, _letter(int(field(row, "answer", problems)))))
    return examples


def _letter(index: int) -> str:
    return chr(ord("A") + index)


def ai2d(root: Path, split: str) -> list[Example]:
    """`questions/*.json`, and `ai2d_test_ids.csv` with the numbers of the test pictures; the others are train."""
    ids = set(read_lines(first_of(root, ["ai2d_test_ids.csv"])))
    folder = first_of(root, ["images"])
    examples = []
    for path in sorted(first_of(root, ["questions"]).glob("*.json"), key=lambda path: (len(path.name), path.name)):
        content = load_json(path)
        name = content.get("imageName") or path.name.removesuffix(".json")
        if (name.partition(".")[0] in ids) != (split == "test"):
            continue
        for question, row in field(content, "questions", path).items():
            choices = [str(choice) for choice in field(row, "answerTexts", path)]
            fields = {"question": question, "options": " \t ".join(choices)}
            right = choices[int(field(row, "correctAnswer", path))]
            examples.append(Example(str(row.get("questionId", question)), (str(folder / name),), fields, right))
    return examples
