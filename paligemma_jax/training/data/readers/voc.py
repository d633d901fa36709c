"""Pascal VOC: an XML file for each picture. Corners are pixels, counted from 1, and belong to the box.

Source: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html.
"""

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from paligemma_jax.errors import DataError
from paligemma_jax.files import read_text
from paligemma_jax.training.data.examples import Examples
from paligemma_jax.training.data.found import Found, ReadSettings
from paligemma_jax.training.data.regions import Region

_PEEK = 4096  # bytes of a file that say what it is


def read(found: Found, settings: ReadSettings) -> Examples:
    """The classes are those of all splits, in alphabetical order.

    Raises:
      DataError: a file or a picture is missing, or is not what it should be; it is named.
    """
    trees = {}
    for path in found.files:
        with settings.row():
            trees[path] = _parse(path)
    names = {name for tree in trees.values() for name, _ in _objects(tree)}
    for path in found.others:
        with settings.row():
            names.update(name for name, _ in _objects(_parse(path)))
    examples = settings.detection_set(sorted(names))
    for path, tree in trees.items():
        with settings.row():
            size, regions = _regions(path, tree)
            picture = _picture(path, tree.findtext("filename") or "", settings.image_root or found.root)
            examples.add(picture, str(path), regions, size)
    return settings.done(examples, found)


def _regions(path: Path, tree: ElementTree.Element) -> tuple[tuple[int, int], list[Region]]:
    """The picture's size in pixels, and its objects."""
    try:
        width, height = (int(tree.findtext(f"size/{side}") or 0) for side in ("width", "height"))
        if min(width, height) < 1:
            raise DataError(f"{path} has no size of the picture: give width and height in pixels")
        regions = []
        for name, box in _objects(tree):
            x0, y0, x1, y1 = (float(box.findtext(corner) or "") for corner in ("xmin", "ymin", "xmax", "ymax"))
            (left, right), (top, bottom) = _from_zero(x0, x1), _from_zero(y0, y1)
            regions.append(Region(name, (left / width, top / height, right / width, bottom / height)))
    except ValueError:
        raise DataError(f"{path} has a box that is no number: give xmin, ymin, xmax and ymax") from None
    return (width, height), regions


def files(found: Found) -> list[Path]:
    """What examples depend on: classes of other splits are named too."""
    return [*found.files, *found.others]


def _from_zero(first: float, last: float) -> tuple[float, float]:
    """The edges of pixels `first` to `last`, counted from 1; the other way round where they are given so."""
    return (first - 1, last) if first <= last else (first, last - 1)


def is_voc(path: Path) -> bool:
    """Whether an XML file is of this form, by how it begins; it may be damaged further on."""
    with path.open("rb") as file:
        return b"<annotation" in file.read(_PEEK)


def _parse(path: Path) -> ElementTree.Element:
    """The tree of a file; declarations of entities, with which a few bytes can become gigabytes, are refused."""
    try:
        text = read_text(path)
        if "<!DOCTYPE" in text or "<!ENTITY" in text:
            raise DataError(f"{path} declares entities, which are not read: export the data set again")
        return ElementTree.fromstring(text)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give a data set that is there") from None
    except (ElementTree.ParseError, UnicodeDecodeError, ValueError) as error:
        raise DataError(f"{path} is no XML ({error}): export the data set again") from None


def _objects(tree: ElementTree.Element) -> Iterator[tuple[str, ElementTree.Element]]:
    for item in tree.iter("object"):
        name, box = item.findtext("name"), item.find("bndbox")
        if name and box is not None:
            yield " ".join(name.split()), box


def _picture(path: Path, name: str, root: Path) -> str:
    """The picture of a file: beside it, or in JPEGImages, by its name or, where tools wrote another, the file's."""
    folders = (root, path.parent, path.parent.parent / "JPEGImages", path.parent.parent / "images")
    for folder in folders:
        if name and (folder / name).is_file():
            return str(folder / name)
    raise DataError(f"{path} names {name!r}, which is missing: set image_root to the folder of the pictures")
