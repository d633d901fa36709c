"""COCO captions and TextCaps: one example for each picture, with all its captions."""

from pathlib import Path

from paligemma_jax.evaluation.examples import Example, field, first_of, grouped, load_json

_KARPATHY = "karpathy_"


def coco_captions(root: Path, split: str) -> list[Example]:
    """`annotations/captions_{split}.json`; or of Karpathy's splits, "karpathy_val" and such, `dataset_coco.json`."""
    if split.startswith(_KARPATHY):
        return _karpathy(root, split.removeprefix(_KARPATHY))
    path = first_of(root, [f"annotations/captions_{split}.json", f"captions_{split}.json"])
    content = load_json(path)
    folder = first_of(root, [split, f"images/{split}", "images"])
    captions = grouped(field(content, "annotations", path), "image_id", path)
    return [
        Example(
            str(field(image, "id", path)),
            (str(folder / field(image, "file_name", path)),),
            {},
            tuple(str(field(row, "caption", path)) for row in captions[image["id"]]),
        )
        for image in field(content, "images", path)
        if image.get("id") in captions
    ]


def _karpathy(root: Path, split: str) -> list[Example]:
    """The file of Karpathy and Fei-Fei (arXiv 1412.2306), which names pictures of train2014 and val2014."""
    path = first_of(root, ["dataset_coco.json", "annotations/dataset_coco.json"])
    images = [image for image in field(load_json(path), "images", path) if field(image, "split", path) == split]
    folder = first_of(root, ["images", "."])
    return [
        Example(
            str(field(image, "cocoid", path)),
            (str(folder / field(image, "filepath", path) / field(image, "filename", path)),),
            {},
            tuple(str(field(sentence, "raw", path)) for sentence in field(image, "sentences", path)),
        )
        for image in images
    ]


def textcaps(root: Path, split: str) -> list[Example]:
    """`TextCaps_0.1_{split}.json`, which has a row for each caption; val has its pictures in `train_images`."""
    path = first_of(root, [f"TextCaps_0.1_{split}.json"])
    folder = first_of(root, ["test_images" if split == "test" else "train_images"])
    captions = grouped(field(load_json(path), "data", path), "image_id", path)
    return [
        Example(
            str(name), (str(folder / f"{name}.jpg"),), {}, tuple(str(field(row, "caption_str", path)) for row in rows)
        )
        for name, rows in captions.items()
    ]
