"""The same few pictures with painted boxes, written in every format of data sets."""

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from paligemma_jax.tasks.detection import Detection, format_objects

CLASSES = ("cat", "grey dog")
COLORS = {"cat": (255, 0, 0), "grey dog": (0, 0, 255)}

Scene = tuple[str, tuple[int, int], Sequence[tuple[str, tuple[int, int, int, int]]]]  # name, size, objects

SCENES: tuple[Scene, ...] = (
    ("0.png", (64, 48), (("cat", (4, 6, 20, 30)), ("grey dog", (30, 10, 60, 44)))),
    ("1.png", (40, 80), (("grey dog", (0, 0, 40, 20)), ("cat", (10, 50, 39, 79)), ("cat", (2, 30, 12, 45)))),
    ("2.png", (50, 50), ()),
)
PREFIX = "detect cat ; grey dog"


def paint(folder: Path, scenes: Sequence[Scene] = SCENES) -> None:
    """Each object is a rectangle in the colour of its class."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (name, size, objects) in enumerate(scenes):
        image = Image.new("RGB", size, (20 * i,) * 3)
        for label, (x0, y0, x1, y1) in objects:
            ImageDraw.Draw(image).rectangle((x0, y0, x1 - 1, y1 - 1), fill=COLORS[label])
        image.save(folder / name)


def suffix(scene: Scene) -> str:
    """What a model should write: by class, then from top to bottom."""
    _, size, objects = scene
    ordered = sorted(objects, key=lambda item: (CLASSES.index(item[0]), item[1][1], item[1][0]))
    return format_objects((Detection(label, box) for label, box in ordered), size)


def corners(box: Sequence[float]) -> list[tuple[float, float]]:
    x0, y0, x1, y1 = box
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def write_lines(path: Path, scenes: Sequence[Scene] = SCENES) -> None:
    rows = [{"image": scene[0], "prefix": PREFIX, "suffix": suffix(scene)} for scene in scenes]
    path.write_text("\n".join(map(json.dumps, rows)))


def coco(scenes: Sequence[Scene] = SCENES) -> dict:
    """With a class for the whole project, as Roboflow writes it, numbers that are not in a row, and a crowd."""
    annotations = []
    for i, (_, _, objects) in enumerate(scenes):
        for label, (x0, y0, x1, y1) in objects:
            polygon = [v for corner in corners((x0, y0, x1, y1)) for v in corner]
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": 10 + i,
                    "category_id": 3 + 4 * CLASSES.index(label),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "segmentation": [polygon],
                    "iscrowd": 0,
                }
            )
    crowd = {"id": 99, "image_id": 10, "category_id": 3, "bbox": [0, 0, 9, 9], "segmentation": [], "iscrowd": 1}
    return {
        "images": [{"id": 10 + i, "file_name": n, "width": s[0], "height": s[1]} for i, (n, s, _) in enumerate(scenes)],
        "annotations": [*annotations, crowd],
        "categories": [
            {"id": 0, "name": "animals", "supercategory": "none"},
            {"id": 7, "name": "grey dog", "supercategory": "animals"},
            {"id": 3, "name": "cat", "supercategory": "animals"},
        ],
    }


def write_coco(folder: Path) -> Path:
    paint(folder / "train")
    (folder / "train" / "_annotations.coco.json").write_text(json.dumps(coco()))
    return folder


def write_instances(folder: Path) -> Path:
    paint(folder / "train2017")
    (folder / "annotations").mkdir()
    (folder / "annotations" / "instances_train2017.json").write_text(json.dumps(coco()))
    (folder / "annotations" / "captions_train2017.json").write_text(json.dumps({"images": [], "annotations": []}))
    return folder


def write_yolo(folder: Path, polygons: bool = False) -> Path:
    paint(folder / "train" / "images")
    (folder / "train" / "labels").mkdir()
    for name, (width, height), objects in SCENES:
        lines = []
        for label, (x0, y0, x1, y1) in objects:
            if polygons:
                values = [v for x, y in corners((x0, y0, x1, y1)) for v in (x / width, y / height)]
            else:
                values = [(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height]
            lines.append(" ".join([str(CLASSES.index(label)), *(f"{v:.8f}" for v in values)]))
        if lines:  # a picture without objects has no file
            (folder / "train" / "labels" / name).with_suffix(".txt").write_text("\n".join(lines) + "\n")
    (folder / "data.yaml").write_text("train: ../train/images\nnc: 2\nnames: ['cat', 'grey dog']\n")
    return folder


def voc_xml(scene: Scene) -> str:
    name, (width, height), objects = scene
    boxes = "".join(
        f"<object><name>{label}</name><bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin>"
        f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        for label, (x0, y0, x1, y1) in objects
    )
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation><filename>{name}</filename>{size}{boxes}</annotation>"


def write_voc(folder: Path) -> Path:
    paint(folder / "train")
    for scene in SCENES:
        (folder / "train" / scene[0]).with_suffix(".xml").write_text(voc_xml(scene))
    return folder


def write_voc_kit(folder: Path) -> Path:
    paint(folder / "JPEGImages")
    for name in ("Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for scene in SCENES:
        (folder / "Annotations" / scene[0]).with_suffix(".xml").write_text(voc_xml(scene))
    (folder / "ImageSets" / "Main" / "train.txt").write_text("0\n1\n2\n")
    return folder


def label_studio() -> list[dict]:
    """Addresses as of uploads; the first annotation of a picture was cancelled, and a task has none."""
    tasks = []
    for i, (name, (width, height), objects) in enumerate(SCENES):
        results = [
            {
                "type": "rectanglelabels",
                "original_width": width,
                "original_height": height,
                "value": {
                    "x": 100 * x0 / width,
                    "y": 100 * y0 / height,
                    "width": 100 * (x1 - x0) / width,
                    "height": 100 * (y1 - y0) / height,
                    "rotation": 0,
                    "rectanglelabels": [label],
                },
            }
            for label, (x0, y0, x1, y1) in objects
        ]
        cancelled = {"was_cancelled": True, "result": [{"type": "rectanglelabels", "value": {}}]}
        annotations = [cancelled, {"was_cancelled": False, "result": results}]
        address = f"/data/upload/1/01234567-{name}" if i else f"/data/local-files/?d=pictures/{name}"
        tasks.append({"id": i, "data": {"image": address}, "annotations": annotations})
    return [*tasks, {"id": 9, "data": {"image": "none.png"}, "annotations": []}]


def write_label_studio(folder: Path) -> Path:
    paint(folder)
    (folder / "project.json").write_text(json.dumps(label_studio()))
    return folder


def write_paligemma(folder: Path) -> Path:
    """Roboflow's PaliGemma export."""
    paint(folder / "dataset")
    write_lines(folder / "dataset" / "_annotations.train.jsonl")
    write_lines(folder / "dataset" / "_annotations.valid.jsonl", SCENES[:1])
    return folder


def write_jsonl(folder: Path) -> Path:
    """Roboflow's other export."""
    for split, scenes in (("train", SCENES), ("valid", SCENES[:1])):
        paint(folder / split, scenes)
        write_lines(folder / split / "annotations.jsonl", scenes)
    return folder


def write_csv(folder: Path) -> Path:
    paint(folder)
    rows = [f'{name},{PREFIX},"{suffix(scene)}"' for scene in SCENES for name in scene[:1]]
    (folder / "train.csv").write_text("\r\n".join(["image,prefix,suffix", *rows]))
    return folder


def write_arrow(folder: Path) -> Path:
    """As datasets.save_to_disk: bytes and a path for each picture, two files, and rows in another order by indices."""
    import pyarrow as pa

    paint(folder / "pictures")
    rows = [
        {
            "image": {"bytes": (folder / "pictures" / scene[0]).read_bytes(), "path": None},
            "prefix": PREFIX,
            "suffix": suffix(scene),
        }
        for scene in SCENES
    ]
    rows[1]["image"] = {"bytes": None, "path": "../pictures/1.png"}
    (folder / "train").mkdir()
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("prefix", pa.string()), ("suffix", pa.string())])
    for name, part in (("data-0.arrow", rows[1:]), ("data-1.arrow", rows[:1])):
        _stream(folder / "train" / name, pa.Table.from_pylist(part, schema=schema))
    _stream(folder / "train" / "indices.arrow", pa.table({"indices": pa.array([2, 0, 1], pa.uint64())}))
    state = {
        "_data_files": [{"filename": "data-0.arrow"}, {"filename": "data-1.arrow"}],
        "_indices_data_files": [{"filename": "indices.arrow"}],
    }
    (folder / "train" / "state.json").write_text(json.dumps(state))
    (folder / "train" / "dataset_info.json").write_text("{}")
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    return folder


def _stream(path: Path, table: object) -> None:
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


WRITERS = {
    "coco": write_coco,
    "instances": write_instances,
    "yolo": write_yolo,
    "yolo polygons": lambda folder: write_yolo(folder, polygons=True),
    "voc": write_voc,
    "voc kit": write_voc_kit,
    "label studio": write_label_studio,
    "paligemma": write_paligemma,
    "jsonl": write_jsonl,
    "csv": write_csv,
    "arrow": write_arrow,
}
