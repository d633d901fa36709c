"""The engine of one process: threads read pictures ahead of the device, which answers one group after the other."""

import collections
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from paligemma_jax.annotate.rows import Row
from paligemma_jax.annotate.sources import Source
from paligemma_jax.annotate.store import Group
from paligemma_jax.annotate.worker import Picture

_AHEAD = 2  # groups that are being read while one is answered


class Annotates(Protocol):
    """What an `worker.Annotator` does: `read` in many threads, `answer` in one."""

    def read(self, source: Source) -> Picture: ...

    def answer(self, pictures: Sequence[Picture]) -> list[list[Row]]: ...


def annotate(
    annotator: Annotates, sources: Sequence[Source], groups: Iterable[Group], threads: int
) -> Iterator[tuple[Group, list[list[Row]]]]:
    """Each group with the rows of its pictures, in order; pictures of three groups are in memory at most."""
    waiting: collections.deque[tuple[Group, list[Future[Picture]]]] = collections.deque()
    pool = ThreadPoolExecutor(threads, "read")
    try:
        reading = ((group, [pool.submit(annotator.read, sources[i]) for i in group.items]) for group in groups)
        waiting.extend(itertools.islice(reading, _AHEAD))
        while waiting:
            group, pictures = waiting.popleft()
            waiting.extend(itertools.islice(reading, 1))
            yield group, annotator.answer([picture.result() for picture in pictures])
    finally:
        pool.shutdown(cancel_futures=True)
