"""From a path, URL, folder or glob to the pictures that it names, and to what of it is passed over, with the reason."""

import functools
import glob
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from PIL import Image

from paligemma_jax.errors import ImageError, shortened
from paligemma_jax.processing.decode import AVIF_REMEDY, HEIF_REMEDY, has_heif, looks_like_picture, pil_kinds
from paligemma_jax.processing.fetch import is_url
from paligemma_jax.processing.video import is_video

_HEIF_SUFFIXES = (".heic", ".heics", ".heif", ".heifs", ".hif")
_AVIF_SUFFIXES = (".avif", ".avifs")  # of old versions of PIL
_ALSO = (".mpo",)  # PIL's JPEG reader takes them
_SHOWN = 3  # names for each reason


def find_images(pattern: str, also: Sequence[str] = (), tell: Callable[[str], None] | None = None) -> list[str]:
    """Pictures named by a path, URL, folder or glob (`**` goes into subfolders), in natural order: 2.png before 10.png.

    A file that is named is taken whatever it is. Of a folder's files those are taken whose endings are pictures'; of a
    glob's, besides them, those that end in one of `also`, and those that are pictures by their contents.

    Args:
        tell: called with a line about files that were passed over, if there are any.

    Raises:
        ImageError: when there is none.
    """
    path = os.path.expanduser(pattern)
    if is_url(path) or os.path.isfile(path):
        return [path]
    if is_folder := os.path.isdir(path):
        paths = (os.path.join(path, name) for name in os.listdir(path))
        reasons = {name: _why_not_in_folder(name) for name in paths}
    elif glob.has_magic(path):
        reasons = {name: _why_not_in_glob(name, also) for name in glob.glob(path, recursive=True)}
        if "**" in path:  # which looked into folders already
            reasons = {name: why for name, why in reasons.items() if not os.path.isdir(name)}
    else:
        raise ImageError(f"{pattern!r} does not exist: give a picture, a folder, a glob or a URL")
    found = sorted((name for name, why in reasons.items() if why is None), key=natural_key)
    passed_over = _listed((name, why) for name, why in reasons.items() if why)
    if not found and is_folder:
        raise ImageError(f"{pattern} holds no pictures: {passed_over or 'it is empty'}; give a folder with pictures")
    if not found and passed_over:
        raise ImageError(f"{pattern} matches no pictures: {passed_over}")
    if not found:
        raise ImageError(f"{pattern} matches no pictures and no other files: quote the pattern and check the folder")
    if tell and passed_over:
        tell(shortened(f"note: {pattern}: passed over {passed_over}"))
    return found


@functools.cache
def suffixes() -> frozenset[str]:
    """Endings of files that PIL can read by itself, in small letters."""
    kinds = pil_kinds()
    opened = {suffix for suffix, kind in Image.registered_extensions().items() if kind in kinds}
    return frozenset(opened.union(_ALSO).difference(_HEIF_SUFFIXES))


def _why_not_in_folder(name: str) -> str | None:
    """Why a file of a folder is no picture to look at, None when it is one."""
    suffix = Path(name).suffix.lower()
    if os.path.isdir(name):
        return "folder: ** goes into it"
    if not os.path.isfile(name):
        return "not a file"
    if os.path.basename(name).startswith("."):
        return "hidden"
    if suffix in suffixes() or (suffix in _HEIF_SUFFIXES and has_heif()):
        return None
    if suffix in _HEIF_SUFFIXES:
        return f"HEIF: {HEIF_REMEDY}"
    if suffix in _AVIF_SUFFIXES:
        return f"AVIF: {AVIF_REMEDY}"
    return "video: name it" if is_video(name) else "no picture by its ending"


def _why_not_in_glob(name: str, also: Sequence[str]) -> str | None:
    suffix = Path(name).suffix.lower()
    if os.path.isdir(name):
        return "folder"
    if not os.path.isfile(name):
        return "not a file"
    known = suffixes().union(_HEIF_SUFFIXES, _AVIF_SUFFIXES, also)
    if suffix in known or looks_like_picture(name):
        return None
    return "video" if is_video(name) else "no picture"


def _listed(passed_over: Iterable[tuple[str, str]]) -> str:
    """How many there are, and for each reason a few names: "3: a.txt, b.md (no picture); sub (folder)"."""
    by_reason: dict[str, list[str]] = {}
    for name, why in sorted(passed_over, key=lambda item: natural_key(item[0])):
        by_reason.setdefault(why, []).append(os.path.basename(os.path.normpath(name)))
    total = sum(map(len, by_reason.values()))
    parts = []
    for why, names in by_reason.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        parts.append(f"{', '.join(shortened(name, 40) for name in names[:_SHOWN])}{more} ({why})")
    kind = "files and folders" if any(why.startswith("folder") for why in by_reason) else f"file{'s' * (total != 1)}"
    return f"{total} {kind}: {'; '.join(parts)}" if parts else ""


def natural_key(name: str) -> tuple[list[str | int], str]:
    """What names are sorted by so that 2.png comes before 10.png."""
    parts: list[str | int] = re.split(r"([0-9]+)", name.casefold())
    parts[1::2] = map(int, parts[1::2])
    return parts, name
