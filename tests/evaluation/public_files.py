"""Tiny data sets in the layouts of the public ones, written for tests."""

import json
from pathlib import Path

from PIL import Image

POLYGON = [[2.0, 1.0, 6.0, 1.0, 6.0, 3.0, 2.0, 3.0]]  # x 2 to 6, y 1 to 3


def picture(path: Path, size=(8, 4), colour="red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def as_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def as_jsonl(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def coco_captions(root: Path) -> None:
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "width": 8, "height": 4} for i in (7, 9)]
    captions = [(9, "A cat."), (7, "A dog."), (9, "a grey cat")]
    annotations = [{"id": i, "image_id": image, "caption": text} for i, (image, text) in enumerate(captions)]
    as_json(root / "annotations/captions_val2017.json", {"images": images, "annotations": annotations})
    for image in images:
        picture(root / "val2017" / image["file_name"])


def karpathy(root: Path) -> None:
    rows = [
        {
            "cocoid": i,
            "split": split,
            "filepath": "val2014",
            "filename": f"COCO_val2014_{i}.jpg",
            "sentences": [{"raw": f"caption {i}"}, {"raw": "other"}],
        }
        for i, split in ((3, "val"), (4, "test"))
    ]
    as_json(root / "dataset_coco.json", {"images": rows})
    for row in rows:
        picture(root / row["filepath"] / row["filename"])


def textcaps(root: Path) -> None:
    rows = [("a1", "A sign."), ("a1", "Stop sign."), ("b2", "A bus.")]
    data = [{"image_id": name, "caption_id": i, "caption_str": text} for i, (name, text) in enumerate(rows)]
    as_json(root / "TextCaps_0.1_val.json", {"data": data})
    for name in ("a1", "b2"):
        picture(root / "train_images" / f"{name}.jpg")


def vqav2(root: Path) -> None:
    questions = [{"image_id": 42, "question_id": 42000 + i, "question": f"what {i}?"} for i in range(2)]
    annotations = [
        {
            "question_id": 42001 - i,
            "answer_type": ("number", "other")[i],
            "answers": [{"answer": f"a{1 - i}", "answer_id": n} for n in range(10)],
        }
        for i in range(2)
    ]
    as_json(root / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    as_json(root / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    picture(root / "val2014/COCO_val2014_000000000042.jpg")


def textvqa(root: Path) -> None:
    row = {"image_id": "f00", "question_id": 5, "question": "which brand?", "answers": ["nokia"] * 9 + ["toshiba"]}
    as_json(root / "TextVQA_0.5.1_val.json", {"data": [row]})
    picture(root / "train_images/f00.jpg")


def stvqa(root: Path) -> None:
    row = {"question_id": 8, "question": "what word?", "file_path": "coco-text/1.jpg", "answers": ["Stop", "STOP"]}
    as_json(root / "train_task_3.json", {"data": [row]})
    picture(root / "coco-text/1.jpg")


def docvqa(root: Path) -> None:
    row = {"questionId": 11, "question": "What date?", "image": "documents/x_1.png", "answers": ["Jan 5", "January 5"]}
    as_json(root / "val_v1.0_withQT.json", {"data": [row]})
    picture(root / "documents/x_1.png")


def infovqa(root: Path) -> None:
    row = {"questionId": 12, "question": "How many?", "image_local_name": "20.jpeg", "answers": ["5"]}
    as_json(root / "infographicsVQA_val_v1.0_withQT.json", {"data": [row]})
    picture(root / "infographicsvqa_images/20.jpeg")


def chartqa(root: Path) -> None:
    for part, count in (("human", 1), ("augmented", 3)):
        rows = [{"imgname": f"{part}.png", "query": f"{part} {i}?", "label": str(10 * i)} for i in range(1, count + 1)]
        as_json(root / f"test/test_{part}.json", rows)
        picture(root / f"test/png/{part}.png")


def science_qa(root: Path) -> None:
    problem = {"question": "Which?", "choices": ["iron", "wood"], "answer": 1, "hint": "Look.", "split": "test"}
    as_json(root / "problems.json", {"1": problem | {"image": "image.png"}, "2": problem | {"image": None}})
    as_json(root / "pid_splits.json", {"test": ["1", "2"], "val": []})
    picture(root / "test/1/image.png")


def ai2d(root: Path) -> None:
    for number, right in (("1", 0), ("22", 1)):
        row = {"answerTexts": ["sun", "moon"], "correctAnswer": right, "questionId": f"{number}.png-0"}
        as_json(root / f"questions/{number}.png.json", {"questions": {"Which one?": row}, "imageName": f"{number}.png"})
        picture(root / f"images/{number}.png")
    (root / "ai2d_test_ids.csv").write_text("22\n")


def nlvr2(root: Path) -> None:
    rows = [{"identifier": f"test1-0-1-{i}", "sentence": f"There are {i}.", "label": str(bool(i))} for i in range(2)]
    as_jsonl(root / "test1.json", rows)
    for side in (0, 1):
        picture(root / f"test1/test1-0-1-img{side}.png")


def pope(root: Path) -> None:
    rows = [{"question_id": i, "image": "COCO_1.jpg", "text": f"Is there {i}?", "label": "no"} for i in (1, 2)]
    as_jsonl(root / "coco_pope_random.json", rows)
    picture(root / "val2014/COCO_1.jpg")


def _instances(split: str) -> dict:
    image = {"id": 3, "file_name": "p.jpg", "width": 8, "height": 4}
    row = {"image_id": 3, "category_id": 18, "bbox": [2, 1, 4, 2], "iscrowd": 0, "segmentation": POLYGON}
    crowd = row | {"id": 6, "iscrowd": 1, "segmentation": {"size": [4, 8], "counts": [32]}}
    categories = [{"id": 18, "name": "dog"}, {"id": 20, "name": "sheep"}]
    return {"images": [image], "annotations": [row | {"id": 5}, crowd], "categories": categories}


def coco_detection(root: Path) -> None:
    as_json(root / "annotations/instances_val2017.json", _instances("val2017"))
    picture(root / "val2017/p.jpg")


def refcoco(root: Path) -> None:
    as_json(root / "instances.json", _instances("val"))
    sentences = [{"sent_id": i, "sent": text} for i, text in enumerate(("left dog", "dog"))]
    ref = {"ref_id": 0, "ann_id": 5, "image_id": 3, "split": "val", "sentences": sentences}
    as_json(root / "refs.json", [ref, ref | {"split": "testA"}])
    picture(root / "train2014/p.jpg")


def jsonl(root: Path, count: int = 3) -> None:
    rows = [{"image": "1.png", "prefix": f"answer en {i}?", "suffix": f"yes {i}"} for i in range(count)]
    as_jsonl(root / "test.jsonl", rows)
    picture(root / "1.png")
