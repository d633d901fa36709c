"""What a teacher says of pictures, kept on disk by the pictures' content, so that each is embedded once.

One SQLite file holds it: a write is there whole or not at all, and a run that was killed goes on where it was.
"""

import concurrent.futures
import hashlib
import os
import sqlite3
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from paligemma_jax.errors import DataError, ImageError, one_line
from paligemma_jax.patch_vit.models import Clip
from paligemma_jax.processing.image import load_image

_CHUNK = 64  # pictures that are embedded and written together
_TABLES = """
create table if not exists files (path text primary key, size integer, mtime integer, digest blob);
create table if not exists embeddings (digest blob primary key, vector blob);
create table if not exists corrupt (digest blob primary key, reason text);
create table if not exists teacher (fingerprint text primary key);
"""


def fingerprint(clip_directory: Path) -> str:
    """A digest of all that decides what a teacher says: weights, config and preprocessor settings."""
    digest = hashlib.sha256()
    for path in sorted([*clip_directory.glob("*.safetensors"), *clip_directory.glob("*config.json")]):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


class TeacherCache:
    """Embeddings f32 [D] by content; `teacher` is its `fingerprint`.

    Raises:
      DataError: the file is of another teacher, or no such cache.
    """

    def __init__(self, path: Path, teacher: str):
        self.path, self._lock = path, threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._connection = sqlite3.connect(path, check_same_thread=False)
            self._connection.executescript(_TABLES)
            known = [row[0] for row in self._connection.execute("select fingerprint from teacher")]
            if not known:
                with self._connection:
                    self._connection.execute("insert into teacher values (?)", (teacher,))
        except sqlite3.Error as error:
            raise DataError(f"{path} cannot be used as a cache ({one_line(error)}): remove it") from None
        if known not in ([], [teacher]):
            raise DataError(f"{path} holds what another teacher said: give another cache, or remove it")

    def vectors(self, digests: Sequence[bytes]) -> np.ndarray:
        """Embeddings f32 [B, D] of pictures that `fill` has seen."""
        with self._lock:
            found = [self._one("select vector from embeddings where digest = ?", digest)[0] for digest in digests]
        return np.stack([np.frombuffer(vector, np.float32) for vector in found])

    def fill(self, paths: Sequence[str], teacher: Clip) -> tuple[dict[str, bytes], dict[str, str]]:
        """Embed what is not known yet.

        Returns:
          The digest of each picture, and of those that cannot be read the reason; both in the order of `paths`.
        """
        digests: dict[str, bytes] = {}
        corrupt: dict[str, str] = {}
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            chunks = [paths[i : i + _CHUNK] for i in range(0, len(paths), _CHUNK)]
            for chunk in tqdm(chunks, desc="teacher", unit="batch", disable=not sys.stderr.isatty()):
                looked_at = list(pool.map(self._digest, chunk))
                for path, found in zip(chunk, looked_at, strict=True):
                    if isinstance(found, str):
                        corrupt[path] = found
                    else:
                        digests[path] = found[-1]
                rows = [found for found in looked_at if not isinstance(found, str)]
                with self._lock, self._connection:
                    self._connection.executemany("insert or replace into files values (?, ?, ?, ?)", rows)
                self._embed({digests[path]: path for path in chunk if path in digests}, teacher, pool)
        for path, digest in list(digests.items()):
            if (row := self._one("select reason from corrupt where digest = ?", digest)) is not None:
                corrupt[path] = row[0]
                del digests[path]
        return digests, {path: corrupt[path] for path in paths if path in corrupt}

    def _embed(self, chunk: dict[bytes, str], teacher: Clip, pool: concurrent.futures.Executor) -> None:
        """Embed the pictures of a chunk that are new; rows are always as many, so that results are always the same."""
        new = {digest: path for digest, path in chunk.items() if not self._known(digest)}
        if not new:
            return
        pixels = np.zeros((_CHUNK, *([teacher.config.vision.image_size] * 2), 3), np.float32)
        broken: list[tuple[bytes, str]] = []
        read = pool.map(lambda path: _pixels(path, teacher), new.values())
        for row, (digest, found) in zip(pixels, zip(new, read, strict=True), strict=False):
            if isinstance(found, str):
                broken.append((digest, found))
            else:
                row[...] = found
        vectors = teacher.embed_image(pixels)
        bad = {digest for digest, _ in broken}
        rows = [(d, v.tobytes()) for d, v in zip(new, vectors, strict=False) if d not in bad]
        with self._lock, self._connection:
            self._connection.executemany("insert or replace into embeddings values (?, ?)", rows)
            self._connection.executemany("insert or replace into corrupt values (?, ?)", broken)

    def _known(self, digest: bytes) -> bool:
        tables = ("embeddings", "corrupt")
        return any(self._one(f"select 1 from {name} where digest = ?", digest) for name in tables)

    def _digest(self, path: str) -> tuple[str, int, int, bytes] | str:
        """A row of `files`, for which a file is read only where its size or time is not as it was; or why it cannot."""
        try:
            status = os.stat(path)
            with self._lock:
                known = self._one("select size, mtime, digest from files where path = ?", path)
            if known and known[:2] == (status.st_size, status.st_mtime_ns):
                return path, *known
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            return f"{path} cannot be read: {one_line(error.strerror or error)}"
        return path, status.st_size, status.st_mtime_ns, digest

    def _one(self, query: str, *values: object) -> tuple | None:
        return self._connection.execute(query, values).fetchone()


def _pixels(path: str, teacher: Clip) -> np.ndarray | str:
    try:
        return teacher.settings.one(load_image(path))
    except ImageError as error:
        return str(error)


def is_validation(digest: bytes) -> bool:
    """Whether a picture of the folders that are split is for validation: one in ten, by its content."""
    return int.from_bytes(digest[:4], "big") % 10 == 0


def find_pictures(folders: Iterable[str]) -> list[str]:
    """The jpg, jpeg and png files in folders and all below them, in a fixed order.

    Raises:
      DataError: a folder is missing, or holds none.
    """
    found: list[str] = []
    for folder in folders:
        root = os.path.expanduser(folder)
        if not os.path.isdir(root):
            raise DataError(f"{folder} is no folder: give one with jpg, jpeg or png files")
        inside = [
            os.path.join(place, name)
            for place, _, names in os.walk(root, followlinks=True)
            for name in names
            if name.lower().endswith((".jpg", ".jpeg", ".png")) and not name.startswith(".")
        ]
        if not inside:
            raise DataError(f"{folder} holds no jpg, jpeg or png files: give a folder with pictures")
        found += sorted(inside)
    return list(dict.fromkeys(found))
