"""The answer of one request, heard of by whoever asked for it, in whatever thread."""

import threading
from collections.abc import Callable, Iterator

from paligemma_jax.serving.events import Event, Finished, Piece


class Answer:
    """An answer that comes piece by piece; several threads may listen, and each hears everything.

    Args:
      cancel: takes the request back.
    """

    def __init__(self, cancel: Callable[[], None]):
        self._cancel = cancel
        self._changed = threading.Condition()
        self._events: list[Event | BaseException] = []
        self._callbacks: list[Callable[[Event | BaseException], None]] = []

    def __iter__(self) -> Iterator[Event]:
        """All events from the first one; waits for those to come, and raises what went wrong."""
        index = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda seen=index: len(self._events) > seen)
                event = self._events[index]
            if isinstance(event, BaseException):
                raise event
            yield event
            if isinstance(event, Finished):
                return
            index += 1

    def result(self) -> Finished:
        """The whole answer, once it is there.

        Raises:
          Expired, Cancelled, EngineFailed, NumericsError: what went wrong.
        """
        *_, last = self
        return last

    def cancel(self) -> None:
        """Take the request back: it raises Cancelled, unless it ended before, and its slot is free at the next look."""
        self._cancel()

    def on_event(self, callback: Callable[[Event | BaseException], None]) -> None:
        """Have a function called with every event, or with what went wrong.

        Those so far come at once, later ones in the engine's thread, which waits meanwhile: it should only pass them
        on. A function that raises is not called again, and the request is cancelled.
        """
        with self._changed:
            self._callbacks.append(callback)
            for event in self._events:
                self._tell(callback, event)

    @property
    def ended(self) -> bool:
        """Whether nothing more comes."""
        with self._changed:
            return bool(self._events) and not isinstance(self._events[-1], Piece)

    def put(self, event: Event | BaseException) -> None:
        """Add an event; nothing follows a `Finished` or an error. For the engine."""
        with self._changed:
            if self.ended:
                return
            self._events.append(event)
            self._changed.notify_all()
            for callback in list(self._callbacks):
                self._tell(callback, event)

    def _tell(self, callback: Callable[[Event | BaseException], None], event: Event | BaseException) -> None:
        if callback not in self._callbacks:
            return
        try:
            callback(event)
        except Exception:  # whoever listened is gone, as an event loop that was closed
            self._callbacks.remove(callback)
            self._cancel()
