"""Small data sets of real pictures, from packages that have them, to try fine-tuning on.

    python benchmarks/demo_data.py digits output/digits
    python benchmarks/demo_data.py emoji output/emoji --emoji node_modules/emoji-datasource-google/img/google/64
    python benchmarks/demo_data.py words output/words

digits: 1,797 handwritten digits of scikit-learn, the last quarter of them unseen.
emoji: one to three emoji on a part of a photograph of scikit-image, with boxes and masks; other photographs unseen. The
emoji are those of `npm install emoji-datasource-google` (Noto, Apache-2.0).
words: a short word, printed in any place, size and colour with Pillow's font; `test` has the words of training,
`new_words` others.

Each folder has `train.jsonl` and `test.jsonl`, pictures beside. Emoji are a COCO data set too (`train`, `valid`);
their rows ask what is there, for the boxes of all kinds, and for those of one.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from paligemma_jax.tasks.detection import Detection, format_objects

_SIDE = 128
_NAMES = {  # of emoji, by their code points: things unlike one another
    "apple": "1f34e",
    "banana": "1f34c",
    "pizza": "1f355",
    "cat": "1f431",
    "frog": "1f438",
    "ball": "26bd",
    "car": "1f697",
    "key": "1f511",
    "heart": "2764-fe0f",
    "tree": "1f333",
}
_WORDS = """
air art bag bar bed bird blue boat body book bus cake call card cash city club coat cold cool cup dark data
deep desk dog door down east exit face farm fast fire fish five food free game gold good hair half hand hard
hat head help high hill hot hour ice idea inn jam jazz job key kind king lake last left lemon line live long
love map milk moon more new nine north note now oil old one open park part pay pear pen pink plan play post
pull push rain red rice ring road room rose safe sale salt sand sea seat shop show sky slow snow soap soft
song soup south star stop
"""
_NEW_WORDS = """
bell cow days fan glass home iron juice lamp owl pipe quiz rent ship tea under west zoo
"""


def digits(folder: Path, args: argparse.Namespace) -> None:
    """Handwritten digits, enlarged; the writers of the last quarter are others than those before."""
    from sklearn.datasets import load_digits

    data = load_digits()
    first = round(0.75 * len(data.images))
    for split, part in (("train", slice(first)), ("test", slice(first, None))):
        rows = []
        for index, (pixels, label) in enumerate(zip(data.images[part], data.target[part], strict=True)):
            grey = Image.fromarray((255 - pixels * 15.9).astype(np.uint8)).resize((96, 96), Image.Resampling.BICUBIC)
            image = Image.new("RGB", (_SIDE, _SIDE), "white")
            image.paste(grey, (16, 16))
            rows.append((image, "answer en which digit?", str(label), f"{split}_{index:04d}"))
        _write(folder, split, rows)


def words(folder: Path, args: argparse.Namespace) -> None:
    """Printed words."""
    rng = np.random.default_rng(args.seed)
    old, new = _WORDS.split(), _NEW_WORDS.split()
    for split, count, known in (("train", args.count, old), ("test", 200, old), ("new_words", 100, new)):
        chosen = [str(rng.choice(known)) for _ in range(count)]
        _write(folder, split, [(_printed(word, rng), "ocr", word, f"{split}_{i:05d}") for i, word in enumerate(chosen)])


def _printed(word: str, rng: np.random.Generator) -> Image.Image:
    dark, light = rng.integers(0, 100, 3), rng.integers(170, 256, 3)
    ink, ground = (dark, light) if rng.random() < 0.5 else (light, dark)
    image = Image.new("RGB", (_SIDE, _SIDE), tuple(map(int, ground)))
    font = ImageFont.load_default(int(rng.integers(28, 41)))
    x0, y0, x1, y1 = ImageDraw.Draw(image).textbbox((0, 0), word, font=font)
    x, y = (int(rng.integers(2, max(3, _SIDE - size - 2))) for size in (x1 - x0, y1 - y0))
    ImageDraw.Draw(image).text((x - x0, y - y0), word, font=font, fill=tuple(map(int, ink)))
    return image


def _write(folder: Path, split: str, rows: list[tuple[Image.Image, str, str, str]]) -> None:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for image, prefix, suffix, name in rows:
        image.save(folder / "images" / f"{name}.png")
        lines.append(json.dumps({"image": f"images/{name}.png", "prefix": prefix, "suffix": suffix}) + "\n")
    (folder / f"{split}.jsonl").write_text("".join(lines))


def emoji(folder: Path, args: argparse.Namespace) -> None:
    """Emoji on photographs, as a COCO data set; boxes and masks are those of what one sees of an emoji."""
    from pycocotools import mask as coco_mask

    if not args.emoji or not args.emoji.is_dir():
        raise SystemExit("--emoji names no folder: npm install emoji-datasource-google, and give its img/google/64")
    pictures = {name: Image.open(args.emoji / f"{code}.png").convert("RGBA") for name, code in _NAMES.items()}
    photos, rng = _photographs(), np.random.default_rng(args.seed)
    held_out = len(photos) // 4
    for split, count, grounds in (("train", args.count, photos[held_out:]), ("valid", 150, photos[:held_out])):
        (folder / split).mkdir(parents=True, exist_ok=True)
        images, annotations, rows = [], [], []
        for index in range(count):
            image, found = _scene(grounds, pictures, rng)
            image.save(folder / split / f"{index:05d}.png")
            rows += [{"image": f"{split}/{index:05d}.png"} | row for row in _questions(found, rng)]
            images.append({"id": index + 1, "file_name": f"{index:05d}.png", "width": _SIDE, "height": _SIDE})
            for name, mask in found:
                code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
                box, area = coco_mask.toBbox(code).tolist(), int(mask.sum())
                code["counts"] = code["counts"].decode()
                about = {"id": len(annotations) + 1, "image_id": index + 1, "category_id": list(_NAMES).index(name) + 1}
                annotations.append(about | {"bbox": box, "area": area, "segmentation": code, "iscrowd": 0})
        categories = [{"id": i, "name": name} for i, name in enumerate(_NAMES, 1)]
        data = {"images": images, "annotations": annotations, "categories": categories}
        (folder / split / "_annotations.coco.json").write_text(json.dumps(data))
        name = "train" if split == "train" else "test"
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for kind in ("answer", "detect"):
            of_kind = [row for row in rows if row["prefix"].startswith(kind)]
            (folder / f"{name}_{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_kind))


def _questions(found: list[tuple[str, np.ndarray]], rng: np.random.Generator) -> list[dict[str, str]]:
    """Prefixes and suffixes about a picture: what is there, all boxes, and those of a kind that may be absent."""
    objects = []
    for name, mask in sorted(found, key=lambda item: (item[0], *np.argwhere(item[1]).min(axis=0))):
        (y0, x0), (y1, x1) = np.argwhere(mask).min(axis=0), np.argwhere(mask).max(axis=0) + 1
        objects.append(Detection(name, (float(x0), float(y0), float(x1), float(y1))))
    names, one = [item.label for item in objects], str(rng.choice(list(_NAMES)))
    here = [item for item in objects if item.label == one]
    return [
        {"prefix": "answer en what is here?", "suffix": ", ".join(names)},
        {"prefix": f"detect {' ; '.join(_NAMES)}", "suffix": format_objects(objects, (_SIDE, _SIDE))},
        {"prefix": f"detect {one}", "suffix": format_objects(here, (_SIDE, _SIDE))},
    ]


def _photographs() -> list[Image.Image]:
    from skimage import data

    names = ("astronaut", "chelsea", "coffee", "rocket", "cat", "camera", "moon", "page", "coins", "brick", "grass")
    names += ("gravel", "hubble_deep_field", "immunohistochemistry", "retina", "text")
    found = []
    for name in names:
        try:
            found.append(Image.fromarray(getattr(data, name)()).convert("RGB"))
        except Exception as error:  # some are fetched from the network, which is not asked for here
            print(f"without {name}: {str(error).splitlines()[0]:.80}", file=sys.stderr)
    return found


def _scene(
    grounds: list[Image.Image], pictures: dict[str, Image.Image], rng: np.random.Generator
) -> tuple[Image.Image, list[tuple[str, np.ndarray]]]:
    """A picture, and the name and mask of each emoji in it; they lie apart."""
    photo = grounds[rng.integers(len(grounds))]
    side = int(rng.integers(_SIDE, min(photo.size) + 1)) if min(photo.size) > _SIDE else min(photo.size)
    x, y = (int(rng.integers(0, size - side + 1)) for size in photo.size)
    image = photo.crop((x, y, x + side, y + side)).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    taken, found = np.zeros((_SIDE, _SIDE), bool), []
    for name in rng.permutation(list(pictures))[: rng.integers(1, 4)]:
        size = int(rng.integers(32, 61))
        small = pictures[name].resize((size, size), Image.Resampling.LANCZOS)
        alpha = np.asarray(small)[..., 3] > 127
        for _ in range(20):
            x, y = map(int, rng.integers(0, _SIDE - size + 1, 2))
            if not taken[y : y + size, x : x + size].any():
                taken[y : y + size, x : x + size] = True
                image.paste(small, (x, y), small)
                mask = np.zeros((_SIDE, _SIDE), bool)
                mask[y : y + size, x : x + size] = alpha
                found.append((str(name), mask))
                break
    return image, found


_MAKERS: dict[str, Callable[[Path, argparse.Namespace], None]] = {"digits": digits, "emoji": emoji, "words": words}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=_MAKERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--emoji", type=Path, help="folder of emoji-datasource-google with PNG files of 64 pixels")
    parser.add_argument("--count", type=int, default=3000, help="training pictures of emoji and words")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    _MAKERS[args.kind](args.folder, args)
    print(f"wrote {args.folder}")


if __name__ == "__main__":
    main()
