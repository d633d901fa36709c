"""Answers as asyncio sees them."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from paligemma_jax.serving.events import Event, Finished


class Heard(Protocol):
    """Of `serving.answer.Answer`: what listening needs of it."""

    def on_event(self, callback: Callable[[Event | BaseException], None]) -> None: ...


async def listen(answers: Sequence[Heard]) -> AsyncIterator[tuple[int, Event]]:
    """What happens to answers until all are finished, each event with the number of its answer; raises what goes wrong.

    No thread waits meanwhile.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[int, Event | BaseException]] = asyncio.Queue()

    def tell(index: int, event: Event | BaseException) -> None:  # in the engine's thread
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(queue.put_nowait, (index, event))

    for index, answer in enumerate(answers):
        answer.on_event(functools.partial(tell, index))
    left = len(answers)
    while left:
        index, event = await queue.get()
        if isinstance(event, BaseException):
            raise event
        left -= isinstance(event, Finished)
        yield index, event
