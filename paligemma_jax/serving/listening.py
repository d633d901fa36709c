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
    queue, left = _queue(answers), len(answers)
    while left:
        index, event = await queue.get()
        if isinstance(event, BaseException):
            raise event
        left -= isinstance(event, Finished)
        yield index, event


async def listen_by_turns(answer: Heard, pause_s: float) -> AsyncIterator[list[Event]]:
    """The events of one answer, all that came since the last turn at once; raises what goes wrong.

    Who shows an answer more slowly than it is generated does not fall behind.

    Args:
      pause_s: seconds between two turns.
    """
    queue = _queue([answer])
    while True:
        said = [await queue.get()]
        while not queue.empty():
            said.append(queue.get_nowait())
        events = [event for _, event in said if not isinstance(event, BaseException)]
        if events:
            yield events
        if isinstance(last := said[-1][1], BaseException):
            raise last
        if isinstance(last, Finished):
            return
        await asyncio.sleep(pause_s)


def _queue(answers: Sequence[Heard]) -> "asyncio.Queue[tuple[int, Event | BaseException]]":
    """What happens to answers, in the running loop."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[int, Event | BaseException]] = asyncio.Queue()

    def tell(index: int, event: Event | BaseException) -> None:  # in the engine's thread
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(queue.put_nowait, (index, event))

    for index, answer in enumerate(answers):
        answer.on_event(functools.partial(tell, index))
    return queue
