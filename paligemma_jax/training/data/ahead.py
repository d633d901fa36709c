"""Rows that threads prepare before their step comes: pictures are decoded while the device works."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """The rows of a step, worked out by threads; those of the next steps are begun.

    What is returned depends on the step alone, not on the threads or on what was asked before.
    """

    def __init__(
        self,
        row: Callable[[int], T],
        rows: Callable[[int], Sequence[int]],
        num_steps: int,
        num_threads: int,
        depth: int,
    ):
        """
        Args:
          row: gives the row with a number; errors are raised when its step is asked for.
          rows: numbers of the rows of a step.
          depth: steps that are prepared in advance; memory holds the rows of so many.
        """
        self._row, self._rows, self._num_steps, self._depth = row, rows, num_steps, depth
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="data")
        self._pending: dict[int, list[Future[T]]] = {}
        self._lock = threading.Lock()

    def __call__(self, step: int) -> list[T]:
        with self._lock:
            wanted = range(step, min(step + self._depth + 1, max(self._num_steps, step + 1)))
            for other in [other for other in self._pending if other not in wanted]:
                for future in self._pending.pop(other):
                    future.cancel()
            for other in wanted:
                if other not in self._pending:
                    self._pending[other] = [self._pool.submit(self._row, number) for number in self._rows(other)]
            futures = self._pending.pop(step)
        return [future.result() for future in futures]
