"""Bringing an index up to date: only pictures whose contents are new are embedded, and a stopped run goes on."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from paligemma_jax.errors import ImageError
from paligemma_jax.patch_vit import index as files
from paligemma_jax.patch_vit.index import Entry, Index
from paligemma_jax.patch_vit.models import Clip, Student

_SHARE = 20  # saving takes at most one part in so many of the time

Prepared = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Embedder:
    """Both image embeddings of pictures.

    prepare: a picture to the pixels that each model takes; called from several threads.
    embed: pixels of both, [B, ...] each, to embeddings [B, D] of both.
    batch_size: B, always so many, so that a picture's embedding does not depend on others' number.
    """

    prepare: Callable[[Image.Image], Prepared]
    embed: Callable[[np.ndarray, np.ndarray], tuple[Any, Any]]
    batch_size: int = 16


@dataclasses.dataclass(frozen=True)
class Update:
    """An index that is up to date, and how many pictures were embedded now, and known by their contents."""

    index: Index
    embedded: int
    moved: int


def of_models(student: Student, clip: Clip, batch_size: int = 16) -> Embedder:
    """The embeddings that search compares: the student's pooled one and the teacher's."""
    return Embedder(
        lambda image: (np.asarray(student.preprocess([image]))[0], np.asarray(clip.preprocess([image]))[0]),
        lambda small, large: (student.embed(small)[0], clip.embed_image(large)),
        batch_size,
    )


def embed(embedder: Embedder, prepared: Sequence[Prepared]) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors f32 [B, D] of both models; NumericsError."""
    count, missing = len(prepared), embedder.batch_size - len(prepared)
    filled = [*prepared, *itertools.repeat(prepared[-1], missing)]
    student, teacher = embedder.embed(*(np.stack(pixels) for pixels in zip(*filled, strict=True)))
    return (
        files.unit(np.asarray(student)[:count], "the student's image embeddings"),
        files.unit(np.asarray(teacher)[:count], "the teacher's image embeddings"),
    )


def update(
    old: Index | None,
    source: str,
    names: Sequence[str],
    models: Mapping[str, str],
    embedder: Embedder,
    save: Callable[[Index], None],
    save_every_s: float = 30.0,
    advance: Callable[[int], None] = lambda count: None,
    threads: int = 4,
) -> Update:
    """Make an index of some pictures, with the embeddings that an older one of the same models has.

    A picture whose path, size and time of change are known is not read; one whose contents are known is not embedded.
    While it works the index is saved, as one that is not complete, every `save_every_s` seconds, or less often where
    saving takes long, and with 0 after each batch; whoever goes on from there does not embed a picture again.

    Args:
      old: an index whose embeddings count; its pictures that are not named are left out.
      source, models: what the index says about itself.
      names: paths of pictures.
      embedder: of the models.
      save: is given what there is now and then, and at the end.
      advance: told of pictures that are done.
      threads: that read and decode.

    Raises:
      ImageError: no picture could be read.
    """
    work = _Work(old, source, models)
    new = work.take_known(names, advance)
    started, spent = time.monotonic(), 0.0
    try:
        with ThreadPoolExecutor(threads) as pool:
            for batch in _read(pool, work, embedder, new, advance):
                work.add([entry for entry, _ in batch], *embed(embedder, [pixels for _, pixels in batch]))
                advance(len(batch))
                now = time.monotonic()
                if not save_every_s or now - started >= max(save_every_s, _SHARE * spent):
                    save(work.index(is_complete=False))
                    started, spent = time.monotonic(), time.monotonic() - now
    except KeyboardInterrupt:
        if work.embedded:
            save(work.index(is_complete=False))
        raise
    if not work.rows:
        first = f"{work.failed[0].problem}" if work.failed else "there is none"
        raise ImageError(f"{source}: none of {len(names)} pictures can be searched for: {first}")
    done = work.index(names=names)
    save(done)
    return Update(done, work.embedded, work.moved)


class _Work:
    """Rows so far: entries and where their embeddings are."""

    def __init__(self, old: Index | None, source: str, models: Mapping[str, str]):
        self.source, self.models = source, models
        self.old = old
        self.rows: dict[str, tuple[Entry, int]] = {}  # by path
        self.failed: list[Entry] = []
        self.by_contents = {} if old is None else {entry.sha256: row for row, entry in enumerate(old.entries)}
        self.student = [] if old is None else [old.student]
        self.teacher = [] if old is None else [old.teacher]
        self.count = 0 if old is None else len(old.entries)
        self.embedded = self.moved = 0

    def take_known(self, names: Sequence[str], advance: Callable[[int], None]) -> list[tuple[str, int, int]]:
        """Keep what is unchanged; what is to be read is returned as `Entry.seen_as`."""
        known = {} if self.old is None else {entry.seen_as: (entry, row) for row, entry in enumerate(self.old.entries)}
        to_read = []
        for name in names:
            try:
                seen_as = files.stamp(name)
            except OSError as error:
                self.fail(Entry(name, "", 0, 0), error.strerror or str(error))
                advance(1)
                continue
            if (found := known.get(seen_as)) is not None:
                self.rows[name] = found
                advance(1)
            else:
                to_read.append(seen_as)
        return to_read

    def find_again(self, entry: Entry) -> bool:
        """Keep a picture whose contents have a row."""
        row = self.by_contents.get(entry.sha256)
        if row is None:
            return False
        self.rows[entry.path] = entry, row
        self.moved += 1
        return True

    def fail(self, entry: Entry, problem: str) -> None:
        self.failed.append(dataclasses.replace(entry, problem=problem or "it cannot be read"))

    def add(self, entries: Sequence[Entry], student: np.ndarray, teacher: np.ndarray) -> None:
        for row, entry in enumerate(entries, self.count):
            self.rows[entry.path] = entry, row
            self.by_contents[entry.sha256] = row
        self.student.append(student)
        self.teacher.append(teacher)
        self.count += len(entries)
        self.embedded += len(entries)

    def index(self, names: Sequence[str] | None = None, is_complete: bool = True) -> Index:
        """Of the pictures named, in their order; without names, of all and what the old index has besides."""
        rows = dict(self.rows)
        if names is None:
            old = [] if self.old is None else self.old.entries
            rows = {entry.path: (entry, row) for row, entry in enumerate(old)} | rows
        chosen = [rows[name] for name in (rows if names is None else names) if name in rows]
        places = np.array([row for _, row in chosen], int)
        student, teacher = (np.concatenate(parts)[places] for parts in (self.student, self.teacher))
        entries = [entry for entry, _ in chosen]
        return Index(self.source, self.models, entries, student, teacher, self.failed, is_complete)


def _read(
    pool: ThreadPoolExecutor,
    work: _Work,
    embedder: Embedder,
    to_read: Sequence[tuple[str, int, int]],
    advance: Callable[[int], None],
) -> Iterator[list[tuple[Entry, Prepared]]]:
    """Batches of new pictures; contents that are known, or in the same batch already, are dealt with here."""

    def look(seen_as: tuple[str, int, int]) -> tuple[Entry, Prepared | None, str]:
        entry = Entry(seen_as[0], "", *seen_as[1:])
        try:
            entry, contents = files.look(seen_as[0], seen_as)
            if entry.sha256 in work.by_contents:
                return entry, None, ""
            return entry, embedder.prepare(files.picture(entry, contents)), ""
        except ImageError as error:
            return entry, None, str(error)

    batch: dict[str, tuple[Entry, Prepared]] = {}
    twins: list[Entry] = []  # of what is in the batch
    starts = range(0, len(to_read), embedder.batch_size)
    groups = (pool.map(look, to_read[start : start + embedder.batch_size]) for start in starts)
    for group in _one_ahead(groups):
        for entry, pixels, problem in group:
            if problem:
                work.fail(entry, problem)
                advance(1)
            elif work.find_again(entry):
                advance(1)
            elif entry.sha256 in batch:
                twins.append(entry)
            else:
                batch[entry.sha256] = entry, pixels
            if len(batch) == embedder.batch_size:
                yield list(batch.values())
                batch.clear()
                advance(sum(map(work.find_again, twins)))
                twins.clear()
    if batch:
        yield list(batch.values())
        advance(sum(map(work.find_again, twins)))


def _one_ahead(items: Iterable[Any]) -> Iterator[Any]:
    """The items, each once the next one is begun: while a batch is embedded another one is read."""
    for item, _ in itertools.pairwise(itertools.chain(items, [None])):
        yield item
