"""The engine of one process: threads read pictures ahead of the device, which answers one group after the other."""

import collections
import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from paligemma_jax.annotate.rows import Row
from paligemma_jax.annotate.sources import Source
from paligemma_jax.annotate.store import Group
from paligemma_jax.annotate.worker import Picture

_AHEAD = 2  # groups that are being read while others are answered
_AT_ONCE = 2  # groups that are answered: one has the device while the other's tokens are chosen on the host


class Annotates(Protocol):
    """What a `worker.Annotator` does: `read` in many threads, `answer` in two, and `rows` in one beside them."""

    def read(self, source: Source) -> Picture: ...

    def answer(self, pictures: Sequence[Picture]) -> Any: ...

    def rows(self, pictures: Sequence[Picture], answers: Any) -> list[list[Row]]: ...


Keep = Callable[[Group, list[list[Row]]], None]  # what is called with the rows of a group as soon as they are made


def annotate(
    annotator: Annotates, sources: Sequence[Source], groups: Iterable[Group], threads: int, keep: Keep
) -> None:
    """Make the rows of each group, in order; `keep` is called in another thread.

    Pictures of five groups are in memory at most: two are read and one is made rows of while two are answered.
    """
    reading, finishing = ThreadPoolExecutor(threads, "read"), ThreadPoolExecutor(1, "rows")
    answering = ThreadPoolExecutor(_AT_ONCE, "answer")
    waiting: collections.deque[tuple[Group, list[Future[Picture]]]] = collections.deque()
    asked: collections.deque[tuple[Group, Future[tuple[list[Picture], Any]]]] = collections.deque()
    last: Future[None] | None = None
    try:
        coming = ((group, [reading.submit(annotator.read, sources[i]) for i in group.items]) for group in groups)
        waiting.extend(itertools.islice(coming, _AHEAD))
        at_once = 1  # the first group compiles for all
        while waiting or asked:
            while waiting and len(asked) < at_once:
                group, futures = waiting.popleft()
                waiting.extend(itertools.islice(coming, 1))
                asked.append((group, answering.submit(_answer, annotator, futures)))
            group, answered = asked.popleft()
            pictures, answers = answered.result()
            at_once = _AT_ONCE
            if last:
                last.result()
            last = finishing.submit(_finish, annotator, group, pictures, answers, keep)
        if last:
            last.result()
    finally:
        for pool in (reading, answering):
            pool.shutdown(cancel_futures=True)
        finishing.shutdown()  # what is answered is kept


def _answer(annotator: Annotates, futures: Sequence[Future[Picture]]) -> tuple[list[Picture], Any]:
    pictures = [future.result() for future in futures]
    return pictures, annotator.answer(pictures)


def _finish(annotator: Annotates, group: Group, pictures: Sequence[Picture], answers: Any, keep: Keep) -> None:
    keep(group, annotator.rows(pictures, answers))
