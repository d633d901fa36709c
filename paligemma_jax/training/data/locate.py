"""What a path holds: the format of a data set by its files and keys, and its splits."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from paligemma_jax.errors import CheckpointError, DataError
from paligemma_jax.files import read_json
from paligemma_jax.training.data.found import Found
from paligemma_jax.training.data.readers import arrow, jsonl, voc, yolo

SPLITS = {
    "train": ("train", "training"),
    "valid": ("valid", "val", "validation", "dev"),
    "test": ("test", "testing"),
}
_NAMES = {name: split for split, names in SPLITS.items() for name in names}
_SPLIT = re.compile(rf"(?:^|[^a-z])({'|'.join(_NAMES)})(?:\d{{4}})?(?:[^a-z0-9]|$)")
_TABLES = (".csv", ".tsv")
_YAML = (".yaml", ".yml")
_PEEK = 2**16  # bytes of a JSON file that say what it is


def locate(path: Path, split: str = "train", kind: str = "auto") -> Found:
    """The split of a data set, or all of one that has no splits.

    Raises:
      DataError: nothing is there, it is of no known format, or it has other splits only.
    """
    there = splits_of(path, kind)
    if split in there:
        return there[split]
    if "" in there:
        return there[""]
    names = ", ".join(there)
    raise DataError(f"{path} has no {split} split, only {names}: name the folder or the file of one")


def splits_of(path: Path, kind: str = "auto") -> dict[str, Found]:
    """The splits of a data set by name ("train", "valid", "test"); "" is the name of one that has none."""
    if path.is_file():
        found = _file(path, kind)
        return found if isinstance(found, dict) else {"": found}
    if not path.is_dir():
        raise DataError(f"{path} is not there: give a .jsonl file, or the folder or file of a data set")
    for search in (_arrow, _yolo, _split_files, _split_folders, _voc_folders, _whole):
        there = {name: found for name, found in search(path, kind).items() if kind in ("auto", found.kind)}
        if there:
            return _with_others(there)
    if kind != "auto":
        raise DataError(f"{path} holds no data set with data_format={kind}: leave data_format out to see what it is")
    raise DataError(
        f"{path} holds no data set that is known: give JSON lines, COCO, YOLO with its data.yaml, Pascal VOC, "
        "Label Studio's JSON, a CSV or a folder of datasets.save_to_disk"
    )


def kind_of(path: Path) -> str | None:
    """The format of a file by its ending and, where that says too little, its first bytes; None when it is none."""
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return "jsonl"
    if suffix in _TABLES:
        return "csv"
    if suffix in _YAML:
        return "yolo" if "names" in _keys_of_yaml(path) else None
    if suffix == ".xml":
        return "voc" if voc.is_voc(path) else None
    if suffix != ".json":
        return "jsonl" if jsonl.is_rows(path) else None
    if jsonl.is_rows(path):
        return "jsonl"
    with path.open("rb") as file:
        head = file.read(_PEEK).lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith(b"["):
        return "label_studio" if any(key in head for key in (b'"data"', b'"annotations"')) else None
    return "coco" if any(key in head for key in (b'"images"', b'"annotations"', b'"categories"')) else None


def _keys_of_yaml(path: Path) -> Iterable[str]:
    try:
        return yolo.load_yaml(path)
    except DataError:
        return ()


def _file(path: Path, kind: str) -> Found | dict[str, Found]:
    known = kind_of(path) if kind == "auto" else kind
    if known is None and path.suffix.lower() in _YAML:
        yolo.load_yaml(path)  # says what is missing in it
    if known is None:
        with path.open("rb") as file:
            is_json = file.read(1) in (b"{", b"[")
        raise DataError(
            f"{path} is of no known format{_hint(path) if is_json else ''}: give JSON lines with image, prefix and "
            "suffix, or a data set of another form"
        )
    if known == "yolo":
        return {split: Found("yolo", (path,), path.parent, split) for split in yolo.splits(path)} or Found(
            "yolo", (path,), path.parent, "train"
        )
    return Found(known, (path,), _root(path))


def _hint(path: Path) -> str:
    try:
        value = json.loads(path.read_bytes()[: 16 * _PEEK])
    except ValueError:
        return ""
    first = value[0] if isinstance(value, list) and value else value
    return f", with the keys {', '.join(map(str, first))[:60]}" if isinstance(first, dict) else ""


def _root(path: Path) -> Path:
    """The folder that the pictures of a file are named from: its own, or for COCO's annotations/ that of pictures."""
    if path.parent.name != "annotations":
        return path.parent
    base, name = path.parent.parent, path.stem.removeprefix("instances_")
    split = match[1] if (match := _SPLIT.search(name)) else name
    for folder in (name, f"images/{name}", split, f"images/{split}", "images"):
        if (base / folder).is_dir():
            return base / folder
    return base


def _arrow(path: Path, kind: str) -> dict[str, Found]:
    if (path / arrow.STATE).is_file():
        return {"": Found("datasets", (path / arrow.STATE,), path)}
    if not (path / arrow.SPLITS).is_file():
        return {}
    try:
        names = read_json(path / arrow.SPLITS).get("splits")
    except CheckpointError as error:
        raise DataError(str(error)) from None
    named = {_NAMES.get(str(name), str(name)): path / str(name) for name in names or ()}
    return {split: Found("datasets", (folder / arrow.STATE,), folder, split) for split, folder in named.items()}


def _yolo(path: Path, kind: str) -> dict[str, Found]:
    files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in _YAML and file.is_file()]
    for file in sorted(files, key=lambda file: file.stem != "data"):
        if kind_of(file) == "yolo":
            if not (names := yolo.splits(file)):
                raise DataError(f"{file} names folders that are not there: correct its paths")
            return {split: Found("yolo", (file,), path, split) for split in names}
    return {}


def _split_files(path: Path, kind: str) -> dict[str, Found]:
    """Files with a split in their names: _annotations.train.jsonl, annotations/instances_val2017.json, test.csv."""
    there: dict[str, Found] = {}
    for folder in (path, path / "dataset", path / "annotations"):
        files = sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
        for file in _preferred(files):
            match = _SPLIT.search(file.name.lower())
            if match and (known := kind_of(file)) in ("jsonl", "coco", "csv", "label_studio"):
                there.setdefault(_NAMES[match[1]], Found(known, (file,), _root(file), _NAMES[match[1]]))
        if there:
            break
    return there


def _preferred(files: Sequence[Path]) -> list[Path]:
    """Files in the order in which they are looked at: COCO has captions and key points of the same pictures too."""
    wanted = [file for file in files if file.suffix.lower() in (".jsonl", ".json", *_TABLES)]
    return sorted(wanted, key=lambda file: not file.name.startswith(("instances_", "_annotations")))


def _split_folders(path: Path, kind: str) -> dict[str, Found]:
    there = {}
    for name, split in _NAMES.items():
        if split not in there and (folder := path / name).is_dir() and (found := _inside(folder, kind, split)):
            there[split] = found
    return there


def _inside(folder: Path, kind: str, split: str = "") -> Found | None:
    """A data set whose files lie in this very folder."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    if xml := tuple(file for file in files if file.suffix.lower() == ".xml"):
        return Found("voc", xml, folder, split) if voc.is_voc(xml[0]) else None
    known = [(file, kind_of(file)) for file in _preferred(files)]
    known = [(file, name) for file, name in known if name and kind in ("auto", name)]
    if len(known) > 1 and not known[0][0].name.startswith("_annotations"):
        names = ", ".join(file.name for file, _ in known[:4])
        raise DataError(f"{folder} holds several data sets ({names}): name the file of one")
    return Found(known[0][1], (known[0][0],), _root(known[0][0]), split) if known else None


def _voc_folders(path: Path, kind: str) -> dict[str, Found]:
    """The development kit's folders: Annotations, JPEGImages, and lists of each split in ImageSets/Main."""
    folder = path / "Annotations"
    files = {file.stem: file for file in sorted(folder.glob("*.xml"))}
    if not files:
        return {}
    there = {}
    for name, split in _NAMES.items():
        listed = path / "ImageSets" / "Main" / f"{name}.txt"
        if listed.is_file() and split not in there:
            stems = [line.split()[0] for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()]
            if missing := [stem for stem in stems if stem not in files]:
                raise DataError(f"{listed} names {missing[0]}, which has no file in {folder}: correct the list")
            there[split] = Found("voc", tuple(files[stem] for stem in stems), path / "JPEGImages", split)
    return there or {"": Found("voc", tuple(files.values()), path / "JPEGImages")}


def _whole(path: Path, kind: str) -> dict[str, Found]:
    for folder in (path, path / "annotations"):
        if folder.is_dir() and (found := _inside(folder, kind)):
            return {"": found}
    return {}


def _with_others(there: dict[str, Found]) -> dict[str, Found]:
    """Each split with the files of the others; training's first."""
    known = list(SPLITS)
    there = dict(sorted(there.items(), key=lambda item: known.index(item[0]) if item[0] in known else len(known)))
    return {
        name: Found(
            found.kind,
            found.files,
            found.root,
            found.split,
            tuple(file for other in there.values() if other is not found for file in other.files),
        )
        for name, found in there.items()
    }
