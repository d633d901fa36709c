"""A question to an answer that grows: what the page shows of it, event by event."""

import asyncio
import dataclasses
import itertools
import logging
import threading
from collections.abc import AsyncIterator

import anyio.to_thread
from PIL import Image

import paligemma_jax as pj
from paligemma_jax.errors import Cancelled, EngineFailed, UserError, shortened
from paligemma_jax.serving.answer import Answer
from paligemma_jax.serving.events import Finished
from paligemma_jax.serving.listening import listen_by_turns
from paligemma_jax.serving.web.backend import Backend, Served
from paligemma_jax.serving.web.questions import Question
from paligemma_jax.tasks.detection import parse
from paligemma_jax.tasks.remarks import remarks

SIDE = 1280  # longest, in pixels, of pictures that are shown
_log = logging.getLogger(__name__)
_TURN_S = 0.04  # between two looks at what is new of an answer: 25 a second are seen as a flow
_LOOK_S = 0.1  # between two looks whether there is a model


@dataclasses.dataclass(frozen=True)
class Shown:
    """An answer so far.

    number: of the answer, in this process.
    text: as the model wrote it.
    objects: those that are complete, in pixels of `picture`.
    dropped: texts of incomplete ones.
    picture: that was asked about, no larger than is shown.
    waiting: for a model, or a slot.
    finished: at the end, how it went.
    stopped: by the visitor.
    notes: about the answer; error: why there is none.
    """

    picture: Image.Image
    number: int = 0
    text: str = ""
    objects: tuple[pj.Detection, ...] = ()
    dropped: tuple[str, ...] = ()
    waiting: bool = False
    finished: Finished | None = None
    stopped: bool = False
    notes: tuple[str, ...] = ()
    error: str = ""

    @property
    def ended(self) -> bool:
        """Whether nothing more comes."""
        return self.finished is not None or self.stopped or bool(self.error)


class Visits:
    """The answers that run, by visitor, so that each can stop its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ids = itertools.count()
        self._running: dict[str, dict[int, Answer | None]] = {}

    def begin(self, visitor: str) -> int:
        """A number for an answer that is about to run."""
        with self._lock:
            number = next(self._ids)
            self._running.setdefault(visitor, {})[number] = None
            return number

    def attach(self, visitor: str, number: int, answer: Answer) -> None:
        """Name the answer, which is cancelled at once if it was stopped meanwhile."""
        with self._lock:
            if wanted := number in self._running.get(visitor, {}):
                self._running[visitor][number] = answer
        if not wanted:
            answer.cancel()

    def wanted(self, visitor: str, number: int) -> bool:
        """Whether an answer was not stopped."""
        with self._lock:
            return number in self._running.get(visitor, {})

    def stop(self, visitor: str) -> None:
        """Stop all answers of a visitor; whoever listens to them hears of it now, the engine at its next look."""
        with self._lock:
            answers = self._running.pop(visitor, {}).values()
        for answer in filter(None, answers):
            answer.cancel()
            answer.put(Cancelled("stopped"))

    def end(self, visitor: str, number: int) -> None:
        """Forget an answer, and cancel it if it still runs."""
        with self._lock:
            answer = self._running.get(visitor, {}).pop(number, None)
            if not self._running.get(visitor, True):
                del self._running[visitor]
        if answer is not None and not answer.ended:
            answer.cancel()


def shown_size(picture: Image.Image) -> Image.Image:
    """A picture no larger than is shown."""
    small = picture.copy()
    small.thumbnail((SIDE, SIDE))
    return small


async def answer(
    backend: Backend, visits: Visits, visitor: str, question: Question
) -> AsyncIterator[tuple[Shown, Served | None]]:
    """Ask a question; the answer so far again and again until it ended, and who answers. Errors are part of it."""
    number = visits.begin(visitor)
    shown, served = Shown(shown_size(question.picture), number, waiting=True), None
    try:
        yield shown, served
        while (served := backend.served()) is None and visits.wanted(visitor, number):
            await asyncio.sleep(_LOOK_S)
        if served is None:
            raise Cancelled("stopped")
        asked = await anyio.to_thread.run_sync(served.ask, question, visitor)
        visits.attach(visitor, number, asked)
        async for events in listen_by_turns(asked, _TURN_S):
            if isinstance(events[-1], Finished):
                shown = await anyio.to_thread.run_sync(_whole, shown, events[-1], served, question)
            elif piece := "".join(event.text for event in events):
                shown = _longer(shown, piece, served, question)
            else:
                continue
            yield shown, served
    except Cancelled:
        yield dataclasses.replace(shown, waiting=False, stopped=True), served
    except EngineFailed:
        yield dataclasses.replace(shown, waiting=False, error="the answer could not be generated: ask again"), served
    except UserError as error:
        line = shortened(" ".join(str(error).split()))
        yield dataclasses.replace(shown, waiting=False, error=line), served
    except Exception:
        _log.exception("an answer failed")
        yield (
            dataclasses.replace(shown, waiting=False, error="something went wrong; the log of the page says what"),
            served,
        )
    finally:
        visits.end(visitor, number)


def _longer(shown: Shown, piece: str, served: Served, question: Question) -> Shown:
    text = shown.text + piece
    found, _ = parse(text, shown.picture.size, served.source.loc_scale, question.prompt.labels)
    return dataclasses.replace(shown, text=text, objects=tuple(found), waiting=False)


def _whole(shown: Shown, finished: Finished, served: Served, question: Question) -> Shown:
    """The end of an answer: objects with scores and masks, and what is to be said about it."""
    output, prompt, options = finished.output, question.prompt, question.options
    found, dropped = served.objects(output, shown.picture.size, prompt.labels)
    limits = options.max_new_tokens, options.constrain
    notes = list(remarks(output, prompt, found, dropped, *limits, served.tokenizer))
    if any(item.codes and item.mask is None for item in found):
        notes.append("masks are not drawn: there is no mask decoder here")
    ended = {"finished": finished, "notes": tuple(notes), "waiting": False}
    return dataclasses.replace(shown, text=output.text, objects=tuple(found), dropped=tuple(dropped), **ended)


def at_full_size(finished: Finished, served: Served, question: Question) -> tuple[list[pj.Detection], list[str]]:
    """Objects in pixels of the question's own picture."""
    return served.objects(finished.output, question.picture.size, question.prompt.labels)
